"""The benchmark's models as handlers of TorchServe: a call with a batch, which TorchServe formed."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.runner import Images, Lstm, Step

INPUTS, IMAGE = 40, (28, 28)

models: dict[str, Any] = {}


def file(context: Any) -> Path:
    logging.getLogger().setLevel(logging.WARNING)  # else a line a batch
    return Path(context.system_properties["model_dir"], "model.onnx")


def lstm(requests: list[dict[str, bytes]] | None, context: Any) -> list[bytes]:
    """Called once without requests, before all others."""
    if requests is None:
        models["lstm"] = Lstm(file(context))
        return []
    steps = []
    for place, request in enumerate(requests):
        x = np.frombuffer(request["data"], np.float32).reshape(-1, INPUTS)
        steps.append(Step(context.get_sequence_id(place), x, "first" in request, "last" in request))
    return [y.tobytes() for y in models["lstm"].run(steps)]


def digits(requests: list[dict[str, bytes]] | None, context: Any) -> list[bytes]:
    if requests is None:
        models["digits"] = Images(file(context))
        return []
    data = b"".join([request["data"] for request in requests])
    rows = models["digits"].run(np.frombuffer(data, np.float32).reshape(-1, *IMAGE))
    return [row.tobytes() for row in rows]
