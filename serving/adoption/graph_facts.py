"""What an ONNX file says of itself: tensors, operators and weights, and what its graph does to its inputs.

Read from the file alone, and nothing is run. Weights in other files are named, not opened.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from tenuto.serving.errors import ModelInvalid
from tenuto.serving.manifest import METADATA_KEY, GraphTensor
from tenuto.serving.regular_file import read as read_file

MOST_BYTES = 2**31 - 1  # protobuf reads no longer message


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_RECURRENT = ("LSTM", "GRU", "RNN")
# Through these a tensor keeps its axes. What they take besides it is weights, in what is looked for here.
_KEEP_AXES = word_set(
    """
    Abs Add BatchNormalization Cast Clip Div Dropout Exp Gelu Identity LeakyRelu Log MatMul Max Min Mul
    Neg Pow Relu Sigmoid Slice Softplus Split Sqrt Sub Tanh
    """
)
# Through these a state goes from a recurrent layer to an output, or the other way round.
_CARRY = word_set(
    """
    Cast Concat Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze Where Expand
    """
)
_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64", TensorProto.FLOAT16: "float16",
    TensorProto.BOOL: "bool", TensorProto.INT8: "int8", TensorProto.INT16: "int16",
    TensorProto.INT32: "int32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8",
    TensorProto.UINT16: "uint16",
    TensorProto.UINT32: "uint32", TensorProto.UINT64: "uint64",
}  # fmt: skip


@dataclass(frozen=True)
class Axes:
    """Which of an input's axes a layer takes for time and for the batch, and which layer that is."""

    layer: str
    time: int
    batch: int | None


@dataclass(frozen=True)
class Facts:
    """`passed` are, by the names of outputs, the inputs that have a part in them."""

    path: Path
    nbytes: int
    sha256: str
    ir_version: int
    opsets: dict[str, int]  # by domain, "ai.onnx" for the standard's own
    producer: str
    manifest: str | None  # its own, of its metadata
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    parameters: int
    operators: dict[str, int]  # by operator, in sub-graphs too; another domain's with its name in front
    nodes: tuple[NodeProto, ...]
    external: dict[str, int]  # files with weights, and their bytes that are used
    passed: dict[str, frozenset[str]]
    layers: dict[str, Axes]  # by input
    layer_states: dict[str, tuple[str, frozenset[str]]]  # by input: the layer, and outputs that bring it back
    lengths: dict[str, str]  # by input: the layer that takes it for the rows' lengths
    ranges: dict[str, tuple[int, str]]  # by input: rows of the table that it is an index into, and its name
    compared: dict[str, tuple[float, ...]]  # by input: the numbers with which the graph compares it


def read(path: Path) -> Facts:
    """Raises: ModelInvalid if it cannot be read, or is no ONNX file."""
    content = read_file(path, MOST_BYTES, str(path.parent))
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ModelInvalid(f"{path} is no ONNX file: its protobuf ends too early or is none") from error
    if not model.graph.node or not model.graph.output:
        raise ModelInvalid(f"{path} is no ONNX file: there is no graph with nodes and outputs in it")
    graph = _Graph(model.graph)
    weights = list(_weights(model.graph, graph.nodes))
    own = {tensor.name for tensor in model.graph.initializer}
    return Facts(
        path=path,
        nbytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        ir_version=model.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in model.opset_import},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        manifest=next((p.value for p in model.metadata_props if p.key == METADATA_KEY), None),
        inputs=tuple(_tensor(v) for v in model.graph.input if v.name not in own),
        outputs=tuple(_tensor(v) for v in model.graph.output),
        parameters=sum(math.prod(tensor.dims) for tensor in weights),
        operators=dict(Counter(operator(node) for node in graph.nodes).most_common()),
        nodes=tuple(graph.nodes),
        external=_external(weights),
        passed={v.name: graph.inputs_of(v.name) for v in model.graph.output},
        layers=graph.layers(),
        layer_states=graph.layer_states(),
        lengths=graph.lengths(),
        ranges=graph.ranges(),
        compared=graph.compared(),
    )


