"""Our own HTTP/2 server on real sockets: whatever one client does or leaves undone, all others are served."""

from __future__ import annotations

import errno
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import hpack
import numpy as np
import pytest

from tenuto.serving import frame as http
from tenuto.serving import http2
from tenuto.serving.call import GONE
from tenuto.serving.http2 import Http2Server
from tenuto.serving.http_call import Limits
from tenuto.serving.inflate import Inflater
from tenuto.serving.outflow import MOST_UNSENT
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys
from tests.unit.http2_peer import (
    POST,
    WIDE,
    Answer,
    answers_of,
    cut,
    data_frame,
    frames_of,
    packed,
    settings,
)

from .running import Counting, assert_nothing_is_left, serving, wait_for
from .wire import (
    PATIENCE_SECONDS,
    STREAM,
    Conversation,
    array,
    chunk,
    connect,
    ending,
    opening,
    stub,
    tensor,
)

GREETING = http.PREFACE + settings()
Answers = dict[int, Answer]


class RawClient:
    """A socket that sends what it is given, and reads when it is told to."""

    def __init__(self, port: int, greeting: bytes = GREETING, *, buffer_bytes: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE_SECONDS)
        if buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.connect(("127.0.0.1", port))
        self.got = bytearray()
        self._encoder = hpack.Encoder()
        self.send(greeting)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def open(self, stream: int, *events: pb.Event, flags: int = 0) -> None:
        """One of tenuto's streams, with one message."""
        block = self._encoder.encode(list((POST | {":path": STREAM}).items()))
        message = packed(pb.StreamRequest(events=events).SerializeToString())
        pieces = [data_frame(stream, piece) for piece in cut(message, [http.DEFAULT_FRAME])]
        last = data_frame(stream, b"", flags)
        self.send(b"".join([http.frame(http.HEADERS, http.END_HEADERS, stream, block), *pieces, last]))

    def read_until(self, holds: Callable[[Answers], bool]) -> Answers:
        while not holds(answers := answers_of(frames_of(bytes(self.got)))):
            read = self.socket.recv(1 << 20)
            assert read, f"the connection ended with {answers}"
            self.got += read
        return answers

    def read_all(self) -> None:
        """Up to the connection's end."""
        while read := self.socket.recv(1 << 20):
            self.got += read

    def goodbyes(self) -> list[tuple[int, int, bytes]]:
        """Of each GOAWAY: the last stream that was taken, the error's code, and its text."""
        found = [f.payload for f in frames_of(bytes(self.got)) if f.kind == http.GOAWAY]
        return [(*struct.unpack(">II", payload[:8]), payload[8:]) for payload in found]


def replies(answer: Answer) -> list[pb.Reply]:
    return [reply for data in answer.messages for reply in pb.StreamResponse.FromString(data).replies]


def transport_of(server: Server) -> Any:
    transport: Any = server._transport
    return transport._server


