"""One stream's two sides, in bytes: a `Call` sends, its `Listener` receives. And what waits to be sent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import grpc

Metadata = tuple[tuple[str, str | bytes], ...]


class Listener(Protocol):
    """One stream's receiver. All calls come one after another; none may block."""

    def received(self, message: bytes) -> None:
        """One message of the client."""

    def half_closed(self) -> None:
        """The client sends no more. It may still read."""

    def terminated(self) -> None:
        """The call is over, in whatever way. Nothing that is sent from now on arrives."""

    def wait(self, resume: Callable[[], None]) -> bool:
        """Whether reading must pause; then `resume` is called once, when it may go on."""


class Call(Protocol):
    """One stream's sender. Any thread; nothing blocks."""

    @property
    def metadata(self) -> Metadata:
        """What the client sent along; to be read when the call is opened."""

    def send(self, message: bytes) -> None:
        """Queues a message; dropped if the call is over."""

    def finish(self, code: grpc.StatusCode = ..., details: str = ..., metadata: Metadata = ...) -> None:
        """Ends the call with that status once all that was queued is sent."""

    def cancel(self) -> None:
        """Ends the call now."""

    def suggest_leaving(self) -> None:
        """Tells the client that its next calls had better go over another connection, perhaps to another
        server; this call goes on. Where that can be said."""

    @property
    def backed_up(self) -> bool:
        """Whether the client leaves more replies untaken than the outbox may hold."""

    def peer(self) -> str:
        """The client's address, for logs."""


Opener = Callable[[Call], Listener]


class _Gone:
    """The listener of a call that is over, or was refused."""

    def received(self, message: bytes) -> None: ...
    def half_closed(self) -> None: ...
    def terminated(self) -> None: ...
    def wait(self, resume: Callable[[], None]) -> bool:
        return True


GONE = _Gone()


class Outbox:
    """What waits to be sent on one call, and what its ending will be. Guarded by its lock."""

    __slots__ = ("bytes", "ending", "full", "limit_bytes", "lock", "messages", "over", "taken")

    def __init__(self, limit_bytes: int) -> None:
        self.lock = threading.Lock()
        self.messages: deque[bytes] = deque()
        self.bytes = 0
        self.limit_bytes = limit_bytes
        self.full = False
        self.ending: tuple[grpc.StatusCode, str, Metadata] | None = None
        self.over = False
        self.taken: Callable[[int], None] | None = None  # told the bytes of each message that is taken

    def put(self, message: bytes) -> None:
        self.messages.append(message)
        self.bytes += len(message)
        self.full = self.bytes > self.limit_bytes

    def close(self) -> None:
        """The call is over; nothing arrives from now on."""
        self.over = True
        self.clear()

    def clear(self) -> None:
        """Nobody wants what waits."""
        self.messages.clear()
        self.bytes = 0
        self.full = False

    def take(self) -> bytes | None:
        if not self.messages:
            return None
        message = self.messages.popleft()
        self.bytes -= len(message)
        self.full = self.bytes > self.limit_bytes
        if self.taken is not None:
            self.taken(len(message))
        return message
