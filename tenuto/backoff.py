"""When a lost sequence is opened again, and for how long that is tried."""

import random
from collections.abc import Callable

TRIES_OF_A_NAME = 3  # the only one, where a server drains: others may stand behind it
_FIRST_SECONDS = 0.05
_LONGEST_SECONDS = 2.0
_ASKED_SECONDS = 10.0  # the longest pause that a server may ask for


def jitter() -> float:
    """Return a factor from 0.5 to 1.5, so that the callers of a lost server do not come as one."""
    return random.uniform(0.5, 1.5)


class Backoff:
    """At once, then after 50 ms, doubling to 2 s, each times a factor that `jitter` returns.

    `due` is when the next call may be made. `since` is when a call was first missed; a call that
    opens and brings nothing does not change it. `limit_seconds` later the trying ends.
    """

    def __init__(self, limit_seconds: float, jitter: Callable[[], float]) -> None:
        self.due = 0.0
        self.since: float | None = None
        self._limit_seconds = limit_seconds
        self._jitter = jitter
        self._tries = 0

    def miss(self, now: float) -> None:
        """A call is needed and there is none."""
        if self.since is None:
            self.since = now

    def progress(self) -> None:
        """A call has brought something new: the next loss is a first one."""
        self.since = None
        self._tries = 0

    def nearer(self) -> None:
        """A call came nearer to something new than any before: the next loss has all the time again."""
        self.since = None

    def read_on(self, now: float) -> None:
        """The caller read at last: what went by before is not the servers' time."""
        if self.since is not None:
            self.since = now

    @property
    def tries(self) -> int:
        """How many calls were fixed since the last progress."""
        return self._tries

    def again(self, now: float, asked_seconds: float = 0.0) -> bool:
        """Fix when the next call is due, `asked_seconds` from now or later; False if that is too late."""
        delay = 0.0
        if self._tries:
            # The exponent is bounded only so that it never overflows.
            longest = min(_FIRST_SECONDS * 2.0 ** min(self._tries - 1, 30), _LONGEST_SECONDS)
            delay = longest * self._jitter()
        self._tries += 1
        self.due = now + min(asked_seconds, _ASKED_SECONDS) + delay
        return self.since is None or self.due < self.since + self._limit_seconds
