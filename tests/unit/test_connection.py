"""One HTTP/2 connection: bytes in, what listeners hear; what calls send, bytes out. No socket, no thread."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from functools import partial

import grpc
import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving import frame as http
from tenuto.serving.frame import ProtocolError, frame
from tenuto.serving.http_call import WINDOW, HttpCall, Limits
from tenuto.serving.outflow import MOST_UNSENT
from tenuto.serving.routed_call import RoutedCall

from .http2_peer import (
    LIMITS,
    PLENTY,
    WIDE,
    Answer,
    Client,
    Ears,
    Frame,
    answers_of,
    cut,
    data_frame,
    lasting,
    packed,
    settings,
)

Code = grpc.StatusCode


@pytest.fixture
def client() -> Client:
    return Client()


# How a connection begins.


def test_a_preface_may_come_in_pieces() -> None:
    client = Client(greet=False)
    for byte in http.PREFACE + settings() + client.headers(1):
        assert not client.ears
        client.say(bytes((byte,)))
    assert client.ears[0].call.path == "/a/b"


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", http.PREFACE[:-1] + b"x"])
def test_what_is_no_http2_is_refused_at_its_first_wrong_byte(data: bytes) -> None:
    client, right = Client(greet=False), 0
    while data[right] == http.PREFACE[right]:
        client.say(data[right : right + 1])
        right += 1
    with pytest.raises(ProtocolError, match="TLS"):
        client.say(data[right : right + 1])


def test_the_server_begins_with_its_settings_and_acknowledges_the_clients(client: Client) -> None:
    first, second, third = client.frames()
    assert (first.kind, first.flags, first.stream) == (http.SETTINGS, 0, 0)
    told = dict(struct.iter_unpack(">HI", first.payload))
    assert told[http.INITIAL_WINDOW_SIZE] == WINDOW
    assert told[http.MAX_CONCURRENT_STREAMS] == LIMITS.calls
    assert (second.kind, second.stream) == (http.WINDOW_UPDATE, 0)
    assert third == (http.SETTINGS, http.ACK, 0, b"")


def test_a_ping_is_answered_and_an_answer_is_not(client: Client) -> None:
    client.fresh()
    client.say(frame(http.PING, 0, 0, b"12345678"), frame(http.PING, http.ACK, 0, b"abcdefgh"))
    assert client.fresh() == [(http.PING, http.ACK, 0, b"12345678")]


def test_a_silent_client_is_pinged_and_given_up_unless_it_answers(client: Client) -> None:
    look, heard = client.connection.look, client.connection.heard
    client.fresh()
    assert look(heard + 29, 30, 20) == ""
    assert client.fresh() == []
    assert look(heard + 31, 30, 20) == ""
    client.turn()
    (ping,) = client.fresh()
    assert (ping.kind, ping.flags) == (http.PING, 0)
    assert look(heard + 50, 30, 20) == ""
    assert "ping" in look(heard + 52, 30, 20)
    client.say(frame(http.PING, http.ACK, 0, ping.payload))
    assert look(client.connection.heard + 29, 30, 20) == ""


def test_a_client_that_never_greets_is_given_up() -> None:
    silent = Client(greet=False).connection
    assert silent.look(silent.began + 19, 30, 20) == ""
    assert "HTTP/2" in silent.look(silent.began + 21, 30, 20)


# Requests.


@given(st.data())
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(data: st.DataObject) -> None:
    longest, low, high = data.draw(st.sampled_from([(300, 1, 64), (40_000, 500, 16_000)]))
    sizes = st.lists(st.integers(low, high), min_size=1, max_size=8)
    client, sent, stream = Client(greet=False), list[bytes](), b""
    for size, compressed in data.draw(st.lists(st.tuples(st.integers(0, longest), st.booleans()))):
        sent.append(bytes((len(sent),)) * size)
        compressed = compressed and size < 16_000  # more would be taken for a bomb
        stream += packed(gzip.compress(sent[-1]) if compressed else sent[-1], compressed)
    padding = data.draw(st.none() | st.integers(0, 255))
    parts = [data_frame(1, piece, padding=padding) for piece in cut(stream, data.draw(sizes))]
    match data.draw(st.sampled_from(["data", "trailers", "the last message"])):
        case "trailers":
            parts.append(frame(http.HEADERS, http.END_STREAM | http.END_HEADERS, 1))
        case "the last message" if parts:
            parts[-1] = parts[-1][:4] + bytes((parts[-1][4] | http.END_STREAM,)) + parts[-1][5:]
        case _:
            parts.append(data_frame(1, b"", http.END_STREAM))
    whole = http.PREFACE + settings() + client.headers(1, grpc_encoding="gzip") + b"".join(parts)
    for piece in cut(whole, data.draw(sizes)):
        client.say(piece)
    assert client.ears[0].heard == [*sent, "half-closed"]


def test_a_request_without_a_body_is_half_closed_at_once(client: Client) -> None:
    assert client.open(1, http.END_STREAM).heard == ["half-closed"]


def test_a_half_close_within_a_message_cancels_the_call(client: Client) -> None:
    ears = client.open()
    client.say(data_frame(1, packed(b"whole") + packed(b"half")[:-1], http.END_STREAM))
    assert lasting(ears.heard) == [b"whole"]
    assert client.answer().reset == http.CANCEL


def test_headers_with_priority_and_padding_are_read(client: Client) -> None:
    block = client.headers(1)[9:]
    flags = http.END_HEADERS | http.HAS_PRIORITY | http.PADDED | http.END_STREAM
    client.say(frame(http.HEADERS, flags, 1, b"\x03" + bytes(5) + block + bytes(3)))
    assert client.ears[0].heard == ["half-closed"]


def test_metadata_reaches_the_call_without_http2s_own(client: Client) -> None:
    metadata = client.open(1, x="1").call.metadata
    assert metadata == (("content-type", "application/grpc"), ("x", "1"))


@given(st.lists(st.sampled_from(["1", "2", "3"]), max_size=12))
def test_headers_named_by_their_places_are_those_that_are_there_now(values: list[str]) -> None:
    """All that the table has of one call is new in another one, which then has its places: the same bytes."""
    client = Client()
    for number, value in enumerate(values):
        content = f"application/grpc+{value}"
        fields = {":path": f"/a/{value}", "content-type": content, "x": value}
        client.say(client.headers(2 * number + 1, more=fields))
        assert client.ears[-1].call.metadata == (("content-type", content), ("x", value))


def test_a_block_that_is_known_is_not_decoded_again(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 3):  # put into the table; named by their places
        client.open(number, x="1")
    monkeypatch.setattr(client.connection, "_decoder", None)
    assert client.open(5, x="1").call.metadata == client.ears[0].call.metadata


def test_a_block_that_means_much_is_not_kept(client: Client) -> None:
    """One byte may name a field that becomes thousands."""
    for number in (1, 3):
        client.open(number, x_bin="," * 4_000)
    assert not client.connection._known_blocks


def test_binary_metadata_reaches_the_call_as_bytes(client: Client) -> None:
    assert dict(client.open(1, x_bin="/wA").call.metadata)["x-bin"] == b"\xff\x00"


@pytest.mark.parametrize(
    "sent, values",
    [("AA==,AQ", [b"\0", b"\1"]), ("A", [b"A"]), ("AAEC", [b"\0\1\2"])],
    ids=["two", "no base64", "one"],
)
def test_what_is_wrong_in_a_binary_header_is_its_calls_matter(
    client: Client, sent: str, values: list[bytes]
) -> None:
    call = client.open(1, x_bin=sent).call
    assert [value for name, value in call.metadata if name == "x-bin"] == values


def test_a_call_with_headers_beyond_what_was_told_is_reset_alone(client: Client) -> None:
    neighbour = client.open(1)
    opened = len(client.ears)
    block = client.headers(3, 0, {"x-long": "v" * 20_000})[9:]
    pieces = cut(block, [16_000])
    client.say(frame(http.HEADERS, 0, 3, pieces[0]))
    for piece in pieces[1:]:
        client.say(frame(http.CONTINUATION, http.END_HEADERS if piece is pieces[-1] else 0, 3, piece))
    client.turn()
    assert client.answer(3).reset == http.ENHANCE_YOUR_CALM
    assert len(client.ears) == opened
    client.say(data_frame(1, packed(b"on")))
    assert neighbour.heard == [b"on"]


def test_windows_that_change_without_end_end_the_connection(client: Client) -> None:
    change = settings(INITIAL_WINDOW_SIZE=1000) + settings(INITIAL_WINDOW_SIZE=2000)
    client.say(change * 20)
    assert client.breaks(change * 100) == http.ENHANCE_YOUR_CALM


def test_what_comes_for_a_call_that_was_refused_is_not_kept(client: Client) -> None:
    client.wire.room = 0
    call = client.open(1).call
    call.finish(Code.NOT_FOUND, "not here")
    client.say(*(data_frame(1, piece) for piece in cut(packed(bytes(100_000)), [16_384])))
    assert isinstance(call, HttpCall)
    assert call._partial == b""


def test_goaway_never_names_a_later_stream_than_before(client: Client) -> None:
    client.open(1)
    client.connection.leave()
    client.say(client.headers(9))
    client.connection.leave(http.PROTOCOL_ERROR, "why")
    named = [struct.unpack(">II", f.payload[:8]) for f in client.frames() if f.kind == http.GOAWAY]
    assert named == [(1, http.NO_ERROR), (1, http.PROTOCOL_ERROR)]


@pytest.mark.parametrize(
    "content, taken",
    [
        ("application/grpc+proto", True),
        ("application/grpc;v=1", True),
        ("application/grpc-web", False),
    ],
)
def test_what_is_grpc_is_said_by_its_content_type(client: Client, content: str, taken: bool) -> None:
    client.say(client.headers(1, 0, {"content-type": content}))
    assert bool(client.ears) is taken


def continuation(client: Client, *sizes: int, stream: int = 1) -> list[bytes]:
    """A request whose header block is cut so."""
    first, *rest = cut(client.headers(stream)[9:], list(sizes))
    frames = [frame(http.HEADERS, http.END_STREAM, stream, first)]
    for i, piece in enumerate(rest, 1):
        flags = http.END_HEADERS if i == len(rest) else 0
        frames.append(frame(http.CONTINUATION, flags, stream, piece))
    return frames


@pytest.mark.parametrize("sizes", [(1,), (9, 3)])
def test_a_header_block_may_come_in_pieces(client: Client, sizes: tuple[int, ...]) -> None:
    client.say(*continuation(client, *sizes))
    assert client.ears[0].heard == ["half-closed"]


@pytest.mark.parametrize(
    "between",
    [
        data_frame(1, b""),
        frame(http.PING, 0, 0, bytes(8)),
        frame(http.HEADERS, http.END_HEADERS, 3, b"\x82"),
        frame(http.CONTINUATION, http.END_HEADERS, 3, b"\x82"),
        frame(0xFA, 0, 0, b"unknown"),
    ],
    ids=["data", "ping", "headers", "another continuation", "unknown"],
)
def test_nothing_may_come_between_the_pieces_of_a_header_block(client: Client, between: bytes) -> None:
    first, *_ = continuation(client, 8)
    assert client.breaks(first, between) == http.PROTOCOL_ERROR


@pytest.mark.parametrize("size", [0, 1, 16_384])
def test_header_blocks_without_end_are_cut_off(client: Client, size: int) -> None:
    first, *_ = continuation(client, 8)
    pieces = frame(http.CONTINUATION, 0, 1, bytes(size)) * (100_000 // max(size, 1))
    assert client.breaks(first, pieces) == http.ENHANCE_YOUR_CALM


def test_empty_frames_without_end_are_cut_off(client: Client) -> None:
    ears = client.open()
    for _ in range(5):
        client.say(data_frame(1, b"") * 1000, data_frame(1, packed(b"m")))
    assert client.breaks(data_frame(1, b"") * 2000) == http.ENHANCE_YOUR_CALM
    assert lasting(ears.heard) == [b"m"] * 5


def repeated_header(client: Client) -> bytes:
    """Few bytes that stand for many."""
    return client.headers(3) + frame(
        http.HEADERS, http.END_HEADERS, 5, b"\x40\x01x" + b"\x7f\x81\x1e" + b"v" * 4000 + b"\xbe" * 20
    )


def window_made_too_wide(_: Client) -> bytes:
    return http.widen(1, WIDE) + settings(INITIAL_WINDOW_SIZE=http.DEFAULT_WINDOW + 1)


ENDED = data_frame(1, b"", http.END_STREAM)
BREACHES: dict[str, tuple[int, bytes | Callable[[Client], bytes]]] = {
    "a frame that is too large": (http.FRAME_SIZE_ERROR, data_frame(1, bytes(16_385))),
    "a ping that is too short": (http.FRAME_SIZE_ERROR, frame(http.PING, 0, 0, bytes(7))),
    "settings in pieces": (http.FRAME_SIZE_ERROR, frame(http.SETTINGS, 0, 0, bytes(5))),
    "a short reset": (http.FRAME_SIZE_ERROR, frame(http.RST_STREAM, 0, 1, bytes(3))),
    "a short window update": (http.FRAME_SIZE_ERROR, frame(http.WINDOW_UPDATE, 0, 1, bytes(3))),
    "headers shorter than their priority": (
        http.FRAME_SIZE_ERROR,
        frame(http.HEADERS, http.END_HEADERS | http.HAS_PRIORITY, 3, bytes(4)),
    ),
    "data on a stream never opened": (http.PROTOCOL_ERROR, data_frame(3, b"")),
    "data on no stream": (http.PROTOCOL_ERROR, data_frame(0, b"")),
    "a reset of a stream never opened": (http.PROTOCOL_ERROR, http.reset(3, http.CANCEL)),
    "a window of a stream never opened": (http.PROTOCOL_ERROR, http.widen(3, 1)),
    "a stream that is not a client's": (http.PROTOCOL_ERROR, lambda c: c.headers(2)),
    "headers on no stream": (http.PROTOCOL_ERROR, lambda c: c.headers(0)),
    "a push": (http.PROTOCOL_ERROR, frame(http.PUSH_PROMISE, http.END_HEADERS, 1, bytes(4))),
    "a continuation of nothing": (http.PROTOCOL_ERROR, frame(http.CONTINUATION, 0, 1, b"")),
    "a window that grows by nothing": (http.PROTOCOL_ERROR, http.widen(1, 0)),
    "frames of a size that is not allowed": (http.PROTOCOL_ERROR, settings(MAX_FRAME_SIZE=16_383)),
    "more padding than data": (http.PROTOCOL_ERROR, frame(http.DATA, http.PADDED, 1, b"\x05abcd")),
    "padding without its length": (http.PROTOCOL_ERROR, frame(http.DATA, http.PADDED, 1, b"")),
    "more padding than headers": (http.PROTOCOL_ERROR, frame(http.HEADERS, http.PADDED, 3, b"\x09abcd")),
    "headers in the middle": (http.PROTOCOL_ERROR, lambda c: c.headers(1)),
    "a connection's window too wide": (http.FLOW_CONTROL_ERROR, http.widen(0, WIDE + 1)),
    "a stream's window too wide": (http.FLOW_CONTROL_ERROR, http.widen(1, WIDE + 1)),
    "all windows too wide": (http.FLOW_CONTROL_ERROR, settings(INITIAL_WINDOW_SIZE=1 << 31)),
    "a window made too wide by settings": (http.FLOW_CONTROL_ERROR, window_made_too_wide),
    "data behind the end": (http.STREAM_CLOSED, ENDED + data_frame(1, b"")),
    "trailers behind the end": (http.STREAM_CLOSED, lambda c: ENDED + c.headers(1, http.END_STREAM)),
    "headers that are no hpack": (
        http.COMPRESSION_ERROR,
        frame(http.HEADERS, http.END_HEADERS, 3, b"\xff\xff\xff\xff\xff\xff"),
    ),
    "three sizes of the table": (
        http.COMPRESSION_ERROR,
        frame(http.HEADERS, http.END_HEADERS, 3, b"\x3f\x80\x01" * 3),
    ),
    "a header list that is too long": (http.COMPRESSION_ERROR, repeated_header),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_client_that_breaks_the_rules_is_told_which(client: Client, name: str) -> None:
    ears = client.open()
    code, frames = BREACHES[name]
    assert client.breaks(frames if isinstance(frames, bytes) else frames(client)) == code
    lasting(ears.heard)


IGNORED: dict[str, bytes | Callable[[Client], bytes]] = {
    "an unknown type": frame(0xFA, 0xFF, 0, b"?") + frame(0xFB, 0xFF, 9, b"?"),
    "a priority": frame(http.PRIORITY, 0, 1, bytes(5)) + frame(http.PRIORITY, 0, 99, bytes(5)),
    "a client that leaves": frame(http.GOAWAY, 0, 0, bytes(8)),
    "unknown settings": frame(http.SETTINGS, 0, 0, b"\xfa\xfa" + bytes(4)),
    "settings acknowledged": frame(http.SETTINGS, http.ACK, 0),
    "data of a call that is over": data_frame(1, packed(b"late")) + data_frame(1, b"", http.END_STREAM),
    "a reset of a call that is over": http.reset(1, http.CANCEL),
    "a window of a call that is over": http.widen(1, 1000),
    "trailers of a call that is over": lambda c: c.headers(1, http.END_STREAM),
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_means_nothing_is_ignored(client: Client, name: str) -> None:
    over = client.open(1)
    over.call.finish()
    other = client.open(3)
    frames = IGNORED[name]
    client.say(frames if isinstance(frames, bytes) else frames(client))
    client.say(data_frame(3, packed(b"on")))
    assert other.heard == [b"on"]
    assert lasting(over.heard) == []


# Messages that are not taken.


@pytest.mark.parametrize(
    "encoding, message, code, reason",
    [
        ("identity", packed(b"", 1), Code.UNIMPLEMENTED, "NOT_SUPPORTED"),
        ("snappy", packed(b"..", 1), Code.UNIMPLEMENTED, "NOT_SUPPORTED"),
        ("gzip", packed(b"no gzip", 1), Code.INVALID_ARGUMENT, "WRONG_ENCODING"),
        ("deflate", packed(zlib.compress(bytes(2 << 20)), 1), Code.RESOURCE_EXHAUSTED, "TOO_LARGE"),
        ("identity", struct.pack(">BI", 0, (1 << 20) + 1), Code.RESOURCE_EXHAUSTED, "TOO_LARGE"),
        ("gzip", struct.pack(">BI", 1, (1 << 32) - 1), Code.RESOURCE_EXHAUSTED, "TOO_LARGE"),
    ],
    ids=["no encoding", "unknown encoding", "no gzip", "a bomb", "too large", "too large, compressed"],
)
def test_a_message_that_cannot_be_taken_ends_its_call_with_a_reason(
    client: Client, encoding: str, message: bytes, code: grpc.StatusCode, reason: str
) -> None:
    ears = client.open(1, grpc_encoding=encoding)
    client.say(data_frame(1, packed(b"before") + message + packed(b"behind")))
    client.say(data_frame(1, packed(b"later"), http.END_STREAM))
    answer = client.answer()
    assert (answer.status, answer.fields["tenuto-reason"]) == (code, reason)
    assert lasting(ears.heard) == [b"before"]


def test_a_message_of_just_the_limit_is_taken() -> None:
    client = Client(limits=Limits(message_bytes=1000))
    ears = client.open(1, grpc_encoding="deflate")
    client.say(data_frame(1, packed(bytes(1000)) + packed(zlib.compress(bytes(1000)), 1)))
    assert ears.heard == [bytes(1000)] * 2


@pytest.mark.parametrize(
    "fields, status",
    [
        ({":method": "GET"}, "405"),
        ({"content-type": "text/plain"}, "415"),
        ({"content-type": ""}, "415"),
    ],
)
def test_what_is_no_grpc_gets_a_status_of_http(client: Client, fields: dict[str, str], status: str) -> None:
    client.say(client.headers(1, more=fields), data_frame(1, b"a body", http.END_STREAM))
    answer = client.answer()
    assert (answer.fields[":status"], answer.ended) == (status, True)
    assert answer.reset == http.NO_ERROR  # its body is not wanted
    assert (client.ears, client.connection.calls) == ([], 0)


# A client's window.


def sized(size: int) -> bytes:
    """A message that takes that many bytes with its prefix, in frames of stream 1."""
    return b"".join(data_frame(1, piece) for piece in cut(packed(bytes(size - 5)), [http.DEFAULT_FRAME]))


def test_a_client_may_fill_its_window_and_no_more_while_the_listener_pauses(client: Client) -> None:
    ears = client.open()
    ears.pauses = True
    client.say(sized(5), sized(WINDOW - 5))
    assert ears.heard == [b""]
    assert client.answer().granted == 0
    assert client.breaks(data_frame(1, b"x")) == http.FLOW_CONTROL_ERROR
    assert lasting(ears.heard) == [b""]


def test_padding_counts_against_the_window(client: Client) -> None:
    client.open().pauses = True
    client.say(sized(5), sized(WINDOW - 5 - 11))
    client.say(data_frame(1, b"", padding=10))
    assert client.breaks(data_frame(1, b"", padding=0)) == http.FLOW_CONTROL_ERROR


def test_what_the_listener_takes_is_granted_again(client: Client) -> None:
    ears = client.open()
    for _ in range(10):
        client.say(sized(WINDOW // 2))
    assert client.answer().granted == 10 * WINDOW // 2
    ears.pauses = True
    client.say(sized(WINDOW // 2))
    client.say(sized(WINDOW // 2))
    assert (len(ears.heard), client.answer().granted) == (11, 10 * WINDOW // 2)
    ears.go_on()
    client.turn()
    assert (len(ears.heard), client.answer().granted) == (12, 12 * WINDOW // 2)


def test_a_message_larger_than_the_window_arrives(client: Client) -> None:
    ears, left, allowed = client.open(), packed(bytes(1 << 20)), WINDOW
    client.fresh()
    while left:
        size = min(allowed, http.DEFAULT_FRAME, len(left))
        assert size, "the window is shut and nothing opens it"
        client.say(data_frame(1, left[:size]))
        left, allowed = left[size:], allowed - size + answers_of(client.fresh()).get(1, Answer()).granted
    assert ears.heard == [bytes(1 << 20)]


def test_large_messages_that_are_not_whole_share_a_bound() -> None:
    client = Client(limits=Limits(1 << 20, partial_bytes=300_000))
    first, second = client.open(1), client.open(3)
    beginning = [packed(bytes(500_000))[:150_000], packed(bytes(400_000))[:300_000]]
    for stream, data in zip((1, 3), beginning, strict=True):
        client.say(*(data_frame(stream, piece) for piece in cut(data, [16_384])))
    assert second.heard == []
    client.say(*(data_frame(3, piece) for piece in cut(bytes(100_000), [16_384])))
    assert client.answer(1).ended is False
    client.say(*(data_frame(1, piece) for piece in cut(bytes(30_000), [16_384])))
    assert client.answer(1).fields["tenuto-reason"] == "POOL_FULL"
    assert lasting(first.heard) == []


def test_half_a_connections_window_is_granted_again(client: Client) -> None:
    """All calls together may send a GiB; what is spent of it comes back, calls that are over included."""
    client.open().call.finish()
    client.turn()
    before, frames = client.answer(0).granted, data_frame(1, bytes(http.DEFAULT_FRAME)) * 64
    for _ in range(512):
        client.connection.receive(frames)
    client.turn()
    assert client.answer(0).granted - before == 1 << 29


def test_a_client_that_does_not_take_its_replies_is_not_read_until_it_does() -> None:
    client = Client(limits=Limits(1 << 20, outbox_bytes=1000))
    client.say(settings(INITIAL_WINDOW_SIZE=0))
    ears = client.open()
    replies = [bytes(900)] * 3
    for reply in replies:
        ears.call.send(reply)
    client.turn()
    full = ears.call.backed_up
    assert full
    client.say(sized(10), sized(20), sized(WINDOW - 30))
    client.say(ENDED)
    assert ears.heard == [bytes(5)]
    assert client.answer().granted == 0
    client.say(http.widen(1, 905))
    client.say(http.widen(1, 2000))
    assert client.answer().messages == replies
    assert not ears.call.backed_up
    assert [len(h) for h in ears.heard[:-1]] == [5, 15, WINDOW - 35]
    assert ears.heard[-1] == "half-closed"


# The server's windows.


def stream_windows(frames: list[Frame], windows: dict[int, int]) -> None:
    """Takes what was sent off the windows, which it must not exceed."""
    for one in frames:
        if one.kind == http.DATA and one.payload:
            assert len(one.payload) <= http.DEFAULT_FRAME
            for stream in (0, one.stream):
                windows[stream] -= len(one.payload)
                assert windows[stream] >= 0, f"beyond the window of {stream}"


STREAMS = (1, 3, 5)
_ACTIONS = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(STREAMS), st.integers(0, 100_000)),
    st.tuples(st.just("widen"), st.sampled_from((0, *STREAMS)), st.integers(1, 50_000)),
    st.tuples(st.just("settings"), st.just(0), st.integers(0, 100_000)),
)


@given(st.lists(_ACTIONS, max_size=30))
def test_no_window_is_exceeded_and_in_the_end_all_arrives(actions: list[tuple[str, int, int]]) -> None:
    client, initial = Client(), http.DEFAULT_WINDOW
    ears = {stream: client.open(stream) for stream in STREAMS}
    windows, sent = dict.fromkeys((0, *STREAMS), initial), {stream: list[bytes]() for stream in STREAMS}
    for what, stream, size in actions:
        match what:
            case "send":
                sent[stream].append(bytes((len(sent[stream]),)) * size)
                ears[stream].call.send(sent[stream][-1])
                client.turn()
            case "widen":
                windows[stream] += size
                client.say(http.widen(stream, size))
            case _:
                for own in STREAMS:
                    windows[own] += size - initial
                initial = size
                client.say(settings(INITIAL_WINDOW_SIZE=size))
        stream_windows(client.fresh(), windows)
    client.say(*(http.widen(stream, 1 << 30) for stream in (0, *STREAMS)))
    for stream in STREAMS:
        assert client.answer(stream).messages == sent[stream]


def test_a_reply_goes_on_when_settings_widen_its_window(client: Client) -> None:
    client.say(settings(INITIAL_WINDOW_SIZE=10))
    client.open().call.send(bytes(1000))
    client.turn()
    assert len(client.answer().data) == 10
    client.say(settings(INITIAL_WINDOW_SIZE=2000))
    assert client.answer().messages == [bytes(1000)]


def test_a_window_below_nothing_has_to_be_filled_up_first(client: Client) -> None:
    client.open().call.send(bytes(1000))
    client.turn()
    client.say(settings(INITIAL_WINDOW_SIZE=0))  # it is at -1005 now
    client.ears[0].call.send(bytes(1000))
    client.turn()
    for size, more in ((1000, 0), (5, 0), (1, 1), (1004, 1004)):
        before = len(client.answer().data)
        client.say(http.widen(1, size))
        assert len(client.answer().data) - before == more


def test_a_long_reply_goes_out_whole_without_a_further_window_update(client: Client) -> None:
    """However much more it is than may lie in front of a socket."""
    client.say(settings(INITIAL_WINDOW_SIZE=http.MAX_WINDOW), http.widen(0, WIDE))
    message = bytes(4 * MOST_UNSENT)
    ears = client.open()
    ears.call.send(message)
    ears.call.send(b"the next one")
    client.turn()
    assert client.answer().messages == [message, b"the next one"]


@pytest.mark.parametrize("whose", ["the client's", "the server's"])
def test_nothing_is_sent_behind_a_reset(client: Client, whose: str) -> None:
    """Neither what is left of a reply nor what was sent when the reset came."""
    client.say(settings(INITIAL_WINDOW_SIZE=http.MAX_WINDOW))
    ears = client.open()
    ears.call.send(bytes(100_000))  # the connection's window holds it up
    client.turn()
    ears.call.send(b"next")
    if whose == "the client's":
        client.connection.receive(http.reset(1, http.CANCEL))
    else:
        ears.call.cancel()
    sent = len(client.answer().data)
    client.turn()
    client.say(http.widen(0, 1 << 20))
    assert len(client.answer().data) == sent
    other = client.open(3)
    other.call.send(b"on")
    client.turn()
    assert client.answer(3).messages == [b"on"]


def test_no_window_is_opened_behind_a_reset(client: Client) -> None:
    """The bug comes with the byte that would open it."""
    ears = client.open()
    client.say(sized(WINDOW // 2 - 6))
    ears.bug = "received"
    client.say(data_frame(1, packed(b"m")))
    assert client.answer().reset == http.CANCEL
    assert client.answer().granted == 0


# The socket.


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_socket_that_takes_little_at_a_time_gets_everything_in_order(client: Client, at_once: int) -> None:
    client.wire.at_once = at_once
    replies = [bytes((n,)) * 300 for n in range(10)]
    ears = client.open()
    for reply in replies:
        ears.call.send(reply)
        client.turn()
    ears.call.finish()
    client.turn()
    client.drain()
    assert client.answer().messages == replies
    assert client.answer().status is Code.OK


@pytest.mark.parametrize("at_once", [0, 1])
def test_little_is_queued_in_front_of_a_socket_that_takes_nothing(client: Client, at_once: int) -> None:
    client.say(settings(INITIAL_WINDOW_SIZE=http.MAX_WINDOW), http.widen(0, WIDE))
    for stream in range(1, 41, 2):
        client.open(stream)
    client.wire.at_once = at_once
    for n in range(10):
        for ears in client.ears:
            ears.call.send(bytes((n,)) * 50_000)
        client.turn()
    assert client.wire.most <= MOST_UNSENT + 2 * http.DEFAULT_FRAME + 10_000
    client.wire.at_once = PLENTY
    client.drain()
    for stream in range(1, 41, 2):
        assert [set(m) for m in client.answer(stream).messages] == [{n} for n in range(10)]


def test_a_socket_that_is_full_is_no_broken_one(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that does not block says so by an exception when it takes nothing at all."""

    def full(_data: bytes | memoryview) -> int:
        raise BlockingIOError

    ears = client.open()
    monkeypatch.setattr(client.wire, "send", full)
    ears.call.send(b"one")
    client.turn()
    monkeypatch.undo()
    assert client.connection.is_blocked
    client.connection.write_on()
    assert client.answer().messages == [b"one"]


