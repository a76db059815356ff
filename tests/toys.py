"""Small models that make a mistake visible, written as ONNX graphs.

`accumulator`: every output frame is the sum of all that its sequence ever sent, so cross-talk between two
sequences shows as a number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tenuto.serving.sampling import Uniforms

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
Manifest = dict[str, Any]
# Where a graph cuts its sums: all but the first column, and the last one.
_CUTS = {
    name: np.array([at], np.int64) for name, at in (("from", 1), ("to", 2**31), ("axes", 1), ("last", -1))
}


def model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any] | None = None
) -> bytes:
    """Serialized bytes of a checked graph, opset 17, IR 10."""
    initial = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initial)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def value(name: str, kind: int, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def write(root: Path, name: str, made: tuple[bytes, Manifest], version: int = 1) -> Path:
    """`root/name/version/` with model.onnx and manifest.json."""
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(made[0])
    (folder / "manifest.json").write_text(json.dumps(made[1] | {"name": name}))
    return folder


def accumulator(*, ragged: bool = True, scale: float = 1.0, **changes: Any) -> tuple[bytes, Manifest]:
    """x [batch, time] -> y [batch, time], the running sum; the state is the sum so far. Another `scale`, of
    the outputs alone, makes another version."""
    nodes = [
        helper.make_node("Concat", ["total", "x"], ["all"], axis=1),
        helper.make_node("CumSum", ["all", "one"], ["sums"]),
        helper.make_node("Slice", ["sums", "from", "to", "axes"], ["running"]),
        helper.make_node("Mul", ["running", "scale"], ["y"]),
        helper.make_node("Slice", ["sums", "last", "to", "axes"], ["total_next"]),
    ]
    # Padding is zeros, so the last column is each row's own total whatever its length.
    constants = {"one": np.int64(1), "scale": np.float32(scale), **_CUTS}
    inputs = [value("x", FLOAT, "batch", "time"), value("total", FLOAT, "batch", 1)]
    if ragged:
        inputs.append(value("lengths", INT32, "batch"))
        nodes.append(helper.make_node("Identity", ["lengths"], ["seen"]))
    outputs = [value("y", FLOAT, "batch", "time"), value("total_next", FLOAT, "batch", 1)]
    x = {"name": "x", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1} | changes.pop("x", {})
    manifest = {
        "format": 1,
        "name": "accumulator",
        "inputs": [x | ({"lengths": "lengths"} if ragged else {})],
        "states": [{"input": "total", "output": "total_next", "dtype": "float32", "shape": ["batch", 1]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}],
        "max_frames": 8,
    }
    return model(nodes, inputs, outputs, constants), manifest | changes


def doubler(**changes: Any) -> tuple[bytes, Manifest]:
    """Stateless: x [batch, 2] -> y = 2 x."""
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    made = model(nodes, [value("x", FLOAT, "batch", 2)], [value("y", FLOAT, "batch", 2)])
    manifest = {
        "format": 1,
        "name": "doubler",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2]}],
        "max_batch": 8,
    }
    return made, manifest | changes


def brightness(side: int = 4) -> tuple[bytes, Manifest]:
    """Stateless image model: [batch, side, side] in 0…1 -> the mean of each image."""
    nodes = [helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2], keepdims=0)]
    made = model(nodes, [value("image", FLOAT, "batch", side, side)], [value("mean", FLOAT, "batch")])
    wire = [{"dtype": "uint8", "scale": 1 / 255}, {"encoding": "png"}, {"encoding": "jpeg"}]
    manifest = {
        "format": 1,
        "name": "brightness",
        "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", side, side], "wire": wire}],
        "outputs": [{"name": "mean", "dtype": "float32", "shape": ["batch"]}],
    }
    return made, manifest


def lookup(*, checked: bool = True) -> tuple[bytes, Manifest]:
    """Stateful: index [batch, time] into a table of four; adds up. An index of 9 fails the whole run, unless
    the manifest's range stops it before."""
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["x"], axis=0),
        helper.make_node("Concat", ["total", "x"], ["all"], axis=1),
        helper.make_node("CumSum", ["all", "one"], ["sums"]),
        helper.make_node("Slice", ["sums", "from", "to", "axes"], ["y"]),
        helper.make_node("Slice", ["sums", "last", "to", "axes"], ["total_next"]),
    ]
    constants = {"table": np.array([0, 1, 10, 100], np.float32), "one": np.int64(1), **_CUTS}
    inputs = [value("index", INT64, "batch", "time"), value("total", FLOAT, "batch", 1)]
    outputs = [value("y", FLOAT, "batch", "time"), value("total_next", FLOAT, "batch", 1)]
    index: dict[str, Any] = {
        "name": "index",
        "dtype": "int64",
        "shape": ["batch", "time"],
        "time_axis": 1,
    }
    manifest = {
        "format": 1,
        "name": "lookup",
        "inputs": [index | ({"range": [0, 3]} if checked else {})],
        "states": [{"input": "total", "output": "total_next", "dtype": "float32", "shape": ["batch", 1]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}],
    }
    return model(nodes, inputs, outputs, constants), manifest


