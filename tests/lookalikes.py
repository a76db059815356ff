"""Graphs like those that others export, with random weights: the shapes, axes and habits of models that
people bring, none of their files.

Each function gives the file and the manifest that its user would write. `tests/contract/stepper.py` runs
them as their authors would.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import helper, numpy_helper

from tests.toys import FLOAT, INT32, INT64, Manifest, value

Made = tuple[bytes, Manifest]


class _Graph:
    """Nodes one after another, and weights that are drawn as they are asked for."""

    def __init__(self, seed: int, opset: int = 17) -> None:
        self._draw = np.random.default_rng(seed)
        self._opset = opset
        self._nodes: list[Any] = []
        self._constants: dict[str, NDArray[Any]] = {}

    def weight(self, *shape: int, scale: float = 0.2) -> str:
        return self.constant(self._draw.normal(0, scale, shape).astype(np.float32))

    def constant(self, values: ArrayLike, name: str = "") -> str:
        name = name or f"constant_{len(self._constants)}"
        self._constants[name] = np.asarray(values)
        return name

    def add(self, operator: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        """The node's only output."""
        return self.add_many(operator, *inputs, into=[into or f"value_{len(self._nodes)}"], **attributes)[0]

    def add_many(self, operator: str, *inputs: str, into: list[str], **attributes: Any) -> list[str]:
        self._nodes.append(helper.make_node(operator, list(inputs), into, **attributes))
        return into

    def squeeze(self, name: str, axis: int, into: str = "") -> str:
        """By an attribute, or by an input, as the opset wants it."""
        if self._opset < 13:
            return self.add("Squeeze", name, into=into, axes=[axis])
        return self.add("Squeeze", name, self.constant(np.array([axis], np.int64)), into=into)

    def unsqueeze(self, name: str, axis: int) -> str:
        return self.add("Unsqueeze", name, self.constant(np.array([axis], np.int64)))

    def part(self, name: str, axis: int, begin: int, end: int, into: str = "") -> str:
        cuts = [self.constant(np.array([at], np.int64)) for at in (begin, end, axis)]
        return self.add("Slice", name, *cuts, into=into)

    def reshape(self, name: str, *shape: int, into: str = "") -> str:
        return self.add("Reshape", name, self.constant(np.array(shape, np.int64)), into=into)

    def model(self, inputs: list[Any], outputs: list[Any]) -> bytes:
        """The checked file, of the oldest IR that has this opset. Before IR 4, weights are inputs as well."""
        opset = helper.make_opsetid("", self._opset)
        ir = helper.find_min_ir_version_for([opset])
        initial = [numpy_helper.from_array(array, name) for name, array in self._constants.items()]
        if ir < 4:
            inputs = inputs + [value(i.name, i.data_type, *i.dims) for i in initial]
        graph = helper.make_graph(self._nodes, "lookalike", inputs, outputs, initial)
        made = helper.make_model(graph, opset_imports=[opset], ir_version=ir)
        onnx.checker.check_model(made, full_check=True)
        return bytes(made.SerializeToString())


def _tensor(name: str, *shape: int | str, dtype: str = "float32", **rest: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)} | rest


def _state(name: str, *shape: int | str, dtype: str = "float32", **rest: Any) -> dict[str, Any]:
    return {"input": name, "output": f"{name}_next", "dtype": dtype, "shape": list(shape)} | rest


