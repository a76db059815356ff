"""What a manifest says of its graph's runs is tried: shapes for a row and for two, the same answer twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tenuto.serving.errors import ModelInvalid, RunFailed
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU, CUDA, ModelRunner
from tenuto.serving.proof import prove
from tests import toys
from tests.toys import FLOAT, INT64, value

Fields = dict[str, Any]


def proven(made: tuple[bytes, Fields]) -> None:
    runner = ModelRunner(made[0], Manifest.model_validate(made[1]), "toy/1", provider=CPU, threads=1)
    prove(runner, made[0])


def refusal(made: tuple[bytes, Fields]) -> str:
    with pytest.raises(ModelInvalid) as raised:
        proven(made)
    return str(raised.value)


@pytest.mark.parametrize(
    "made",
    [
        toys.accumulator(),
        toys.accumulator(ragged=False, name="without-lengths"),
        toys.doubler(),
        toys.brightness(),
        toys.lookup(),
        toys.explosive(),
        toys.gain(),
        toys.spinner(),
        toys.speaker(),
        toys.player(),
        toys.reader(),
    ],
    ids=lambda made: made[1]["name"],
)
def test_what_tells_the_truth_passes(made: tuple[bytes, Fields]) -> None:
    proven(made)


# Shapes. The graphs declare what the manifests say, so that no comparison of declarations finds anything.


def undeclared(made: tuple[bytes, Fields], *names: str) -> tuple[bytes, Fields]:
    """The graph without the shapes of these outputs, so that they are found out by running it alone."""
    proto = onnx.load_model_from_string(made[0])
    for output in proto.graph.output:
        if output.name in names:
            output.type.tensor_type.ClearField("shape")
    return bytes(proto.SerializeToString()), made[1]


def changed(made: tuple[bytes, Fields], group: str, **fields: Any) -> tuple[bytes, Fields]:
    """The first input, state or output of the manifest says something else."""
    first, *others = made[1][group]
    return made[0], made[1] | {group: [first | fields, *others]}


def test_an_output_of_another_length_is_refused_with_both() -> None:
    made = changed(undeclared(toys.doubler(), "y"), "outputs", shape=["batch", 3])
    assert refusal(made) == (
        "toy/1: a run of 1 rows and 1 frames does not give what the manifest says:\n"
        "  output 'y' is [1, 2], expected [1, 3]"
    )


def test_an_output_of_another_rank_is_refused() -> None:
    made = changed(undeclared(toys.doubler(), "y"), "outputs", shape=["batch", 2, 1])
    assert "output 'y' is [1, 2], expected [1, 2, 1]" in refusal(made)


def one_row(width: int) -> tuple[bytes, Fields]:
    """y = 2 x in a single row, whatever comes; of -1 numbers: of as many as it needs."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Reshape", ["twice", "one_row"], ["y"]),
    ]
    ends = [value("x", FLOAT, "batch", 2)], [value("y", FLOAT, "batch", "all")]
    return toys.model(nodes, *ends, {"one_row": np.array([1, width])}), toys.doubler()[1]


def test_rows_that_do_not_stay_rows_are_found_by_two_of_them() -> None:
    assert "a run of 2 rows and 1 frames" in (text := refusal(one_row(-1)))
    assert "output 'y' is [1, 4], expected [2, 2]" in text


def test_a_graph_that_takes_one_row_alone_is_told_what_its_manifest_should_say() -> None:
    made, manifest = one_row(2)
    text = refusal((made, manifest))
    assert "of 2 rows and 1 frames, which the manifest allows" in text
    assert text.endswith('the manifest needs "fixed_batch": 1')
    proven((made, manifest | {"max_batch": 1}))


def test_frames_that_do_not_become_frames_are_found_by_two_of_them() -> None:
    """y has as many frames as x has samples, of which the manifest says that two make one."""
    made = toys.accumulator(ragged=False, x={"chunk": {"multiple": 2}})
    made[1]["outputs"][0]["stride"] = 2
    assert "output 'y' is [1, 2], expected [1, 1]" in refusal(made)
    made[1]["outputs"][0]["stride"] = 1
    proven(made)


def one_frame() -> tuple[bytes, Fields]:
    """The accumulator, whose graph gives the last frame alone."""
    made, manifest = toys.accumulator(ragged=False)
    proto = onnx.load_model_from_string(made)
    proto.graph.node[3].output[0] = "all_y"
    proto.graph.node.append(helper.make_node("Slice", ["all_y", "last", "to", "axes"], ["y"]))
    return bytes(proto.SerializeToString()), manifest


def test_one_frame_of_several_is_refused_unless_they_come_one_by_one() -> None:
    made, manifest = one_frame()
    assert "a run of 1 rows and 2 frames" in (text := refusal((made, manifest)))
    assert "output 'y' is [1, 1], expected [1, 2]" in text
    proven((made, manifest | {"max_frames": 1}))