def explosive() -> tuple[bytes, Manifest]:
    """Stateful: the state is multiplied by x at every step, so 1e30 twice makes it Inf."""
    nodes = [
        helper.make_node("Mul", ["state", "x"], ["state_next"]),
        helper.make_node("Neg", ["x"], ["y"]),
    ]
    inputs = [value("x", FLOAT, "batch", 1), value("state", FLOAT, "batch", 1)]
    outputs = [value("y", FLOAT, "batch", 1), value("state_next", FLOAT, "batch", 1)]
    state = {"input": "state", "output": "state_next", "dtype": "float32", "shape": ["batch", 1]}
    manifest = {
        "format": 1,
        "name": "explosive",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 1]}],
        "states": [state | {"init": {"value": 1.0}}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 1]}],
    }
    return model(nodes, inputs, outputs), manifest


# The characters of `speaker`, and what it says after each sum.
ALPHABET = "\n abcé€😀"
UNIFORMS = Uniforms()
SPEECH = np.random.default_rng(5).normal(0, 1.5, (97, len(ALPHABET))).astype(np.float32)


def speaker(**changes: Any) -> tuple[bytes, Manifest]:
    """Generates: id [batch, time] -> logits [batch, time, 8], the row of a table at the sum of all ids that
    its sequence ever ate, modulo 97. So what it says next depends on everything before, exactly. `sum` tells
    that sum."""
    nodes = [
        helper.make_node("Concat", ["total", "id"], ["all"], axis=1),
        helper.make_node("CumSum", ["all", "one"], ["sums"]),
        helper.make_node("Slice", ["sums", "from", "to", "axes"], ["sum"]),
        helper.make_node("Slice", ["sums", "last", "to", "axes"], ["total_next"]),
        helper.make_node("Mod", ["sum", "rows"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["logits"], axis=0),
        helper.make_node("Identity", ["lengths"], ["seen"]),
    ]
    constants = {"one": np.int64(1), "rows": np.int64(len(SPEECH)), "table": SPEECH, **_CUTS}
    inputs = [value("id", INT64, "batch", "time"), value("total", INT64, "batch", 1)]
    inputs.append(value("lengths", INT32, "batch"))
    outputs = [value("logits", FLOAT, "batch", "time", len(ALPHABET)), value("sum", INT64, "batch", "time")]
    outputs.append(value("total_next", INT64, "batch", 1))
    letters = {"encoding": "utf8", "tokens": "characters", "alphabet": ALPHABET}
    steps = {"shape": ["batch", "time"], "time_axis": 1}
    manifest = {
        "format": 1,
        "name": "speaker",
        "inputs": [
            {"name": "id", "dtype": "int64", "range": [0, 7], "wire": [letters], "lengths": "lengths"} | steps
        ],
        "states": [{"input": "total", "output": "total_next", "dtype": "int64", "shape": ["batch", 1]}],
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": ["batch", "time", 8], "time_axis": 1},
            {"name": "sum", "dtype": "int64"} | steps,
        ],
        "generate": {"output": "logits", "input": "id", "sampling": "categorical"},
        "max_frames": 8,
    }
    return model(nodes, inputs, outputs, constants), manifest | changes


