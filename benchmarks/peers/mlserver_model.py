"""The benchmark's models as runtimes of MLServer, whose adaptive batching forms the batches.

A batch is one request: its input holds the rows of all, and the parameters of their inputs in lists.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from mlserver import MLModel, types  # type: ignore[import-not-found]  # in an environment of its own

from benchmarks.peers import runner


class Lstm(MLModel):  # type: ignore[misc]  # untyped here
    async def load(self) -> bool:
        self.lstm = runner.Lstm(Path(self.settings.parameters.uri))
        return True

    async def predict(self, payload: Any) -> Any:
        given = payload.inputs[0]
        marks = [parameter(given, f"sequence_{what}") for what in ("id", "start", "end")]
        steps = [runner.Step(number, x, *ends) for x, number, *ends in zip(array(given), *marks, strict=True)]
        return response(self.name, "y", np.stack(self.lstm.run(steps)))

    async def predict_stream(self, payloads: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """MLServer batches no streams by itself, but `predict` here is its batching one."""
        async for payload in payloads:
            yield await self.predict(payload)


class Digits(MLModel):  # type: ignore[misc]  # untyped here
    async def load(self) -> bool:
        self.images = runner.Images(Path(self.settings.parameters.uri))
        return True

    async def predict(self, payload: Any) -> Any:
        return response(self.name, "log_probabilities", self.images.run(array(payload.inputs[0])))


def array(given: Any) -> Any:
    return np.array(given.data.root, np.float32).reshape(given.shape)


def parameter(given: Any, name: str) -> list[Any]:
    """A list, unless the batch is of one."""
    value = getattr(given.parameters, name)
    return value if isinstance(value, list) else [value]


def response(model: str, name: str, rows: Any) -> Any:
    """It slices what it hands on by numbers, so the rows are flat."""
    output = types.ResponseOutput(
        name=name, shape=list(rows.shape), datatype="FP32", data=rows.ravel().tolist()
    )
    return types.InferenceResponse(model_name=model, outputs=[output])