@pytest.mark.parametrize("asking", [frame(http.PING, 0, 0, bytes(8)), settings()], ids=["pings", "settings"])
def test_answers_that_are_asked_for_and_never_read_end_the_connection(client: Client, asking: bytes) -> None:
    client.wire.room = 0
    with pytest.raises(ProtocolError) as caught:
        for _ in range(1000):
            client.say(asking * 1000)
    assert caught.value.code == http.ENHANCE_YOUR_CALM
    assert client.wire.most < 1 << 20


def test_one_call_too_many_is_refused_and_places_come_back() -> None:
    client = Client(limits=Limits(1000, calls=2))
    client.say(*(client.headers(stream) for stream in (1, 3, 5)))
    assert [client.answer(stream).reset for stream in (1, 3, 5)] == [None, None, http.REFUSED_STREAM]
    client.ears[0].call.finish()
    client.turn()
    client.open(7)
    assert len(client.ears) == 3


def test_a_client_that_reads_no_refusal_does_not_pile_up_calls() -> None:
    """Each is over as soon as it is opened, and its end waits for the socket."""
    client = Client(limits=Limits(1000, calls=50))

    def refuse(call: RoutedCall) -> Ears:
        call.finish(Code.UNIMPLEMENTED, "x" * 1000)
        return Ears(call)

    client.connection._route = refuse
    client.wire.room = 0
    with pytest.raises(ProtocolError) as caught:
        for first in range(1, 100_000, 200):
            client.say(*(client.headers(n, http.END_STREAM) for n in range(first, first + 200, 2)))
            assert client.connection.calls <= 50
    assert caught.value.code == http.ENHANCE_YOUR_CALM


