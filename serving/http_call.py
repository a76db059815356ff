"""One gRPC call over HTTP/2: bytes become messages for its listener, and what is sent waits in its outbox."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Protocol

from . import frame as http
from .errors import DeadlinePassed, PoolFull, TenutoError, TooLarge
from .frame import ProtocolError
from .inflate import Inflater
from .routed_call import Loop, RoutedCall
from .status import code_of, metadata_of

# Of a request to the methods that everybody may call: health, reflection.
OTHERS_BYTES = 64 << 10
WINDOW = 128 << 10  # bytes that a client may send on a call before they are read

Headers = tuple[tuple[str, str | bytes], ...]


class Owner(Protocol):
    """The connection of a call."""

    peer: str

    def abandon(self, call: HttpCall, code: int = http.CANCEL) -> None:
        """Resets its stream. Any thread."""

    def control(self, frames: bytes) -> None:
        """Queues frames that no window holds up. On the reading thread."""

    def leave(self) -> None:
        """Says that no call is taken any more. On the reading thread."""


@dataclass(frozen=True)
class Limits:
    """What one connection and its calls may take."""

    message_bytes: int
    partial_bytes: int = 256 << 20  # of large messages that are not whole yet, of all calls of the process
    calls: int = 9216  # of one connection
    outbox_bytes: int = 256 << 10


class Partial:
    """How much of large messages is held until they are whole. The reading thread's."""

    def __init__(self) -> None:
        self.bytes = 0


class HttpCall(RoutedCall):
    """Cuts DATA into messages. What is underlined belongs to its connection as well."""

    __slots__ = (
        "_all_partial", "_allowed", "_counted", "_inflater", "_limits", "_parked", "_partial", "_rest",
        "_spent", "_window",
    )  # fmt: skip

    def __init__(
        self,
        connection: Owner,
        number: int,
        headers: Headers,
        window: int,
        limits: Limits,
        partial: Partial,
        loop: Loop,
    ) -> None:
        fields = dict(headers)
        super().__init__(connection, number, str(fields.get(":path", "")), loop, limits.outbox_bytes)
        self.metadata = tuple((k, v) for k, v in headers if not k.startswith(":"))
        self._limits = limits
        seconds = _timeout_seconds(str(fields.get("grpc-timeout", "")))
        self.deadline = time.monotonic() + seconds
        self._inflater = Inflater.of(str(fields.get("grpc-encoding", "identity")))
        # What comes in; the reading thread's.
        self._allowed = WINDOW  # bytes that the client may still send
        self._spent = 0  # bytes taken and not yet granted anew
        self._partial = bytearray()  # what is no whole message yet, or may not be read
        self._parked = 0  # bytes in it that came while reading paused
        self._counted = 0  # bytes of it that are in the count of all
        self._all_partial = partial
        # What goes out; guarded by the outbox's lock or the connection's.
        self._window = window  # bytes that the client takes
        self._rest: memoryview | None = None  # of a message that did not go out whole

    # The reading thread.

    def shrink(self, message_bytes: int) -> None:
        """Its messages may have no more than that."""
        self._limits = replace(self._limits, message_bytes=min(message_bytes, self._limits.message_bytes))

    def look(self, now: float) -> None:
        """Also if its deadline has passed."""
        if self._outbox.ending is None and now > self.deadline:
            self._expire()
        else:
            super().look(now)

    def _expire(self) -> None:
        """The client waits no more."""
        if self._rest is not None:  # its end would be taken for the end of a message
            self.cancel()
            return
        with self._outbox.lock:
            self._outbox.clear()
        error = DeadlinePassed("the deadline has passed; allow more")
        self.finish(code_of(error), str(error), metadata_of(error))

    def take(self, data: bytes, start: int, end: int) -> None:
        """The payload of a DATA frame."""
        size = end - start
        self._allowed -= size
        if self._allowed < 0:
            raise ProtocolError(http.FLOW_CONTROL_ERROR, f"stream {self.number} sends beyond its window")
        if self._outbox.ending is not None:  # nobody wants it
            return
        if self._held or self._paused:
            self._partial += memoryview(data)[start:end]
            self._parked += size
            return
        self._spent += size
        if size >= http.PREFIX.size and not self._partial:
            compressed, length = http.PREFIX.unpack_from(data, start)
            if not compressed and length == size - http.PREFIX.size <= self._limits.message_bytes:
                self._hand_on(data[start + http.PREFIX.size : end])  # nearly always
                if self._spent >= WINDOW // 2:
                    self._grant()
                return
        self._partial += memoryview(data)[start:end]
        self._cut()
        self._count()
        self._grant()

    def skip(self, size: int) -> None:
        """Padding, which counts against the window."""
        self._allowed -= size
        self._spent += size

    def read_on(self) -> None:
        """Looks again whether reading may go on."""
        if self._gone or not (self._held or self._paused or self._parked):
            return
        self._held = self._paused = False
        if self._holds():
            return
        self._spent, self._parked = self._spent + self._parked, 0
        self._cut()
        self._count()
        self._grant()
        if self._ended and not self._held and not self._paused:
            self._half_close()

    def _forget(self) -> None:
        self._partial.clear()
        self._count()

    def _cut(self) -> None:
        """Hands on the messages that are whole."""
        while not self._held and not self._paused and len(self._partial) >= http.PREFIX.size:
            compressed, length = http.PREFIX.unpack_from(self._partial)
            end = http.PREFIX.size + length
            try:
                self._check_size(length)
                if len(self._partial) < end:
                    return
                message = bytes(memoryview(self._partial)[http.PREFIX.size : end])
                if compressed:
                    message = self._inflater.inflate(message, self._limits.message_bytes)
            except TenutoError as error:
                self._refuse(error)
                return
            del self._partial[:end]
            self._hand_on(message)

    def _refuse(self, error: TenutoError) -> None:
        self._partial.clear()
        self.finish(code_of(error), str(error), metadata_of(error))
        self._paused = True  # it is not read on

    def _count(self) -> None:
        """Large messages that are not whole are counted, and refused when there is too much of them."""
        size = max(0, len(self._partial) - WINDOW)
        self._all_partial.bytes += size - self._counted
        self._counted = size
        if size and self._all_partial.bytes > self._limits.partial_bytes:
            self._refuse(PoolFull("too many large messages are on their way; retry, or send smaller ones"))
            self._count()

    def _check_size(self, length: int) -> None:
        if length > self._limits.message_bytes:
            raise TooLarge(
                f"a message of {length} bytes, the limit is {self._limits.message_bytes} "
                "(--max-message-bytes); send smaller ones"
            )

    def _half_close(self) -> None:
        if self._partial:  # it ended within a message
            self.cancel()
        else:
            super()._half_close()

    def _grant(self) -> None:
        """Lets the client send as much again as was taken, once that is worth a frame. While reading pauses,
        what is here counts as not taken."""
        if self._spent >= WINDOW // 2 and not (self._ended or self._held or self._paused):
            spent, self._spent = self._spent, 0
            self._allowed += spent
            self._connection.control(http.widen(self.number, spent))


_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def _timeout_seconds(text: str) -> float:
    """gRPC's timeout, such as 250m; infinity for none, or for what is none."""
    digits, unit = text[:-1], text[-1:]
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 8 and unit in _UNITS):
        return math.inf
    return int(digits) * _UNITS[unit]
