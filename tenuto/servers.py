"""The servers of one client: a channel to each, and whose turn it is."""

import random
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from . import errors, message
from .backoff import TRIES_OF_A_NAME
from .settings import Settings
from .v1.tenuto_pb2_grpc import TenutoStub

Options = list[tuple[str, int | str]]


def first_turn(count: int) -> int:
    """Return where among so many targets a client begins.

    Were it always the first, processes of one stream each would all be at one server.
    """
    return random.randrange(count)


def shuffled(targets: Sequence[str]) -> list[str]:
    """Return the targets in an order of chance."""
    return random.sample(targets, len(targets))


class Servers:
    """The channels of one client, each made at its first use. Safe to share among threads.

    Calls take the targets in turn, from any one of them on: a caller asks for its `round` once, and for
    the `stub` of each target in it until a server took the call.
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

    def round(self) -> tuple[str, ...]:
        """Return all targets: the one whose turn it is, then the others in an order of chance.

        Were it the order of the list, all sequences of a lost server would go to its neighbour.
        """
        with self._lock:
            self._turn += 1
            first = self._turn % self.count
        targets = self._settings.targets
        return targets[first], *shuffled(targets[:first] + targets[first + 1 :])

    def tries(self) -> tuple[str, ...]:
        """Return the targets that a unary call may try, one after the other."""
        return self.round() if self.count > 1 else self.round() * TRIES_OF_A_NAME

    def may_try_on(self, error: errors.TenutoError) -> bool:
        """Whether the next try may be answered where this one was refused."""
        if self.count == 1:
            return errors.drains(error)
        if not isinstance(error, errors.ServerError):
            return False
        return error.code == "UNAVAILABLE" or error.reason == "UNKNOWN_SEQUENCE"

    def only(self) -> str:
        """Return the only target, for what must not end up at any of several; raises InvalidInput."""
        if self.count > 1:
            raise errors.invalid(
                f"models are loaded and unloaded at one server, got {self.count} ({self.target}); name one",
                "WRONG_SETTING",
            )
        return self._settings.targets[0]

    def stub(self, target: str) -> Any:
        """Return the target's stub; raises Unavailable on a closed client."""
        with self._lock:
            if self._closed:
                raise message.client_closed(self.target)
            if target not in self._stubs:
                channel = self._connect(target, self._settings.channel_options(target))
                self._channels.append(channel)
                self._stubs[target] = TenutoStub(channel)
            return self._stubs[target]

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
