"""What the peers' handlers share: ONNX Runtime with one thread, and a state a sequence.

It is imported in each peer's own environment: numpy and ONNX Runtime, and nothing of ours beside it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

STATES, LAYERS, WIDTH = ("h", "c"), 2, 128


def session(file: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(file, options, ["CPUExecutionProvider"])


@dataclass(frozen=True, slots=True)
class Step:
    """Of a sequence."""

    sequence: Hashable
    x: Any  # float32 [time, 40]
    first: bool
    last: bool


class Lstm:
    def __init__(self, file: Path) -> None:
        self.session = session(file)
        self.states: dict[Hashable, dict[str, Any]] = {}

    def run(self, steps: Sequence[Step]) -> list[Any]:
        """[time, 12] of each; the steps are of different sequences, and those of one length run together."""
        places: dict[int, list[int]] = {}
        for place, step in enumerate(steps):
            places.setdefault(len(step.x), []).append(place)
        answers: list[Any] = [None] * len(steps)
        for own in places.values():
            for place, y in zip(own, self._run([steps[place] for place in own]), strict=True):
                answers[place] = y
        return answers

    def _run(self, steps: list[Step]) -> Any:
        own = [self._state(step) for step in steps]
        feeds = {state: np.concatenate([one[state] for one in own], axis=1) for state in STATES}
        feeds["x"] = np.stack([step.x for step in steps])
        feeds["lengths"] = np.full(len(steps), len(steps[0].x), np.int32)
        y, *after = self.session.run(["y", *(f"{state}_next" for state in STATES)], feeds)
        for row, (step, state) in enumerate(zip(steps, own, strict=True)):
            for name, value in zip(STATES, after, strict=True):
                state[name] = value[:, row : row + 1]
            if step.last:
                del self.states[step.sequence]
        return y

    def _state(self, step: Step) -> dict[str, Any]:
        if step.first:
            self.states[step.sequence] = {s: np.zeros((LAYERS, 1, WIDTH), np.float32) for s in STATES}
        return self.states[step.sequence]


class Images:
    def __init__(self, file: Path) -> None:
        self.session = session(file)

    def run(self, images: Any) -> Any:
        """float32 [rows, 28, 28] -> [rows, 10]"""
        return self.session.run(None, {"image": images})[0]
