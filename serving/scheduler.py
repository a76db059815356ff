"""Decides which ready sequences form the next batch. A plain data structure: no threads, no clock.

One order: due = arrival + period, fixed at arrival, so that declared cadences come first and nothing
starves: a sequence's due time stands still while every later arrival's moves on. The turns of a longer chunk
are due one after the other: within its period if that is declared, else one every 200 ms.

The bound: each batch holds the most urgent turn. So a chunk is done within as many batches as there are turns
due no later than its last one (or than those before it in its sequence), whoever fits beside them, and
whatever arrives after that time; and one batch more where an engine has two in flight, since the second was
scheduled before what came during the first.
"""

from __future__ import annotations

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
        # When it is due, the sequence's number, which breaks ties, the sequence, and its first pending chunk.
        self._ready: list[tuple[float, int, Sequence, Chunk]] = []

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, sequence: Sequence, chunk: Chunk) -> None:
        """Its first pending chunk, which has frames to run."""
        assert chunk.frames > 0 and not sequence.scheduled
        sequence.scheduled = True
        due = chunk.arrived + sequence.patience_seconds
        if chunk.parts or chunk.frames > self._frames:
            due = chunk.arrived + self._place(sequence, chunk) * sequence.patience_seconds
        self._ready.append((due, sequence.number, sequence, chunk))

    def _place(self, sequence: Sequence, chunk: Chunk) -> float:
        """When the chunk's next turn is due, in periods after its arrival.

        Beside a long turn a short one is padding, so a long chunk whose turns were all due at once would hold
        all others to a row or two a batch. A declared period is shared out among them; without one, each has
        its own. Rows of a stateless model need no padding.
        """
        if self._stateless:
            return 1
        done = len(chunk.parts)
        left = -(-chunk.frames // self._frames)
        return (done + 1) / (done + left) if sequence.period_seconds else done + 1

    def schedule(self) -> Batch:
        """The next batch, empty if nothing is ready. Takes all that fits, and never waits for more."""
        turns: Batch = []
        left: list[tuple[float, int, Sequence, Chunk]] = []
        longest = total = seen = 0
        stateless, rows, room = self._stateless, self._rows, self._frames
        # What arrives is nearly in order, and a sort that knows it costs a fifth of a heap.
        self._ready.sort()
        for entry in self._ready:
            if (total if stateless else len(turns)) >= rows or len(left) >= _MAX_PASSED_OVER * rows:
                break
            seen += 1
            _, _, sequence, chunk = entry
            if sequence.ended:
                sequence.scheduled = False
                continue
            if stateless:
                room = rows - total
            frames = chunk.frames if chunk.frames < room else room  # min() costs as much as all of this
            if frames == longest and sequence.constants is turns[0].sequence.constants:
                pass  # nearly always: it fits
            elif turns and not self._fits(turns, sequence, frames, longest, total):
                left.append(entry)
                continue
            sequence.scheduled = False
            turns.append(Turn(sequence, chunk, frames))
            total += frames
            if frames > longest:
                longest = frames
        self._ready[:seen] = left
        return turns

    def _fits(self, turns: Batch, sequence: Sequence, frames: int, longest: int, total: int) -> bool:
        """Whether one more turn may join; the first, most urgent, always does."""
        constants = turns[0].sequence.constants
        if sequence.constants is not constants and sequence.constants != constants:
            return False
        if self._stateless or frames == longest:
            return True
        if not self._ragged:
            return False
        cells = max(longest, frames) * (len(turns) + 1)
        return cells - (total + frames) <= _MAX_PADDING * cells
