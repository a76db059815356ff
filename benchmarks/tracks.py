"""What the sequences send, and what each must get: recorded before the run, compared during it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message's samples as they travel."""

    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Tracks:
    """A number of different sequences of a few chunks.

    A sequence that goes on for longer sends its track again; its answers are then no longer known,
    since it remembers.
    """

    model: str
    chunks: list[list[Chunk]]  # [track][step - 1]
    answers: list[list[bytes]]  # empty: nothing is known
    stateless: bool = False  # then a track's answers are known for ever
    input: str = "x"  # its name
    dtype: str = "float32"  # its elements'

    def chunk(self, track: int, step: int) -> Chunk:
        """What is sent at step 1, 2, 3 …"""
        steps = self.chunks[track % len(self.chunks)]
        return steps[(step - 1) % len(steps)]

    def answer(self, track: int, step: int) -> bytes | None:
        """What must come back, as long as it is known."""
        if not self.answers:
            return None
        steps = self.answers[track % len(self.answers)]
        if self.stateless:
            return steps[(step - 1) % len(steps)]
        return steps[step - 1] if step <= len(steps) else None

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path) as arrays:
            lengths = arrays["lengths"].tolist()
            inputs, answers = arrays["inputs"], arrays["answers"]
            chunks = [
                [Chunk(piece.shape, piece.tobytes()) for piece in _split(track, own)]
                for track, own in zip(inputs, lengths, strict=True)
            ]
            known = [
                [piece.tobytes() for piece in _split(track, own)]
                for track, own in zip(answers, lengths, strict=False)
            ]
            stateless = bool(arrays["stateless"])
            name = "image" if stateless else "x"
            return cls(str(arrays["model"]), chunks, known, stateless, name, inputs.dtype.name)


def save(
    path: Path,
    model: str,
    inputs: Array,
    answers: Array,
    lengths: list[list[int]],
    *,
    stateless: bool = False,
) -> None:
    """`inputs` and `answers` are [track, time, …] (rows for time in a stateless model), `lengths` says how
    each track is cut into chunks. `answers` may be empty: then nothing is compared."""
    np.savez(path, model=model, inputs=inputs, answers=answers, lengths=lengths, stateless=stateless)


def _split(track: Array, lengths: list[int]) -> list[Array]:
    return np.split(track, np.cumsum(lengths)[:-1].tolist())
