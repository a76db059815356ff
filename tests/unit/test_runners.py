"""Which runner a model gets, and what is said if it cannot have the one that was asked for."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import onnx
import onnxruntime
import pytest

from tenuto.serving import runners
from tenuto.serving.graph_pool import GraphRunner
from tenuto.serving.manifest import METADATA_KEY, Manifest
from tenuto.serving.model_runner import CPU, CUDA, ModelRunner
from tenuto.serving.repository import ModelFolder
from tenuto.serving.runners import RunSettings, open_runner, reduced
from tenuto.serving.vetting import check
from tests import toys

GRAPH = RunSettings(CPU, 1, "graph")


def folder(root: Path, model: str) -> ModelFolder:
    made = {"doubler": toys.doubler, "accumulator": toys.accumulator}[model]()
    return ModelFolder(model, 1, toys.write(root, model, made))


@pytest.mark.parametrize(
    "model, settings, expected",
    [
        ("accumulator", RunSettings(CPU, 1), ModelRunner),
        ("accumulator", GRAPH, GraphRunner),
        ("doubler", GRAPH, ModelRunner),  # it has no state
    ],
)
def test_states_are_where_they_were_asked_for(
    tmp_path: Path, model: str, settings: RunSettings, expected: type[ModelRunner | GraphRunner]
) -> None:
    runner = open_runner(folder(tmp_path, model).read(), settings, max_sequences=3)
    assert type(runner) is expected
    assert (runner.pool is not None) == (expected is GraphRunner)
    runner.run(runner.zero_feeds())


def test_a_budget_of_bytes_bounds_the_graphs_pool(tmp_path: Path) -> None:
    runner = open_runner(folder(tmp_path, "accumulator").read(), GRAPH, max_sequences=10, max_bytes=12)
    assert runner.pool is not None
    assert (runner.pool.capacity, runner.pool.nbytes) == (1, 12)


def test_a_graph_that_cannot_keep_its_states_is_fed_them_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = folder(tmp_path, "accumulator")
    manifest = json.loads((one.path / "manifest.json").read_text())
    (one.path / "manifest.json").write_text(json.dumps(manifest | {"fixed_batch": 4, "max_batch": 4}))
    with caplog.at_level(logging.INFO):
        runner = open_runner(one.read(), GRAPH, max_sequences=3)
    assert type(runner) is ModelRunner
    assert (
        "accumulator/1: the states of 'accumulator' stay outside of its graph: its batch is fixed"
        in caplog.text
    )


def precise(root: Path, precision: str, golden: bool = False) -> ModelFolder:
    """The spoken-digits model with that precision, with its golden steps or without."""
    source = Path("exported/spoken-digits/1")
    path = root / "spoken-digits" / "1"
    path.mkdir(parents=True)
    manifest = json.loads((source / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"precision": precision}))
    for name in ("model.onnx", *(["golden.npz"] if golden else [])):
        (path / name).write_bytes((source / name).read_bytes())
    return ModelFolder("spoken-digits", 1, path)


@pytest.mark.parametrize("precision", ["float16", "tf32"])
def test_on_the_cpu_all_is_computed_in_float32_and_the_log_says_so(
    precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = precise(tmp_path, precision)
    with caplog.at_level(logging.INFO):
        runner = open_runner(one.read(), RunSettings(CPU, 1), max_sequences=3)
    assert f"spoken-digits/1: {precision} is for CUDA; on the CPU it is computed in float32" in caplog.text
    assert not any("tenuto.half" in node for node in runner.placement.nodes[CPU])
    assert not reduced(runner.manifest, RunSettings(CPU, 1))
    assert reduced(runner.manifest, RunSettings(CUDA, 1))


@pytest.mark.parametrize("pool", ["numpy", "graph"])
def test_where_float16_is_computed_with_either_pool_its_error_is_told_and_not_refused(
    pool: runners.PoolKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "CUDA", CPU)  # as if this were the device for it
    one, how = precise(tmp_path, "float16", golden=True), RunSettings(CPU, 1, pool)
    with ThreadPoolExecutor(1) as other:  # a check changes the floating-point environment of its thread
        verdict = other.submit(check, one, how).result()
    assert verdict.why == ""
    assert verdict.golden_steps > 0
    assert 0.01 < verdict.golden_worst < 0.1  # the tolerance is 0.01
    runner = open_runner(one.read(), how, max_sequences=3)
    assert any("tenuto.half" in node for node in runner.placement.nodes[CPU])


@pytest.mark.parametrize("inside", [False, True])
def test_tf32_is_asked_for_by_the_manifest_alone(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inside` the ONNX file or beside it: every session of CUDA says whether, since its default is yes."""
    asked: list[str] = []
    real = onnxruntime.InferenceSession

    def build(model: bytes, options: object, providers: list[object]) -> object:
        name, cuda = cast(tuple[str, dict[str, str]], providers[0])
        asked.append(cuda["use_tf32"])
        made = real(model, options, providers=[CPU])
        made.get_providers = lambda: [name]
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", build)
    for precision, expected in (("float32", "0"), ("tf32", "1")):
        model, fields = toys.accumulator()
        manifest = Manifest.model_validate(fields | {"precision": precision})
        if inside:
            proto = onnx.load_from_string(model)
            del proto.metadata_props[:]
            proto.metadata_props.add(key=METADATA_KEY, value=manifest.to_json())
            model = proto.SerializeToString()
        ModelRunner(model, None if inside else manifest, "toy/1", provider=CUDA, threads=1)
        assert asked.pop() == expected
