"""One HTTP/2 connection and its gRPC calls: bytes in, messages to listeners; messages of calls, bytes out.

It knows no socket and no thread: what reads the socket calls `receive`, and whoever has something to send
calls `write`. One lock guards what both touch: the windows, and what is written.

Every place where bytes wait has a bound. A call that is not read is granted `WINDOW` bytes and no more; what
is sent waits in the calls' outboxes, and only `MOST_UNSENT` bytes of it in front of a socket that takes none.
"""

from __future__ import annotations

import base64
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import grpc
import hpack

from . import frame as http
from .call import GONE, Listener, Metadata, Outbox
from .errors import PoolFull, TenutoError, TooLarge
from .frame import ProtocolError, frame
from .inflate import Inflater
from .status import code_of, metadata_of

log = logging.getLogger("tenuto.transport")

WINDOW = 128 << 10  # bytes that a client may send on a call before they are read
_WINDOW_OF_ALL = 1 << 30  # of a connection: its calls' own windows are the bound
MOST_UNSENT = 256 << 10  # bytes in front of a socket; beyond them outboxes are not emptied
_MOST_CONTROL = 256 << 10  # bytes that a client has us answer without reading the answers
_MOST_HEADERS = 64 << 10  # bytes of a header block, as it comes and as it is
_WISHED_HEADERS = 16 << 10  # the same, as clients are told
_MOST_EMPTY = 1_000  # DATA frames in a row that bring nothing
_TABLE_SIZE_UPDATES = 2  # in front of a header block (RFC 7541, section 4.2)
# A call that is finished, and whose client takes neither its last replies nor its status, ends after that.
_UNTAKEN_SECONDS = 60.0
# Calls that a client begins and resets: so many at once, and so many a second (CVE-2023-44487).
_RESETS, _RESETS_PER_SECOND = 10_000, 1_000.0
_PING = b"tenuto:)"

Headers = tuple[tuple[str, str | bytes], ...]
Route = Callable[["HttpCall"], Listener]  # opens a call: who listens to it


class Wire(Protocol):
    """The socket."""

    def send(self, data: bytes | memoryview) -> int:
        """Takes as many bytes as it can at once. Raises: OSError."""


class Loop(Protocol):
    """The thread that reads."""

    def soon(self, what: Callable[[], object]) -> None:
        """Has it done on that thread. Any thread."""

    def dirty(self, connection: Connection) -> None:
        """Has `Connection.write` called at the end of its turn. On that thread."""

    def submit(self, call: HttpCall) -> None:
        """Has `Connection.write` called for it, now or with this thread's next flush. Any thread."""

    def blocked(self, connection: Connection) -> None:
        """Its socket takes no more for now: `write_on` when it does. Any thread."""


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