def spoken(
    steps: list[tuple[str, int]], seed: int = 1, temperature: float = 1.0, top_k: int = 0
) -> list[int]:
    """What `speaker` must say to each (text, count), step by step: worked out without a server."""
    total, said = 0, []
    for step, (text, count) in enumerate(steps, 1):
        total += sum(ALPHABET.index(c) for c in text)
        for part in range(1, count + 1):
            weights = np.exp(SPEECH[total % len(SPEECH)].astype(np.float64) / temperature)
            kept = sorted(np.argsort(-weights, kind="stable")[: top_k or None].tolist())
            place = UNIFORMS.draw(seed, step, part, 1)[0] * weights[kept].sum()
            said.append(kept[int(np.argmax(np.cumsum(weights[kept]) > place))])
            total += said[-1]
    return said


def reader(**changes: Any) -> tuple[bytes, Manifest]:
    """`speaker` that reads words: id is a word's bucket, and it generates nothing."""
    made, manifest = speaker()
    words = {"encoding": "utf8", "tokens": "words", "buckets": 1000}
    manifest["inputs"][0] |= {"wire": [words], "range": [0, 999]}
    del manifest["generate"]
    return made, manifest | {"name": "reader"} | changes


KEYS = np.random.default_rng(6).uniform(0.05, 0.95, (97, 6)).astype(np.float32)


def player(**changes: Any) -> tuple[bytes, Manifest]:
    """Generates chords: keys [batch, time, 6], each 0 or 1 -> probabilities [batch, time, 6], the row of a
    table at the sum of all keys ever played, the i-th counting i, modulo 97."""
    nodes = [
        helper.make_node("MatMul", ["keys", "weights"], ["played"]),
        helper.make_node("Squeeze", ["played", "last"], ["x"]),
        helper.make_node("Concat", ["total", "x"], ["all"], axis=1),
        helper.make_node("CumSum", ["all", "one"], ["sums"]),
        helper.make_node("Slice", ["sums", "from", "to", "axes"], ["sum"]),
        helper.make_node("Slice", ["sums", "last", "to", "axes"], ["total_next"]),
        helper.make_node("Cast", ["sum"], ["whole"], to=INT64),
        helper.make_node("Mod", ["whole", "rows"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["chord"], axis=0),
    ]
    weights = np.arange(1, 7, dtype=np.float32)[:, None]
    constants = {"one": np.int64(1), "rows": np.int64(len(KEYS)), "table": KEYS, "weights": weights, **_CUTS}
    inputs = [value("keys", FLOAT, "batch", "time", 6), value("total", FLOAT, "batch", 1)]
    outputs = [value("chord", FLOAT, "batch", "time", 6), value("total_next", FLOAT, "batch", 1)]
    steps = {"dtype": "float32", "shape": ["batch", "time", 6], "time_axis": 1}
    manifest = {
        "format": 1,
        "name": "player",
        "inputs": [{"name": "keys"} | steps],
        "states": [{"input": "total", "output": "total_next", "dtype": "float32", "shape": ["batch", 1]}],
        "outputs": [{"name": "chord", "activation": "sigmoid"} | steps],
        "generate": {"output": "chord", "input": "keys", "sampling": "bernoulli"},
    }
    return model(nodes, inputs, outputs, constants), manifest | changes


def gain() -> tuple[bytes, Manifest]:
    """Stateful: y = gain * x + the sum of all gained x before; a client may choose the gain 1, 2 or 10."""
    nodes = [
        helper.make_node("Mul", ["x", "gain"], ["gained"]),
        helper.make_node("Add", ["total", "gained"], ["y"]),
        helper.make_node("Identity", ["y"], ["total_next"]),
    ]
    inputs = [value("x", FLOAT, "batch", 1), value("gain", FLOAT), value("total", FLOAT, "batch", 1)]
    outputs = [value("y", FLOAT, "batch", 1), value("total_next", FLOAT, "batch", 1)]
    manifest = {
        "format": 1,
        "name": "gain",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 1]}],
        "constants": [{"name": "gain", "dtype": "float32", "value": 1.0, "allowed": [1.0, 2.0, 10.0]}],
        "states": [{"input": "total", "output": "total_next", "dtype": "float32", "shape": ["batch", 1]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 1]}],
    }
    return model(nodes, inputs, outputs), manifest


