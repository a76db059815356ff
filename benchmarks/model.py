"""The benchmark's models: a two-layer LSTM of width 128 with random weights, and the digits CNN."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

NAME = "lstm"
INPUTS, WIDTH, OUTPUTS, LAYERS = 40, 128, 12, 2
STATES = ("h", "c")
SEED = 20261122
IMAGES, IMAGE = "digits", (28, 28)
EXPORTED = Path(__file__).parents[1] / "exported"

Floats = NDArray[np.float32]


def manifest() -> dict[str, object]:
    """What the model says of itself, as `tenuto.serving.manifest` reads it."""
    states = [
        {
            "input": state,
            "output": f"{state}_next",
            "dtype": "float32",
            "shape": [LAYERS, "batch", WIDTH],
            "batch_axis": 1,
            "init": "zeros",
        }
        for state in STATES
    ]
    x = {"name": "x", "dtype": "float32", "shape": ["batch", "time", INPUTS], "batch_axis": 0}
    y = {"name": "y", "dtype": "float32", "shape": ["batch", "time", OUTPUTS], "batch_axis": 0}
    return {
        "format": 1,
        "name": NAME,
        "description": "Two LSTM layers of width 128 with random weights, for benchmarks.",
        "licence": "Apache-2.0",
        "inputs": [{**x, "time_axis": 1, "chunk": "free", "lengths": "lengths"}],
        "states": states,
        "outputs": [{**y, "time_axis": 1, "stride": 1}],
        "max_batch": 64,
        "max_frames": 32,
    }


@dataclass(frozen=True, slots=True)
class Repository:
    """A folder that `tenuto serve` takes, and the two model files in it."""

    folder: Path

    @property
    def lstm(self) -> Path:
        return self.folder / NAME / "1" / "model.onnx"

    @property
    def images(self) -> Path:
        return self.folder / IMAGES / "1" / "model.onnx"


def write_repository(folder: Path) -> Repository:
    """Writes the LSTM with its manifest, and copies the CNN."""
    repository = Repository(folder)
    shutil.copytree(EXPORTED / IMAGES, folder / IMAGES)
    version = folder / NAME / "1"
    version.mkdir(parents=True)
    text = json.dumps(manifest(), indent=2)
    (version / "manifest.json").write_text(text + "\n")
    model = build()
    helper.set_model_props(model, {"tenuto.manifest": text})
    repository.lstm.write_bytes(model.SerializeToString())
    return repository


def build() -> onnx.ModelProto:
    """x [batch, time, 40], lengths [batch], h and c [2, batch, 128] -> y [batch, time, 12]."""
    nodes = [helper.make_node("Transpose", ["x"], ["frames"], perm=[1, 0, 2])]  # [time, batch, …]
    nodes += [helper.make_node("Split", [s], [f"{s}0", f"{s}1"], axis=0) for s in STATES]
    nodes += _layer(0, "frames") + _layer(1, "frames0")
    nodes += [
        helper.make_node("MatMul", ["frames1", "W"], ["product"]),
        helper.make_node("Add", ["product", "B"], ["sum"]),
        helper.make_node("Transpose", ["sum"], ["y"], perm=[1, 0, 2]),
    ]
    nodes += [helper.make_node("Concat", [f"{s}0_next", f"{s}1_next"], [f"{s}_next"], axis=0) for s in STATES]
    value = helper.make_tensor_value_info
    state: list[str | int | None] = [LAYERS, "batch", WIDTH]
    inputs = [value("x", TensorProto.FLOAT, ["batch", "time", INPUTS])]
    inputs += [value("lengths", TensorProto.INT32, ["batch"])]
    inputs += [value(s, TensorProto.FLOAT, state) for s in STATES]
    outputs = [value("y", TensorProto.FLOAT, ["batch", "time", OUTPUTS])]
    outputs += [value(f"{s}_next", TensorProto.FLOAT, state) for s in STATES]
    weights = [numpy_helper.from_array(array, name) for name, array in _weights().items()]
    graph = helper.make_graph(nodes, NAME, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _layer(number: int, frames: str) -> list[onnx.NodeProto]:
    weights = [f"W{number}", f"R{number}", f"B{number}"]
    states = [f"h{number}", f"c{number}"]
    outputs = [f"directions{number}", *(f"{state}_next" for state in states)]
    return [
        helper.make_node("LSTM", [frames, *weights, "lengths", *states], outputs, hidden_size=WIDTH),
        helper.make_node("Squeeze", [outputs[0], "direction_axis"], [f"frames{number}"]),
    ]


def _weights() -> Mapping[str, NDArray[np.float32] | NDArray[np.int64]]:
    rng = np.random.default_rng(SEED)
    bound = WIDTH**-0.5

    def uniform(*shape: int) -> Floats:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    arrays: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
        "direction_axis": np.array([1], np.int64),
        "W": uniform(WIDTH, OUTPUTS),
        "B": uniform(OUTPUTS),
    }
    for number, width in enumerate((INPUTS, WIDTH)):
        arrays[f"W{number}"] = uniform(1, 4 * WIDTH, width)
        arrays[f"R{number}"] = uniform(1, 4 * WIDTH, WIDTH)
        arrays[f"B{number}"] = uniform(1, 8 * WIDTH)
    return arrays


def session(path: Path) -> ort.InferenceSession:
    """ONNX Runtime on the CPU with one thread that does not spin, for the baselines."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def zero_state(batch: int = 1) -> dict[str, Floats]:
    """What a sequence remembers before its first frame: each state by its input's name."""
    return {state: np.zeros((LAYERS, batch, WIDTH), np.float32) for state in STATES}


def alone(runner: ort.InferenceSession, frames: Floats) -> Floats:
    """[time, 12]: what one sequence gets for `frames` [time, 40], alone and in one run."""
    feeds = {"x": frames[None], "lengths": np.array([len(frames)], np.int32), **zero_state()}
    y: Floats = runner.run(["y"], feeds)[0][0]
    return y