# Replies and statuses.


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("messages", [[], [b""], [b"one", b"two" * 9000]], ids=["none", "empty", "two"])
def test_a_call_ends_behind_its_replies_with_status_and_trailers(
    client: Client, messages: list[bytes], half_closed: bool
) -> None:
    ears = client.open(1, http.END_STREAM if half_closed else 0)
    for message in messages:
        ears.call.send(message)
    ears.call.finish(Code.ABORTED, "50 % of\nünïts", (("x-one", "1"), ("x-bin", b"\xff\x00")))
    ears.call.send(b"too late")
    ears.call.finish()
    client.turn()
    answer = client.answer()
    assert answer.messages == messages
    assert (answer.fields[":status"], answer.fields["content-type"]) == ("200", "application/grpc")
    assert answer.status is Code.ABORTED
    assert answer.fields["grpc-message"] == "50 %25 of%0A%C3%BCn%C3%AFts"
    assert (answer.fields["x-one"], answer.fields["x-bin"]) == ("1", "/wA")
    assert answer.blocks == (2 if messages else 1)
    assert answer.reset == (None if half_closed else http.NO_ERROR)  # it need send no more
    assert [f.kind for f in client.frames()][-1] == (http.HEADERS if half_closed else http.RST_STREAM)
    assert lasting(ears.heard) == (["half-closed"] if half_closed else [])
    assert client.connection.calls == 0


