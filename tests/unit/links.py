"""Both ends of a link in one process: real sockets, and the threads that read them turned by hand."""

from __future__ import annotations

import selectors
import socket
from collections import deque
from collections.abc import Callable

from tenuto.serving.routed_call import RoutedCall


class HandLoop:
    """The thread that reads, of one end."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._errands: deque[Callable[[], object]] = deque()
        self._calls: list[RoutedCall] = []

    def soon(self, what: Callable[[], object]) -> None:
        self._errands.append(what)

    def defer(self, what: Callable[[], None]) -> bool:
        self._errands.append(what)
        return True

    def submit(self, call: RoutedCall) -> None:
        self._calls.append(call)

    def watch(self, watched: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        if watched in self._selector.get_map():
            self._selector.modify(watched, events, ready)
        else:
            self._selector.register(watched, events, ready)

    def unwatch(self, watched: socket.socket) -> None:
        if watched in self._selector.get_map():
            self._selector.unregister(watched)

    def close(self) -> None:
        self._selector.close()

    @property
    def is_busy(self) -> bool:
        return bool(self._errands or self._calls)

    def turn(self) -> bool:
        """Whether there was anything to do."""
        busy = False
        for key, events in self._selector.select(0):
            key.data(events)
            busy = True
        while self.is_busy:
            busy = True
            while self._errands:
                self._errands.popleft()()
            calls, self._calls = self._calls, []
            for call in calls:
                call.connection.write((call,))
        return busy


def settle(*loops: HandLoop) -> None:
    """Turns them until none has anything to do."""
    while any(loop.turn() for loop in loops):
        pass