def operator(node: NodeProto) -> str:
    """Its type, behind its domain if that is not the standard's."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _tensor(value: onnx.ValueInfoProto) -> GraphTensor:
    """A dtype that the vocabulary lacks keeps ONNX's word for it."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return GraphTensor(value.name, value.type.WhichOneof("value") or "nothing", ())
    number = kind.elem_type
    dtype = _DTYPES.get(number) or TensorProto.DataType.Name(number).lower()
    shape = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None
        for d in kind.shape.dim
    )
    return GraphTensor(value.name, dtype, shape)


def _weights(graph: GraphProto, nodes: list[NodeProto]) -> Iterator[TensorProto]:
    """Of the graph and its sub-graphs; constants of one number are none."""
    yield from graph.initializer
    for node in nodes:
        for a in node.attribute:
            if a.type == AttributeProto.TENSOR and math.prod(a.t.dims) > 1:
                yield a.t
            for sub in _graphs(a):
                yield from sub.initializer


def _external(weights: list[TensorProto]) -> dict[str, int]:
    files: dict[str, int] = {}
    for tensor in weights:
        if tensor.data_location == TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            size = int(said["length"]) if said.get("length", "").isdigit() else 0
            files[said.get("location", "")] = files.get(said.get("location", ""), 0) + size
    return files


def _graphs(a: AttributeProto) -> Iterator[GraphProto]:
    if a.type == AttributeProto.GRAPH:
        yield a.g
    yield from a.graphs