@pytest.mark.parametrize("message", [b"one", None])
def test_initial_metadata_arrives_with_or_without_a_message(client: Client, message: bytes | None) -> None:
    call = client.open().call
    call.initial_metadata = (("x-first", "1"),)
    if message is not None:
        call.send(message)
    call.finish()
    client.turn()
    assert client.answer().fields["x-first"] == "1"


def test_trailers_longer_than_a_frame_are_continued(client: Client) -> None:
    client.open().call.finish(Code.ABORTED, "", (("x-long", "x" * 40_000),))
    client.turn()
    assert client.answer().fields["x-long"] == "x" * 40_000
    assert [f.kind for f in client.fresh()].count(http.CONTINUATION) == 2


def test_a_client_without_a_table_for_headers_hears_so_in_the_next_block(client: Client) -> None:
    client.open(1)
    client.open(3)
    client.say(settings(HEADER_TABLE_SIZE=0))
    client.fresh()
    for ears in client.ears:
        ears.call.finish()
        client.turn()
    first, second = (f.payload for f in client.fresh() if f.kind == http.HEADERS)
    assert first == b"\x20" + second
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    assert ("grpc-status", "0") in [(str(name), str(value)) for name, value in decoder.decode(first)]


# Deadlines.


@pytest.mark.parametrize(
    "text, seconds",
    [("2H", 7200), ("3M", 180), ("4S", 4), ("250m", 0.25), ("99999999u", 99.999999), ("1n", 1e-9), ("0S", 0)],
)
def test_a_deadline_is_read_and_ends_the_call(client: Client, text: str, seconds: float) -> None:
    ears = client.open(1, grpc_timeout=text)
    began = ears.call.deadline - seconds
    assert client.connection.began <= began <= client.connection.began + 60  # a test takes no longer
    assert ears.call.seconds_left <= seconds
    ears.call.send(b"before")
    client.turn()
    client.connection.look(ears.call.deadline, 1e9, 1e9)
    client.turn()
    assert ears.heard == []
    client.look(seconds + 60)
    assert client.answer().status is Code.DEADLINE_EXCEEDED
    assert client.answer().messages == [b"before"]
    assert lasting(ears.heard) == []
    client.look(seconds + 61)


