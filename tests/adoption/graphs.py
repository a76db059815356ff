"""ONNX files as others export them, small: no manifest, and each with a trait of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
Dims = Sequence[int | str | None]
Tensors = Mapping[str, tuple[int, Dims]]  # by name: dtype and shape
_RANDOM = np.random.default_rng(4)


def weights(*shape: int, scale: float = 0.5) -> Any:
    return _RANDOM.uniform(-scale, scale, shape).astype(np.float32)


def build(
    nodes: list[Any],
    inputs: Tensors,
    outputs: Tensors,
    constants: dict[str, Any] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """In old files, of IR below 4, weights are inputs with a value of their own."""
    made = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    fed = [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in inputs.items()]
    if ir_version < 4:
        fed += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in made]
    given = [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in outputs.items()]
    graph = helper.make_graph(nodes, "graph", fed, given, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model)
    return model


def save(folder: Path, model: onnx.ModelProto, name: str = "other.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


node = helper.make_node


def lstm(batch: str | None = "batch", time: str | None = "time") -> onnx.ModelProto:
    """Batch first around an LSTM that has time first; `h0`, `c0` come back as `hn`, `cn`."""
    nodes = [
        node("Transpose", ["x"], ["x_time_first"], perm=[1, 0, 2]),
        node("LSTM", ["x_time_first", "W", "R", "B", "", "h0", "c0"], ["Y", "hn", "cn"], hidden_size=4),
        node("Squeeze", ["Y", "one"], ["Y_flat"]),
        node("Transpose", ["Y_flat"], ["y"], perm=[1, 0, 2]),
    ]
    made = {"W": weights(1, 16, 3), "R": weights(1, 16, 4), "B": weights(1, 32), "one": np.array([1])}
    inputs = {"x": (FLOAT, [batch, time, 3]), "h0": (FLOAT, [1, batch, 4]), "c0": (FLOAT, [1, batch, 4])}
    outputs = {"y": (FLOAT, [batch, time, 4]), "hn": (FLOAT, [1, batch, 4]), "cn": (FLOAT, [1, batch, 4])}
    return build(nodes, inputs, outputs, made)


def gru(batch: int | None = None) -> onnx.ModelProto:
    """Time first, so that the batch is axis 1; nothing has a name but by number."""
    nodes = [
        node("GRU", ["1", "W", "R", "B", "", "2"], ["Y", "4"], hidden_size=4, name="layer"),
        node("Squeeze", ["Y", "one"], ["3"]),
    ]
    made = {"W": weights(1, 12, 3), "R": weights(1, 12, 4), "B": weights(1, 24), "one": np.array([1])}
    inputs = {"1": (FLOAT, [None, batch, 3]), "2": (FLOAT, [1, batch, 4])}
    return build(nodes, inputs, {"3": (FLOAT, [None, batch, 4]), "4": (FLOAT, [1, batch, 4])}, made)


def denoiser() -> onnx.ModelProto:
    """A spectrum's frame, and three caches of rank 5, 5 and 4; one row, and nothing varies."""
    caches: dict[str, Dims] = {
        "conv_cache": [2, 1, 3, 3, 5],
        "tra_cache": [2, 3, 1, 1, 3],
        "inter_cache": [2, 1, 5, 3],
    }
    nodes, added = [node("ReduceMean", ["mix"], ["level"], keepdims=0)], "mix"
    for name in caches:
        nodes += [
            node("Mul", [name, "half"], [f"{name}_less"]),
            node("Add", [f"{name}_less", "level"], [f"{name}_out"]),
            node("ReduceMean", [name], [f"{name}_mean"], keepdims=0),
            node("Add", [added, f"{name}_mean"], [f"{name}_added"]),
        ]
        added = f"{name}_added"
    nodes.append(node("Identity", [added], ["enh"]))
    frame: Dims = [1, 5, 1, 2]
    inputs = {"mix": (FLOAT, frame), **{n: (FLOAT, d) for n, d in caches.items()}}
    outputs = {"enh": (FLOAT, frame), **{f"{n}_out": (FLOAT, d) for n, d in caches.items()}}
    return build(nodes, inputs, outputs, {"half": np.float32(0.5)})