@pytest.fixture
def http2_server(servers: dict[str, Server]) -> Iterator[Server]:
    """The shared one; nothing may be left in it."""
    yield servers["http2"]
    assert_nothing_is_left(servers["http2"])


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server that waits for nobody, and serves nothing."""
    for name in ("_PING_SECONDS", "_LOOK_SECONDS", "_LINGER_SECONDS"):
        monkeypatch.setattr(http2, name, 0.05)
    monkeypatch.setattr(http2, "_PONG_SECONDS", 0.5)
    server = Http2Server(lambda call: GONE, Limits(1000))
    port = server.bind("127.0.0.1", 0)
    server.start()
    yield port
    assert server.stop(0.0).wait(PATIENCE_SECONDS)


def assert_serves(channel: grpc.Channel) -> None:
    with Conversation(channel) as conversation:
        conversation.send(opening("accumulator"), chunk(1, [1.0, 2.0]), ending())
        conversation.opened()
        assert conversation.values(1) == [1.0, 3.0]
        assert conversation.closed().reason == pb.END
    request = pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])])
    answer = stub(channel).Predict(request, timeout=PATIENCE_SECONDS)
    assert array(answer.outputs[0]).tolist() == [[2, 4]]


# What clients may do.


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_client_may_compress_its_requests(
    http2_server: Server, compression: grpc.Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    inflated: list[int] = []
    own = Inflater.inflate

    def counted(inflater: Inflater, data: bytes, most: int) -> bytes:
        inflated.append(len(data))
        return own(inflater, data, most)

    monkeypatch.setattr(Inflater, "inflate", counted)
    option = ("grpc.default_compression_algorithm", compression.value)
    with connect(http2_server.port, option) as channel:
        request = pb.PredictRequest(model="doubler", inputs=[tensor(np.ones((64, 2)))])
        answer = stub(channel).Predict(request, timeout=PATIENCE_SECONDS)
        assert array(answer.outputs[0]).tolist() == [[2, 2]] * 64
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0] * 1000))
            conversation.opened()
            assert conversation.values(1)[-1] == 1000
    assert len(inflated) >= 2


@pytest.mark.parametrize("host", ["::1", "::", "localhost", "0.0.0.0"])
def test_a_server_listens_where_it_is_told_to(toy_repository: Path, host: str) -> None:
    ends = {"::1": ["[::1]"], "::": ["[::1]", "127.0.0.1"]}.get(host, ["127.0.0.1"])
    with serving(toy_repository, transport="http2", host=host, insecure=True) as server:
        for end in ends:
            with grpc.insecure_channel(f"{end}:{server.port}") as channel:
                assert_serves(channel)


@contextmanager
def listening_on(
    addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Http2Server, int]]:
    """A server that is not started yet, and the port it has on all of them."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    server = Http2Server(lambda call: GONE, Limits(1000))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
            port = server.bind("a name", 0)
        yield server, port
    finally:
        assert server.stop(0.0).wait(PATIENCE_SECONDS)


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1", "127.0.0.2"), ("192.0.2.1", "127.0.0.1")], ids=["both", "one is not here"]
)
def test_a_name_of_several_addresses_is_served_on_those_that_are_here(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, str]
) -> None:
    """On the same port. `localhost` names ::1 on machines that have no IPv6 as well."""
    with listening_on(addresses, monkeypatch) as (server, port):
        server.start()
        for address in addresses:
            if address.startswith("127."):
                with socket.create_connection((address, port), PATIENCE_SECONDS) as own:
                    assert own.recv(1)


def test_a_port_that_is_in_use_is_refused(http2_server: Server) -> None:
    server = Http2Server(lambda call: GONE, Limits(1000))
    with pytest.raises(OSError, match="in use"):
        server.bind("127.0.0.1", http2_server.port)
    assert server.stop(0.0).is_set()


# What clients leave undone.


@pytest.mark.parametrize("greeting", [b"", http.PREFACE[:10]], ids=["nothing", "half a preface"])
def test_a_client_that_does_not_greet_is_dropped(hasty: int, greeting: bytes) -> None:
    with RawClient(hasty, greeting) as silent:
        silent.read_all()


def test_a_client_that_answers_no_ping_is_dropped_and_one_that_does_stays(hasty: int) -> None:
    with RawClient(hasty) as silent, RawClient(hasty) as lively:
        answering = threading.Thread(target=answer_pings, args=(lively, 3))
        answering.start()
        silent.read_all()
        assert [f.kind for f in frames_of(bytes(silent.got))].count(http.PING) == 1
        answering.join(PATIENCE_SECONDS)
        assert not answering.is_alive()
        assert [f.kind for f in frames_of(bytes(lively.got))].count(http.PING) >= 3


def answer_pings(client: RawClient, count: int) -> None:
    while count and (read := client.socket.recv(1 << 16)):
        client.got += read
        for one in frames_of(read):
            if one.kind == http.PING:
                client.send(http.frame(http.PING, http.ACK, 0, one.payload))
                count -= 1


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_http1_and_tls_get_an_answer_and_are_closed(http2_server: Server, data: bytes) -> None:
    with RawClient(http2_server.port, data) as lost:
        lost.read_all()
        ((_, code, text),) = lost.goodbyes()
    assert code == http.PROTOCOL_ERROR
    assert b"without TLS" in text


