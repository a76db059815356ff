"""The benchmark's LSTM for Triton's Python backend: ONNX Runtime, and a state a sequence.

Triton's ONNX backend cannot be had from PyPI. Its sequence batcher (oldest) forms the batches.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ["PEER_PACKAGES"])  # the backend does not pass PYTHONPATH on

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as triton

STATES, LAYERS, WIDTH = ("h", "c"), 2, 128


class TritonPythonModel:
    """What the backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        folder = Path(args["model_repository"]) / args["model_version"]
        self.session = ort.InferenceSession(folder / "lstm.onnx", options, ["CPUExecutionProvider"])
        self.states: dict[int, dict[str, Any]] = {}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Each request is one step of another sequence; those of one length run together."""
        by_length: dict[int, list[int]] = {}
        inputs = [triton.get_input_tensor_by_name(request, "x").as_numpy()[0] for request in requests]
        for place, x in enumerate(inputs):
            by_length.setdefault(len(x), []).append(place)
        responses: list[Any] = [None] * len(requests)
        for places in by_length.values():
            self._run([requests[p] for p in places], [inputs[p] for p in places], places, responses)
        return responses

    def _run(self, requests: list[Any], inputs: list[Any], places: list[int], responses: list[Any]) -> None:
        own = [self._state(request) for request in requests]
        feeds = {state: np.concatenate([one[state] for one in own], axis=1) for state in STATES}
        feeds["x"] = np.stack(inputs)
        feeds["lengths"] = np.full(len(inputs), len(inputs[0]), np.int32)
        y, *after = self.session.run(["y", *(f"{state}_next" for state in STATES)], feeds)
        for row, (request, state) in enumerate(zip(requests, own, strict=True)):
            for name, value in zip(STATES, after, strict=True):
                state[name] = value[:, row : row + 1]
            if request.flags() & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
                self.states.pop(request.correlation_id(), None)
            answer = triton.Tensor("y", y[row : row + 1])
            responses[places[row]] = triton.InferenceResponse(output_tensors=[answer])

    def _state(self, request: Any) -> dict[str, Any]:
        if request.flags() & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            zeros = {state: np.zeros((LAYERS, 1, WIDTH), np.float32) for state in STATES}
            self.states[request.correlation_id()] = zeros
        return self.states[request.correlation_id()]