class _Graph:
    """The nodes of a graph and its sub-graphs, and which tensor comes from which."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: list[NodeProto] = []
        self._inputs = {v.name: v for v in graph.input}
        self._outputs = [v.name for v in graph.output]
        self._values: dict[str, TensorProto] = {}
        self._makers: dict[str, NodeProto] = {}
        self._same: dict[str, list[str]] = {}  # names inside and outside of a sub-graph: one from the others
        self._sources: dict[str, frozenset[str]] = {}  # what `inputs_of` found
        self._add(graph)

    def _add(self, graph: GraphProto) -> None:
        self._values |= {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            self.nodes.append(node)
            self._makers |= dict.fromkeys(filter(None, node.output), node)
            if (
                node.op_type == "Constant"
                and node.attribute
                and node.attribute[0].type == AttributeProto.TENSOR
            ):
                self._values[node.output[0]] = node.attribute[0].t
            for a in node.attribute:
                for sub in _graphs(a):
                    self._join(node, sub)
                    self._add(sub)

    def _join(self, node: NodeProto, sub: GraphProto) -> None:
        """An If's outputs are its branches'; a loop's body has what goes round behind its own inputs."""
        first = {"Loop": 1}.get(node.op_type, 0)  # a Loop's body gives its condition first
        for name, inner in zip(node.output, list(sub.output)[first:], strict=False):
            self._same.setdefault(name, []).append(inner.name)
        if node.op_type != "If":
            for inner, name in zip(sub.input, node.input, strict=False):
                self._same.setdefault(inner.name, []).append(name)

    def _before(self, name: str) -> list[str]:
        """What the tensor is made of."""
        node = self._makers.get(name)
        return [*self._same.get(name, ()), *(filter(None, node.input) if node else ())]

    def inputs_of(self, name: str) -> frozenset[str]:
        """The graph's inputs that have a part in that tensor."""
        known = self._sources.get(name)
        if known is not None:
            return known
        seen, rest = {name}, [name]
        while rest:
            for before in self._before(rest.pop()):
                if before not in seen:
                    seen.add(before)
                    rest.append(before)
        self._sources[name] = found = frozenset(seen & self._inputs.keys())
        return found

    def _origin(self, name: str, axes: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
        """The input whose `axes` are those of that tensor, if only such nodes lie between as keep them."""
        for _ in range(len(self.nodes) + 1):
            if name in self._inputs:
                return name, axes
            node = self._makers.get(name)
            if node is None:
                same = self._same.get(name, [])
                if len(same) != 1:
                    return None
                name = same[0]
                continue
            if node.op_type == "Transpose":
                order = attribute(node, "perm")
                if not isinstance(order, list) or max(axes) >= len(order):
                    return None
                axes = tuple(order[a] for a in axes)
            elif node.op_type not in _KEEP_AXES:
                return None
            moving = [n for n in node.input if n and n not in self._values and self.inputs_of(n)]
            if len(moving) != 1:
                return None
            name = moving[0]
        return None

    def _sinks(self) -> Iterator[tuple[NodeProto, str, int, int | None]]:
        """(node, what it takes, its time axis, its batch axis)."""
        for node in self.nodes:
            if node.op_type in _RECURRENT and not attribute(node, "layout", 0):
                yield node, node.input[0], 0, 1
            elif node.op_type == "Conv" and len(self._weight_shape(node)) == 3:
                yield node, node.input[0], 2, 0
            elif node.op_type == "Scan":
                count = int(str(attribute(node, "num_scan_inputs", 0)))
                axes = attribute(node, "scan_input_axes") or [0] * count
                if isinstance(axes, list):
                    for name, axis in zip(list(node.input)[-count:], axes, strict=False):
                        yield node, name, axis, None

    def _weight_shape(self, node: NodeProto) -> tuple[int, ...]:
        weight = self._values.get(node.input[1])
        return tuple(weight.dims) if weight is not None else ()

    def layers(self) -> dict[str, Axes]:
        found: dict[str, Axes] = {}
        for node, name, time, batch in self._sinks():
            origin = self._origin(name, (time,) if batch is None else (time, batch))
            if origin is not None:
                source, axes = origin
                found.setdefault(source, Axes(_label(node), axes[0], axes[1] if len(axes) > 1 else None))
        return found

    def layer_states(self) -> dict[str, tuple[str, frozenset[str]]]:
        """Inputs that a recurrent layer begins with, and the outputs that its end goes to."""
        ends = {name: self._carried(name) for name in self._outputs}
        found: dict[str, tuple[str, frozenset[str]]] = {}
        for node in self.nodes:
            if node.op_type not in _RECURRENT:
                continue
            for place, end in ((5, 1), (6, 2)):
                if len(node.input) <= place or not node.input[place] or len(node.output) <= end:
                    continue
                back = frozenset(o for o, carried in ends.items() if node.output[end] in carried)
                for source in self._carried(node.input[place]) & self._inputs.keys():
                    before = found.get(source, ("", frozenset[str]()))[1]
                    found[source] = (_label(node), before | back)
        return found

    def _carried(self, name: str) -> set[str]:
        """That tensor, and those that it is but a part or another shape of."""
        seen, rest = {name}, [name]
        while rest:
            name = rest.pop()
            node = self._makers.get(name)
            if node is not None and node.op_type not in (*_CARRY, "If"):
                continue
            for before in self._before(name):
                if before not in seen:
                    seen.add(before)
                    rest.append(before)
        return seen

    def lengths(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in self.nodes:
            if node.op_type in _RECURRENT and len(node.input) > 4 and node.input[4]:
                for source in self._carried(node.input[4]) & self._inputs.keys():
                    found[source] = _label(node)
        return found

    def ranges(self) -> dict[str, tuple[int, str]]:
        """Indices into a table of weights."""
        found: dict[str, tuple[int, str]] = {}
        for node in self.nodes:
            table = self._values.get(node.input[0]) if node.op_type == "Gather" and node.input else None
            if table is None or attribute(node, "axis", 0) != 0 or not table.dims:
                continue
            origin = self._origin(node.input[1], (0,))
            if origin is not None:
                rows = min(table.dims[0], found.get(origin[0], (table.dims[0], ""))[0])
                found[origin[0]] = (rows, table.name or node.input[0])
        return found

    def compared(self) -> dict[str, tuple[float, ...]]:
        """Numbers that an input is compared with: of one that chooses, the choices."""
        found: dict[str, tuple[float, ...]] = {}
        for node in self.nodes:
            if node.op_type != "Equal":
                continue
            for name, other in (tuple(node.input), tuple(reversed(node.input))):
                value = self._values.get(other)
                sources = self._carried(name) & self._inputs.keys()
                if value is None or value.data_location == TensorProto.EXTERNAL or math.prod(value.dims) != 1:
                    continue
                number = float(numpy_helper.to_array(value).reshape(-1)[0])
                for source in sources:
                    found[source] = tuple(dict.fromkeys((*found.get(source, ()), number)))
        return found


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else node.op_type
