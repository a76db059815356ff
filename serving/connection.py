"""One HTTP/2 connection: bytes in, calls and their messages; its `Outflow` is the way out.

It knows no socket and no thread: what reads the socket calls `receive`, and whoever has something to send
calls `write`.

Every place where bytes wait has a bound. A call that is not read is granted `WINDOW` bytes and no more; what
is sent waits in the calls' outboxes, and only `MOST_UNSENT` bytes of it in front of a socket that takes none.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import grpc
import hpack

from . import frame as http
from .frame import ProtocolError, check, frame
from .http_call import WINDOW, Headers, HttpCall, Limits, Partial
from .outflow import Outflow, Wire
from .routed_call import Loop as CallLoop
from .routed_call import Route

_WINDOW_OF_ALL = 1 << 30  # of a connection: its calls' own windows are the bound
_MOST_HEADERS = 64 << 10  # bytes of a header block, as it comes and as it is
_KEPT_HEADERS = 16 << 10  # bytes of the headers of a call that is taken; clients are told
# A field that the header table has is one byte from _INDEXED on; _LONG_INDEX begins one of several bytes.
_INDEXED, _LONG_INDEX = 0x80, 0xFF
_MOST_KNOWN_BLOCKS, _MOST_KNOWN_FIELDS = 16, 64
_MOST_EMPTY = 1_000  # DATA frames in a row that bring nothing
_TABLE_SIZE_UPDATES = 2  # in front of a header block (RFC 7541, section 4.2)
# What a client may do so often at once, and so often a second: begin calls and reset them (CVE-2023-44487),
# and change the windows of all its calls.
_RESETS, _RESETS_PER_SECOND = 10_000, 1_000.0
_CHANGES, _CHANGES_PER_SECOND = 100, 10.0
_PING = b"tenuto:)"
_SPLIT = "a header block is not in one piece"


class Loop(CallLoop, Protocol):
    """The thread that reads."""

    def dirty(self, connection: Connection) -> None:
        """Has `Connection.write` called at the end of its turn. On that thread."""

    def blocked(self, connection: Connection) -> None:
        """Its socket takes no more for now: `write_on` when it does. Any thread."""


class _Budget:
    """How often a client may do what costs us more than it."""

    def __init__(self, most: int, per_second: float, now: float) -> None:
        self._most, self._per_second = most, per_second
        self._left, self._at = float(most), now

    def spend(self, now: float, text: str) -> None:
        """Raises: ProtocolError when it is used up."""
        self._left = min(self._left + (now - self._at) * self._per_second, self._most) - 1
        self._at = now
        check(self._left >= 0, http.ENHANCE_YOUR_CALM, text)


class Connection:
    """The reading thread: `receive`, `read_on`, `look`, `leave`, `lost`. Any thread: all else."""

    def __init__(
        self,
        wire: Wire,
        peer: str,
        limits: Limits,
        route: Route,
        loop: Loop,
        partial: Partial | None = None,
        holds: Callable[[], bool] = lambda: False,
    ) -> None:
        self.peer = peer
        self.heard = time.monotonic()  # when something came last
        self.began = self.heard
        self.greeted = False  # the client's preface is here
        self.leaving = False  # no call is taken any more
        self.fault: ProtocolError | None = None  # why the connection must end
        self._limits = limits
        self._partial = partial or Partial()
        self._route = route
        self._loop = loop
        self._decoder = hpack.Decoder(max_header_list_size=_MOST_HEADERS)
        self._known_blocks: dict[bytes, Headers] = {}
        self._calls: dict[int, HttpCall] = {}
        self._last = 0  # the highest stream that the client began
        self._in = b""  # less than a frame
        self._block: tuple[int, int, bytearray] | None = None  # stream, flags and a header block in pieces
        self._empty = 0  # DATA frames in a row that brought nothing
        self._credit = 0  # bytes taken on all streams and not yet granted anew
        self._resets = _Budget(_RESETS, _RESETS_PER_SECOND, self.began)
        self._changes = _Budget(_CHANGES, _CHANGES_PER_SECOND, self.began)
        self._gone_at = 0  # the highest stream, as GOAWAY said
        self._pinged = 0.0  # when; 0: the last one was answered
        self._outflow = Outflow(wire, self._calls, loop.soon, lambda: loop.blocked(self), holds)
        self.write_on = self._outflow.write_on
        settings = (
            (http.INITIAL_WINDOW_SIZE, WINDOW),
            (http.MAX_HEADER_LIST_SIZE, _KEPT_HEADERS),
            (http.MAX_CONCURRENT_STREAMS, limits.calls),
        )
        self._outflow.put(frame(http.SETTINGS, 0, 0, b"".join(http.SETTING.pack(*one) for one in settings)))
        self._outflow.put(http.widen(0, _WINDOW_OF_ALL - http.DEFAULT_WINDOW))

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
            check(self._empty <= _MOST_EMPTY, http.ENHANCE_YOUR_CALM, "too many empty frames")
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
            raise ProtocolError(http.PROTOCOL_ERROR, _SPLIT)
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
                check(len(payload) == 8 and not number, http.FRAME_SIZE_ERROR, "a wrong PING")
                if flags & http.ACK:
                    self._pinged = 0.0
                else:
                    self.control(frame(http.PING, http.ACK, 0, payload))
            case http.WINDOW_UPDATE:
                self._widen(number, payload)
            case http.PUSH_PROMISE:
                raise ProtocolError(http.PROTOCOL_ERROR, "a client pushes nothing")
            case http.DATA:
                raise ProtocolError(http.PROTOCOL_ERROR, _SPLIT)
            case _:  # GOAWAY: the client takes no pushes; PRIORITY; what is unknown is ignored
                pass

    def _headers(self, number: int, flags: int, payload: bytes) -> None:
        start, end = http.unpadded(flags, payload, 0, len(payload))
        if flags & http.HAS_PRIORITY:
            start += 5
        check(start <= end, http.FRAME_SIZE_ERROR, "a wrong HEADERS")
        self._block = (number, flags, bytearray(payload[start:end]))
        if flags & http.END_HEADERS:
            self._block_is_whole()

    def _continue(self, number: int, flags: int, payload: bytes) -> None:
        assert self._block is not None
        check(number == self._block[0], http.PROTOCOL_ERROR, _SPLIT)
        # An empty piece is no progress, and a client could send them for ever.
        check(bool(payload) or bool(flags & http.END_HEADERS), http.ENHANCE_YOUR_CALM, "empty CONTINUATION")
        self._block[2].extend(payload)
        check(len(self._block[2]) <= _MOST_HEADERS, http.ENHANCE_YOUR_CALM, "a header block is too long")
        if flags & http.END_HEADERS:
            self._block_is_whole()

    def _block_is_whole(self) -> None:
        assert self._block is not None
        (number, flags, block), self._block = self._block, None
        headers = self._headers_of(bytes(block))
        call = self._calls.get(number)
        if call is not None:  # trailers
            check(bool(flags & http.END_STREAM), http.PROTOCOL_ERROR, "headers in the middle of a stream")
            check(not call._ended, http.STREAM_CLOSED, f"stream {number} goes on behind its end")
            call.end()
            return
        if number <= self._last and number & 1:  # of a call that is over
            return
        check(number & 1 == 1, http.PROTOCOL_ERROR, f"stream {number} is not a client's")
        self._last = number
        if headers is None:
            self.control(http.reset(number, http.ENHANCE_YOUR_CALM))
            return
        self._open(number, headers, bool(flags & http.END_STREAM))

    def _headers_of(self, block: bytes) -> Headers | None:
        """The fields of a header block; None: too many of them are kept.

        A client that calls again and again names fields that the table has, each by one byte of 128 to 254
        (RFC 7541, section 6.1): that changes nothing in it, so the same bytes mean the same until another
        block does.
        """
        known = self._known_blocks.get(block)
        if known is not None:
            return known
        _check_size_updates(block)
        try:
            fields = list(self._decoder.decode(block, raw=True))
        except hpack.HPACKError as error:
            text = f"a header block is wrong: {error}"[:200]
            raise ProtocolError(http.COMPRESSION_ERROR, text) from error
        by_bytes = bool(block) and min(block) >= _INDEXED and max(block) < _LONG_INDEX
        if not by_bytes or len(self._known_blocks) >= _MOST_KNOWN_BLOCKS:
            self._known_blocks.clear()
        if sum([len(name) + len(value) for name, value in fields]) > _KEPT_HEADERS:
            return None
        headers = tuple([pair for name, value in fields for pair in _pairs(name, value)])
        if by_bytes and len(block) <= _MOST_KNOWN_FIELDS >= len(headers):  # one byte may name thousands
            self._known_blocks[block] = headers
        return headers

    def _open(self, number: int, headers: Headers, ended: bool) -> None:
        if self.leaving or len(self._calls) >= self._limits.calls:
            self.control(http.reset(number, http.REFUSED_STREAM))
            return
        fields = dict(headers)
        content = str(fields.get("content-type", ""))
        if fields.get(":method") != "POST" or not _is_grpc(content):
            block = http.literal(":status", "405" if fields.get(":method") != "POST" else "415")
            self._outflow.put_headers(number, http.END_STREAM, block)
            self.control(b"" if ended else http.reset(number, http.NO_ERROR))
            return
        window = self._outflow.initial_window
        call = HttpCall(self, number, headers, window, self._limits, self._partial, self._loop)
        self._outflow.add(call)
        call.open(self._route)
        if ended and not call._gone:
            call.end()

    def _reset(self, number: int, payload: bytes) -> None:
        check(len(payload) == 4, http.FRAME_SIZE_ERROR, "a wrong RST_STREAM")
        self._check_known(number)
        call = self._calls.get(number)
        if call is None:
            return
        self._resets.spend(self.heard, "too many streams are opened and reset")
        self._outflow.drop(call)
        call.terminated()

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        check(not number and len(payload) % 6 == 0, http.FRAME_SIZE_ERROR, "wrong SETTINGS")
        if flags & http.ACK:
            return
        settings = dict(http.SETTING.iter_unpack(payload))
        window = settings.get(http.INITIAL_WINDOW_SIZE)
        largest = settings.get(http.MAX_FRAME_SIZE, http.DEFAULT_FRAME)
        check(http.DEFAULT_FRAME <= largest < 1 << 24, http.PROTOCOL_ERROR, "frames of a wrong size")
        if window is not None:
            self._changes.spend(self.heard, "the windows change too often")
            self._outflow.set_initial_window(window)
        if settings.get(http.HEADER_TABLE_SIZE, 4096) < 4096:
            self._outflow.shrink_table()
        self.control(frame(http.SETTINGS, http.ACK, 0))

    def _widen(self, number: int, payload: bytes) -> None:
        check(len(payload) == 4, http.FRAME_SIZE_ERROR, "a wrong WINDOW_UPDATE")
        size = http.WORD.unpack(payload)[0] & http.NUMBER
        check(size > 0, http.PROTOCOL_ERROR, "a window grows by nothing")
        call = self._calls.get(number)
        if not number:
            self._outflow.widen(size)
        elif call is not None:
            self._outflow.widen_one(call, size)
        else:
            self._check_known(number)

    # What goes out. Any thread.

    def write(self, calls: Iterable[Any] = ()) -> None:
        """Sends what these calls have, as far as windows and the socket allow, and what waited before."""
        self._outflow.write(calls)

    def abandon(self, call: HttpCall, code: int = http.CANCEL) -> None:
        """Resets a call's stream."""
        self._outflow.drop(call, http.reset(call.number, code))
        self._loop.soon(self.write)

    def control(self, frames: bytes) -> None:
        """Queues frames that no window holds up. On the reading thread."""
        if self._outflow.put(frames):
            self.fault = ProtocolError(http.ENHANCE_YOUR_CALM, "answers are asked for and not read")
        self._loop.dirty(self)

    @property
    def is_blocked(self) -> bool:
        """Whether the socket did not take all that was sent."""
        return self._outflow.is_blocked

    @property
    def calls(self) -> int:
        return len(self._calls)

    @property
    def is_idle(self) -> bool:
        """Whether there is no call, and everything was sent."""
        return self._outflow.is_idle

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
        self._gone_at = self._gone_at or self._last  # it may be said again, and never be higher then
        last = http.TWO_WORDS.pack(self._gone_at, code)
        self._outflow.put(frame(http.GOAWAY, 0, 0, last + text[:200].encode()))
        self.write()

    def finish_all(self) -> None:
        """Ends every call, each behind what it has sent."""
        for call in list(self._calls.values()):
            call.finish(grpc.StatusCode.UNAVAILABLE, "the server has left; go to another one")

    def lost(self) -> None:
        """The connection is gone: so are its calls."""
        self._outflow.close()
        for call in list(self._calls.values()):
            self._outflow.drop(call)
            call.terminated()


def _check_size_updates(block: bytes) -> None:
    """Each costs the decoder time, and a block could hold thousands."""
    at = found = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:
        found += 1
        check(found <= _TABLE_SIZE_UPDATES, http.COMPRESSION_ERROR, "too many sizes of the header table")
        long = block[at] & 0x1F == 0x1F
        at += 1
        while long and at < len(block):
            long = block[at] & 0x80 != 0
            at += 1


def _pairs(name: bytes, value: bytes) -> list[tuple[str, str | bytes]]:
    """A header field as text, or the bytes of a binary one, of which several may come as one."""
    key = name.decode("latin-1")
    if not key.endswith("-bin"):
        return [(key, value.decode("latin-1"))]
    try:
        return [(key, base64.b64decode(part + b"=" * (-len(part) % 4))) for part in value.split(b",")]
    except binascii.Error:  # its sender's mistake, and nobody else's
        return [(key, value)]


def _is_grpc(content: str) -> bool:
    """`application/grpc`, perhaps with what the messages are, or a parameter behind it."""
    rest = content.removeprefix("application/grpc")
    return rest != content and rest[:1] in ("", "+", ";")