def test_garbage_leaves_the_neighbours_untouched(http2_server: Server) -> None:
    noise = random.Random(1)
    with connect(http2_server.port) as channel, Conversation(channel) as conversation:
        conversation.send(opening("accumulator"))
        conversation.opened()
        for step in range(1, 31):
            greeting = GREETING if step % 2 else b""
            with RawClient(http2_server.port, greeting) as garbler:
                if greeting:
                    garbler.open(1, opening("accumulator"), chunk(1, [1.0]))
                garbler.send(noise.randbytes(noise.randrange(9, 3000)))
                if step % 3:
                    with suppress(OSError):  # it is closed already
                        garbler.socket.shutdown(socket.SHUT_WR)
            conversation.send(chunk(step, [1.0]))
            assert conversation.values(step) == [step]
        assert_serves(channel)


def test_connections_that_come_and_go_leave_nothing(http2_server: Server) -> None:
    peers = transport_of(http2_server)._peers
    wait_for(lambda: not peers, "earlier clients to be gone")
    for n in range(200):
        with RawClient(http2_server.port, GREETING if n % 2 else b"") as passing:
            if n % 4 == 1:
                passing.open(1, opening("accumulator"), chunk(1, [1.0]))
            if n % 8 == 1:
                passing.read_until(lambda answers: 1 in answers)
            if n % 5 == 0:  # a reset in place of an end
                linger = struct.pack("ii", 1, 0)
                passing.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wait_for(lambda: not peers, "all connections to be gone")


def test_a_client_that_reads_nothing_is_held_for_little_and_holds_nobody_back(tmp_path: Path) -> None:
    """Its windows are as wide as they may be, so that its socket alone says stop."""
    toys.write(tmp_path, "accumulator", toys.accumulator(max_frames=65536))
    toys.write(tmp_path, "doubler", toys.doubler())
    streams, samples = range(1, 301, 2), np.ones(16_384, np.float32)
    greeting = http.PREFACE + settings(INITIAL_WINDOW_SIZE=http.MAX_WINDOW) + http.widen(0, WIDE)
    with (
        serving(tmp_path, transport="http2") as server,
        connect(server.port) as neighbour,
        RawClient(server.port, greeting, buffer_bytes=4096) as deaf,
    ):
        counting = Counting(server)
        for stream in streams:
            deaf.open(stream, opening("accumulator"), chunk(1, tensor(samples)), flags=http.END_STREAM)
        counting.wait_for_rise(len(streams), "tenuto_chunks_total", model="accumulator", outcome="answered")
        assert_serves(neighbour)
        blocked = next((c for c in transport_of(server)._peers if c.is_blocked), None)
        assert blocked is not None, "what its socket did not take is not kept"
        assert (
            blocked._outflow._queued + len(blocked._outflow._unsent) <= MOST_UNSENT + 4 * http.DEFAULT_FRAME
        )
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        ended = set(streams)
        answers = deaf.read_until(lambda a: {s for s, one in a.items() if one.ended} >= ended)
        for stream in streams:
            outputs = [r.output for r in replies(answers[stream]) if r.HasField("output")]
            assert [array(o.outputs[0])[-1] for o in outputs] == [len(samples)]
            assert answers[stream].status is grpc.StatusCode.OK
        assert_nothing_is_left(server)


# The server's own troubles, and its end.


