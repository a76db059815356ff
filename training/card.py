"""Writes MODEL_CARD.md from a manifest, the metrics and a recipe's own words."""

from collections.abc import Mapping
from typing import Any

from tenuto.serving.manifest import Manifest

TEMPLATE = """---
license: {licence}
datasets: [{data_name}]
library_name: onnx
---
# {name}

{description}

{words}

## Measured

| | |
|---|---|
{rows}

The figures are of this `model.onnx`, but for other seeds and variants, which were trained, exported and
measured in the same way; `metrics.json` has them all, with recipe, thread count, versions, git revision and
data checksums. Epochs are chosen by the validation part alone; `docs/decisions.md` says how the recipe was
found, and where a test set was looked at on the way.

## Repeat

    {command}

The same command on the same machine with the same versions gives the same bytes.

## Data and licence

Trained on {data_name} ({data_licence}). These weights are offered under {licence};
`exported/LICENSES.md` says why. No data is in this folder: `golden.npz` is synthetic.
"""


def card(manifest: Manifest, metrics: Mapping[str, Any], words: str) -> str:
    """Return the card's text; `words` says what the model is for, and where it fails."""
    training = metrics["training"]
    return TEMPLATE.format(
        licence=manifest.licence,
        name=manifest.name,
        description=manifest.description,
        words=words.strip(),
        rows="\n".join(f"| {name} | {value} |" for name, value in _rows(metrics).items()),
        command=training["command"],
        data_name=training["data"]["name"],
        data_licence=training["data"]["licence"],
    )


def _rows(metrics: Mapping[str, Any]) -> dict[str, str]:
    test, training, checks = metrics["test"], metrics["training"], metrics["checks"]
    metric = test["metric"]
    rows = {f"{metric} on the test set": f"{_figure(metric, test['value'])} (n = {test['n']:,})"}
    for age, one in test.get("ages", {}).items():
        rate = _figure(metric, one[metric.replace(" ", "_")])
        rows[f"{metric} of streams that are {age} old"] = f"{rate} ± {one['standard_error']:.4f}"
    seeds = metrics["seeds"]
    if len(seeds["values"]) > 1:
        spread = f"{_figure(metric, seeds['mean'])} ± {_figure(metric, seeds['standard_deviation'])}"
        rows[f"mean and standard deviation over {len(seeds['values'])} seeds"] = spread
    for label, one in metrics.get("variants", {}).items():
        value = one if label == "mean" else one["value"]
        rows["mean of these" if label == "mean" else label] = _figure(metric, value)
    for label, one in metrics.get("baselines", {}).items():
        rows[f"beside it: {label}"] = _figure(one["metric"], one["value"])
    invariance = checks["chunk_invariance_max_abs_error"]
    rows |= {
        "test set": test["test_set"],
        "split": training["data"]["split"],
        "parameters": f"{training['parameters']:,}",
        "training, CPU seconds": f"{training['cpu_seconds']:.0f} ({training['threads']} thread)",
        "torch against ONNX, largest difference": f"{checks['parity_max_abs_error']:.1e}",
        "any chunking or batch against alone and whole": f"{invariance:g} (bit for bit, ONNX Runtime CPU)",
    }
    if "float16_max_abs_error" in checks:
        half = checks["float16_max_abs_error"]
        rows["`precision` float16 against float32"] = (
            f"{half:.1e} at most over the golden steps (rounded as on a GPU, computed on a CPU)"
        )
    return rows


def _figure(metric: str, value: float) -> str:
    return f"{value:.2%}" if metric == "accuracy" else f"{value:.4f}"