def enhancement() -> onnx.ModelProto:
    """One stage of a speech enhancement: h and c in the last axis of one state, whose name tells nothing."""
    nodes = [
        node("Gather", ["input_3", "zero"], ["h"], axis=3),
        node("Gather", ["input_3", "one"], ["c"], axis=3),
        node("MatMul", ["input_2", "W"], ["seen"]),  # [1, 1, 4]
        node("Add", ["h", "seen"], ["mixed"]),  # [1, 2, 4]
        node("Tanh", ["mixed"], ["h_next"]),
        node("Mul", ["c", "half"], ["c_less"]),
        node("Add", ["c_less", "h_next"], ["c_next"]),
        node("Unsqueeze", ["h_next", "last"], ["h_column"]),
        node("Unsqueeze", ["c_next", "last"], ["c_column"]),
        node("Concat", ["h_column", "c_column"], ["stack_2"], axis=3),
        node("ReduceMean", ["c_next"], ["level"], keepdims=0),
        node("Add", ["input_2", "level"], ["shifted"]),
        node("Sigmoid", ["shifted"], ["activation_2"]),
    ]
    made = {"zero": np.int64(0), "one": np.int64(1), "W": weights(8, 4), "half": np.float32(0.5)}
    made["last"] = np.array([3])
    inputs = {"input_2": (FLOAT, [1, 1, 8]), "input_3": (FLOAT, [1, 2, 4, 2])}
    return build(nodes, inputs, {"activation_2": (FLOAT, [1, 1, 8]), "stack_2": (FLOAT, [1, 2, 4, 2])}, made)


def controlled() -> onnx.ModelProto:
    """An accumulator that forgets by itself where a sequence starts, and counts a row only if it is ready."""
    nodes = [
        node("Cast", ["START"], ["starts"], to=TensorProto.BOOL),
        node("Where", ["starts", "zero", "INPUT_STATE"], ["before"]),
        node("Mul", ["INPUT", "READY"], ["counted"]),
        node("Add", ["before", "counted"], ["OUTPUT"]),
        node("Identity", ["OUTPUT"], ["OUTPUT_STATE"]),
    ]
    one: tuple[int, Dims] = (FLOAT, ["batch", 1])
    inputs = {"INPUT": one, "START": one, "READY": one, "INPUT_STATE": one}
    return build(nodes, inputs, {"OUTPUT": one, "OUTPUT_STATE": one}, {"zero": np.float32(0)})


def pictures() -> onnx.ModelProto:
    """A CNN for one picture, of opset 8 and IR 3."""
    nodes = [
        node("Conv", ["data_0", "kernel"], ["felt"], kernel_shape=[3, 3]),
        node("Relu", ["felt"], ["firing"]),
        node("GlobalAveragePool", ["firing"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat"]),
        node("Gemm", ["flat", "W", "b"], ["logits"]),
        node("Softmax", ["logits"], ["softmaxout_1"], axis=1),
    ]
    made = {"kernel": weights(5, 3, 3, 3), "W": weights(5, 4), "b": weights(4)}
    outputs = {"softmaxout_1": (FLOAT, [1, 4])}
    return build(nodes, {"data_0": (FLOAT, [1, 3, 8, 8])}, outputs, made, opset=8, ir_version=3)


def mlp() -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "W"], ["seen"]), node("Tanh", ["seen"], ["y"])]
    return build(nodes, {"x": (FLOAT, ["N", 4])}, {"y": (FLOAT, ["N", 2])}, {"W": weights(4, 2)})


def mislabelled() -> onnx.ModelProto:
    """What looks like a state is the loudness of the whole chunk, which no chunk of another length gives."""
    nodes = [
        node("Add", ["x", "gain_in"], ["y"]),
        node("ReduceMean", ["x"], ["gain_out"], axes=[1], keepdims=1),
    ]
    inputs: Tensors = {"x": (FLOAT, ["batch", "time"]), "gain_in": (FLOAT, ["batch", 1])}
    return build(nodes, inputs, {"y": (FLOAT, ["batch", "time"]), "gain_out": (FLOAT, ["batch", 1])})