class HttpCall:
    """A gRPC call. Implements call.Call; what is underlined belongs to its connection."""

    __slots__ = (
        "__weakref__", "_all_partial", "_allowed", "_connection", "_counted", "_due", "_ended", "_gone",
        "_held", "_inflater", "_limits", "_listener", "_loop", "_outbox", "_parked", "_partial", "_paused",
        "_rest", "_spent", "_started", "_untaken_since", "_window", "closed", "deadline",
        "initial_metadata", "metadata", "number", "path",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        number: int,
        headers: Headers,
        window: int,
        limits: Limits,
        partial: Partial,
        loop: Loop,
    ) -> None:
        fields = dict(headers)
        self.number = number  # of the stream
        self.path = str(fields.get(":path", ""))
        self.metadata = tuple((k, v) for k, v in headers if not k.startswith(":"))
        self.initial_metadata: Metadata = ()  # goes out with the first message
        self.closed: Callable[[], None] | None = None  # called once the call is over, behind its listener
        self._connection = connection
        self._loop = loop
        self._limits = limits
        self._listener: Listener = GONE
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
        self._held = False  # reading pauses: the outbox is full
        self._paused = False  # reading pauses: the listener wants it
        self._ended = False  # the client sends no more
        self._gone = False  # it is over, and its listener knows
        # What goes out; guarded by the outbox's lock or the connection's.
        self._outbox = Outbox(limits.outbox_bytes)
        self._due = False  # a write is asked for, or under way
        self._window = window  # bytes that the client takes
        self._started = False  # the response's headers are out
        self._rest: memoryview | None = None  # of a message that did not go out whole
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
        self._connection.abandon(self, http.CANCEL)
        self._loop.soon(self.terminated)

    @property
    def backed_up(self) -> bool:
        return self._outbox.full

    def peer(self) -> str:
        return self._connection.peer

    @property
    def connection(self) -> Connection:
        return self._connection

    @property
    def is_over(self) -> bool:
        return self._outbox.over

    @property
    def seconds_left(self) -> float:
        """Until the deadline that the client has set; infinity without one."""
        return max(0.0, self.deadline - time.monotonic())

    # The reading thread.

    def open(self, route: Route) -> None:
        """Finds its listener."""
        try:
            self._listener = route(self)
        except Exception:
            log.exception("a call could not be opened")
            self.finish(grpc.StatusCode.UNKNOWN, "an error inside the server; its log says more")

    def look(self, now: float) -> None:
        """Ends it if its deadline has passed, or if its client does not take its ending."""
        box = self._outbox
        if box.ending is None:
            if now > self.deadline:
                self._expire()
        elif not self._untaken_since:
            self._untaken_since = now
        elif now - self._untaken_since > _UNTAKEN_SECONDS:
            self.cancel()

    def _expire(self) -> None:
        """The client waits no more."""
        if self._rest is not None:  # its end would be taken for the end of a message
            self.cancel()
            return
        with self._outbox.lock:
            self._outbox.clear()
        self.finish(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")

    def take(self, data: bytes, start: int, end: int) -> None:
        """The payload of a DATA frame."""
        size = end - start
        self._allowed -= size
        if self._allowed < 0:
            raise ProtocolError(http.FLOW_CONTROL_ERROR, f"stream {self.number} sends beyond its window")
        if self._held or self._paused:
            self._partial += memoryview(data)[start:end]
            self._parked += size
            return
        self._spent += size
        if size >= http.PREFIX.size and not self._partial:
            compressed, length = http.PREFIX.unpack_from(data, start)
            if not compressed and length == size - http.PREFIX.size <= self._limits.message_bytes:
                self._hand_on(data[start + http.PREFIX.size : end])  # nearly always
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

    def end(self) -> None:
        """The client sends no more."""
        self._ended = True
        if not self._held and not self._paused:
            self._half_close()

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

    def terminated(self) -> None:
        """The call is over, in whatever way."""
        if self._gone:
            return
        self._gone = True
        with self._outbox.lock:
            self._outbox.close()
        listener, self._listener = self._listener, GONE  # or each would keep the other alive
        self._partial.clear()
        self._count()
        try:
            listener.terminated()
        except Exception:
            log.exception("the end of a call met a bug")
        finally:
            if self.closed is not None:
                self.closed()

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
            if self._partial:  # it ended within a message
                self.cancel()
            else:
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

    def _grant(self) -> None:
        """Lets the client send as much again as was taken, once that is worth a frame. While reading pauses,
        what is here counts as not taken."""
        if self._spent >= WINDOW // 2 and not (self._ended or self._held or self._paused):
            spent, self._spent = self._spent, 0
            self._allowed += spent
            self._connection.control(http.widen(self.number, spent))


class Connection:
    """The reading thread: `receive`, `read_on`, `look`, `leave`, `lost`. Any thread: all else."""

    def __init__(
        self, wire: Wire, peer: str, limits: Limits, route: Route, loop: Loop, partial: Partial | None = None
    ) -> None:
        self.peer = peer
        self.heard = time.monotonic()  # when something came last
        self.began = self.heard
        self.greeted = False  # the client's preface is here
        self.leaving = False  # no call is taken any more
        self.fault: ProtocolError | None = None  # why the connection must end
        self._wire = wire
        self._limits = limits
        self._partial = partial or Partial()
        self._route = route
        self._loop = loop
        self._decoder = hpack.Decoder(max_header_list_size=_MOST_HEADERS)
        self._calls: dict[int, HttpCall] = {}
        self._last = 0  # the highest stream that the client began
        self._in = b""  # less than a frame
        self._block: tuple[int, int, bytearray] | None = None  # stream, flags and a header block in pieces
        self._empty = 0  # DATA frames in a row that brought nothing
        self._credit = 0  # bytes taken on all streams and not yet granted anew
        self._resets = float(_RESETS)
        self._resets_at = self.began
        self._pinged = 0.0  # when; 0: the last one was answered
        # What goes out.
        self._lock = threading.Lock()
        self._out: list[bytes | memoryview] = []
        self._queued = 0  # bytes in it
        self._unsent = memoryview(b"")  # what the socket did not take
        self._watched = False  # somebody waits until the socket takes more
        self._dead = False
        self._window = http.DEFAULT_WINDOW
        self._initial_window = http.DEFAULT_WINDOW
        self._largest = http.DEFAULT_FRAME
        self._shrink = b""  # what the next header block begins with
        self._blocked: dict[HttpCall, None] = {}  # by windows
        self._queueing: dict[HttpCall, None] = {}  # by the queue, which is full
        self._widened: dict[HttpCall, None] = {}  # blocked no more, perhaps
        settings = (
            (http.INITIAL_WINDOW_SIZE, WINDOW),
            (http.MAX_HEADER_LIST_SIZE, _WISHED_HEADERS),
            (http.MAX_CONCURRENT_STREAMS, limits.calls),
        )
        self._put(frame(http.SETTINGS, 0, 0, b"".join(http.SETTING.pack(*one) for one in settings)))
        self._put(http.widen(0, _WINDOW_OF_ALL - http.DEFAULT_WINDOW))

    # What comes in.

    def receive(self, read: bytes) -> None:
        """Takes what was read, and does what it asks for. What there is to send then waits for `write`.

        Raises: ProtocolError.
        """
        self.heard = time.monotonic()
        data, at = self._in + read if self._in else read, 0
        if not self.greeted:
            begin = data[: len(http.PREFACE)]
            if not http.PREFACE.startswith(begin):
                raise ProtocolError(http.PROTOCOL_ERROR, "this is no HTTP/2; speak gRPC, without TLS")
            if len(begin) < len(http.PREFACE):
                self._in = data
                return
            self.greeted, at = True, len(http.PREFACE)
        size, head = len(data), http.HEAD.size
        while size - at >= head:
            word, flags, number = http.HEAD.unpack_from(data, at)
            start = at + head
            end = start + (word >> 8)
            if end - start > http.DEFAULT_FRAME:
                raise ProtocolError(http.FRAME_SIZE_ERROR, f"a frame of {end - start} bytes")
            if end > size:
                break
            at = end
            if word & 0xFF == http.DATA and self._block is None:
                self._data(number & http.NUMBER, flags, data, start, end)
            else:
                self._control(word & 0xFF, flags, number & http.NUMBER, data[start:end])
        self._in = data[at:]
        if self.fault is not None:
            raise self.fault

    def _data(self, number: int, flags: int, data: bytes, start: int, end: int) -> None:
        self._credit += end - start
        if self._credit >= _WINDOW_OF_ALL // 2:
            credit, self._credit = self._credit, 0
            self.control(http.widen(0, credit))
        if start == end and not flags & http.END_STREAM:
            self._empty += 1
            _check(self._empty <= _MOST_EMPTY, http.ENHANCE_YOUR_CALM, "too many empty frames")
        else:
            self._empty = 0
        call = self._calls.get(number)
        if call is None:
            self._check_known(number)  # else it is over, and the client does not know yet
            return
        if call._ended:
            raise ProtocolError(http.STREAM_CLOSED, f"stream {number} goes on behind its end")
        if flags & http.PADDED:
            whole = end - start
            start, end = http.unpadded(flags, data, start, end)
            call.skip(whole - (end - start))
        call.take(data, start, end)
        if flags & http.END_STREAM:
            call.end()

    def _check_known(self, number: int) -> None:
        if number > self._last or not number & 1:
            raise ProtocolError(http.PROTOCOL_ERROR, f"stream {number} was never opened")

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if (self._block is None) == (kind == http.CONTINUATION):
            raise ProtocolError(http.PROTOCOL_ERROR, "a header block is not in one piece")
        match kind:
            case http.HEADERS:
                self._headers(number, flags, payload)
            case http.CONTINUATION:
                self._continue(number, flags, payload)
            case http.RST_STREAM:
                self._reset(number, payload)
            case http.SETTINGS:
                self._settings(flags, number, payload)
            case http.PING:
                _check(len(payload) == 8 and not number, http.FRAME_SIZE_ERROR, "a wrong PING")
                if flags & http.ACK:
                    self._pinged = 0.0
                else:
                    self.control(frame(http.PING, http.ACK, 0, payload))
            case http.WINDOW_UPDATE:
                self._widen(number, payload)
            case http.PUSH_PROMISE:
                raise ProtocolError(http.PROTOCOL_ERROR, "a client pushes nothing")
            case http.DATA:
                raise ProtocolError(http.PROTOCOL_ERROR, "a header block is not in one piece")
            case _:  # GOAWAY: the client takes no pushes; PRIORITY; what is unknown is ignored
                pass

    def _headers(self, number: int, flags: int, payload: bytes) -> None:
        start, end = http.unpadded(flags, payload, 0, len(payload))
        if flags & http.HAS_PRIORITY:
            start += 5
        _check(start <= end, http.FRAME_SIZE_ERROR, "a wrong HEADERS")
        self._block = (number, flags, bytearray(payload[start:end]))
        if flags & http.END_HEADERS:
            self._block_is_whole()

    def _continue(self, number: int, flags: int, payload: bytes) -> None:
        assert self._block is not None
        _check(number == self._block[0], http.PROTOCOL_ERROR, "a header block is not in one piece")
        # An empty piece is no progress, and a client could send them for ever.
        _check(bool(payload) or bool(flags & http.END_HEADERS), http.ENHANCE_YOUR_CALM, "empty CONTINUATION")
        self._block[2].extend(payload)
        _check(len(self._block[2]) <= _MOST_HEADERS, http.ENHANCE_YOUR_CALM, "a header block is too long")
        if flags & http.END_HEADERS:
            self._block_is_whole()

    def _block_is_whole(self) -> None:
        assert self._block is not None
        (number, flags, block), self._block = self._block, None
        _check_size_updates(block)
        try:
            fields = self._decoder.decode(bytes(block), raw=True)
            headers = tuple([(_text(name), _value(name, value)) for name, value in fields])
        except (hpack.HPACKError, UnicodeDecodeError, ValueError) as error:
            text = f"a header block is wrong: {error}"[:200]
            raise ProtocolError(http.COMPRESSION_ERROR, text) from error
        call = self._calls.get(number)
        if call is not None:  # trailers
            _check(bool(flags & http.END_STREAM), http.PROTOCOL_ERROR, "headers in the middle of a stream")
            _check(not call._ended, http.STREAM_CLOSED, f"stream {number} goes on behind its end")
            call.end()
            return
        if number <= self._last and number & 1:  # of a call that is over
            return
        _check(number & 1 == 1, http.PROTOCOL_ERROR, f"stream {number} is not a client's")
        self._last = number
        self._open(number, headers, bool(flags & http.END_STREAM))

    def _open(self, number: int, headers: Headers, ended: bool) -> None:
        if self.leaving or len(self._calls) >= self._limits.calls:
            self.control(http.reset(number, http.REFUSED_STREAM))
            return
        fields = dict(headers)
        content = str(fields.get("content-type", ""))
        if fields.get(":method") != "POST" or not content.startswith("application/grpc"):
            block = http.literal(":status", "405" if fields.get(":method") != "POST" else "415")
            with self._lock:
                block = self._shrunk() + block
            self.control(http.header_frames(number, http.END_STREAM, block, self._largest))
            self.control(b"" if ended else http.reset(number, http.NO_ERROR))
            return
        with self._lock:
            window = self._initial_window
            call = HttpCall(self, number, headers, window, self._limits, self._partial, self._loop)
            self._calls[number] = call
        call.open(self._route)
        if ended and not call._gone:
            call.end()

    def _reset(self, number: int, payload: bytes) -> None:
        _check(len(payload) == 4, http.FRAME_SIZE_ERROR, "a wrong RST_STREAM")
        self._check_known(number)
        call = self._calls.get(number)
        if call is None:
            return
        self._resets += (self.heard - self._resets_at) * _RESETS_PER_SECOND
        self._resets = min(self._resets, float(_RESETS)) - 1
        self._resets_at = self.heard
        _check(self._resets >= 0, http.ENHANCE_YOUR_CALM, "too many streams are opened and reset")
        self._forget(call)
        call.terminated()

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        _check(not number and len(payload) % 6 == 0, http.FRAME_SIZE_ERROR, "wrong SETTINGS")
        if flags & http.ACK:
            return
        settings = dict(http.SETTING.iter_unpack(payload))
        window = settings.get(http.INITIAL_WINDOW_SIZE)
        largest = settings.get(http.MAX_FRAME_SIZE, http.DEFAULT_FRAME)
        _check(http.DEFAULT_FRAME <= largest < 1 << 24, http.PROTOCOL_ERROR, "frames of a wrong size")
        with self._lock:
            if window is not None:
                self._set_initial_window(window)
            if settings.get(http.HEADER_TABLE_SIZE, 4096) < 4096:
                self._shrink = http.SHRINK_TABLE
        self.control(frame(http.SETTINGS, http.ACK, 0))

    def _set_initial_window(self, window: int) -> None:
        most = max([call._window for call in self._calls.values()], default=0)
        wider = window - self._initial_window
        _check(max(window, most + wider) <= http.MAX_WINDOW, http.FLOW_CONTROL_ERROR, "a window is too wide")
        for call in self._calls.values():
            call._window += wider
        self._initial_window = window
        self._widened.update(self._blocked)

    def _widen(self, number: int, payload: bytes) -> None:
        _check(len(payload) == 4, http.FRAME_SIZE_ERROR, "a wrong WINDOW_UPDATE")
        size = http.WORD.unpack(payload)[0] & http.NUMBER
        _check(size > 0, http.PROTOCOL_ERROR, "a window grows by nothing")
        with self._lock:
            call = self._calls.get(number)
            if not number:
                self._window += size
                _check(self._window <= http.MAX_WINDOW, http.FLOW_CONTROL_ERROR, "a window is too wide")
                if self._window == size:  # it was shut
                    self._widened.update(self._blocked)
            elif call is not None:
                call._window += size
                _check(call._window <= http.MAX_WINDOW, http.FLOW_CONTROL_ERROR, "a window is too wide")
                if call in self._blocked:
                    self._widened[call] = None
        if number and call is None:
            self._check_known(number)

    # What goes out. Any thread.

    def write(self, calls: Iterable[HttpCall] = ()) -> None:
        """Sends what these calls have, as far as windows and the socket allow, and what waited before.

        Does not raise: a call that meets a bug is cancelled, the others go on.
        """
        with self._lock:
            for call in calls:
                self._take_safely(call)
            if self._widened:
                widened, self._widened = self._widened, {}
                for call in widened:
                    if self._window > 0 and self._blocked.pop(call, self) is None:
                        self._take_safely(call)
            self._send()
            while self._queueing and not self._unsent and not self._dead:
                queueing, self._queueing = self._queueing, {}
                for call in queueing:
                    self._take_safely(call)
                self._send()

    def write_on(self) -> None:
        """The socket takes more."""
        with self._lock:
            self._watched = False
        self.write()

    def control(self, frames: bytes) -> None:
        """Queues frames that no window holds up. On the reading thread."""
        with self._lock:
            self._put(frames)
            unread = self._queued + len(self._unsent) > MOST_UNSENT + _MOST_CONTROL
        if unread:
            self.fault = ProtocolError(http.ENHANCE_YOUR_CALM, "answers are asked for and not read")
        self._loop.dirty(self)

    def abandon(self, call: HttpCall, code: int) -> None:
        """Resets a call's stream."""
        with self._lock:
            if self._calls.pop(call.number, None) is not None:
                self._drop(call)
                self._put(http.reset(call.number, code))
        self._loop.soon(self.write)

    @property
    def is_blocked(self) -> bool:
        """Whether the socket did not take all that was sent."""
        return bool(self._unsent)

    @property
    def calls(self) -> int:
        return len(self._calls)

    def _put(self, data: bytes) -> None:
        self._out.append(data)
        self._queued += len(data)

    def _take_safely(self, call: HttpCall) -> None:
        try:
            self._take(call)
        except Exception:
            log.exception("a reply met a bug; its stream is cancelled")
            self._loop.soon(call.cancel)

    def _take(self, call: HttpCall) -> None:
        """Moves what a call has into the queue, until there is no more or it may not."""
        if self._calls.get(call.number) is not call:  # it is over
            call._rest = None
            return
        box = call._outbox
        more = True
        while more:
            if call._rest is not None and not self._split(call):
                return
            if self._queue_is_full(call):
                return
            with box.lock:
                message = box.take()
                more = bool(box.messages) or (message is not None and box.ending is not None)
                ending = box.ending if message is None and not box.over else None
                resume = call._held and not box.full
                if not more and ending is None:
                    call._due = False  # who sends from here on asks anew, and waits for our lock
            if resume:
                self._loop.soon(call.read_on)
            if ending is not None:
                self._end(call, *ending)
            elif message is not None:
                self._message(call, message)
                more = more or call._rest is not None

    def _message(self, call: HttpCall, message: bytes) -> None:
        if not call._started:
            call._started = True
            block = self._shrunk() + http.response_block(call.initial_metadata)
            self._put(http.header_frames(call.number, 0, block, self._largest))
        size = len(message) + http.PREFIX.size
        if size <= call._window and size <= self._window and size <= self._largest:
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
            size = min(len(rest), self._largest, self._window, call._window)
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
        self._put(http.header_frames(call.number, http.END_STREAM, self._shrunk() + block, self._largest))
        if not call._ended:  # nothing more is wanted of the client
            self._put(http.reset(call.number, http.NO_ERROR))
        self._calls.pop(call.number, None)
        self._loop.soon(call.terminated)

    def _shrunk(self) -> bytes:
        shrink, self._shrink = self._shrink, b""
        return shrink

    def _send(self) -> None:
        """Gives the socket what it takes."""
        if self._dead or self._watched or not self._out:
            if not self._unsent or self._dead or self._watched:
                return
        data: bytes | memoryview
        if self._unsent:
            data = b"".join([self._unsent, *self._out]) if self._out else self._unsent
        else:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
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
        if self._unsent:
            self._watched = True
            self._loop.blocked(self)

    # Its life. The reading thread.

    def look(self, now: float, ping_seconds: float, pong_seconds: float) -> str:
        """Pings a client that is silent. Why the connection is to be given up, or nothing."""
        if not self.greeted:
            return "no HTTP/2 came" if now - self.began > pong_seconds else ""
        if self._pinged and now - max(self._pinged, self.heard) > pong_seconds:
            return "a ping was not answered"
        if not self._pinged and now - self.heard > ping_seconds:
            self._pinged = now
            self.control(frame(http.PING, 0, 0, _PING))
        for call in list(self._calls.values()):
            call.look(now)
        return ""

    def leave(self, code: int = http.NO_ERROR, text: str = "") -> None:
        """Says that no call is taken any more; those that are here go on."""
        self.leaving = True
        with self._lock:
            self._put(frame(http.GOAWAY, 0, 0, http.TWO_WORDS.pack(self._last, code) + text[:200].encode()))
            self._send()

    def finish_all(self) -> None:
        """Ends every call, each behind what it has sent."""
        for call in list(self._calls.values()):
            call.finish(grpc.StatusCode.UNAVAILABLE, "the server has left; go to another one")

    def lost(self) -> None:
        """The connection is gone: so are its calls."""
        with self._lock:
            self._dead = True
            self._out.clear()
            self._unsent = memoryview(b"")
            self._blocked.clear()
            self._queueing.clear()
            self._widened.clear()
            calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.terminated()

    def _forget(self, call: HttpCall) -> None:
        with self._lock:
            self._calls.pop(call.number, None)
            self._drop(call)

    def _drop(self, call: HttpCall) -> None:
        for waiting in (self._blocked, self._queueing, self._widened):
            waiting.pop(call, None)


def _check(holds: bool, code: int, text: str) -> None:
    if not holds:
        raise ProtocolError(code, text)


def _check_size_updates(block: bytearray) -> None:
    """Each costs the decoder time, and a block could hold thousands."""
    at = found = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:
        found += 1
        _check(found <= _TABLE_SIZE_UPDATES, http.COMPRESSION_ERROR, "too many sizes of the header table")
        long = block[at] & 0x1F == 0x1F
        at += 1
        while long and at < len(block):
            long = block[at] & 0x80 != 0
            at += 1


def _text(name: bytes) -> str:
    return name.decode("ascii")


def _value(name: bytes, value: bytes) -> str | bytes:
    if name.endswith(b"-bin"):
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    return value.decode("latin-1")


_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def _timeout_seconds(text: str) -> float:
    """gRPC's timeout, such as 250m; infinity for none, or for what is none."""
    digits, unit = text[:-1], text[-1:]
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 8 and unit in _UNITS):
        return math.inf
    return int(digits) * _UNITS[unit]