def fail_to_accept(times: int, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = socket.socket.accept, iter(range(times))

    def failing(listening: socket.socket) -> tuple[socket.socket, Any]:
        if listening.getsockname()[1] == port and next(failures, None) is not None:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listening)

    monkeypatch.setattr(http2, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(socket.socket, "accept", failing)


def test_a_server_without_file_descriptors_goes_on_once_there_are_some(
    http2_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(http2_server.port) as here, connect(http2_server.port) as new:
        assert_serves(here)
        fail_to_accept(3, http2_server.port, monkeypatch)
        assert_serves(new)
        assert_serves(here)
    assert caplog.text.count("Too many open files") == 3
    assert "met a bug" not in caplog.text


def test_clients_of_two_addresses_that_cannot_be_accepted_are_so_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    addresses = ("127.0.0.1", "127.0.0.2")
    with listening_on(addresses, monkeypatch) as (server, port), ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection((address, port), PATIENCE_SECONDS))
            for address in addresses
        ]
        fail_to_accept(3, port, monkeypatch)
        server.start()
        assert all(client.recv(1) for client in clients)
    assert "met a bug" not in caplog.text


def test_a_server_that_stops_says_so_sends_the_last_replies_and_gives_every_sequence_its_token(
    toy_repository: Path,
) -> None:
    with (
        serving(toy_repository, transport="http2") as server,
        RawClient(server.port) as client,
        RawClient(server.port) as idle,
    ):
        for stream in (1, 3):
            client.open(stream, opening("accumulator"), chunk(1, [float(stream)]))
        client.read_until(lambda a: all(s in a and len(replies(a[s])) == 2 for s in (1, 3)))
        stopping = threading.Thread(target=server.stop, args=(PATIENCE_SECONDS,))
        stopping.start()
        client.read_all()
        client.socket.close()
        idle.read_all()
        idle.socket.close()
        stopping.join(PATIENCE_SECONDS)
        assert not stopping.is_alive()
    answers = answers_of(frames_of(bytes(client.got)))
    for stream in (1, 3):
        opened, output, closed = replies(answers[stream])
        assert opened.HasField("opened")
        assert array(output.output.outputs[0]).tolist() == [stream]
        assert (closed.closed.reason, closed.closed.last_step) == (pb.DRAINING, 1)
        assert closed.closed.resume_token
        assert answers[stream].status is grpc.StatusCode.UNAVAILABLE
    assert [goodbye[:2] for goodbye in client.goodbyes()] == [(3, http.NO_ERROR)]
    assert [goodbye[:2] for goodbye in idle.goodbyes()] == [(0, http.NO_ERROR)]


def test_calls_that_outlast_the_grace_are_ended_and_all_threads_return() -> None:
    over = threading.Event()

    class Waiting:
        def received(self, message: bytes) -> None: ...
        def half_closed(self) -> None: ...
        def terminated(self) -> None:
            over.set()

        def wait(self, resume: Callable[[], None]) -> bool:
            return False

    server = Http2Server(lambda call: Waiting(), Limits(1000))
    port = server.bind("127.0.0.1", 0)
    server.start()
    with RawClient(port) as client:
        client.open(1, opening("any"))
        client.read_until(lambda answers: 0 in answers)
        stopped = server.stop(0.05)
        client.read_all()
        answer = answers_of(frames_of(bytes(client.got)))[1]
        assert answer.status is grpc.StatusCode.UNAVAILABLE
        assert over.wait(PATIENCE_SECONDS)
    assert stopped.wait(PATIENCE_SECONDS)
    wait_for(lambda: not server._thread.is_alive(), "the reading thread to return")
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", port)):
        pass


def test_a_stream_that_opens_while_the_server_leaves_does_not_hold_it(
    toy_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the end of the grace, which is for replies."""
    with serving(toy_repository, transport="http2") as server, RawClient(server.port) as client:
        leave, left = server._conversations.leave, 0

        def and_one_comes_back() -> None:
            nonlocal left
            leave()
            left += 1
            if left == 1:
                client.open(1)
                wait_for(lambda: server.metrics.open_streams() == 1, "the stream to open")

        monkeypatch.setattr(server._conversations, "leave", and_one_comes_back)
        stopping = threading.Thread(target=server.stop, args=(100 * PATIENCE_SECONDS,))
        stopping.start()
        client.read_all()
        client.socket.close()
        stopping.join(PATIENCE_SECONDS)
        assert not stopping.is_alive()
    assert answers_of(frames_of(bytes(client.got)))[1].status is grpc.StatusCode.UNAVAILABLE
