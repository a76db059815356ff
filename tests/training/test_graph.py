"""The hand-built graphs: torch's LSTM and ours are the same function."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tenuto.training.graph import IR_VERSION, OPSET, Graph, add_lstm


def test_a_constant_has_one_value() -> None:
    graph = Graph("toy")
    assert graph.constant("one", 1.0) == graph.constant("one", 1.0)
    with pytest.raises(ValueError, match="one has two values"):
        graph.constant("one", 2.0)


def test_lstm_is_torchs_at_each_rows_own_length(one_thread: Any) -> None:
    torch = one_thread
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(5, 8)
    graph = Graph("toy")
    graph.input("x", "float32", ["time", "batch", 5])
    graph.input("lengths", "int32", ["batch"])
    for name in ("h", "c"):
        graph.input(name, "float32", [1, "batch", 8])
    weights = {name: value.numpy() for name, value in lstm.state_dict().items()}
    y = add_lstm(graph, "lstm", weights, "x", "lengths", ("h", "c"), ("h_next", "c_next"))
    graph.output(y, "float32", ["time", "batch", 8])
    for name in ("h_next", "c_next"):
        graph.output(name, "float32", [1, "batch", 8])
    model = graph.model({"key": "value"})

    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 3, 5)).astype(np.float32)
    h, c = rng.standard_normal((2, 1, 3, 8)).astype(np.float32)
    lengths = np.array([6, 1, 4], np.int32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x, "lengths": lengths, "h": h, "c": c})
    for row, length in enumerate(lengths):
        one = [torch.from_numpy(value[:, row : row + 1]) for value in (x[:length], h, c)]
        with torch.no_grad():
            expected, (h_next, c_next) = lstm(one[0], (one[1], one[2]))
        np.testing.assert_allclose(got[0][:length, row], expected[:, 0].numpy(), atol=1e-6)
        np.testing.assert_allclose(got[1][:, row], h_next[:, 0].numpy(), atol=1e-6)
        np.testing.assert_allclose(got[2][:, row], c_next[:, 0].numpy(), atol=1e-6)


def test_files_load_in_older_runtimes() -> None:
    graph = Graph("toy")
    graph.node("Identity", [graph.input("x", "float32", ["batch"])], "y")
    graph.output("y", "float32", ["batch"])
    model = onnx.load_from_string(graph.model({"key": "value"}))
    assert model.ir_version == IR_VERSION <= 10
    assert [entry.version for entry in model.opset_import] == [OPSET]
    assert [(prop.key, prop.value) for prop in model.metadata_props] == [("key", "value")]
