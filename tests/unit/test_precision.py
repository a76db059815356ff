"""Half the width where it pays: the answers stay near, what comes and goes is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tenuto.serving.errors import NotSupported
from tenuto.serving.precision import halved
from tests import toys

FLOAT, DOUBLE, HALF = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16
RNG = np.random.default_rng(3)
WEIGHTS: dict[str, NDArray[Any]] = {
    "w": RNG.standard_normal((1, 16, 3), np.float32),
    "r": RNG.standard_normal((1, 16, 4), np.float32) / 2,
    "p": RNG.standard_normal((4, 2), np.float32),
    "shared": np.array([0.1, 0.2], np.float32),
}


def network(
    *more: onnx.NodeProto,
    dtype: TensorProto.DataType = FLOAT,
    weights: dict[str, NDArray[Any]] = WEIGHTS,
) -> bytes:
    """x [time, batch, 3] through an LSTM, a product, a sum and a logarithm, to y [time, batch, 2]; c goes
    round."""
    value = toys.value
    nodes = [
        helper.make_node(
            "LSTM", ["x", "w", "r", "", "lengths", "", "c"], ["all", "", "c_next"], hidden_size=4
        ),
        helper.make_node("Squeeze", ["all", "one"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "p"], ["logits"]),
        helper.make_node("Add", ["logits", "shared"], ["sum"]),
        helper.make_node("LogSoftmax", ["sum"], ["y"], axis=-1),
        *more,
    ]
    as_numpy = np.float64 if dtype == DOUBLE else np.float32
    graph = helper.make_graph(
        nodes,
        "g",
        [
            value("x", dtype, "time", "batch", 3),
            value("lengths", TensorProto.INT32, "batch"),
            value("c", dtype, 1, "batch", 4),
        ],
        [value("y", dtype, "time", "batch", 2), value("c_next", dtype, 1, "batch", 4)],
        [numpy_helper.from_array(v.astype(as_numpy), k) for k, v in weights.items()]
        + [numpy_helper.from_array(np.array([1]), "one")],
    )
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def run(model: bytes) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((5, 2, 3), np.float32),
        "lengths": np.array([5, 3], np.int32),
        "c": rng.standard_normal((1, 2, 4), np.float32),
    }
    results: list[NDArray[Any]] = session.run(["y", "c_next"], feeds)
    return results


def test_a_halved_network_answers_nearly_the_same_in_the_same_dtypes() -> None:
    exact, half = run(network()), run(halved(network(), "toy/1"))
    for a, b in zip(exact, half, strict=True):
        assert b.dtype == np.float32
        gap = float(np.abs(a - b).max())
        assert 1e-6 < gap < 1e-2  # something was halved, and nothing lost


def test_products_and_layers_are_halved_with_their_weights_and_nothing_else_is() -> None:
    graph = onnx.load_from_string(halved(network(), "toy/1")).graph
    weights = {i.name: (i.data_type, list(i.dims)) for i in graph.initializer}
    halves = {name: dims for name, (dtype, dims) in weights.items() if dtype == HALF}
    assert sorted(halves.values()) == [[1, 16, 3], [1, 16, 4], [4, 2]]
    # The whole ones are gone; what an Add takes stays, and so does a length.
    assert {name for name, (dtype, _) in weights.items() if dtype != HALF} == {"shared", "one"}
    by_type = {node.op_type: node for node in graph.node}
    assert by_type["LSTM"].input[4] == "lengths"
    assert by_type["LSTM"].input[3] == ""
    assert "shared" in by_type["Add"].input
    assert by_type["LogSoftmax"].output == ["y"]
    assert len({node.name for node in graph.node if node.name}) == sum(bool(n.name) for n in graph.node)


def test_a_value_that_two_products_take_is_halved_once() -> None:
    other = helper.make_node("MatMul", ["hidden", "p"], ["again"])
    graph = onnx.load_from_string(halved(network(other), "toy/1")).graph
    assert sum(node.op_type == "Cast" and "hidden" in node.input for node in graph.node) == 1
    assert sum(i.data_type == HALF and list(i.dims) == [4, 2] for i in graph.initializer) == 1


def test_doubles_stay_doubles() -> None:
    with pytest.raises(
        NotSupported, match="toy/1: it has none of .* in float32, .* leave precision at float32"
    ):
        halved(network(dtype=DOUBLE), "toy/1")


@pytest.mark.parametrize("content", [b"", b"no model", toys.accumulator()[0]])
def test_what_cannot_be_halved_says_so(content: bytes) -> None:
    with pytest.raises(NotSupported, match="toy/1: "):
        halved(content, "toy/1")


@pytest.mark.parametrize("model", ["spoken-digits", "digits", "shakespeare", "oil-temperature"])
def test_the_models_of_this_repository_can_be_halved(model: str) -> None:
    content = (Path("exported") / model / "1/model.onnx").read_bytes()
    half = halved(content, model)
    assert len(half) < 0.6 * len(content)
    onnxruntime.InferenceSession(half, providers=["CPUExecutionProvider"])
    kept = onnx.load_from_string(half).metadata_props
    assert [p.key for p in kept] == [p.key for p in onnx.load_from_string(content).metadata_props]


def test_a_weight_that_half_the_width_cannot_hold_stays_whole() -> None:
    """It would become infinite, and an answer of zeros NaN."""
    large = dict(WEIGHTS, p=WEIGHTS["p"] * 1e6)
    half = onnx.load_from_string(halved(network(weights=large), "toy/1"))
    kept = {i.name: i.data_type for i in half.graph.initializer}
    assert kept["p"] == FLOAT
    assert sum(dtype == HALF for dtype in kept.values()) == 2
    assert all(np.isfinite(value).all() for value in run(half.SerializeToString()))


def test_a_weight_that_is_an_input_or_an_output_as_well_stays_one() -> None:
    proto = onnx.load_from_string(network())
    proto.graph.input.append(toys.value("w", FLOAT, 1, 16, 3))
    proto.graph.output.append(toys.value("p", FLOAT, 4, 2))
    half = halved(proto.SerializeToString(), "toy/1")
    run(half)
    names = {i.name for i in onnx.load_from_string(half).graph.initializer}
    assert {"w", "p"} <= names
