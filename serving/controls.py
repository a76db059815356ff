"""What a batch tells models that reset themselves: where each row's sequence stands."""

from __future__ import annotations

import hashlib
from typing import Any

from numpy.typing import NDArray

from .layout import one_a_row
from .manifest import Control, Manifest
from .scheduler import Batch, Turn
from .sequence import Sequence

Array = NDArray[Any]


class Controls:
    """The feeds of a model's control inputs. Owned by the engine thread."""

    def __init__(self, manifest: Manifest) -> None:
        self._controls = manifest.controls
        self._padded = [i.tail == "pad" for i in manifest.inputs]

    def feeds(self, batch: Batch, size: int) -> dict[str, Array]:
        """One number a row. Padding is neither ready nor anybody's first or last run."""
        return {c.name: one_a_row(c, [self._value(c, turn) for turn in batch], size) for c in self._controls}

    def ran(self, batch: Batch) -> None:
        """Their next run is not the first one."""
        for turn in batch:
            turn.sequence.ran = True

    def _value(self, control: Control, turn: Turn) -> float:
        if control.kind == "sequence_id":
            return number(turn.sequence, control.id_bits)
        holds = control.kind == "ready"
        if control.kind == "start":
            holds = not turn.sequence.ran
        elif control.kind == "end":
            holds = self._is_last(turn)
        return control.values[holds]

    def _is_last(self, turn: Turn) -> bool:
        """Whether the client said that these samples are the last ones, and nothing of them waits for End."""
        chunk, feeds = turn.chunk, turn.sequence.feeds
        if not chunk.last or turn.frames < chunk.frames or chunk.part < chunk.generate:
            return False
        if any(feed.waiting for feed in feeds):  # text, which End brings; and which may be spoiled
            return False
        rest = any(feed.padding() for pads, feed in zip(self._padded, feeds, strict=True) if pads)
        return not rest


def number(sequence: Sequence, bits: int) -> int:
    """The sequence's own, the same wherever it goes on, and never 0."""
    digest = hashlib.blake2b(sequence.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % ((1 << bits) - 1) + 1
