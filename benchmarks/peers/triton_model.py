"""The benchmark's LSTM for Triton's Python backend, whose sequence batcher (oldest) forms the batches.

Triton's ONNX backend cannot be had from PyPI.
"""

import os
import sys
from pathlib import Path
from typing import Any

# The backend does not pass PYTHONPATH on.
sys.path.insert(0, os.environ["PEER_ROOT"])
sys.path.insert(0, os.environ["PEER_PACKAGES"])

import triton_python_backend_utils as triton

from benchmarks.peers.runner import Lstm, Step

START, END = triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START, triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END


class TritonPythonModel:
    """What the backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        self.lstm = Lstm(Path(args["model_repository"], args["model_version"], "model.onnx"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Each request is one step of another sequence."""
        answers = self.lstm.run([self._step(request) for request in requests])
        return [triton.InferenceResponse(output_tensors=[triton.Tensor("y", y[None])]) for y in answers]

    def _step(self, request: Any) -> Step:
        x = triton.get_input_tensor_by_name(request, "x").as_numpy()[0]
        flags = request.flags()
        return Step(request.correlation_id(), x, bool(flags & START), bool(flags & END))
