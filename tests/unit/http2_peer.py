"""A client that speaks HTTP/2 in bytes, and stand-ins for a server's thread, socket and listener."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, NamedTuple

import grpc
import hpack
import pytest

from tenuto.serving import frame as http
from tenuto.serving.connection import Connection
from tenuto.serving.frame import ProtocolError, frame
from tenuto.serving.http_call import Limits
from tenuto.serving.routed_call import RoutedCall

Code = grpc.StatusCode
LIMITS = Limits(message_bytes=1 << 20)
PLENTY = 1 << 60
WIDE = http.MAX_WINDOW - http.DEFAULT_WINDOW  # what makes a window as wide as it may be
POST = {":method": "POST", ":scheme": "http", ":path": "/a/b", "content-type": "application/grpc"}


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frames_of(data: bytes) -> list[Frame]:
    """The frames that are whole."""
    found, at = [], 0
    while len(data) >= at + 9:
        length = int.from_bytes(data[at : at + 3], "big")
        kind, flags, stream = struct.unpack_from(">BBI", data, at + 3)
        if len(data) < at + 9 + length:
            break
        found.append(Frame(kind, flags, stream, data[at + 9 : at + 9 + length]))
        at += 9 + length
    return found


@dataclass
class Answer:
    """What came on one stream."""

    fields: dict[str, str] = field(default_factory=dict)
    blocks: int = 0
    data: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None
    granted: int = 0

    @property
    def messages(self) -> list[bytes]:
        found, at = [], 0
        while at < len(self.data):
            length = int.from_bytes(self.data[at + 1 : at + 5], "big")
            found.append(bytes(self.data[at + 5 : at + 5 + length]))
            assert len(found[-1]) == length, "a message is cut short"
            at += 5 + length
        return found

    @property
    def status(self) -> grpc.StatusCode:
        assert self.ended
        number = int(self.fields["grpc-status"])
        return next(code for code in Code if code.value[0] == number)


def answers_of(frames: list[Frame]) -> dict[int, Answer]:
    """By stream; 0 holds what was granted for the connection."""
    decoder, found, block = hpack.Decoder(), dict[int, Answer](), b""
    for kind, flags, stream, payload in frames:
        answer = found.setdefault(stream, Answer())
        assert answer.reset is None, "something comes behind the reset"
        if kind in (http.DATA, http.HEADERS):
            assert not answer.ended, "something comes behind the end"
            answer.ended = bool(flags & http.END_STREAM)
        if kind == http.DATA:
            answer.data += payload
        elif kind in (http.HEADERS, http.CONTINUATION):
            block += payload
            if flags & http.END_HEADERS:
                answer.fields |= {str(name): str(value) for name, value in decoder.decode(block)}
                answer.blocks, block = answer.blocks + 1, b""
        elif kind == http.RST_STREAM:
            answer.reset = int.from_bytes(payload, "big")
        elif kind == http.WINDOW_UPDATE:
            answer.granted += int.from_bytes(payload, "big")
    return found


def packed(message: bytes, compressed: int = 0) -> bytes:
    return struct.pack(">BI", compressed, len(message)) + message


def data_frame(stream: int, payload: bytes, flags: int = 0, padding: int | None = None) -> bytes:
    if padding is not None:
        payload, flags = bytes((padding,)) + payload + bytes(padding), flags | http.PADDED
    return frame(http.DATA, flags, stream, payload)


def settings(**values: int) -> bytes:
    """Named as in `frame`."""
    pairs = [struct.pack(">HI", getattr(http, name), value) for name, value in values.items()]
    return frame(http.SETTINGS, 0, 0, b"".join(pairs))


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Pieces of these sizes, over and over."""
    pieces, at, size = [], 0, cycle(sizes)
    while at < len(data):
        pieces.append(data[at : at + next(size)])
        at += len(pieces[-1])
    return pieces


# Stand-ins.