@pytest.mark.parametrize("text", ["", "S", "1", "1x", "-1S", "1.5S", "123456789S", "²S", "1 S"])
def test_what_is_no_timeout_is_none(client: Client, text: str) -> None:
    ears = client.open(1, grpc_timeout=text)
    assert ears.call.seconds_left == float("inf")
    client.look(1e8)
    assert ears.heard == []


def test_a_deadline_within_a_reply_resets_the_stream(client: Client) -> None:
    ears = client.open(1, grpc_timeout="1S")
    ears.call.send(bytes(100_000))
    client.turn()
    client.look(60)
    assert client.answer().reset == http.CANCEL
    assert lasting(ears.heard) == []


def test_a_deadline_that_drops_replies_does_not_end_the_call_well(client: Client) -> None:
    client.say(settings(INITIAL_WINDOW_SIZE=http.MAX_WINDOW), http.widen(0, WIDE))
    crowd, late = client.open(1), client.open(3, grpc_timeout="1S")
    client.wire.room = 0
    crowd.call.send(bytes(2 * MOST_UNSENT))
    client.turn()
    late.call.send(b"dropped")
    late.call.finish()
    client.turn()
    client.look(60)
    client.drain()
    answer = client.answer(3)
    assert answer.messages == [b"dropped"] or answer.reset or answer.status is Code.DEADLINE_EXCEEDED


