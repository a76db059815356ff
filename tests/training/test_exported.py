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
from tenuto.training.stepper import load, replay

EXPORTED = Path(__file__).resolve().parents[2] / "exported"
# The test figure that each model has to reach: accuracies at least, errors at most.
GOALS = {
    "digits": 0.996,
    "digits-mlp": 0.987,
    "digits-rows": 0.990,
    "gestures": 0.97,  # to be 0.98: two strokes of 300 are missing
    "spoken-digits": 0.97,
    "oil-temperature": 0.45,
}
MOST_PARAMETERS = {
    "digits": 200_000,
    "digits-mlp": 250_000,
    "digits-rows": 100_000,
    "gestures": 20_000,
    "spoken-digits": 250_000,
    "oil-temperature": 100_000,
}
MODELS = list(GOALS)
FILES = ["MODEL_CARD.md", "golden.npz", "manifest.json", "metrics.json", "model.onnx"]
TYPES = {"tensor(float)": "float32", "tensor(int16)": "int16", "tensor(int32)": "int32"}

pytestmark = pytest.mark.parametrize("model", MODELS)


def _manifest(model: str) -> Manifest:
    path = EXPORTED / model / "1/manifest.json"
    return Manifest.parse(path.read_bytes(), str(path))


def _metrics(model: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((EXPORTED / model / "1/metrics.json").read_bytes())
    return metrics


def test_folder_is_complete(model: str) -> None:
    assert sorted(file.name for file in (EXPORTED / model / "1").iterdir()) == FILES
    assert f"`{model}`" in (EXPORTED / "LICENSES.md").read_text(encoding="utf-8")


def test_manifest_beside_the_file_is_the_one_inside(model: str) -> None:
    session, inside = load(EXPORTED / model / "1/model.onnx")
    assert inside == _manifest(model)
    assert inside.name == model
    graph = [
        [GraphTensor(t.name, TYPES[t.type], tuple(t.shape)) for t in tensors]
        for tensors in (session.get_inputs(), session.get_outputs())
    ]
    inside.check_graph(graph[0], graph[1], model)


def test_file_holds_no_more_than_the_model(model: str) -> None:
    proto = onnx.load(EXPORTED / model / "1/model.onnx")
    assert proto.opset_import[0].version == 17
    assert proto.ir_version <= 10
    assert [prop.key for prop in proto.metadata_props] == [METADATA_KEY]
    assert all(node.name and not node.doc_string for node in proto.graph.node)


def test_metrics_describe_this_file(model: str) -> None:
    metrics = _metrics(model)
    bytes_ = (EXPORTED / model / "1/model.onnx").read_bytes()
    assert metrics["model_sha256"] == checks.fingerprint(bytes_)
    assert metrics["checks"]["chunk_invariance_max_abs_error"] == 0.0
    assert metrics["checks"]["parity_max_abs_error"] <= metrics["checks"]["parity_tolerance"]
    assert metrics["training"]["data"]["sha256"]
    assert metrics["training"]["command"].startswith(f"tenuto train {model}")
    assert {"torch", "onnx", "onnxruntime", "numpy", "python"} <= metrics["versions"].keys()
    assert "/work" not in json.dumps(metrics)
    assert "/home" not in json.dumps(metrics)


def test_golden_steps_replay(model: str) -> None:
    session, manifest = load(EXPORTED / model / "1/model.onnx")
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
def test_any_batch_and_chunking_gives_the_same_bits(threads: int, model: str) -> None:
    session, manifest = load(EXPORTED / model / "1/model.onnx", threads)
    entry = manifest.inputs[0]
    rng = np.random.default_rng(7)
    noise = rng.standard_normal((2000, *entry.sample_shape))
    if entry.dtype == "int16":
        noise = rng.standard_normal(40000) * 3000
    source = noise.astype(entry.dtype)
    assert checks.invariance(session, manifest, source, trials=25) == 0.0


def test_answer_is_as_good_as_the_card_says(
    model: str, reachable: Callable[[Callable[[], Any]], Any]
) -> None:
    figures = reachable(lambda: evaluate.evaluate(EXPORTED / model / "1"))
    stated = _metrics(model)["test"]
    assert (figures["metric"], figures["n"]) == (stated["metric"], stated["n"])
    # Another CPU rounds otherwise; one image or recording may then fall on the other side.
    assert abs(figures["value"] - stated["value"]) <= 1.5 / figures["n"]
    if figures["metric"] == "mse":
        assert figures["value"] <= GOALS[model]
    else:
        assert figures["value"] >= GOALS[model]


def test_parameters_are_few(model: str) -> None:
    most = MOST_PARAMETERS[model]
    assert _metrics(model)["training"]["parameters"] <= most
    proto = onnx.load(EXPORTED / model / "1/model.onnx")
    stored = sum(int(np.prod(t.dims)) for t in proto.graph.initializer if t.data_type == 1)
    fixed = {"spoken-digits": 200 * 256 + 128 * 40}.get(model, 0)  # the front end, not trained
    assert stored - fixed <= most + 1000  # and means, deviations and other constants
