"""A model in fewer bits, where its manifest's `precision` says so: faster on CUDA, and less exact."""

from __future__ import annotations

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .errors import NotSupported

# What takes the time on a GPU and stands half the width, and which of its inputs are numbers and not lengths.
# All else, sums and logarithms above all, stays as it is: the same choice as PyTorch's autocast makes.
_RECURRENT = (0, 1, 2, 3, 5, 6, 7)
_HALVED = {
    "Conv": (0, 1, 2), "ConvTranspose": (0, 1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1),
    "GRU": _RECURRENT, "LSTM": _RECURRENT, "RNN": _RECURRENT,
}  # fmt: skip
_PREFIX = "tenuto.half."
_LARGEST_HALF = 65504.0


def halved(model: bytes, where: str) -> bytes:
    """The ONNX file with products, convolutions and recurrent layers in float16, and their weights; inputs,
    outputs and states as they were. What lies in the branches of If, Loop and Scan stays float32.

    (`onnxruntime.transformers.float16` takes values of nodes that are to stay through float16 as well, and
    gives one name twice, 1.31.)

    Raises: NotSupported if nothing in the graph can be halved.
    """
    try:
        proto = onnx.load_from_string(model)
        types = _types(onnx.shape_inference.infer_shapes(proto).graph)
    except (DecodeError, onnx.shape_inference.InferenceError) as error:
        raise NotSupported(f"{where}: float16 needs an ONNX file of known types: {error}") from error
    if not _Halving(proto, types).run():
        raise NotSupported(
            f"{where}: it has none of {', '.join(sorted(_HALVED))} in float32, so float16 changes nothing; "
            "leave precision at float32"
        )
    return bytes(proto.SerializeToString())


def _types(graph: GraphProto) -> dict[str, int]:
    """The element type of each tensor, where it is known."""
    known = {i.name: i.data_type for i in graph.initializer}
    for tensor in (*graph.input, *graph.value_info, *graph.output):
        known[tensor.name] = tensor.type.tensor_type.elem_type
    return known


class _Halving:
    """One model being changed."""

    def __init__(self, proto: ModelProto, types: dict[str, int]) -> None:
        self._graph = proto.graph
        self._types = types
        self._weights = {i.name: i for i in proto.graph.initializer}
        self._half: dict[str, str] = {}  # by a tensor's name, that of its half
        self._nodes: list[NodeProto] = []

    def run(self) -> int:
        """How many nodes were halved."""
        count = 0
        for node in self._graph.node:
            places = [p for p in _HALVED.get(node.op_type, ()) if p < len(node.input) and node.input[p]]
            fits = not node.domain and all(self._may_halve(node.input[p]) for p in places)
            if places and fits:
                count += 1
                self._change(node, places)
            else:
                self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        self._drop_unused()
        return count

    def _may_halve(self, name: str) -> bool:
        """Whether it is float32; and, if it is a weight, none of it becomes infinite."""
        if self._types.get(name) != TensorProto.FLOAT:
            return False
        weight = self._weights.get(name)
        return weight is None or bool((abs(numpy_helper.to_array(weight)) <= _LARGEST_HALF).all())

    def _change(self, node: NodeProto, places: list[int]) -> None:
        half = NodeProto.FromString(node.SerializeToString())
        for place in places:
            half.input[place] = self._halve(node.input[place])
        outputs = [name for name in node.output if name]
        for place, name in enumerate(half.output):
            half.output[place] = f"{_PREFIX}{name}" if name else ""
        casts = [self._cast(f"{_PREFIX}{name}", name, TensorProto.FLOAT) for name in outputs]
        self._nodes += [half, *casts]

    def _halve(self, name: str) -> str:
        if name not in self._half:
            self._half[name] = half = f"{_PREFIX}in.{name}"
            weight = self._weights.get(name)
            if weight is None:
                self._nodes.append(self._cast(name, half, TensorProto.FLOAT16))
            else:
                value = numpy_helper.to_array(weight).astype("float16")
                self._graph.initializer.append(numpy_helper.from_array(value, half))
        return self._half[name]

    @staticmethod
    def _cast(source: str, target: str, to: int) -> NodeProto:
        return helper.make_node("Cast", [source], [target], name=f"{_PREFIX}cast.{target}", to=to)

    def _drop_unused(self) -> None:
        """The float32 weights of which only the halves are needed; a subgraph may need any."""
        used = {name for node in self._graph.node for name in node.input}
        used |= {tensor.name for tensor in (*self._graph.input, *self._graph.output)}
        nested = any(a.HasField("g") or a.graphs for node in self._graph.node for a in node.attribute)
        kept = [i for i in self._graph.initializer if nested or i.name in used or i.name not in self._half]
        copies = [TensorProto.FromString(i.SerializeToString()) for i in kept]
        del self._graph.initializer[:]
        self._graph.initializer.extend(copies)