class FakeWire:
    """A socket that takes what there is room for, and not more than `at_once` a time."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.room = self.at_once = PLENTY
        self.most = 0  # bytes that were held for it at once

    def send(self, data: bytes | memoryview) -> int:
        self.most = max(self.most, len(data))
        size = min(len(data), self.room, self.at_once)
        self.room -= size
        self.taken += data[:size]
        return size


class FakeLoop:
    """The reading thread, turned by hand."""

    def __init__(self) -> None:
        self.errands: deque[Callable[[], object]] = deque()
        self.calls: list[RoutedCall] = []

    def soon(self, what: Callable[[], object]) -> None:
        self.errands.append(what)

    def dirty(self, connection: Connection) -> None: ...

    def submit(self, call: RoutedCall) -> None:
        self.calls.append(call)

    def blocked(self, connection: Connection) -> None:
        assert connection.is_blocked

    def turn(self, connection: Connection) -> None:
        connection.write()
        while self.errands or self.calls:
            while self.errands:
                self.errands.popleft()()
            calls, self.calls = self.calls, []
            connection.write(calls)


class Ears:
    """A listener that keeps what it hears: messages, "half-closed", "over"."""

    def __init__(self, call: RoutedCall) -> None:
        self.call = call
        self.heard: list[bytes | str] = []
        self.pauses = False
        self.resumes: list[Callable[[], None]] = []
        self.bug = ""  # where it raises

    def hear(self, what: bytes | str, method: str) -> None:
        self.heard.append(what)
        if method == self.bug:
            raise ZeroDivisionError("a bug of the listener")

    def received(self, message: bytes) -> None:
        self.hear(message, "received")

    def half_closed(self) -> None:
        self.hear("half-closed", "half_closed")

    def terminated(self) -> None:
        self.hear("over", "terminated")

    def wait(self, resume: Callable[[], None]) -> bool:
        if self.pauses:
            self.resumes.append(resume)
        return self.pauses

    def go_on(self) -> None:
        self.pauses = False
        self.resumes.pop()()


class Client:
    """A client, and its connection at the server."""

    def __init__(
        self, *, limits: Limits = LIMITS, greet: bool = True, table: int = 4096, loop: Any = None
    ) -> None:
        self.wire = FakeWire()
        self.loop: Any = loop or FakeLoop()
        self.ears: list[Ears] = []
        self.encoder = hpack.Encoder()
        self.connection = Connection(self.wire, "ipv4:127.0.0.1:1", limits, self.listen, self.loop)
        self._seen = 0
        if greet:
            self.say(http.PREFACE, settings())

    def listen(self, call: RoutedCall) -> Ears:
        self.ears.append(Ears(call))
        return self.ears[-1]

    def say(self, *frames: bytes) -> None:
        self.connection.receive(b"".join(frames))
        self.turn()

    def turn(self) -> None:
        self.loop.turn(self.connection)

    def drain(self) -> None:
        """The socket takes everything again."""
        self.wire.room = PLENTY
        while self.connection.is_blocked:
            self.connection.write_on()
            self.turn()

    def look(self, later: float) -> None:
        """So many seconds after it was heard last. It is not pinged."""
        self.connection.look(self.connection.heard + later, 1e9, 1e9)
        self.turn()

    def breaks(self, *frames: bytes) -> int:
        """Sends what breaks the rules. The connection's error code."""
        with pytest.raises(ProtocolError) as caught:
            self.say(*frames)
        self.lose()
        return caught.value.code

    def lose(self) -> None:
        self.connection.lost()
        self.turn()

    def headers(
        self, stream: int, flags: int = 0, more: dict[str, str] | None = None, **fields: str
    ) -> bytes:
        """A request's, with gRPC's own; `_` stands for `-`."""
        named = POST | (more or {}) | {name.replace("_", "-"): value for name, value in fields.items()}
        block = self.encoder.encode(list(named.items()))
        return frame(http.HEADERS, flags | http.END_HEADERS, stream, block)

    def open(self, stream: int = 1, flags: int = 0, **fields: str) -> Ears:
        self.say(self.headers(stream, flags, None, **fields))
        return self.ears[-1]

    def frames(self) -> list[Frame]:
        """All that came."""
        return frames_of(bytes(self.wire.taken))

    def fresh(self) -> list[Frame]:
        """What came since the last look."""
        frames = self.frames()
        self._seen, seen = len(frames), self._seen
        return frames[seen:]

    def answer(self, stream: int = 1) -> Answer:
        return answers_of(self.frames()).get(stream, Answer())


def lasting(heard: list[bytes | str]) -> list[bytes | str]:
    """What was heard, after checking that the end was told once and last."""
    assert heard.count("over") == 1
    assert heard[-1] == "over"
    return heard[:-1]
