"""Which runner a model gets, and what is said if it cannot have the one that was asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tenuto.serving import runners
from tenuto.serving.errors import PlatformError
from tenuto.serving.graph_pool import GraphRunner
from tenuto.serving.model_runner import CPU, ModelRunner
from tenuto.serving.repository import ModelFolder
from tenuto.serving.runners import RunSettings, open_runner
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
    assert (runner.pool.capacity, runner.pool.nbytes) == (2, 12)


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


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "find_spec", lambda _: None)
    with pytest.raises(PlatformError, match="needs the package onnx; install 'tenuto\\[gpu\\]'"):
        open_runner(folder(tmp_path, "accumulator").read(), GRAPH, max_sequences=3)
