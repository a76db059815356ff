"""Decides which ready sequences form the next batch. A plain data structure: no threads, no clock.

One order: due = arrival + period, fixed at arrival, so that declared cadences come first and nothing
starves: a sequence's due time stands still while every later arrival's moves on. Of a chunk of several turns
the second is due a period after the first, and so on.

The bound: each batch holds the most urgent turn. So a chunk is done within as many batches as there are turns
due no later than its last one (or than those before it in its sequence), whoever fits beside them, and
whatever arrives after that time.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from .manifest import Manifest
from .sequence import Chunk, Sequence

# At most that share of a ragged batch may be padding.
_MAX_PADDING = 0.5
# Candidates passed over in one batch, in batches: the bound on a step's own cost.
_MAX_PASSED_OVER = 4


@dataclass(slots=True, eq=False)
class Turn:
    """One sequence's part in one batch: `frames` frames of `chunk` (rows, for a stateless model)."""

    sequence: Sequence
    chunk: Chunk
    frames: int


Batch = list[Turn]  # turns that run together, all with the same constants


class Scheduler:
    """`add` what is ready, `schedule` what runs next. A sequence has one turn a batch."""

    def __init__(self, manifest: Manifest) -> None:
        self._rows = manifest.rows_per_batch
        self._frames = manifest.frames_per_turn
        self._stateless = not manifest.stateful
        self._ragged = manifest.ragged
        self._ready: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, sequence: Sequence) -> None:
        """Its first pending chunk has frames to run."""
        chunk = sequence.pending[0]
        assert isinstance(chunk, Chunk) and chunk.frames > 0 and not sequence.scheduled
        sequence.scheduled = True
        # Each turn of a long chunk is due one patience after the one before: a short turn beside a long one
        # is padding, and a bulk client would hold all others to a row or two a batch. Rows need no padding.
        turn = 1 if self._stateless else 1 + len(chunk.parts)
        due = chunk.arrived + turn * sequence.patience_seconds
        heapq.heappush(self._ready, (due, sequence.number, sequence))

    def schedule(self) -> Batch:
        """The next batch, empty if nothing is ready. Takes all that fits, and never waits for more."""
        turns: Batch = []
        left: list[tuple[float, int, Sequence]] = []
        longest = total = 0
        while self._ready and (total if self._stateless else len(turns)) < self._rows:
            if len(left) >= _MAX_PASSED_OVER * self._rows:
                break
            entry = heapq.heappop(self._ready)
            sequence = entry[2]
            if sequence.ended:
                sequence.scheduled = False
                continue
            chunk = sequence.pending[0]
            assert isinstance(chunk, Chunk)
            frames = min(chunk.frames, self._rows - total if self._stateless else self._frames)
            if turns and not self._fits(turns, sequence, frames, longest, total):
                left.append(entry)
                continue
            sequence.scheduled = False
            turns.append(Turn(sequence, chunk, frames))
            longest, total = max(longest, frames), total + frames
        for entry in left:
            heapq.heappush(self._ready, entry)
        return turns

    def _fits(self, turns: Batch, sequence: Sequence, frames: int, longest: int, total: int) -> bool:
        """Whether one more turn may join; the first, most urgent, always does."""
        constants = turns[0].sequence.constants
        if sequence.constants is not constants and sequence.constants != constants:
            return False
        if self._stateless:
            return True
        if not self._ragged:
            return frames == longest
        cells = max(longest, frames) * (len(turns) + 1)
        return cells - (total + frames) <= _MAX_PADDING * cells
