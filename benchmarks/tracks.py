"""What the sequences send, and what each must get: recorded before the run, compared during it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tracks:
    """A number of different sequences of a few chunks, in bytes as they travel.

    A sequence that goes on for longer sends its track again; its answers are then no longer known,
    since it remembers.
    """

    inputs: list[list[bytes]]  # [track][step - 1]
    answers: list[list[bytes]]
    frames: int  # a chunk

    def chunk(self, track: int, step: int) -> bytes:
        """What is sent at step 1, 2, 3 …"""
        steps = self.inputs[track % len(self.inputs)]
        return steps[(step - 1) % len(steps)]

    def answer(self, track: int, step: int) -> bytes | None:
        """What must come back, as long as it is known."""
        steps = self.answers[track % len(self.answers)]
        return steps[step - 1] if step <= len(steps) else None

    @classmethod
    def load(cls, path: Path) -> Self:
        arrays = np.load(path)
        inputs, answers = ([[chunk.tobytes() for chunk in t] for t in arrays[n]] for n in ARRAYS)
        return cls(inputs, answers, arrays["inputs"].shape[2])


ARRAYS = ("inputs", "answers")  # float32 [track, chunk, frame, …]


def save(path: Path, inputs: Floats, answers: Floats) -> None:
    np.savez(path, inputs=inputs, answers=answers)