def spinner() -> tuple[bytes, Manifest]:
    """Stateful: adds 1 as often as `turns` says, in a loop, so that a client decides how long a run takes."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["sum_in", "one"], ["sum_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "body",
        [value("i", INT64), value("go_in", TensorProto.BOOL), value("sum_in", FLOAT, "batch", 1)],
        [value("go_out", TensorProto.BOOL), value("sum_out", FLOAT, "batch", 1)],
    )
    nodes = [
        helper.make_node("ReduceMax", ["turns"], ["most"], keepdims=0),
        helper.make_node("Loop", ["most", "", "total"], ["total_next"], body=body),
        helper.make_node("Identity", ["total_next"], ["y"]),
    ]
    inputs = [value("turns", INT64, "batch", 1), value("total", FLOAT, "batch", 1)]
    outputs = [value("y", FLOAT, "batch", 1), value("total_next", FLOAT, "batch", 1)]
    manifest = {
        "format": 1,
        "name": "spinner",
        "inputs": [{"name": "turns", "dtype": "int64", "shape": ["batch", 1]}],
        "states": [{"input": "total", "output": "total_next", "dtype": "float32", "shape": ["batch", 1]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 1]}],
    }
    return model(nodes, inputs, outputs, {"one": np.float32(1)}), manifest


def endless() -> tuple[bytes, Manifest]:
    """Loads well, and its first run takes years."""
    made, manifest = spinner()
    proto = onnx.load_model_from_string(made)
    proto.graph.node[0].CopyFrom(helper.make_node("Identity", ["years"], ["most"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(10**15, np.int64), "years"))
    proto.graph.node.append(helper.make_node("Identity", ["turns"], ["unused"]))
    return bytes(proto.SerializeToString()), manifest | {"name": "endless"}


def heavy(weights_bytes: int, state_bytes: int) -> tuple[bytes, Manifest]:
    """Stateful: adds the entry `index` of a large table to every number of a large state; y is the first."""
    width = state_bytes // 4
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["x"], axis=0),
        helper.make_node("Add", ["state", "x"], ["state_next"]),
        helper.make_node("Slice", ["state_next", "first", "second", "axes"], ["y"]),
    ]
    table = np.arange(weights_bytes // 4, dtype=np.float32)
    cuts = {name: np.array([at], np.int64) for name, at in (("first", 0), ("second", 1), ("axes", 1))}
    inputs = [value("index", INT64, "batch", 1), value("state", FLOAT, "batch", width)]
    outputs = [value("y", FLOAT, "batch", 1), value("state_next", FLOAT, "batch", width)]
    state = {"input": "state", "output": "state_next", "dtype": "float32", "shape": ["batch", width]}
    manifest = {
        "format": 1,
        "name": "heavy",
        "inputs": [{"name": "index", "dtype": "int64", "shape": ["batch", 1]}],
        "states": [state],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 1]}],
        "max_batch": 8,
    }
    return model(nodes, inputs, outputs, {"table": table, **cuts}), manifest


def teller(**changes: Any) -> tuple[bytes, Manifest]:
    """x [batch] -> y [batch, 5]: the sum since `start`, whatever the state was before, and what the controls
    said: start, end, ready, and the sequence's number modulo a million."""
    nodes = [
        helper.make_node("Reshape", ["x", "column"], ["new"]),
        helper.make_node("Add", ["total", "new"], ["more"]),
        helper.make_node("Cast", ["start"], ["begins"], to=TensorProto.BOOL),
        helper.make_node("Where", ["begins", "new", "more"], ["total_next"]),
        helper.make_node("Cast", ["start"], ["start_as"], to=FLOAT),
        helper.make_node("Cast", ["end"], ["end_as"], to=FLOAT),
        helper.make_node("Reshape", ["ready", "column"], ["ready_as"]),
        helper.make_node("Mod", ["id", "million"], ["id_rest"]),
        helper.make_node("Cast", ["id_rest"], ["id_float"], to=FLOAT),
        helper.make_node("Reshape", ["id_float", "column"], ["id_as"]),
        helper.make_node("Concat", ["total_next", "start_as", "end_as", "ready_as", "id_as"], ["y"], axis=1),
    ]
    inputs = [
        value("x", FLOAT, "batch"),
        value("total", FLOAT, "batch", 1),
        value("start", INT32, "batch", 1),
        value("end", TensorProto.BOOL, "batch", 1),
        value("ready", FLOAT, "batch"),
        value("id", INT64, "batch"),
    ]
    outputs = [value("y", FLOAT, "batch", 5), value("total_next", FLOAT, "batch", 1)]
    constants = {"column": np.array([-1, 1], np.int64), "million": np.int64(1_000_000)}
    column = {"shape": ["batch", 1]}
    manifest = {
        "format": 1,
        "name": "teller",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch"]}],
        "states": [
            {"input": "total", "output": "total_next", "dtype": "float32", "init": {"value": 7.0}} | column
        ],
        "controls": [
            {"name": "start", "kind": "start", "dtype": "int32"} | column,
            {"name": "end", "kind": "end", "dtype": "bool"} | column,
            {"name": "ready", "kind": "ready", "dtype": "float32", "values": [-1.0, 1.0]},
            {"name": "id", "kind": "sequence_id", "dtype": "int64"},
        ],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 5]}],
    }
    return model(nodes, inputs, outputs, constants), manifest | changes


