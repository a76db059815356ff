"""A model's graph, extended so that it reads and writes the state pool itself.

Gather(pool, slots) takes the place of a state's input, ScatterND(pool, slots) that of its output. If input
and output of the pool are one buffer, the state never leaves the device that the graph runs on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import ArrayLike
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .errors import NotSupported
from .manifest import Manifest, State

_PREFIX = "tenuto."  # of all names that are added
SLOTS = f"{_PREFIX}slots"  # int64 [rows], the slot of each row; it is read, and written unless it is fresh
FINITE = f"{_PREFIX}finite"  # float32 [rows, 1]: NaN for a row with a state that is not finite, else 0
_LEAST_OPSET = 11  # ScatterND
_OPSET = 17  # of the pool's own graphs
_FLOATS = ("float16", "float32", "float64")


def pool_input(state: State) -> str:
    """The graph's input for the whole pool of that state."""
    return f"{_PREFIX}pool.{state.input}"


def pool_output(state: State) -> str:
    """The pool after the run."""
    return f"{_PREFIX}pool.{state.output}.after"


def extend(model: bytes, manifest: Manifest, *, dump: int, fresh: int) -> bytes:
    """The model with its states' inputs and outputs replaced by `SLOTS`, the pools, and `FINITE`. What was
    read from the slot `fresh` is written to `dump`.

    A run that fails has written no state: what writes comes after everything else.

    Raises: NotSupported where that cannot be done, with the reason.
    """
    try:
        proto = onnx.load_from_string(model)
    except DecodeError as error:  # ONNX Runtime has a format of its own, which it loads as well
        raise NotSupported(
            f"the states of {manifest.name!r} stay outside of its graph: no ONNX file"
        ) from error
    reason = obstacle(proto, manifest)
    if reason:
        raise NotSupported(f"the states of {manifest.name!r} stay outside of its graph: {reason}")
    graph, states = proto.graph, manifest.states
    own, wanted = {s.input for s in states}, list(manifest.fetched)
    inputs = [tensor for tensor in graph.input if tensor.name not in own]
    inputs += [_info(SLOTS, TensorProto.INT64, ["rows"]), *(_pool(s, pool_input(s)) for s in states)]
    outputs = [tensor for tensor in graph.output if tensor.name in wanted]
    outputs += [_info(FINITE, TensorProto.FLOAT, ["rows", 1]), *(_pool(s, pool_output(s)) for s in states)]
    before = [
        helper.make_node("Gather", [pool_input(s), SLOTS], [s.input], axis=s.batch_axis) for s in states
    ]
    behind = _Nodes(graph)
    _add_flags(behind, states)
    slots = _add_written(behind, dump, fresh)
    slots = _add_slots_after(behind, slots, [*wanted, FINITE], states)
    for state in states:
        _add_scatter(behind, state, _rows(state), slots)
    nodes = [*before, *graph.node, *behind.nodes]
    for field, values in ((graph.input, inputs), (graph.output, outputs), (graph.node, nodes)):
        _replace(field, values)
    return bytes(proto.SerializeToString())


def pool_writer(states: tuple[State, ...]) -> bytes:
    """A graph that puts rows, named as the states' outputs, into the slots `SLOTS` of the pools."""
    graph = _empty()
    for state in states:
        rows = ["rows" if a == state.batch_axis else d for a, d in enumerate(state.shape)]
        graph.input.append(_info(state.output, _element(state), rows))
        graph.output.append(_pool(state, pool_output(state)))
    added = _Nodes(graph)
    for state in states:
        _add_scatter(added, state, state.output, SLOTS)
    return _whole(graph, added.nodes, states)


def pool_reader(states: tuple[State, ...]) -> bytes:
    """A graph that gives the rows in the slots `SLOTS` of the pools, named as the states' inputs."""
    graph, nodes = _empty(), []
    for state in states:
        rows = ["rows" if a == state.batch_axis else d for a, d in enumerate(state.shape)]
        graph.output.append(_info(state.input, _element(state), rows))
        nodes.append(
            helper.make_node("Gather", [pool_input(state), SLOTS], [state.input], axis=state.batch_axis)
        )
    return _whole(graph, nodes, states)


def _empty() -> GraphProto:
    graph = GraphProto(name="pool")
    graph.input.append(_info(SLOTS, TensorProto.INT64, ["rows"]))
    return graph


def _whole(graph: GraphProto, nodes: list[NodeProto], states: tuple[State, ...]) -> bytes:
    graph.input.extend(_pool(s, pool_input(s)) for s in states)
    graph.node.extend(nodes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
    return bytes(model.SerializeToString())


def obstacle(proto: ModelProto, manifest: Manifest) -> str:
    """Why the graph cannot be extended; empty if it can."""
    graph = proto.graph
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    known = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    names = known | {name for node in graph.node for name in (*node.input, *node.output)}
    if opset < _LEAST_OPSET:
        return f"opset {opset}, and ScatterND came with {_LEAST_OPSET}"
    if any(t.data_location == TensorProto.EXTERNAL for t in graph.initializer):
        return "its weights lie in other files"
    if manifest.fixed_batch is not None or manifest.alone:
        return "its batch is fixed"
    if any(name.startswith(_PREFIX) for name in names):
        return f"it has names that begin with {_PREFIX!r}"
    for state in manifest.states:
        if state.batch_axis not in (0, 1):
            return f"{state.input} has its rows in axis {state.batch_axis}"
        if state.finite and np.dtype(state.dtype).kind == "f" and state.dtype not in _FLOATS:
            return f"{state.input} is {state.dtype}"
        if state.output in known:
            return f"{state.output} is no node's output"
        if state.input in {t.name for t in graph.initializer}:
            return f"{state.input} has a value of its own"
    return ""


_info = helper.make_tensor_value_info


def _pool(state: State, name: str) -> onnx.ValueInfoProto:
    shape = ["slots" if a == state.batch_axis else d for a, d in enumerate(state.shape)]
    return _info(name, _element(state), shape)


def _element(state: State) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(state.dtype)))


