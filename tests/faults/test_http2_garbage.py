"""Whatever bytes a client puts on its connection: it is told at most that it broke the rules, and each of its
calls hears once that it is over.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenuto.serving import frame as http
from tenuto.serving.call import Listener
from tenuto.serving.frame import ProtocolError, frame
from tenuto.serving.http_call import Limits
from tenuto.serving.routed_call import RoutedCall
from tests.unit.http2_peer import Client, Ears, answers_of, cut, data_frame, lasting, packed
from tests.unit.http2_peer import settings as setting

from .test_garbage import spoil

STREAMS = st.sampled_from([1, 3, 5, 0, 2, 7])


class Echo(Ears):
    """A listener that answers every message, and the half-close with a status."""

    def received(self, message: bytes) -> None:
        super().received(message)
        self.call.send(message * 3)

    def half_closed(self) -> None:
        super().half_closed()
        self.call.finish()


class EchoClient(Client):
    def __init__(self) -> None:
        super().__init__(limits=Limits(message_bytes=2000, outbox_bytes=500), greet=False)

    def listen(self, call: RoutedCall) -> Ears:
        self.ears.append(Echo(call))
        return self.ears[-1]


def survives(data: list[bytes], *, room: int) -> EchoClient:
    """Reads that, on a socket with little room at times, and loses the connection in the end."""
    client = EchoClient()
    try:
        for n, piece in enumerate(data):
            client.wire.room = room if n % 3 else 1 << 20
            client.say(piece)
            client.connection.write_on()
    except ProtocolError as error:
        client.connection.leave(error.code, str(error))
    client.drain()
    answers_of(client.frames())  # what it sent is HTTP/2
    client.lose()
    for ears in client.ears:
        lasting(ears.heard)
    assert client.connection.calls == 0
    return client


@st.composite
def sensible(draw: st.DrawFn) -> list[bytes]:
    """Frames as a client sends them, mostly."""
    own = Client(greet=False)  # whose header blocks refer to each other
    stream = draw(STREAMS)
    size = draw(st.integers(1, 90))
    body = packed(draw(st.binary(max_size=300))) + packed(gzip.compress(bytes(draw(st.integers(0, 3000)))), 1)
    kinds: dict[str, Callable[[], bytes]] = {
        "open": lambda: own.headers(
            draw(STREAMS), draw(st.sampled_from([0, 1])), grpc_timeout="1S", grpc_encoding="gzip"
        ),
        "body": lambda: b"".join(data_frame(stream, piece) for piece in cut(body, [size])),
        "end": lambda: data_frame(stream, b"", http.END_STREAM, draw(st.none() | st.integers(0, 9))),
        "reset": lambda: http.reset(stream, http.CANCEL),
        "widen": lambda: http.widen(stream, draw(st.integers(0, 1000) | st.just(1 << 30))),
        "settings": lambda: setting(
            INITIAL_WINDOW_SIZE=draw(st.integers(0, 1 << 31)), HEADER_TABLE_SIZE=draw(st.integers(0, 5000))
        ),
        "ping": lambda: frame(http.PING, draw(st.integers(0, 1)), 0, bytes(8)),
        "any": lambda: frame(
            draw(st.integers(0, 10)), draw(st.integers(0, 255)), stream, draw(st.binary(max_size=40))
        ),
        "pieces": lambda: (
            frame(http.HEADERS, 0, stream, own.headers(stream)[9:])
            + frame(http.CONTINUATION, http.END_HEADERS, draw(STREAMS), draw(st.binary(max_size=9)))
        ),
    }
    made = [kinds["open"]()]
    made += [kinds[kind]() for kind in draw(st.lists(st.sampled_from(sorted(kinds)), max_size=15))]
    return [http.PREFACE, setting(), *made]


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """The same, nearly; the preface is whole."""
    return spoil(draw, b"".join(draw(sensible())), 1, len(http.PREFACE))


@settings(deadline=None, max_examples=300)
@given(sensible(), st.integers(0, 200))
def test_a_connection_survives_frames_in_any_order(frames: list[bytes], room: int) -> None:
    survives(frames, room=room)


@settings(deadline=None, max_examples=300)
@given(spoilt(), st.lists(st.integers(1, 200), min_size=1), st.integers(0, 200))
def test_a_connection_survives_what_is_nearly_http2(data: bytes, sizes: list[int], room: int) -> None:
    survives(cut(data, sizes), room=room)


@given(st.binary(max_size=200))
def test_a_connection_survives_what_is_no_http2(data: bytes) -> None:
    assert survives([data], room=1000).ears == []


def test_what_is_right_is_answered_here_as_well() -> None:
    """Or the tests above would prove little."""
    own = Client(greet=False)
    opened = own.headers(1, grpc_encoding="gzip")
    body = data_frame(1, packed(b"abc") + packed(gzip.compress(b"d"), 1), http.END_STREAM)
    client = survives([http.PREFACE, setting(), opened, body], room=1000)
    assert client.answer().messages == [b"abcabcabc", b"ddd"]
    assert client.ears[0].heard == [b"abc", b"d", "half-closed", "over"]


def test_a_listener_that_is_not_told_is_found() -> None:
    """The check looks for a mistake: here is one."""
    client = EchoClient()
    client.say(http.PREFACE, setting(), client.headers(1))
    with pytest.raises(AssertionError):
        lasting(client.ears[0].heard)
    heard: Listener = client.ears[0]
    heard.terminated()
    lasting(client.ears[0].heard)
