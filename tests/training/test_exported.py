"""The exported folders: complete, true to their manifests, exact in any batch, and accurate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tenuto.serving.manifest import METADATA_KEY, GraphTensor, Manifest
from tenuto.training import checks, evaluate
from tenuto.training.candidate import AnyArray
from tenuto.training.stepper import load, replay

EXPORTED = Path(__file__).resolve().parents[2] / "exported"
# The worst test figure that the exported seed may have, and the most parameters.
LIMITS = {
    "digits": (0.996, 200_000),
    "digits-mlp": (0.987, 250_000),
    "digits-rows": (0.990, 100_000),
    "gestures": (0.97, 20_000),  # to be 0.98
    "spoken-digits": (0.97, 250_000),
    "spoken-digits-rnn": (0.9, 60_000),
    "digit-strings": (0.04, 250_000),
    "oil-temperature": (0.39, 100_000),
    "shakespeare": (1.5, 2_000_000),
    "chorales": (8.45, 500_000),
    "sentiment": (0.78, 1_000_000),
}
MODELS = list(LIMITS)
EAR = 200 * 256 + 128 * 40  # constants of the models that listen, not trained
LISTEN = ("spoken-digits", "spoken-digits-rnn", "digit-strings")
NOT_PASSED_ON = {"sentiment"}  # their data is for research use: recipe, card and figures are here alone
FILES = ["MODEL_CARD.md", "golden.npz", "manifest.json", "metrics.json", "model.onnx"]
BYTES = ("golden.npz", "model.onnx")
TYPES = {
    "tensor(float)": "float32",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}

pytestmark = pytest.mark.parametrize("model", MODELS)


def _folder(model: str) -> Path:
    return EXPORTED / "not-passed-on" / model if model in NOT_PASSED_ON else EXPORTED / model / "1"


def _manifest(model: str) -> Manifest:
    path = _folder(model) / "manifest.json"
    return Manifest.parse(path.read_bytes(), str(path))


def _metrics(model: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((_folder(model) / "metrics.json").read_bytes())
    return metrics


@pytest.fixture
def file(model: str) -> Path:
    """The model's ONNX file; skip where it may not be passed on and was not made here."""
    path = EXPORTED / model / "1/model.onnx"
    if model in NOT_PASSED_ON and not path.exists():
        pytest.skip(f"{model} is not passed on; make it with: tenuto train {model}")
    return path


def test_folder_is_complete(model: str) -> None:
    found = sorted(file.name for file in _folder(model).iterdir())
    assert found == [name for name in FILES if model not in NOT_PASSED_ON or name not in BYTES]
    assert f"`{model}`" in (EXPORTED / "LICENSES.md").read_text(encoding="utf-8")


def test_manifest_beside_the_file_is_the_one_inside(model: str, file: Path) -> None:
    session, inside = load(file)
    assert inside == _manifest(model)
    assert inside.name == model
    graph = [
        [GraphTensor(t.name, TYPES[t.type], tuple(t.shape)) for t in tensors]
        for tensors in (session.get_inputs(), session.get_outputs())
    ]
    inside.check_graph(graph[0], graph[1], model)


def test_file_holds_no_more_than_the_model(model: str, file: Path) -> None:
    proto = onnx.load(file)
    assert proto.opset_import[0].version == 17
    assert proto.ir_version <= 10
    assert [prop.key for prop in proto.metadata_props] == [METADATA_KEY]
    assert all(node.name and not node.doc_string for node in proto.graph.node)


def test_metrics_are_of_this_file(model: str, file: Path) -> None:
    assert _metrics(model)["model_sha256"] == checks.fingerprint(file.read_bytes())


def test_metrics_say_how_it_was_made(model: str) -> None:
    metrics = _metrics(model)
    assert metrics["checks"]["chunk_invariance_max_abs_error"] == 0.0
    assert metrics["checks"]["parity_max_abs_error"] <= metrics["checks"]["parity_tolerance"]
    assert metrics["training"]["data"]["sha256"]
    assert metrics["training"]["command"].startswith(f"tenuto train {model}")
    assert {"torch", "onnx", "onnxruntime", "numpy", "python"} <= metrics["versions"].keys()
    assert not metrics["git_revision"].endswith("-dirty")
    assert "/work" not in json.dumps(metrics)
    assert "/home" not in json.dumps(metrics)


