"""The benchmark's image network for Triton's Python backend, whose dynamic batcher forms the batches."""

import os
import sys
from pathlib import Path
from typing import Any

# The backend does not pass PYTHONPATH on.
sys.path.insert(0, os.environ["PEER_ROOT"])
sys.path.insert(0, os.environ["PEER_PACKAGES"])

import numpy as np
import triton_python_backend_utils as triton

from benchmarks.peers.runner import Images

OUTPUT = "log_probabilities"


class TritonPythonModel:
    """What the backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        self.images = Images(Path(args["model_repository"], args["model_version"], "model.onnx"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """The rows of all requests at once."""
        inputs = [triton.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        rows = self.images.run(np.concatenate(inputs))
        pieces = np.split(rows, np.cumsum([len(each) for each in inputs])[:-1])
        return [triton.InferenceResponse(output_tensors=[triton.Tensor(OUTPUT, piece)]) for piece in pieces]
