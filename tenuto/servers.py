"""The servers of one client: a channel to each, and whose turn it is."""

import random
from collections.abc import Callable
from threading import Lock
from typing import Any

from . import errors, message
from .settings import Settings
from .v1.tenuto_pb2_grpc import TenutoStub

Options = list[tuple[str, int | str]]


def first_turn(count: int) -> int:
    """Return where among so many targets a client begins.

    Were it always the first, processes of one stream each would all be at one server.
    """
    return random.randrange(count)


class Servers:
    """The channels of one client, each made at its first use. Safe to share among threads.

    Calls take the targets in turn, from any one of them on: a caller asks for its `turn` once, and
    for what is `at` that turn, at the next, and so on, until a server took the call.
    """

    def __init__(self, settings: Settings, connect: Callable[[str, Options], Any]) -> None:
        self.target = settings.target
        self.count = len(settings.targets)
        self.resumes = 0
        self.metadata = settings.metadata  # of each call
        self._settings = settings
        self._connect = connect
        self._lock = Lock()
        self._turn = first_turn(self.count) - 1
        self._closed = False
        self._channels: list[Any] = []
        self._stubs: dict[str, Any] = {}

    def turn(self) -> int:
        """Return the next turn."""
        with self._lock:
            self._turn += 1
            return self._turn

    def at(self, turn: int) -> tuple[str, Any]:
        """Return the target of that turn and its stub; raises Unavailable on a closed client."""
        target = self._settings.targets[turn % self.count]
        with self._lock:
            if self._closed:
                raise message.client_closed(self.target)
            if target not in self._stubs:
                channel = self._connect(target, self._settings.channel_options(target))
                self._channels.append(channel)
                self._stubs[target] = TenutoStub(channel)
            return target, self._stubs[target]

    def resumed(self, times: int) -> None:
        """Count sequences that were opened again."""
        with self._lock:
            self.resumes += times

    def close(self) -> list[Any]:
        """Give out no more channels, and return those that are to be closed."""
        with self._lock:
            self._closed = True
            channels, self._channels = self._channels, []
            return channels


def is_elsewhere(error: errors.TenutoError) -> bool:
    """Whether another server may answer the unary call that this one refused."""
    if not isinstance(error, errors.ServerError):
        return False
    return error.code == "UNAVAILABLE" or error.reason == "UNKNOWN_SEQUENCE"