def test_a_client_that_does_not_take_its_status_is_not_waited_for_without_end(client: Client) -> None:
    """One with a call that goes on may be slow for as long as it likes."""
    slow, finished = client.open(1), client.open(3)
    for ears in (slow, finished):
        ears.call.send(bytes(100_000))
    finished.call.finish()
    client.turn()
    for seconds in (0, 59):
        client.look(seconds)
        assert finished.heard == []
    client.look(61)
    assert client.answer(3).reset == http.CANCEL
    assert (lasting(finished.heard), slow.heard) == ([], [])


# Leaving.


def test_a_server_that_leaves_refuses_new_calls_and_ends_the_old_in_peace(client: Client) -> None:
    old = client.open(1)
    client.fresh()
    client.connection.leave()
    (goaway,) = client.fresh()
    assert (goaway.kind, goaway.payload) == (http.GOAWAY, struct.pack(">II", 1, http.NO_ERROR))
    client.open(3)
    client.say(data_frame(3, b"whatever"), data_frame(1, packed(b"still")))
    assert (client.answer(3).reset, len(client.ears)) == (http.REFUSED_STREAM, 1)
    old.call.send(b"on")
    client.connection.finish_all()
    client.turn()
    assert client.answer(1).messages == [b"on"]
    assert client.answer(1).status is Code.UNAVAILABLE
    assert lasting(old.heard) == [b"still"]
    assert client.connection.calls == 0