def test_a_state_that_grows_is_refused() -> None:
    """What comes out is twice what goes in."""
    made, manifest = toys.explosive()
    proto = onnx.load_model_from_string(made)
    proto.graph.node[0].output[0] = "once"
    proto.graph.node.append(helper.make_node("Concat", ["once", "once"], ["state_next"], axis=1))
    text = refusal(undeclared((proto.SerializeToString(), manifest), "state_next", "y"))
    assert "state 'state_next', the next 'state', is [1, 2], expected [1, 1]" in text


def test_a_run_that_fails_on_zeros_says_so() -> None:
    made = toys.lookup(checked=False)
    made[1]["inputs"][0]["range"] = [9, 9]
    with pytest.raises(RunFailed):
        proven(made)


# The same answer twice.


def noisy(operator: str, inputs: list[str], **attributes: Any) -> tuple[bytes, Fields]:
    """y = x, and something that the operator makes of it."""
    nodes = [
        helper.make_node(operator, inputs, ["noise"], **attributes),
        helper.make_node("Cast", ["noise"], ["number"], to=FLOAT),
        helper.make_node("Add", ["x", "number"], ["y"]),
    ]
    constants = {"half": np.float32(0.5), "train": np.bool_(True), "odds": np.zeros((1, 7), np.float32)}
    ins, outs = [value("x", FLOAT, "batch", 16)], [value("y", FLOAT, "batch", 16)]
    manifest = {
        "format": 1,
        "name": "noisy",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 16]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 16]}],
    }
    return toys.model(nodes, ins, outs, constants), manifest


NOISE: dict[str, tuple[bytes, Fields]] = {
    "RandomNormalLike": noisy("RandomNormalLike", ["x"]),
    "RandomNormal": noisy("RandomNormal", [], shape=[1, 16]),
    "RandomUniformLike": noisy("RandomUniformLike", ["x"], seed=1.0),  # a seed is for the session
    "RandomUniform": noisy("RandomUniform", [], shape=[16]),
    "Dropout": noisy("Dropout", ["x", "half", "train"]),
    "Multinomial": noisy("Multinomial", ["odds"], sample_size=16),
}


@pytest.mark.parametrize("operator", NOISE)
def test_what_draws_numbers_is_refused_by_its_name(operator: str) -> None:
    text = refusal(NOISE[operator])
    assert "run twice on the same numbers, it answers otherwise (step 1, 'y')" in text
    assert f"It draws numbers by {operator}; export it for inference" in text


def test_a_branch_is_looked_at_as_well() -> None:
    def branch(name: str) -> Any:
        z = [value(f"z_{name}", FLOAT, "batch", 2)]
        nodes = [
            helper.make_node("RandomNormalLike", ["x"], [f"n_{name}"]),
            helper.make_node("Add", ["x", f"n_{name}"], [f"z_{name}"]),
        ]
        return helper.make_graph(nodes, name, [], z)

    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    ends = [value(name, FLOAT, "batch", 2) for name in "xy"]
    made = toys.model([node], ends[:1], ends[1:], {"yes": np.bool_(True)})
    assert "RandomNormalLike" in refusal((made, toys.doubler()[1]))


def test_what_could_draw_and_does_not_passes() -> None:
    proven(noisy("Dropout", ["x", "half"]))  # for inference
    proven(noisy("RandomUniformLike", ["x"], low=0.0, high=0.0))


class Drifting:
    """A graph whose sums come in any order: its answers differ in their last bits."""

    def __init__(self, off: float, provider: str) -> None:
        self.manifest = Manifest.model_validate(toys.doubler()[1])
        self.where, self.provider, self._off, self._runs = "toy/1", provider, off, 0

    def zero_feeds(self) -> dict[str, Any]:
        return {"x": np.zeros((1, 2), np.float32)}

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        self._runs += 1
        return [2 * feeds["x"] + np.float32(self._off * self._runs)]


def test_on_cuda_the_last_bits_may_differ_and_no_more() -> None:
    prove(Drifting(1e-6, CUDA), b"")  # type: ignore[arg-type]
    for off, provider in ((1e-6, CPU), (0.01, CUDA)):
        with pytest.raises(ModelInvalid, match="run twice .* report this to whoever made"):
            prove(Drifting(off, provider), b"")  # type: ignore[arg-type]


def test_what_numbers_of_our_own_would_break_is_run_on_zeros() -> None:
    """Its table has one row, and nothing says so."""
    nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
    ends = [value("x", INT64, "batch", 1)], [value("y", FLOAT, "batch", 1)]
    manifest = {
        "format": 1,
        "name": "narrow",
        "inputs": [{"name": "x", "dtype": "int64", "shape": ["batch", 1]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 1]}],
    }
    proven((toys.model(nodes, *ends, {"table": np.zeros(1, np.float32)}), manifest))
