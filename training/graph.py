"""Builds ONNX graphs by hand: every tensor named, the same bytes for the same weights.

Why not torch's exporters: the default one freezes the time axis of recurrent networks or unrolls
them, and neither can express the LSTM operator's `sequence_lens`, which ragged batches need.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

# What ONNX Runtime releases of the last years load; `onnx`'s own defaults are newer than that.
OPSET = 17
IR_VERSION = 8

Axes = Sequence[int | str]
Array = NDArray[np.float32]

_ELEMENT = {
    "float32": TensorProto.FLOAT,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


class Graph:
    """An ONNX graph under construction. Methods return tensor names, to be used as inputs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def input(self, name: str, dtype: str, shape: Axes) -> str:
        """Declare a graph input; strings in `shape` are axes of any length."""
        self._inputs.append(helper.make_tensor_value_info(name, _ELEMENT[dtype], shape))
        return name

    def output(self, name: str, dtype: str, shape: Axes) -> str:
        """Declare that the tensor called `name` is an output of the graph."""
        self._outputs.append(helper.make_tensor_value_info(name, _ELEMENT[dtype], shape))
        return name

    def constant(self, name: str, value: ArrayLike, dtype: str = "float32") -> str:
        """Store `value` in the file. The same name may be stored again with the same value."""
        tensor = numpy_helper.from_array(np.array(value, dtype, order="C"), name)
        if self._constants.setdefault(name, tensor) != tensor:
            raise ValueError(f"constant {name} has two values")
        return name

    def integers(self, *values: int) -> str:
        """Store a one-dimensional int64 constant, such as axes or a shape."""
        return self.constant("i64_" + "_".join(str(v) for v in values), values, "int64")

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output; the node carries the name of that output."""
        self.nodes(operator, inputs, [output], **attributes)
        return output

    def nodes(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Add a node with any number of outputs ("" for one that is not wanted)."""
        name = next(output for output in outputs if output)
        self._nodes.append(helper.make_node(operator, inputs, outputs, name, **attributes))

    def model(self, metadata: dict[str, str]) -> bytes:
        """Check the graph and return the ONNX file's bytes."""
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._constants.values())
        )
        model = helper.make_model(
            graph,
            producer_name="tenuto",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)


def add_lstm(
    graph: Graph,
    name: str,
    weights: dict[str, Array],
    inputs: str,
    lengths: str,
    state: tuple[str, str],
    state_next: tuple[str, str],
) -> str:
    """Add a one-layer LSTM with the `weights` of a `torch.nn.LSTM` (its state_dict as numpy).

    `inputs` is [time, batch, features], `lengths` int32 [batch], the states are [1, batch, hidden].
    Returns the hidden values, [time, batch, hidden]. Values beyond a row's length are zeros, and the
    new states are those at each row's own length.
    """
    return _recurrent(graph, "LSTM", name, weights, inputs, lengths, state, state_next)


def add_gru(
    graph: Graph,
    name: str,
    weights: dict[str, Array],
    inputs: str,
    lengths: str,
    state: str,
    state_next: str,
) -> str:
    """Add a one-layer GRU with the `weights` of a `torch.nn.GRU`; the rest as in `add_lstm`."""
    # torch resets after the recurrent product, which ONNX calls linear_before_reset.
    return _recurrent(
        graph, "GRU", name, weights, inputs, lengths, (state,), (state_next,), linear_before_reset=1
    )


def add_rnn(
    graph: Graph,
    name: str,
    weights: dict[str, Array],
    inputs: str,
    lengths: str,
    state: str,
    state_next: str,
) -> str:
    """Add a one-layer tanh RNN with the `weights` of a `torch.nn.RNN`; the rest as in `add_lstm`."""
    # ONNX Runtime's RNN multiplies a lone row by another routine than several: alone and in a batch a
    # sequence would differ by 1e-6 (measured; LSTM and GRU do not). So each row runs twice, and none
    # is ever alone.
    inputs, lengths, state = (
        graph.node("Concat", [value, value], f"{name}_{what}_twice", axis=axis)
        for what, value, axis in (("inputs", inputs, 1), ("lengths", lengths, 0), ("state", state, 1))
    )
    after = f"{name}_state_next_twice"
    hidden = _recurrent(graph, "RNN", name, weights, inputs, lengths, (state,), (after,))
    graph.nodes("Split", [after], [state_next, f"{name}_state_next_again"], axis=1)
    once = f"{name}_hidden_once"
    graph.nodes("Split", [hidden], [once, f"{name}_hidden_again"], axis=1)
    return once


def _recurrent(
    graph: Graph,
    operator: str,
    name: str,
    weights: dict[str, Array],
    inputs: str,
    lengths: str,
    state: Sequence[str],
    state_next: Sequence[str],
    **attributes: int,
) -> str:
    order = GATES[operator]
    w, r = (_gates(weights[key], order)[None] for key in ("weight_ih_l0", "weight_hh_l0"))
    bias = np.concatenate([_gates(weights[key], order) for key in ("bias_ih_l0", "bias_hh_l0")])[None]
    operands = [
        inputs,
        graph.constant(f"{name}_w", w),
        graph.constant(f"{name}_r", r),
        graph.constant(f"{name}_b", bias),
        lengths,
        *state,
    ]
    hidden = r.shape[-1]
    graph.nodes(operator, operands, [f"{name}_y", *state_next], hidden_size=hidden, **attributes)
    return graph.node("Squeeze", [f"{name}_y", graph.integers(1)], f"{name}_hidden")


# Where ONNX's gates are among torch's. LSTM: torch i, f, g, o; ONNX i, o, f, c (c is g). GRU: torch r, z, n;
# ONNX z, r, h (h is n).
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _gates(stacked: Array, order: Sequence[int]) -> Array:
    """Reorder the gates, which lie stacked along the first axis."""
    parts = np.split(stacked, len(order))
    return np.concatenate([parts[i] for i in order])