def _replace(field: Any, values: list[Any]) -> None:
    """Of a repeated field. The values may be its own."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)


class _Nodes:
    """Nodes that are added behind a graph's own, and constants."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: list[NodeProto] = []
        self._constants = graph.initializer
        self._known: set[str] = set()

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: ArrayLike, dtype: str = "int64") -> str:
        """The same name means the same value."""
        name = f"{_PREFIX}{name}"
        if name not in self._known:
            self._known.add(name)
            self._constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name


def _add_flags(graph: _Nodes, states: tuple[State, ...]) -> None:
    """FINITE: x - x is 0, but NaN for NaN and Inf; a product with ones adds up each row."""
    total = graph.add("Sub", [SLOTS, SLOTS], f"{_PREFIX}no_slots")
    total = graph.add("Cast", [total], f"{_PREFIX}no_flags", to=TensorProto.FLOAT)
    total = graph.add("Reshape", [total, graph.constant("column", [-1, 1])], f"{_PREFIX}flags")
    for state in states:
        if not state.finite or np.dtype(state.dtype).kind != "f":
            continue
        name, size = f"{_PREFIX}{state.output}", math.prod(state.slot_shape)
        rows_first = [state.batch_axis, *(a for a in range(len(state.shape)) if a != state.batch_axis)]
        ones = graph.constant(f"ones.{size}", np.ones((size, 1)), "float32")
        value = graph.add("Sub", [state.output, state.output], f"{name}.zero")
        value = graph.add("Cast", [value], f"{name}.float", to=TensorProto.FLOAT)
        value = graph.add("Transpose", [value], f"{name}.by_row", perm=rows_first)
        value = graph.add("Reshape", [value, graph.constant(f"rows.{size}", [-1, size])], f"{name}.flat")
        value = graph.add("MatMul", [value, ones], f"{name}.sum")
        total = graph.add("Add", [total, value], f"{name}.flags")
    graph.add("Identity", [total], FINITE)


def _add_written(graph: _Nodes, dump: int, fresh: int) -> str:
    """The slots that are written: `dump` instead of `fresh`."""
    value = graph.add("Equal", [SLOTS, graph.constant("fresh", fresh)], f"{_PREFIX}is_fresh")
    value = graph.add("Cast", [value], f"{_PREFIX}fresh_number", to=TensorProto.INT64)
    value = graph.add("Mul", [value, graph.constant("back", fresh - dump)], f"{_PREFIX}moved")
    return graph.add("Sub", [SLOTS, value], f"{_PREFIX}written")


def _add_slots_after(graph: _Nodes, slots: str, names: list[str], states: tuple[State, ...]) -> str:
    """The slots again, in a tensor that is there only once all of `names` and all new states are.

    Nothing is added to them, but that nothing is made of the tensors' sizes; and they are given the number of
    each state's rows as their shape, which fails where that is another number. So nothing is written before
    all that is to be written has its shape.
    """
    nothing, total = graph.constant("nothing", 0), slots
    for number, name in enumerate(names):
        own = f"{_PREFIX}after.{number}"
        value = graph.add("Size", [name], f"{own}.size")
        value = graph.add("Mul", [value, nothing], f"{own}.nothing")
        total = graph.add("Add", [total, value], own)
    for state in states:
        name = _rows(state)
        shape = [-1 if axis == state.batch_axis else d for axis, d in enumerate(state.shape)]
        graph.add("Reshape", [state.output, graph.constant(f"shape.{state.output}", shape)], name)
        value = graph.add("Shape", [name], f"{name}.shape")
        place = graph.constant(f"axis.{state.batch_axis}", [state.batch_axis or 0])
        value = graph.add("Gather", [value, place], f"{name}.number", axis=0)
        total = graph.add("Reshape", [total, value], f"{name}.slots_after")
    return total


def _rows(state: State) -> str:
    """The new state, in the shape that its slots have."""
    return f"{_PREFIX}{state.output}.rows"


def _add_scatter(graph: _Nodes, state: State, rows: str, slots: str) -> None:
    """The pool with new rows in their slots."""
    name = f"{_PREFIX}{state.output}.place"
    if state.batch_axis == 0:
        place = graph.add("Reshape", [slots, graph.constant("column", [-1, 1])], name)
    else:  # (its place in the first axis, slot) of each part of a row
        first = int(state.shape[0] or 0)
        grid = np.arange(first).reshape(first, 1, 1)
        value = graph.add("Reshape", [slots, graph.constant("plane", [1, -1, 1])], f"{name}.plane")
        none = graph.add("Mul", [value, graph.constant("nothing", 0)], f"{name}.none")
        parts = graph.add("Add", [none, graph.constant(f"parts.{first}", grid)], f"{name}.parts")
        every = graph.add("Add", [value, graph.constant(f"no_parts.{first}", 0 * grid)], f"{name}.slots")
        place = graph.add("Concat", [parts, every], name, axis=2)
    graph.add("ScatterND", [pool_input(state), place, rows], pool_output(state))