def test_card_says_what_the_metrics_say(model: str) -> None:
    pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")
    from tenuto.training import tasks
    from tenuto.training.card import card

    written = (_folder(model) / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert written == card(_manifest(model), _metrics(model), tasks.find(model).card)


def test_all_models_together_take_two_cpu_hours_at_most(model: str) -> None:
    training = _metrics(model)["training"]
    assert training["cpu_seconds"] <= 15 * 60
    if model == MODELS[0]:
        seconds = [_metrics(one)["training"]["cpu_seconds_with_other_seeds_and_variants"] for one in MODELS]
        assert sum(seconds) <= 2 * 3600


def test_golden_steps_replay(model: str, file: Path) -> None:
    session, manifest = load(file)
    with np.load(EXPORTED / model / "1/golden.npz") as golden:
        name = manifest.inputs[0].name
        steps = len([key for key in golden.files if ".in." in key])
        assert steps >= 1
        chunks = [golden[f"{step}.in.{name}"] for step in range(1, steps + 1)]
        tolerance = float(golden["tolerance"])
        seen = {"tolerance"} | {f"{step}.in.{name}" for step in range(1, steps + 1)}
        for step, outputs in enumerate(replay(session, manifest, chunks), start=1):
            for output, value in outputs.items():
                key = f"{step}.out.{output}"
                seen.add(key)
                np.testing.assert_allclose(value, golden[key], rtol=0, atol=tolerance)
        assert seen == set(golden.files)  # and so a step that completes no frame has no outputs


@pytest.mark.parametrize("threads", [1, 2])
def test_any_batch_and_chunking_gives_the_same_bits(threads: int, file: Path) -> None:
    session, manifest = load(file, threads)
    entry = manifest.inputs[0]
    rng = np.random.default_rng(7)
    noise: AnyArray = rng.standard_normal((2000, *entry.sample_shape))
    if entry.dtype == "int16":
        noise = rng.standard_normal(40000) * 3000
    if entry.range is not None:
        noise = rng.integers(entry.range[0], entry.range[1] + 1, 2000)
    source = noise.astype(entry.dtype)
    assert checks.invariance(session, manifest, source, trials=25) == 0.0


def test_answer_is_as_good_as_the_card_says(
    model: str, file: Path, reachable: Callable[[Callable[[], Any]], Any]
) -> None:
    figures = reachable(lambda: evaluate.evaluate(file.parent))
    stated = _metrics(model)["test"]
    assert (figures["metric"], figures["n"]) == (stated["metric"], stated["n"])
    # Another CPU rounds otherwise; one image or recording may then fall on the other side.
    assert abs(figures["value"] - stated["value"]) <= max(1.5 / figures["n"], 1e-4)


def test_stated_figure_is_within_its_limit(model: str) -> None:
    test, (limit, _) = _metrics(model)["test"], LIMITS[model]
    if test["metric"] == "accuracy":
        assert test["value"] >= limit
    else:
        assert test["value"] <= limit


def test_parameters_are_few(model: str) -> None:
    assert _metrics(model)["training"]["parameters"] <= LIMITS[model][1]


def test_file_has_no_other_numbers(model: str, file: Path) -> None:
    # What is not trained: a front end, means and deviations, counts of words.
    fixed = {"sentiment": 2**17 + 2**20, **dict.fromkeys(LISTEN, EAR)}.get(model, 0)
    stored = sum(int(np.prod(t.dims)) for t in onnx.load(file).graph.initializer if t.data_type == 1)
    assert stored - fixed <= LIMITS[model][1] + 1000


def test_what_float16_costs_is_what_the_metrics_say(model: str, file: Path) -> None:
    """To a factor of two, for another CPU's rounding."""
    with np.load(EXPORTED / model / "1/golden.npz") as golden:
        name = _manifest(model).inputs[0].name
        steps = sum(".in." in key for key in golden.files)
        chunks = [golden[f"{step}.in.{name}"] for step in range(1, steps + 1)]
    stated = _metrics(model)["checks"]["float16_max_abs_error"]
    assert stated / 2 <= checks.half(file.read_bytes(), chunks) <= stated * 2
