"""ONNX's own test cases of recurrent operators, STFT and the like: each is served and answers as its data
says, or is refused with why. One server has them all, so that none of the refused disturbs the others.

Their weights are inputs of the graph: the manifest makes constants of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from tenuto import Client, Unavailable
from tenuto.serving.server import Server
from tests import toys
from tests.integration.running import TRANSPORTS, serving

Array = NDArray[Any]
# What ONNX Runtime differs by from the cases' own arithmetic: recurrent layers by so much, sums of squares
# and products, as the STFT's, by that share of their largest value.
RECURRENT, OF_THE_LARGEST = 5e-7, 1e-6
# A part of the name, and what the refusal says.
REFUSED = {
    "_batchwise": "Batchwise recurrent operations (layout == 1) are not supported",
    "reversesequence_": "Unsupported model IR version: 14, max supported IR version: 13",
}
# Where each row of a batch lies: an operator's own convention. What is not listed is no row's: a constant.
ROWS = {"X": 1, "initial_h": 1, "initial_c": 1, "Y": 2, "Y_h": 1, "Y_c": 1, "sequence_lens": 0, "signal": 0,
        "x": 0, "y": 0}  # fmt: skip


class Case:
    """One folder: a graph, what goes in and what must come out."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.model = (folder / "model.onnx").read_bytes()
        graph = onnx.load_model_from_string(self.model).graph
        data = folder / "test_data_set_0"
        self.inputs = {t.name: _tensor(data / f"input_{i}.pb") for i, t in enumerate(graph.input)}
        self.outputs = {t.name: _tensor(data / f"output_{i}.pb") for i, t in enumerate(graph.output)}
        self.rows: dict[str, int | None] = {n: ROWS[n] for n in (*self.inputs, *self.outputs) if n in ROWS}
        if not self.rows:  # MelWeightMatrix has numbers alone: one of them is sent
            self.rows = {"lower_edge_hertz": None}
        self.sent = {n: a for n, a in self.inputs.items() if n in self.rows}
        first = next(iter(self.sent))
        axis = self.rows[first]
        self.batch = 1 if axis is None else self.inputs[first].shape[axis]
        is_recurrent = any(part in self.name for part in ("rnn", "gru", "lstm"))
        largest = max(np.abs(a.astype(np.float64)).max() for a in self.outputs.values())
        self.tolerance = RECURRENT if is_recurrent else OF_THE_LARGEST * largest

    @property
    def refusal(self) -> str:
        return next((text for part, text in REFUSED.items() if part in self.name), "")

    def manifest(self) -> dict[str, Any]:
        return {
            "format": 1,
            "fixed_batch": self.batch,
            "inputs": [self._said(n, a) for n, a in self.sent.items()],
            "constants": [
                {"name": n, "dtype": a.dtype.name, "shape": a.shape, "value": a.ravel().tolist()}
                for n, a in self.inputs.items()
                if n not in self.sent
            ],
            "outputs": [self._said(n, a) for n, a in self.outputs.items()],
        }

    def _said(self, name: str, example: Array) -> dict[str, Any]:
        dtype = "float32" if example.dtype.name == "bfloat16" else example.dtype.name
        return {"name": name, "dtype": dtype, "shape": example.shape, "batch_axis": self.rows.get(name)}


def _tensor(file: Path) -> Array:
    return numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    root = Path(os.environ.get("TENUTO_MODELS", "no-such-folder")) / "onnx_node"
    if not root.is_dir():
        pytest.skip("TENUTO_MODELS does not name a folder with onnx_node/")
    return {folder.name: Case(folder) for folder in sorted(root.glob("test_*"))}


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(
    request: pytest.FixtureRequest, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("operators")
    for name, case in cases.items():
        toys.write(root, name, (case.model, case.manifest()))
    with serving(root, vetted=True, transport=request.param) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}") as client:
        yield client


def test_each_is_served_or_refused_with_why(client: Client, cases: dict[str, Case]) -> None:
    found = {model.name: model for model in client.models()}
    assert len(cases) == 24
    assert set(found) == set(cases)
    for name, case in cases.items():
        assert found[name].state == ("FAILED" if case.refusal else "READY"), found[name].why
        assert case.refusal in found[name].why
        assert bool(found[name].why) == bool(case.refusal)
    assert sum(bool(case.refusal) for case in cases.values()) == 6


def test_the_served_ones_answer_as_their_data_says(client: Client, cases: dict[str, Case]) -> None:
    """As the batch of the case, every bit of what ONNX Runtime gives by itself; and a row at a time."""
    for name, case in cases.items():
        if case.refusal:
            continue
        own = dict(zip(case.outputs, _session(case).run(list(case.outputs), case.inputs), strict=True))
        _assert_close(client.predict(name, case.sent).outputs, own, 0, name)
        _assert_close(own, case.outputs, case.tolerance, name)
        for row in range(case.batch):
            one = {n: _row(a, case.rows[n], row) for n, a in case.sent.items()}
            answer = {n: _row(a, case.rows.get(n), row) for n, a in case.outputs.items()}
            _assert_close(client.predict(name, one).outputs, answer, case.tolerance, name)


def _session(case: Case) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(case.model, providers=["CPUExecutionProvider"])


def _row(array: Array, axis: int | None, row: int) -> Array:
    return array if axis is None else array.take([row], axis)


def _assert_close(got: dict[str, Array], expected: dict[str, Array], tolerance: float, name: str) -> None:
    assert got.keys() == expected.keys()
    for output, values in got.items():
        assert values.dtype == expected[output].dtype
        np.testing.assert_allclose(
            values, expected[output], rtol=0, atol=tolerance, err_msg=f"{name}: {output}", strict=True
        )


def test_whoever_asks_for_a_refused_one_is_told_so(client: Client, cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        if case.refusal and "bfloat16" not in name:
            with pytest.raises(Unavailable, match="MODEL_NOT_READY"):
                client.predict(name, case.sent)
