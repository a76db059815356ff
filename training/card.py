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
| {metric} on the test set | {value} (n = {n}) |
| test set | {test_set} |
| parameters | {parameters:,} |
| torch against ONNX, largest difference | {parity:.1e} |
| any chunking or batch against alone and whole | {invariance} (bit for bit, ONNX Runtime CPU) |

The figures are of this `model.onnx`; `metrics.json` has them all, with seed, thread count, versions
and data checksums. The test set took no part in any choice.

## Repeat

    {command}

The same command on the same machine with the same versions gives the same bytes.

## Data and licence

Trained on {data_name} ({data_licence}). These weights are offered under {licence};
`exported/LICENSES.md` says why. No data is in this folder: `golden.npz` is synthetic.
"""


def card(manifest: Manifest, metrics: Mapping[str, Any], words: str) -> str:
    """Return the card's text; `words` says what the model is for, and where it fails."""
    test, training, checks = metrics["test"], metrics["training"], metrics["checks"]
    return TEMPLATE.format(
        licence=manifest.licence,
        name=manifest.name,
        description=manifest.description,
        words=words.strip(),
        metric=test["metric"],
        value=f"{test['value']:.2%}" if test["metric"] == "accuracy" else f"{test['value']:.4f}",
        n=f"{test['n']:,}",
        test_set=test["test_set"],
        parameters=training["parameters"],
        parity=checks["parity_max_abs_error"],
        invariance=f"{checks['chunk_invariance_max_abs_error']:g}",
        command=training["command"],
        data_name=training["data"]["name"],
        data_licence=training["data"]["licence"],
    )