def _carried(*states: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """The graph's inputs and outputs of states, each a name and a shape."""
    return (
        [value(name, FLOAT, *shape) for name, *shape in states],
        [value(f"{name}_next", FLOAT, *shape) for name, *shape in states],
    )


def enhancer(width: int, *, is_mask: bool) -> Made:
    """One of the two stages of a speech enhancement: a mask on 257 magnitudes, or 512 samples anew. Two LSTMs
    of 128, whose h and c lie in the last axis of one state; batch 1, frame by frame."""
    g = _Graph(seed=width)
    kept = [g.squeeze(g.part("state", 3, at, at + 1), 3) for at in (0, 1)]  # h and c, [1, 2, 128]
    y, new = "x", []
    for layer, size in enumerate((width, 128)):
        before = [g.part(part, 1, layer, layer + 1) for part in kept]
        weights = g.weight(1, 512, size), g.weight(1, 512, 128), g.weight(1, 1024)
        names = [f"{what}_{layer}" for what in ("all", "h", "c")]
        every, h, c = g.add_many("LSTM", y, *weights, "", *before, into=names, hidden_size=128)
        y = g.squeeze(every, 1)
        new.append((h, c))
    stacked = [g.unsqueeze(g.add("Concat", *part, axis=1), 3) for part in zip(*new, strict=True)]
    g.add("Concat", *stacked, into="state_next", axis=3)
    dense = g.add("Add", g.add("MatMul", y, g.weight(128, width)), g.weight(width))
    g.add("Sigmoid" if is_mask else "Identity", dense, into="y")
    before, after = _carried(("state", 1, 2, 128, 2))
    made = g.model([value("x", FLOAT, 1, 1, width), *before], [value("y", FLOAT, 1, 1, width), *after])
    frame = {"shape": [1, 1, width], "time_axis": 1}
    return made, {
        "format": 1,
        "fixed_batch": 1,
        "inputs": [_tensor("x", chunk={"exact": 1}) | frame],
        "states": [_state("state", 1, 2, 128, 2)],
        "outputs": [_tensor("y") | frame],
    }


def denoiser(*, has_batch_axes: bool) -> Made:
    """A spectrogram, a frame at a time on axis 2; caches of convolutions (rank 5), of six attentions (rank 5)
    and of two recurrent layers across time (rank 4). The manifest names their batch axis of 1, or none."""
    g = _Graph(seed=3)
    x = g.add("Transpose", "mix", perm=[0, 3, 2, 1])  # [1, 2, time, 257]
    strided: dict[str, Any] = {"strides": [1, 8], "pads": [0, 4, 0, 4]}
    x = g.add("Tanh", g.add("Conv", x, g.weight(16, 2, 1, 9), g.weight(16), **strided))  # [1, 16, time, 33]
    convolved, attended, recurrent = [], [], []
    for half in range(2):
        cache = g.squeeze(g.part("conv", 0, half, half + 1), 0)
        whole = g.add("Concat", cache, x, axis=2)
        convolved.append(g.unsqueeze(g.part(whole, 2, -16, 2**31), 0))
        x = g.add("Tanh", g.add("Conv", whole, g.weight(16, 1, 17, 1), g.weight(16), group=16))
        for third in range(3):
            h = g.reshape(g.part(g.part("attention", 0, half, half + 1), 1, third, third + 1), 1, 1, 16)
            energy = g.reshape(g.add("ReduceMean", g.add("Mul", x, x), axes=[3]), 1, 1, 16)
            weights = g.weight(1, 48, 16), g.weight(1, 48, 16), g.weight(1, 96)
            names = ["", f"attention_{half}{third}"]
            h = g.add_many("GRU", energy, *weights, "", h, into=names, hidden_size=16)[1]
            attended.append(h)
            x = g.add("Mul", x, g.add("Sigmoid", g.reshape(h, 1, 16, 1, 1)))
        bands = g.reshape(g.add("Transpose", x, perm=[2, 0, 3, 1]), 1, 33, 16)  # time, bands, channels
        h = g.squeeze(g.part("across", 0, half, half + 1), 0)
        weights = g.weight(1, 48, 16), g.weight(1, 48, 16), g.weight(1, 96)
        names = ["", f"across_{half}"]
        h = g.add_many("GRU", bands, *weights, "", h, into=names, hidden_size=16)[1]
        recurrent.append(h)
        x = g.add("Add", x, g.add("Transpose", g.reshape(h, 1, 1, 33, 16), perm=[0, 3, 1, 2]))
    g.add("Concat", *convolved, into="conv_next", axis=0)
    g.reshape(g.add("Concat", *attended, axis=0), 2, 3, 1, 1, 16, into="attention_next")
    g.reshape(g.add("Concat", *recurrent, axis=0), 2, 1, 33, 16, into="across_next")
    wide = g.add("ConvTranspose", x, g.weight(16, 2, 1, 9), g.weight(2), **strided)
    g.add("Transpose", g.add("Tanh", wide), into="enhanced", perm=[0, 3, 2, 1])
    shapes: list[tuple[Any, ...]] = [("conv", 2, 1, 16, 16, 33), ("attention", 2, 3, 1, 1, 16)]
    shapes += [("across", 2, 1, 33, 16)]
    before, after = _carried(*shapes)
    mix, enhanced = value("mix", FLOAT, 1, 257, 1, 2), value("enhanced", FLOAT, 1, 257, 1, 2)
    axes = (1, 2, 1) if has_batch_axes else (None, None, None)
    frame = {"shape": [1, 257, 1, 2], "time_axis": 2}
    return g.model([mix, *before], [enhanced, *after]), {
        "format": 1,
        "fixed_batch": 1,
        "inputs": [_tensor("mix", chunk={"exact": 1}) | frame],
        "states": [_state(*shape, batch_axis=axis) for shape, axis in zip(shapes, axes, strict=True)],
        "outputs": [_tensor("enhanced") | frame],
    }


def digit() -> Made:
    """A picture, [1, 1, 28, 28] of 0 to 255, to ten scores, in the words of 2018: opset 8, IR 3, its weights
    among its inputs, batch 1."""
    g = _Graph(seed=8, opset=8)
    x = g.add("Div", "picture", g.constant(np.float32(255)))
    for before, size, pool in ((1, 8, 2), (8, 16, 3)):
        x = g.add("Conv", x, g.weight(size, before, 5, 5), auto_pad="SAME_UPPER", kernel_shape=[5, 5])
        x = g.add("Relu", g.add("Add", x, g.weight(size, 1, 1)))
        x = g.add("MaxPool", x, kernel_shape=[pool, pool], strides=[pool, pool])
    x = g.reshape(x, 1, 256)
    g.add("Gemm", x, g.weight(256, 10), g.weight(1, 10), into="scores")
    made = g.model([value("picture", FLOAT, 1, 1, 28, 28)], [value("scores", FLOAT, 1, 10)])
    wire = [{"dtype": "uint8"}, {"encoding": "png"}]
    return made, {
        "format": 1,
        "fixed_batch": 1,
        "inputs": [_tensor("picture", 1, 1, 28, 28, wire=wire)],
        "outputs": [_tensor("scores", 1, 10)],
    }


def of_opset(opset: int) -> Made:
    """A recurrent layer, time first, and a dense one behind its last step, in the words of that opset."""
    g = _Graph(seed=opset, opset=opset)
    weights = g.weight(1, 5, 3), g.weight(1, 5, 5), g.weight(1, 10)
    g.add_many("RNN", "x", *weights, "", "h", into=["every", "h_next"], hidden_size=5)
    g.squeeze("every", 1, into="steps")
    last = g.squeeze("h_next", 0)
    g.add("Gemm", last, g.weight(5, 2), g.weight(2), into="y")
    before, after = _carried(("h", 1, "batch", 5))
    steps, y = value("steps", FLOAT, "time", "batch", 5), value("y", FLOAT, "batch", 2)
    time = {"time_axis": 0, "batch_axis": 1}
    return g.model([value("x", FLOAT, "time", "batch", 3), *before], [steps, y, *after]), {
        "format": 1,
        "max_frames": 8,
        "inputs": [_tensor("x", "time", "batch", 3) | time],
        "states": [_state("h", 1, "batch", 5, batch_axis=1)],
        "outputs": [_tensor("steps", "time", "batch", 5) | time, _tensor("y", "batch", 2)],
    }


def mixer(order: list[str]) -> Made:
    """Two inputs and a state, whose places in the graph are those of `order`: y is 2 left - right + the y
    before. Taken for each other, they give another one."""
    g = _Graph(seed=0)
    mixed = g.add("Sub", g.add("Add", "left", "left"), "right")
    g.add("Add", mixed, "total", into="y")
    g.add("Identity", "y", into="total_next")
    outputs = [value(name, FLOAT, "batch", 1) for name in ("y", "total_next")]
    made = g.model([value(name, FLOAT, "batch", 1) for name in order], outputs)
    return made, {
        "format": 1,
        "inputs": [_tensor(name, "batch", 1) for name in ("left", "right")],
        "states": [_state("total", "batch", 1)],
        "outputs": [_tensor("y", "batch", 1)],
    }


def meter() -> Made:
    """Three outputs of one input, which is taken by fours: its running sum at every sample, the largest of
    each four, and the sum after the last one. What is left over is padded at End."""
    g = _Graph(seed=0)
    sums = g.add("CumSum", g.add("Concat", "total", "x", axis=1), g.constant(np.int64(1)))
    g.part(sums, 1, 1, 2**31, into="running")
    g.part(sums, 1, -1, 2**31, into="total_next")
    g.add("ReduceMax", g.reshape("x", 0, -1, 4), into="peak", axes=[2], keepdims=0)
    g.add("Identity", "total_next", into="sum")
    before, after = _carried(("total", "batch", 1))
    shapes: dict[str, tuple[str | int, ...]] = {
        "running": ("batch", "time"),
        "peak": ("batch", "fours"),
        "sum": ("batch", 1),
    }
    outputs = [value(name, FLOAT, *shape) for name, shape in shapes.items()]
    timed: dict[str, Manifest] = {
        "running": {"time_axis": 1},
        "peak": {"time_axis": 1, "stride": 4},
        "sum": {},
    }
    x = _tensor("x", "batch", "time", time_axis=1, chunk={"multiple": 4}, tail="pad")
    return g.model([value("x", FLOAT, "batch", "time"), *before], [*outputs, *after]), {
        "format": 1,
        "max_frames": 6,
        "inputs": [x],
        "states": [_state("total", "batch", 1)],
        "outputs": [_tensor(name, *shape) | timed[name] for name, shape in shapes.items()],
    }


def equaliser() -> Made:
    """Three bands, each times its own gain (a constant of three numbers) and a volume (one number); both may
    be chosen. The state is what came out before, a tenth of which is added."""
    g = _Graph(seed=0)
    louder = g.add("Mul", g.add("Mul", "x", "gains"), "volume")
    g.add("Add", louder, g.add("Mul", "echo", g.constant(np.float32(0.1))), into="y")
    g.add("Identity", "y", into="echo_next")
    before, after = _carried(("echo", "batch", 3))
    inputs = [value("gains", FLOAT, 3), value("x", FLOAT, "batch", 3), value("volume", FLOAT), *before]
    return g.model(inputs, [value("y", FLOAT, "batch", 3), *after]), {
        "format": 1,
        "inputs": [_tensor("x", "batch", 3)],
        "constants": [
            {"name": "gains", "dtype": "float32", "shape": [3], "value": [0.5, 1, 2], "allowed": [3, 5]},
            {"name": "volume", "dtype": "float32", "value": 1, "allowed": [1, 2, 4]},
        ],
        "states": [_state("echo", "batch", 3)],
        "outputs": [_tensor("y", "batch", 3)],
    }


# What the sequences of `primed` begin with.
PRIMED = np.random.default_rng(9).normal(0, 0.5, (2, 6)).astype(np.float32)


def primed() -> Made:
    """Two stacked layers whose first states were trained and are stored, not zeros; batch in the middle."""
    g = _Graph(seed=9)
    y, new = "x", []
    for layer, size in enumerate((4, 6)):
        weights = g.weight(1, 18, size), g.weight(1, 18, 6), g.weight(1, 36)
        h = g.part("h", 0, layer, layer + 1)
        names = [f"every_{layer}", f"h_{layer}"]
        g.add_many("GRU", y, *weights, "", h, into=names, hidden_size=6)
        y = g.squeeze(names[0], 1, into="y" if layer else "")
        new.append(names[1])
    g.add("Concat", *new, into="h_next", axis=0)
    before, after = _carried(("h", 2, "batch", 6))
    time = {"time_axis": 0, "batch_axis": 1}
    made = g.model(
        [value("x", FLOAT, "time", "batch", 4), *before], [value("y", FLOAT, "time", "batch", 6), *after]
    )
    return made, {
        "format": 1,
        "max_frames": 8,
        "inputs": [_tensor("x", "time", "batch", 4) | time],
        "states": [_state("h", 2, "batch", 6, batch_axis=1, init=PRIMED.ravel().tolist())],
        "outputs": [_tensor("y", "time", "batch", 6) | time],
    }


def time_major() -> Made:
    """An LSTM as the operator takes it: time first, batch second, each row's length beside it."""
    g = _Graph(seed=5)
    weights = g.weight(1, 32, 3), g.weight(1, 32, 8), g.weight(1, 64)
    names = ["every", "h_next", "c_next"]
    g.add_many("LSTM", "x", *weights, "lengths", "h", "c", into=names, hidden_size=8)
    g.squeeze("every", 1, into="y")
    before, after = _carried(("h", 1, "batch", 8), ("c", 1, "batch", 8))
    inputs = [value("x", FLOAT, "time", "batch", 3), value("lengths", INT32, "batch"), *before]
    time = {"time_axis": 0, "batch_axis": 1}
    return g.model(inputs, [value("y", FLOAT, "time", "batch", 8), *after]), {
        "format": 1,
        "max_frames": 8,
        "inputs": [_tensor("x", "time", "batch", 3, lengths="lengths") | time],
        "states": [_state(name, 1, "batch", 8, batch_axis=1) for name in ("h", "c")],
        "outputs": [_tensor("y", "time", "batch", 8) | time],
    }


def fours() -> Made:
    """A recurrent layer exported for batches of exactly four."""
    g = _Graph(seed=4)
    weights = g.weight(1, 5, 3), g.weight(1, 5, 5), g.weight(1, 10)
    names = ["every", "h_next"]
    g.add_many("RNN", g.unsqueeze("x", 0), *weights, "", "h", into=names, hidden_size=5)
    g.squeeze("h_next", 0, into="y")
    before, after = _carried(("h", 1, 4, 5))
    return g.model([value("x", FLOAT, 4, 3), *before], [value("y", FLOAT, 4, 5), *after]), {
        "format": 1,
        "fixed_batch": 4,
        "inputs": [_tensor("x", 4, 3)],
        "states": [_state("h", 1, 4, 5, batch_axis=1)],
        "outputs": [_tensor("y", 4, 5)],
    }


def thirds() -> Made:
    """A running sum with two frames for every three samples, which no stride can say: the graph counts them
    itself."""
    g = _Graph(seed=0)
    pairs = g.constant(np.array([[1, 0], [1, 1], [0, 1]], np.float32))
    flat = g.reshape(g.add("MatMul", g.reshape("x", 0, -1, 3), pairs), 0, -1)
    sums = g.add("CumSum", g.add("Concat", "total", flat, axis=1), g.constant(np.int64(1)))
    g.part(sums, 1, 1, 2**31, into="y")
    g.part(sums, 1, -1, 2**31, into="total_next")  # padding is zeros
    turns = g.add("Div", "lengths", g.constant(np.int32(3)))
    g.add("Add", turns, turns, into="counts")
    before, after = _carried(("total", "batch", 1))
    inputs = [value("x", FLOAT, "batch", "time"), value("lengths", INT32, "batch"), *before]
    y, counts = value("y", FLOAT, "batch", "frames"), value("counts", INT32, "batch")
    x = _tensor("x", "batch", "time", time_axis=1, chunk={"multiple": 3}, lengths="lengths")
    return g.model(inputs, [y, counts, *after]), {
        "format": 1,
        "max_frames": 8,
        "inputs": [x],
        "states": [_state("total", "batch", 1)],
        "outputs": [_tensor("y", "batch", "frames", time_axis=1, lengths_output="counts")],
    }


def undeclared() -> Made:
    """An exporter's wrong and missing words: an output that is said to be [batch, 7] and is [batch, 2], and a
    state of unknown axes."""
    g = _Graph(seed=6)
    g.add("Tanh", g.add("Add", g.add("MatMul", "x", g.weight(3, 2)), "h"), into="h_next")
    g.add("Identity", "h_next", into="y")
    made = onnx.load_model_from_string(
        g.model(
            [value("x", FLOAT, "batch", 3), value("h", FLOAT, "batch", 2)],
            [value("y", FLOAT, "batch", 2), value("h_next", FLOAT, "batch", 2)],
        )
    )
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    made.graph.output[1].type.tensor_type.shape.dim[1].dim_param = "unk__12"
    return made.SerializeToString(), {
        "format": 1,
        "inputs": [_tensor("x", "batch", 3)],
        "states": [_state("h", "batch", 2)],
        "outputs": [_tensor("y", "batch", 2)],
    }


def enrolled() -> Made:
    """A layer that begins with what its caller brings, an embedding of a speaker, and forgets it slowly."""
    g = _Graph(seed=7)
    g.add("Tanh", g.add("Add", g.add("MatMul", "x", g.weight(3, 4)), "voice"), into="voice_next")
    g.add("Identity", "voice_next", into="y")
    before, after = _carried(("voice", "batch", 4))
    made = g.model([value("x", FLOAT, "batch", 3), *before], [value("y", FLOAT, "batch", 4), *after])
    return made, {
        "format": 1,
        "inputs": [_tensor("x", "batch", 3)],
        "states": [_state("voice", "batch", 4, init="given")],
        "outputs": [_tensor("y", "batch", 4)],
    }


_KINDS = {"start": ("START", FLOAT, "float32"), "end": ("END", FLOAT, "float32"),
          "ready": ("READY", INT32, "int32"), "sequence_id": ("CORRID", INT64, "int64")}  # fmt: skip


def self_resetting() -> Made:
    """A sum that its graph resets at START, counts only where READY, and tells with a minus at END; and the
    number by which the model knows its caller. What the state begins with is rubbish."""
    g = _Graph(seed=0)
    ready = g.add("Cast", "READY", to=FLOAT)
    kept = g.add("Mul", "total", g.add("Sub", g.constant(np.float32(1)), "START"))
    g.add("Add", kept, g.add("Mul", "x", ready), into="total_next")
    sign = g.add("Sub", g.constant(np.float32(1)), g.add("Add", "END", "END"))
    g.add("Mul", "total_next", sign, into="sum")
    g.add("Identity", "CORRID", into="caller")
    controls = [value(name, kind, "batch", 1) for name, kind, _ in _KINDS.values()]
    before, after = _carried(("total", "batch", 1))
    outputs = [value("sum", FLOAT, "batch", 1), value("caller", INT64, "batch", 1)]
    return g.model([value("x", FLOAT, "batch", 1), *controls, *before], [*outputs, *after]), {
        "format": 1,
        "inputs": [_tensor("x", "batch", 1)],
        "controls": [
            {"name": name, "kind": kind, "dtype": dtype, "shape": ["batch", 1]}
            for kind, (name, _, dtype) in _KINDS.items()
        ],
        "states": [_state("total", "batch", 1, init={"value": 1000.0})],
        "outputs": [_tensor("sum", "batch", 1), _tensor("caller", "batch", 1, dtype="int64")],
    }