# Endings.


def finish(client: Client) -> None:
    client.ears[0].call.finish(Code.ABORTED)


def cancel(client: Client) -> None:
    client.ears[0].call.cancel()


def reset(client: Client) -> None:
    client.say(http.reset(1, http.CANCEL))


def breach(client: Client) -> None:
    client.breaks(data_frame(9, b""))


def expire(client: Client) -> None:
    client.look(4000)


def leave(client: Client) -> None:
    client.connection.leave()
    client.connection.finish_all()


def half_a_message(client: Client) -> None:
    client.say(data_frame(1, b"\0", http.END_STREAM))


def too_large(client: Client) -> None:
    client.say(data_frame(1, b"\0\xff\xff\xff\xff"))


def bug(client: Client, method: str) -> None:
    client.ears[0].bug = method
    client.say(data_frame(1, packed(b"m"), http.END_STREAM))


ENDINGS: dict[str, tuple[Callable[[Client], None], ...]] = {
    "finished": (finish,),
    "cancelled": (cancel,),
    "reset": (reset,),
    "expired": (expire,),
    "lost": (Client.lose,),
    "left": (leave,),
    "a breach": (breach,),
    "half a message": (half_a_message,),
    "too large": (too_large,),
    "a bug in received": (partial(bug, method="received"),),
    "a bug in half_closed": (partial(bug, method="half_closed"),),
    "finished, then all else": (finish, finish, cancel, reset, expire, Client.lose),
    "cancelled, then all else": (cancel, cancel, finish, reset, expire, Client.lose),
    "expired and lost": (expire, Client.lose),
    "finished and lost": (finish, Client.lose),
}


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("name", ENDINGS)
def test_the_end_of_a_call_is_told_once_and_then_its_place_is_free(
    client: Client, name: str, blocked: bool
) -> None:
    """With a reply half sent or without one."""
    ears = client.open(1, grpc_timeout="1H")
    places: list[list[bytes | str]] = []
    ears.call.closed = lambda: places.append(list(ears.heard))
    if blocked:
        ears.call.send(bytes(200_000))
        client.turn()
    for step in ENDINGS[name]:
        step(client)
    client.turn()
    if client.connection.calls:
        client.say(http.widen(1, 1 << 20), http.widen(0, 1 << 20))
    lasting(ears.heard)
    assert places == [ears.heard]
    client.say(data_frame(1, packed(b"late")))
    ears.call.send(b"late")
    ears.call.finish()
    ears.call.cancel()
    client.lose()
    assert places == [ears.heard]
    assert client.connection.calls == 0


