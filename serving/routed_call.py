"""One gRPC call on a server of our own, wherever its bytes come from: its listener, what it sends, and when
reading pauses.

What its client sent is cut into messages by a class of its own: `http_call`, for HTTP/2.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from .call import GONE, Listener, Metadata, Outbox

log = logging.getLogger("tenuto.transport")

# A call that is finished, and whose client takes neither its last replies nor its status, ends after that.
_UNTAKEN_SECONDS = 60.0

Ending = tuple[grpc.StatusCode, str, Metadata]
Route = Callable[["RoutedCall"], Listener]  # opens a call: who listens to it


class Loop(Protocol):
    """The thread that reads."""

    def soon(self, what: Callable[[], object]) -> None:
        """Has it done on that thread. Any thread."""

    def submit(self, call: RoutedCall) -> None:
        """Has what it sends written, now or with this thread's next flush. Any thread."""


class RoutedCall:
    """A gRPC call. Implements call.Call; what is underlined belongs to its connection as well.

    `connection` writes what waits in the outboxes of its calls (`write`), and is asked to `abandon` one.
    """

    __slots__ = (
        "__weakref__", "_connection", "_due", "_ended", "_gone", "_held", "_listener", "_loop", "_outbox",
        "_paused", "_started", "_untaken_since", "closed", "deadline", "initial_metadata", "metadata",
        "number", "path",
    )  # fmt: skip

    def __init__(self, connection: Any, number: int, path: str, loop: Loop, outbox_bytes: int) -> None:
        self.number = number  # among its connection's
        self.path = path
        self.metadata: Metadata = ()
        self.initial_metadata: Metadata = ()  # goes out with the first message
        self.deadline = float("inf")  # of the monotonic clock
        self.closed: Callable[[], None] | None = None  # called once the call is over, behind its listener
        self._connection = connection
        self._loop = loop
        self._listener: Listener = GONE
        # What comes in; the reading thread's.
        self._held = False  # reading pauses: the outbox is full
        self._paused = False  # reading pauses: the listener wants it
        self._ended = False  # the client sends no more
        self._gone = False  # it is over, and its listener knows
        # What goes out; guarded by the outbox's lock or the connection's.
        self._outbox = Outbox(outbox_bytes)
        self._due = False  # a write is asked for, or under way
        self._started = False  # the initial metadata is out
        self._untaken_since = 0.0  # since when its ending waits for the client; 0: it does not

    # Any thread.

    def send(self, message: bytes) -> None:
        box = self._outbox
        with box.lock:
            if box.over or box.ending is not None:
                return
            box.put(message)
            if self._due:
                return
            self._due = True
        self._loop.submit(self)

    def finish(
        self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "", metadata: Metadata = ()
    ) -> None:
        box = self._outbox
        with box.lock:
            if box.over or box.ending is not None:
                return
            box.ending = (code, details, metadata)
            if self._due:
                return
            self._due = True
        self._loop.submit(self)

    def cancel(self) -> None:
        box = self._outbox
        with box.lock:
            if box.over:
                return
            box.close()
        self._connection.abandon(self)
        self._loop.soon(self.terminated)

    def suggest_leaving(self) -> None:
        self._loop.soon(self._connection.leave)

    @property
    def backed_up(self) -> bool:
        return self._outbox.full

    def peer(self) -> str:
        return str(self._connection.peer)

    @property
    def connection(self) -> Any:
        return self._connection

    @property
    def seconds_left(self) -> float:
        """Until the deadline that the client has set; infinity without one."""
        return max(0.0, self.deadline - time.monotonic())

    def next_out(self) -> tuple[bytes | None, Ending | None, bool]:
        """What is to be written next: a message, or the ending behind all of them; and whether more comes.

        For the connection, under the lock that its `write` takes: where there is neither, who sends from here
        on asks for a write anew, and that waits for the lock.
        """
        box = self._outbox
        with box.lock:
            was_full, message = box.full, box.take()
            more = bool(box.messages) or (message is not None and box.ending is not None)
            ending = box.ending if message is None and not box.over else None
            resume = was_full and self._held and not box.full
            if not more and ending is None:
                self._due = False
        if resume:
            self._loop.soon(self.read_on)
        return message, ending, more

    # The reading thread.

    def shrink(self, message_bytes: int) -> None:
        """Its messages may have no more than that."""

    def open(self, route: Route) -> None:
        """Finds its listener."""
        try:
            self._listener = route(self)
        except Exception:
            log.exception("a call could not be opened")
            self.finish(grpc.StatusCode.UNKNOWN, "an error inside the server; its log says more")
        if self._outbox.ending is not None:
            self.metadata = ()  # it was refused, and may wait for its client for a while

    def look(self, now: float) -> None:
        """Ends it if its client does not take its ending. To be called now and then."""
        if self._outbox.ending is None:
            return
        if not self._untaken_since:
            self._untaken_since = now
        elif now - self._untaken_since > _UNTAKEN_SECONDS:
            self.cancel()

    def end(self) -> None:
        """The client sends no more."""
        self._ended = True
        if not self._held and not self._paused:
            self._half_close()

    def pause(self) -> Callable[[], None]:
        """Nothing is handed on until what is returned is called, on any thread."""
        self._paused = True
        return self._resume

    def watch_taken(self, taken: Callable[[int], None]) -> None:
        """Has the bytes of each message told when it has left the outbox."""
        self._outbox.taken = taken

    def read_on(self) -> None:
        """Looks again whether reading may go on."""
        raise NotImplementedError

    def terminated(self) -> None:
        """The call is over, in whatever way."""
        if self._gone:
            return
        self._gone = True
        with self._outbox.lock:
            self._outbox.close()
        listener, self._listener = self._listener, GONE  # or each would keep the other alive
        self._forget()
        try:
            listener.terminated()
        except Exception:
            log.exception("the end of a call met a bug")
        finally:
            if self.closed is not None:
                self.closed()

    def _forget(self) -> None:
        """What came in and was not handed on is not wanted any more."""
        raise NotImplementedError

    def _hand_on(self, message: bytes) -> None:
        try:
            self._listener.received(message)
            self._holds()
        except Exception:
            log.exception("a message met a bug; its stream is cancelled")
            self._paused = True  # nothing more is handed on, or granted
            self.cancel()

    def _half_close(self) -> None:
        try:
            self._listener.half_closed()
        except Exception:
            log.exception("a message met a bug; its stream is cancelled")
            self.cancel()

    def _holds(self) -> bool:
        """Whether reading pauses here: the client does not take its replies, the call ends, or the process
        holds too much."""
        box = self._outbox
        if box.full:
            with box.lock:
                self._held = box.full
        if not self._held and (box.over or box.ending is not None or self._listener.wait(self._resume)):
            self._paused = True
        return self._held or self._paused

    def _resume(self) -> None:
        self._loop.soon(self.read_on)