def leaking(factor: float = 0.0) -> onnx.ModelProto:
    """A state into which goes `factor` times the mean of all rows' states: with 0, NaN alone gets across."""
    nodes = [
        node("ReduceMean", ["h_in"], ["mean"], axes=[0], keepdims=1),
        node("Mul", ["mean", "factor"], ["leak"]),
        node("Mul", ["h_in", "half"], ["less"]),
        node("Add", ["less", "x"], ["more"]),
        node("Add", ["more", "leak"], ["h_out"]),
        node("Identity", ["h_out"], ["y"]),
    ]
    row: tuple[int, Dims] = (FLOAT, ["batch", 2])
    made = {"factor": np.float32(factor), "half": np.float32(0.5)}
    return build(nodes, {"x": row, "h_in": row}, {"y": row, "h_out": row}, made)


def unused_state() -> onnx.ModelProto:
    """What comes back is never looked at."""
    nodes = [node("Neg", ["x"], ["y"]), node("Identity", ["mem_in"], ["mem_out"])]
    row: tuple[int, Dims] = (FLOAT, ["batch", 2])
    return build(nodes, {"x": row, "mem_in": row}, {"y": row, "mem_out": row})


def noisy() -> onnx.ModelProto:
    nodes = [node("RandomNormalLike", ["x"], ["noise"]), node("Add", ["x", "noise"], ["y"])]
    return build(nodes, {"x": (FLOAT, ["batch", 2])}, {"y": (FLOAT, ["batch", 2])})


def convolution() -> onnx.ModelProto:
    """Frames of 5 samples, 2 apart, without padding, and their sum so far."""
    nodes = [
        node("Conv", ["sound", "kernel"], ["frames"], kernel_shape=[5], strides=[2]),
        node("ReduceSum", ["frames", "last"], ["heard"], keepdims=1),
        node("Add", ["sum_in", "heard"], ["sum_out"]),
    ]
    made = {"kernel": weights(3, 1, 5), "last": np.array([2])}
    inputs: Tensors = {
        "sound": (FLOAT, ["batch", 1, "samples"]),
        "sum_in": (FLOAT, ["batch", 3, 1]),
    }
    outputs: Tensors = {"frames": (FLOAT, ["batch", 3, "frames"]), "sum_out": (FLOAT, ["batch", 3, 1])}
    return build(nodes, inputs, outputs, made)


def growing() -> onnx.ModelProto:
    """A cache that is longer after each step."""
    nodes = [
        node("Concat", ["past_key", "x"], ["present_key"], axis=1),
        node("ReduceMean", ["present_key"], ["y"], axes=[1], keepdims=1),
    ]
    inputs: Tensors = {
        "x": (FLOAT, ["batch", 1, 4]),
        "past_key": (FLOAT, ["batch", "past", 4]),
    }
    outputs: Tensors = {"y": (FLOAT, ["batch", 1, 4]), "present_key": (FLOAT, ["batch", "now", 4])}
    return build(nodes, inputs, outputs)


def rated(rates: tuple[int, ...] = (16000,)) -> onnx.ModelProto:
    """Doubles its state where its constant is the first rate, and adds the sum of its chunk of any length."""
    nodes = [node("Equal", ["sr", f"rate_{rate}"], [f"is_{rate}"]) for rate in rates]
    nodes += [
        node("Where", [f"is_{rates[0]}", "two", "half"], ["factor"]),
        node("Mul", ["state", "factor"], ["scaled"]),
        node("ReduceSum", ["input", "last"], ["heard"], keepdims=1),
        node("Mul", ["heard", "tenth"], ["less"]),
        node("Add", ["scaled", "less"], ["sum"]),
        node("Tanh", ["sum"], ["output"]),
        node("Identity", ["output"], ["stateN"]),
    ]
    made: dict[str, Any] = {f"rate_{rate}": np.int64(rate) for rate in rates}
    made |= {"two": np.float32(2), "half": np.float32(0.5), "last": np.array([1]), "tenth": np.float32(0.1)}
    inputs: Tensors = {
        "input": (FLOAT, ["batch", None]),
        "state": (FLOAT, ["batch", 1]),
        "sr": (INT64, []),
    }
    return build(nodes, inputs, {"output": (FLOAT, ["batch", 1]), "stateN": (FLOAT, [None, None])}, made)
