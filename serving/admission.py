"""Whether a model version takes new sequences: not while it answers those it has later than they asked.

A plain data structure: no threads, no clock; the engine tells it when a turn begins and ends. It measures in
seconds: one ends with the first turn that ends a second or more after it began, so it holds whole turns, and
what happens in a turn of many seconds is not lost.
"""

from __future__ import annotations

from .errors import Overloaded

_SECOND = 1.0
# From here on work rarely finds the engine waiting, and one more sequence is paid for by the others. Below,
# chunks are late because their period is shorter than a run, whoever is refused: one client that declares an
# absurd period locks nobody out of an engine that has time left.
_BUSY = 0.9
# One chunk in twenty: the 95th percentile is over the period. A single slow run among many stays below.
_LATE = 0.05


class Admission:
    """The figures of the last full second. Owned by the engine thread; `busy_ratio` is read by others."""

    def __init__(self, now: float) -> None:
        self._began = now  # of the second that is being measured
        self._busy = 0.0  # seconds in it that were spent in turns
        self._turn = 0.0  # when the turn in progress began; 0: none
        self._paced = self._late = 0  # the engine's counts so far
        self._paced_before = self._late_before = 0  # the same when the second began
        self._last_busy = self._last_late = 0.0  # shares, of the last full second

    def begin(self, now: float) -> None:
        """A turn begins."""
        self._turn = now

    def end(self, now: float, paced: int, late: int) -> None:
        """The turn is done. The counts are those since the start: chunks answered that have a declared
        period; and those of them that came, or were answered, later than that."""
        self._busy += now - self._turn
        self._turn = 0.0
        self._paced, self._late = paced, late
        if now - self._began >= _SECOND:
            self._close_second(now)

    def check(self, now: float, where: str) -> None:
        """Whether a new sequence may come in, asked in a turn.

        Raises: Overloaded.
        """
        self._busy, self._turn = self._busy + now - self._turn, now
        self._close_second(now)  # what was measured before the engine had nothing to do is past
        if self._last_busy >= _BUSY and self._last_late >= _LATE:
            raise Overloaded(
                f"{where} was busy for {self._last_busy:.0%} of the last second, and "
                f"{self._last_late:.0%} of the chunks that have a period came or were answered later than "
                "that; retry, or go to another server"
            )

    def busy_ratio(self, now: float) -> float:
        """The share of the last full second that was spent in turns, one in progress included."""
        elapsed, turn = now - self._began, self._turn
        if elapsed < _SECOND:
            return self._last_busy
        if not turn and elapsed >= 2 * _SECOND:
            return 0.0  # a turn that ended in the last second would have begun a new one
        return min(1.0, (self._busy + (now - turn if turn else 0.0)) / elapsed)

    def _close_second(self, now: float) -> None:
        elapsed = now - self._began
        if elapsed < _SECOND:
            return
        self._last_busy = self._busy / elapsed
        paced, late = self._paced - self._paced_before, self._late - self._late_before
        self._last_late = late / paced if paced else 0.0
        self._began, self._busy = now, 0.0
        self._paced_before, self._late_before = self._paced, self._late
