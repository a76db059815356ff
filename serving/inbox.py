"""What other threads ask of an engine, in order; and what becomes of it once the engine has ended."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

Command = tuple[Callable[[Any, Any], None], Any, Any]  # what, of whom, with what
Defer = Callable[[Callable[[], None]], bool]  # does it later, or says that it will not


def never(_wake: Callable[[], None]) -> bool:
    return False


class Inbox:
    """Any thread puts commands; one at a time takes them.

    The thread that reads the network has many to put. It defers the wake-up until all are there: the first
    one alone would have the engine run, and fight for the interpreter, while the others come.

    Once closed, whoever puts a command carries it out: nobody else is there to do so. A caller may have
    looked its engine up just before that engine ended; its command must still be answered, and its bytes
    taken off the pending ones.
    """

    def __init__(self, defer: Defer = never) -> None:
        self._commands: deque[Command] = deque()
        self.take = self._commands.popleft  # the oldest; raises IndexError if there is none
        self._defer = defer
        self._sleeps = False  # somebody waits, and was not woken yet
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._late: Callable[[Command], None] | None = None
        self._one_at_a_time = threading.Lock()  # what a reply makes its stream put is taken behind it

    def __len__(self) -> int:
        return len(self._commands)

    def put(self, command: Command) -> None:
        self._commands.append(command)
        if self._sleeps:
            self._sleeps = False
            if not self._defer(self.wake):
                self.wake()
        if self._late:
            self._carry_out(self._late)

    def wake(self) -> None:
        self._bell.put(None)

    def wait(self, seconds: float | None) -> None:
        """Until somebody has put a command, for so long at most. It may come back earlier."""
        self._sleeps = True  # before the look: whoever puts one after it wakes
        if not self._commands:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=seconds)
        self._sleeps = False
        with contextlib.suppress(queue.Empty):
            while True:
                self._bell.get_nowait()

    def close(self, late: Callable[[Command], None]) -> None:
        """From here on `late` gets every command, those that are still here included."""
        self._late = late
        self._carry_out(late)

    def _carry_out(self, late: Callable[[Command], None]) -> None:
        """One thread at a time. The others do not wait, since they may hold what it needs: it looks again
        behind its last command."""
        while self._commands and self._one_at_a_time.acquire(blocking=False):
            try:
                while self._commands:
                    late(self._commands.popleft())
            finally:
                self._one_at_a_time.release()
