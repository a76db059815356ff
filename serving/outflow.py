"""What one HTTP/2 connection sends: replies of its calls, as far as windows and the socket allow, and frames
that neither holds up.

Any thread may write; one lock guards the windows and the queue.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

import grpc

from . import frame as http
from .call import Metadata
from .http_call import HttpCall

log = logging.getLogger("tenuto.transport")

MOST_UNSENT = 256 << 10  # bytes in front of a socket; beyond them outboxes are not emptied
_MOST_CONTROL = 256 << 10  # bytes that a client has us answer without reading the answers


class Wire(Protocol):
    """The socket."""

    def send(self, data: bytes | memoryview) -> int:
        """Takes as many bytes as it can at once. Raises: OSError."""


class Outflow:
    """The queue in front of a socket, and the calls that wait for room in it, or for their windows.

    `calls` are the connection's, by stream; those that end are taken out here. `soon` has something done on
    the reading thread. `stuck` is called when the socket takes no more; `write_on` is to be, when it does.
    """

    def __init__(
        self,
        wire: Wire,
        calls: dict[int, HttpCall],
        soon: Callable[[Callable[[], object]], None],
        stuck: Callable[[], None],
        holds: Callable[[], bool] = lambda: False,
    ) -> None:
        """`holds`: whether the wire keeps something of what it took: then it is stuck."""
        self.initial_window = http.DEFAULT_WINDOW  # bytes that the client takes on a new stream
        self._wire = wire
        self._calls = calls
        self._soon = soon
        self._stuck = stuck
        self._holds = holds
        self._lock = threading.Lock()
        self._out: list[bytes | memoryview] = []
        self._queued = 0  # bytes in it
        self._unsent = memoryview(b"")  # what the socket did not take
        self._watched = False  # somebody waits until the socket takes more
        self._dead = False
        self._window = http.DEFAULT_WINDOW
        self._shrink = b""  # what the next header block begins with
        self._blocked: dict[HttpCall, None] = {}  # by windows
        self._queueing: dict[HttpCall, None] = {}  # by the queue, which is full
        self._widened: dict[HttpCall, None] = {}  # blocked no more, perhaps

    def add(self, call: HttpCall) -> None:
        """A new call."""
        with self._lock:
            self._calls[call.number] = call

    def drop(self, call: HttpCall, frames: bytes = b"") -> bool:
        """The call is over, and these frames say so. Whether it was not before."""
        with self._lock:
            known = self._calls.pop(call.number, None) is call
            for waiting in (self._blocked, self._queueing, self._widened):
                waiting.pop(call, None)
            if known and frames:
                self._put(frames)
            return known

    def put(self, frames: bytes) -> bool:
        """Queues frames that no window holds up. Whether there is too much of them, which nobody reads."""
        with self._lock:
            self._put(frames)
            return self._queued + len(self._unsent) > MOST_UNSENT + _MOST_CONTROL

    def put_headers(self, stream: int, flags: int, block: bytes) -> None:
        """Queues a header block of no call."""
        with self._lock:
            self._put(http.header_frames(stream, flags, self._shrunk() + block, http.DEFAULT_FRAME))

    def shrink_table(self) -> None:
        """The client's table of headers has no room; the next block says that we know."""
        with self._lock:
            self._shrink = http.SHRINK_TABLE

    def set_initial_window(self, window: int) -> None:
        """Of each stream, also of those that are there (RFC 9113, section 6.9.2).

        Raises: ProtocolError.
        """
        with self._lock:
            wider = window - self.initial_window
            most = max([call._window for call in self._calls.values()], default=0)
            http.check_window(max(window, most + wider))
            for call in self._calls.values():
                call._window += wider
            self.initial_window = window
            self._widened.update(self._blocked)

    def widen(self, size: int) -> None:
        """The connection's window. Raises: ProtocolError."""
        with self._lock:
            http.check_window(self._window + size)
            if not self._window:
                self._widened.update(self._blocked)
            self._window += size

    def widen_one(self, call: HttpCall, size: int) -> None:
        """A call's window. Raises: ProtocolError."""
        with self._lock:
            http.check_window(call._window + size)
            call._window += size
            if call in self._blocked:
                self._widened[call] = None

    def close(self) -> None:
        """The socket is gone."""
        with self._lock:
            self._dead = True
            self._stuck = lambda: None  # or we and our connection would keep each other alive
            self._out.clear()
            self._unsent = memoryview(b"")
            for waiting in (self._blocked, self._queueing, self._widened):
                waiting.clear()

    @property
    def is_idle(self) -> bool:
        """Whether there is no call, and everything was sent."""
        with self._lock:
            return not (self._calls or self._out or self._unsent or self._holds())

    @property
    def is_blocked(self) -> bool:
        """Whether the socket did not take all that was sent."""
        return bool(self._unsent) or self._holds()

    def write(self, calls: Iterable[HttpCall] = ()) -> None:
        """Sends what these calls have, as far as windows and the socket allow, and what waited before.

        Does not raise: a call that meets a bug is cancelled, the others go on.
        """
        with self._lock:
            self._take_all(calls)
            if self._widened:
                widened, self._widened = self._widened, {}
                for call in widened:
                    if self._window > 0 and self._blocked.pop(call, self) is None:
                        self._take_all((call,))
            self._send()
            while self._queueing and not self._unsent and not self._dead:
                queueing, self._queueing = self._queueing, {}
                self._take_all(queueing)
                self._send()

    def write_on(self) -> None:
        """The socket takes more."""
        with self._lock:
            self._watched = False
        self.write()

    def _put(self, data: bytes) -> None:
        self._out.append(data)
        self._queued += len(data)

    def _take_all(self, calls: Iterable[HttpCall]) -> None:
        for call in calls:
            try:
                self._take(call)
            except Exception:
                log.exception("a reply met a bug; its stream is cancelled")
                self._soon(call.cancel)

    def _take(self, call: HttpCall) -> None:
        """Moves what a call has into the queue, until there is no more or it may not."""
        if self._calls.get(call.number) is not call:  # it is over
            call._rest = None
            return
        more = True
        while more:
            if call._rest is not None and not self._split(call):
                return
            if self._queue_is_full(call):
                return
            message, ending, more = call.next_out()
            if ending is not None:
                self._end(call, *ending)
            elif message is not None:
                self._message(call, message)
                more = more or call._rest is not None

    def _message(self, call: HttpCall, message: bytes) -> None:
        if not call._started:
            call._started = True
            block = self._shrunk() + http.response_block(call.initial_metadata)
            self._put(http.header_frames(call.number, 0, block, http.DEFAULT_FRAME))
        size = len(message) + http.PREFIX.size
        if size <= call._window and size <= self._window and size <= http.DEFAULT_FRAME:
            call._window -= size
            self._window -= size
            self._out.append(http.MESSAGE.pack(size << 8, 0, call.number, 0, len(message)))
            self._out.append(message)
            self._queued += size + http.HEAD.size
        else:
            call._rest = memoryview(http.PREFIX.pack(0, len(message)) + message)

    def _queue_is_full(self, call: HttpCall) -> bool:
        """If so, the call is looked at again once the socket has taken what is queued."""
        if self._queued + len(self._unsent) < MOST_UNSENT:
            return False
        self._queueing[call] = None
        return True

    def _split(self, call: HttpCall) -> bool:
        """Queues as much of a call's unfinished message as may be. Whether that is all of it."""
        rest = call._rest
        while rest is not None:
            if self._queue_is_full(call):
                return False
            size = min(len(rest), http.DEFAULT_FRAME, self._window, call._window)
            if size <= 0:
                self._blocked[call] = None
                return False
            self._window -= size
            call._window -= size
            self._put(http.HEAD.pack(size << 8, 0, call.number))
            self._out.append(rest[:size])
            self._queued += size
            call._rest = rest = rest[size:] if size < len(rest) else None
        return True

    def _end(self, call: HttpCall, code: grpc.StatusCode, details: str, metadata: Metadata) -> None:
        block = http.status_block(code, details, metadata)
        if not call._started:
            block = http.response_block(call.initial_metadata) + block
        self._put(
            http.header_frames(call.number, http.END_STREAM, self._shrunk() + block, http.DEFAULT_FRAME)
        )
        if not call._ended:  # nothing more is wanted of the client
            self._put(http.reset(call.number, http.NO_ERROR))
        self._calls.pop(call.number, None)
        self._soon(call.terminated)

    def _shrunk(self) -> bytes:
        shrink, self._shrink = self._shrink, b""
        return shrink

    def _send(self) -> None:
        """Gives the socket what it takes."""
        if self._dead or self._watched or not (self._out or self._unsent or self._holds()):
            return
        data: bytes | memoryview
        if self._unsent:
            data = b"".join([self._unsent, *self._out]) if self._out else self._unsent
        else:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)  # perhaps nothing new
        self._out.clear()
        self._queued = 0
        try:
            sent = self._wire.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:  # its reader finds out
            self._dead, self._unsent = True, memoryview(b"")
            return
        self._unsent = memoryview(data)[sent:] if sent < len(data) else memoryview(b"")
        if self._unsent or self._holds():
            self._watched = True
            self._stuck()