def counter(**changes: Any) -> tuple[bytes, Manifest]:
    """x [batch, time] -> y [batch, time]: of each run's samples as many as the first of them says; so long as
    that is a number that the run has."""
    made, manifest = accumulator(ragged=False, name="counter")
    proto = onnx.load_from_string(made)
    proto.graph.node.extend(
        [
            helper.make_node("Slice", ["x", "zero", "from", "axes"], ["first"]),
            helper.make_node("Cast", ["first"], ["count"], to=INT64),
        ]
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "zero"))
    proto.graph.output.append(value("count", INT64, "batch", 1))
    y = {
        "name": "y",
        "dtype": "float32",
        "shape": ["batch", "time"],
        "time_axis": 1,
        "lengths_output": "count",
    }
    return bytes(proto.SerializeToString()), manifest | {"outputs": [y]} | changes


def single(**changes: Any) -> tuple[bytes, Manifest]:
    """The accumulator as a graph of one row whose state has no batch axis: x [1, time], total [1]."""
    nodes = [
        helper.make_node("Unsqueeze", ["total", "zero"], ["before"]),
        helper.make_node("Concat", ["before", "x"], ["all"], axis=1),
        helper.make_node("CumSum", ["all", "one"], ["sums"]),
        helper.make_node("Slice", ["sums", "from", "to", "axes"], ["y"]),
        helper.make_node("Slice", ["sums", "last", "to", "axes"], ["after"]),
        helper.make_node("Squeeze", ["after", "zero"], ["total_next"]),
    ]
    inputs = [value("x", FLOAT, 1, "time"), value("total", FLOAT, 1)]
    outputs = [value("y", FLOAT, 1, "time"), value("total_next", FLOAT, 1)]
    constants = {"one": np.int64(1), "zero": np.array([0], np.int64), **_CUTS}
    series = {"dtype": "float32", "shape": [1, "time"], "time_axis": 1}
    manifest = {
        "format": 1,
        "name": "single",
        "inputs": [{"name": "x"} | series],
        "states": [
            {"input": "total", "output": "total_next", "dtype": "float32", "shape": [1], "batch_axis": None}
        ],
        "outputs": [{"name": "y"} | series],
        "fixed_batch": 1,
        "max_frames": 8,
    }
    return model(nodes, inputs, outputs, constants), manifest | changes
