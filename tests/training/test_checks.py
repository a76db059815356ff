"""The checks before export find what they are for."""

from typing import Any

import numpy as np
import pytest

from tenuto.serving.manifest import METADATA_KEY, Manifest
from tenuto.training import checks
from tenuto.training.graph import Graph
from tenuto.training.stepper import Stepper, load, replay

from .toy_task import ToyTask

AXES: dict[str, Any] = {"dtype": "float32", "shape": ["batch", "time", 1], "time_axis": 1}
MANIFEST = Manifest.model_validate(
    {
        "format": 1,
        "name": "toy",
        "inputs": [{"name": "x", **AXES, "chunk": {"multiple": 2}, "lengths": "lengths"}],
        "states": [{"input": "s", "output": "s_next", "dtype": "float32", "shape": ["batch", 1]}],
        "outputs": [{"name": "y", **AXES}],
        "max_batch": 4,
        "max_frames": 3,
    }
)
NOISE = np.random.default_rng(0).standard_normal((200, 1)).astype(np.float32)


def _toy(operator: str) -> bytes:
    """y = x, or x minus its mean over whatever else is in the chunk; the state is x's last value."""
    graph = Graph("toy")
    graph.input("x", "float32", ["batch", "time", 1])
    graph.input("lengths", "int32", ["batch"])
    graph.input("s", "float32", ["batch", 1])
    if operator == "Identity":
        graph.node("Identity", ["x"], "y")
    else:
        graph.node("Sub", ["x", graph.node(operator, ["x"], "mean", axes=[1])], "y")
    ends = graph.node("Cast", ["lengths"], "ends", to=7)
    last = graph.node("Sub", [ends, graph.constant("one", 1, "int64")], "last")
    column = graph.node("Unsqueeze", [last, graph.integers(1)], "column")
    graph.node("GatherND", ["x", column], "s_next", batch_dims=1)
    graph.output("y", "float32", ["batch", "time", 1])
    graph.output("s_next", "float32", ["batch", 1])
    return graph.model({METADATA_KEY: MANIFEST.to_json()})


def test_a_model_that_is_the_same_in_any_chunking_passes() -> None:
    session, manifest = load(_toy("Identity"))
    assert checks.invariance(session, manifest, NOISE, trials=5) == 0.0


def test_a_model_that_depends_on_its_chunks_is_refused() -> None:
    session, manifest = load(_toy("ReduceMean"))
    with pytest.raises(checks.CheckFailed, match="toy: the same row differs by .* nothing was"):
        checks.invariance(session, manifest, NOISE, trials=5)


def test_the_stepper_keeps_what_fills_no_frame() -> None:
    stepper = Stepper(*load(_toy("Identity")))
    assert stepper.step(NOISE[:1]) == {}
    np.testing.assert_array_equal(stepper.step(NOISE[1:2])["y"], NOISE[:2])
    assert stepper.step(NOISE[:0]) == {}
    longer = stepper.step(NOISE[2:13])["y"]  # 11 samples: two turns of 6 and 4, and one that waits
    np.testing.assert_array_equal(longer, NOISE[2:12])


def test_replay_starts_a_new_sequence() -> None:
    session, manifest = load(_toy("Identity"))
    steps = replay(session, manifest, [NOISE[:3], NOISE[3:4]])
    np.testing.assert_array_equal(np.concatenate([s["y"] for s in steps]), NOISE[:4])


def test_half_the_width_is_measured_against_the_whole() -> None:
    task = ToyTask()
    candidate = task.candidate(task.network().eval(), 0)
    assert 1e-6 < checks.half(candidate.model, candidate.golden) < 1e-2