def test_a_bug_at_the_end_still_frees_the_place(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    ears, places = client.open(), list[int]()
    ears.bug = "terminated"
    ears.call.closed = lambda: places.append(1)
    ears.call.finish()
    client.turn()
    assert places == [1]
    assert "a bug of the listener" in caplog.text


def test_a_listener_with_a_bug_hears_nothing_more_but_its_end(client: Client) -> None:
    ears = client.open()
    ears.bug = "received"
    client.say(data_frame(1, packed(b"one") + packed(b"two"), http.END_STREAM))
    assert lasting(ears.heard) == [b"one"]


def test_a_reply_with_a_bug_costs_its_own_call_alone(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    unlucky, lucky = client.open(1), client.open(3)
    unlucky.call.finish(Code.ABORTED, "", (("x-text", b"\xff"),))  # no text
    lucky.call.send(b"on")
    client.turn()
    assert client.answer(1).reset == http.CANCEL
    assert lasting(unlucky.heard) == []
    assert client.answer(3).messages == [b"on"]
    assert "a reply met a bug" in caplog.text


def test_a_call_that_cannot_be_opened_ends_without_saying_why(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_call: RoutedCall) -> Ears:
        raise ZeroDivisionError("a secret")

    client.connection._route = broken
    client.say(client.headers(1, http.END_STREAM))
    assert client.answer().status is Code.UNKNOWN
    assert "secret" not in client.answer().fields["grpc-message"]
    assert "secret" in caplog.text


def test_calls_that_are_opened_and_reset_without_end_end_the_connection(client: Client) -> None:
    def abused(count: int) -> bytes:
        pairs = (client.headers(n) + http.reset(n, http.CANCEL) for n in range(first, first + 2 * count, 2))
        return b"".join(pairs)

    first = 1
    client.say(abused(2_000))
    assert client.connection.calls == 0
    first += 4_000
    assert client.breaks(abused(12_000)) == http.ENHANCE_YOUR_CALM
    for ears in client.ears:
        assert lasting(ears.heard) == []
