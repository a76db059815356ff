"""Models whose weights lie in files beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from . import toys

WEIGHTS = np.arange(1, 5, dtype=np.float32)
WIDTH = len(WEIGHTS)


def tensor(
    name: str, file: str, offset: int | str | None = None, length: int | str | None = None, **more: Any
) -> TensorProto:
    """WEIGHTS, said to lie in a file; `more` are fields of the tensor."""
    made = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=[WIDTH], data_location=TensorProto.EXTERNAL, **more
    )
    for key, entry in (("location", file), ("offset", offset), ("length", length)):
        if entry is not None:
            made.external_data.add(key=key, value=str(entry))
    return made


def offsetter(weights: TensorProto, **changes: Any) -> tuple[bytes, toys.Manifest]:
    """Stateless: y = x + WEIGHTS."""
    return _model([helper.make_node("Add", ["x", "w"], ["y"])], [weights], **changes)


def by_attribute(weights: TensorProto) -> tuple[bytes, toys.Manifest]:
    """`offsetter` with its weights in a node's attribute."""
    constant = helper.make_node("Constant", [], ["w"], value=weights)
    return _model([constant, helper.make_node("Add", ["x", "w"], ["y"])], [])


def by_subgraph(weights: TensorProto) -> tuple[bytes, toys.Manifest]:
    """`offsetter` with its weights in a branch."""
    z = [toys.value("z", toys.FLOAT, "batch", WIDTH)]
    branch = helper.make_graph([helper.make_node("Add", ["x", "w"], ["z"])], "inner", [], z, [weights])
    nodes = [
        helper.make_node("IsNaN", ["x"], ["odd"]),
        helper.make_node("Cast", ["odd"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["numbers"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["any"], to=TensorProto.BOOL),
        helper.make_node("If", ["any"], ["y"], then_branch=branch, else_branch=branch),
    ]
    return _model(nodes, [])


def by_function(weights: TensorProto) -> tuple[bytes, toys.Manifest]:
    """`offsetter` with its weights in a function of its own."""
    imports = [helper.make_opsetid("", 17)]
    body = [
        helper.make_node("Constant", [], ["w"], value=weights),
        helper.make_node("Add", ["a", "w"], ["b"]),
    ]
    function = helper.make_function("own", "Offset", ["a"], ["b"], body, imports)
    made, manifest = _model([helper.make_node("Offset", ["x"], ["y"], domain="own")], [])
    proto = onnx.load_model_from_string(made)
    proto.functions.append(function)
    proto.opset_import.add(domain="own", version=1)
    return bytes(proto.SerializeToString()), manifest


def by_sparse(weights: TensorProto) -> tuple[bytes, toys.Manifest]:
    """`offsetter` with its weights in a sparse tensor that has all of its values."""
    sparse = onnx.SparseTensorProto(dims=[WIDTH])
    sparse.values.CopyFrom(weights)
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [WIDTH], range(WIDTH)))
    constant = helper.make_node("Constant", [], ["w"], sparse_value=sparse)
    return _model([constant, helper.make_node("Add", ["x", "w"], ["y"])], [])


def accumulator(file: str) -> tuple[bytes, toys.Manifest, bytes]:
    """The toy, with all of its constants in a file; and what that holds."""
    made, manifest = toys.accumulator()
    proto, contents = onnx.load_model_from_string(made), b""
    for constant in proto.graph.initializer:
        constant.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", file), ("offset", len(contents)), ("length", len(constant.raw_data))):
            constant.external_data.add(key=key, value=str(entry))
        contents += constant.raw_data
        constant.ClearField("raw_data")
    return bytes(proto.SerializeToString()), manifest, contents


def _model(nodes: list[Any], weights: list[TensorProto], **changes: Any) -> tuple[bytes, toys.Manifest]:
    x, y = (toys.value(name, toys.FLOAT, "batch", WIDTH) for name in "xy")
    graph = helper.make_graph(nodes, "external", [x], [y], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    manifest = {
        "format": 1,
        "name": "offsetter",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", WIDTH]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", WIDTH]}],
    }
    return bytes(proto.SerializeToString()), manifest | changes
