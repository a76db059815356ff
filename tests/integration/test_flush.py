"""What an engine thread sends to several calls goes out with its flush, by the thread that reads.

It waits for no client.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from tenuto.serving import http2
from tenuto.serving.connection import Connection
from tenuto.serving.http2 import Http2Server
from tenuto.serving.http_call import Limits
from tenuto.serving.routed_call import RoutedCall

from .wire import PATIENCE_SECONDS, connect

METHOD = "/tests.Flush/Stream"
HUGE = bytes(4 << 20)  # more than flow control lets through to a client that does not read


class Ears:
    """A listener that tells of its call and of its end."""

    def __init__(self, call: RoutedCall, opened: queue.SimpleQueue[Ears]) -> None:
        self.call = call
        self.over = threading.Event()
        opened.put(self)

    def received(self, message: bytes) -> None: ...
    def half_closed(self) -> None: ...
    def wait(self, resume: Callable[[], None]) -> bool:
        return False

    def terminated(self) -> None:
        self.over.set()


class Client:
    """One open stream."""

    def __init__(self, channel: grpc.Channel, opened: queue.SimpleQueue[Ears]) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = channel.stream_stream(METHOD)
        self.call: Any = method(iter(self._requests.get, None), timeout=PATIENCE_SECONDS)
        self.server = opened.get(timeout=PATIENCE_SECONDS)

    def send(self, message: bytes) -> None:
        self.server.call.send(message)

    def leave(self) -> None:
        self.call.cancel()
        self._requests.put(None)
        assert self.server.over.wait(PATIENCE_SECONDS)


class Flushing:
    """A server of that method alone; its clients; and who wrote what calls had, and of how many."""

    def __init__(self, server: Http2Server, opened: queue.SimpleQueue[Ears]) -> None:
        self.server = server
        self.writers: list[tuple[str, int]] = []
        self._opened = opened
        self._stack = ExitStack()

    def clients(self, count: int, *, connections: int = 1) -> list[Client]:
        """One after another, so that each gets its own call."""
        channels = [self._stack.enter_context(connect(self.port)) for _ in range(connections)]
        new = [Client(channels[n % connections], self._opened) for n in range(count)]
        for client in new:
            self._stack.callback(client.leave)
        return new

    def start(self) -> None:
        self.port = self.server.bind("127.0.0.1", 0)
        self.server.start()

    def leave(self) -> None:
        self._stack.close()
        assert self.server.stop(0.0).wait(PATIENCE_SECONDS)


@pytest.fixture
def flushing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flushing]:
    opened: queue.SimpleQueue[Ears] = queue.SimpleQueue()
    flushing = Flushing(Http2Server(lambda call: Ears(call, opened), Limits(1 << 20)), opened)
    own = Connection.write

    def recorded(connection: Connection, calls: Iterable[RoutedCall] = ()) -> None:
        calls = list(calls)
        if calls:
            flushing.writers.append((threading.current_thread().name, len(calls)))
        own(connection, calls)

    monkeypatch.setattr(Connection, "write", recorded)
    flushing.start()
    yield flushing
    flushing.leave()


def on_engine_thread(work: Callable[[], None]) -> None:
    """Runs it on a thread of that name to its end; what hangs fails."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again below
            failed.append(error)

    thread = threading.Thread(target=run, name="engine")
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("connections", [1, 3])
def test_what_goes_to_several_calls_is_written_by_the_reading_thread_at_once(
    flushing: Flushing, connections: int
) -> None:
    clients = flushing.clients(6, connections=connections)

    def work() -> None:
        flushing.server.flush()  # from here on this thread holds back
        for turn in range(3):
            for client in clients:
                client.send(b"%d" % turn)
            assert len(flushing.writers) == turn * connections
            flushing.server.flush()
            assert len(flushing.writers) == (turn + 1) * connections  # it does not return before

    on_engine_thread(work)
    assert set(flushing.writers) == {("http2", 6 // connections)}
    for client in clients:
        assert [next(client.call) for _ in range(3)] == [b"0", b"1", b"2"]


def test_a_single_call_is_written_by_its_own_thread(flushing: Flushing) -> None:
    """One stream alone is not sent through another thread, and its messages go together."""
    (client,) = flushing.clients(1)

    def work() -> None:
        flushing.server.flush()
        client.send(b"one")
        client.send(b"two")
        flushing.server.flush()

    on_engine_thread(work)
    assert [next(client.call), next(client.call)] == [b"one", b"two"]
    assert flushing.writers == [("engine", 1)]


def test_a_thread_that_does_not_flush_writes_at_once(flushing: Flushing) -> None:
    clients = flushing.clients(2)

    def work() -> None:
        for client in clients:
            client.send(b"now")

    on_engine_thread(work)
    assert [next(client.call) for client in clients] == [b"now", b"now"]
    assert flushing.writers == [("engine", 1), ("engine", 1)]


def test_a_client_that_does_not_read_holds_nobody_back(flushing: Flushing) -> None:
    """The engine waits until the sends are written, never until they are taken."""
    deaf, *others = flushing.clients(4)

    def work() -> None:
        flushing.server.flush()
        for turn in range(4):
            for client in (deaf, *others):
                client.send(HUGE if client is deaf else b"%d" % turn)
            flushing.server.flush()

    on_engine_thread(work)
    for client in others:
        assert [next(client.call) for _ in range(4)] == [b"0", b"1", b"2", b"3"]
    assert [next(deaf.call) == HUGE for _ in range(4)] == [True] * 4


@pytest.mark.parametrize("when", ["before the sends", "between send and flush"])
def test_a_call_that_is_over_costs_the_others_nothing(flushing: Flushing, when: str) -> None:
    gone, *others = flushing.clients(3)

    def work() -> None:
        flushing.server.flush()
        if when == "before the sends":
            gone.leave()
        for client in (gone, *others):
            client.send(b"on")
        if when == "between send and flush":
            gone.leave()
        flushing.server.flush()

    on_engine_thread(work)
    assert [next(client.call) for client in others] == [b"on", b"on"]


def test_a_reply_and_the_end_behind_it_go_out_with_the_same_flush(flushing: Flushing) -> None:
    clients = flushing.clients(3)

    def work() -> None:
        flushing.server.flush()
        for client in clients:
            client.send(b"last")
            client.server.call.finish()
        flushing.server.flush()

    on_engine_thread(work)
    assert [list(client.call) for client in clients] == [[b"last"]] * 3
    assert flushing.writers == [("http2", 3)]


def test_many_threads_may_send_to_the_same_calls(flushing: Flushing) -> None:
    clients, count = flushing.clients(4, connections=2), 200

    def work(own: int) -> None:
        flushing.server.flush()
        for n in range(count):
            for client in clients:
                client.send(b"%d %d" % (own, n))
            flushing.server.flush()

    threads = [threading.Thread(target=work, args=(own,)) for own in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    for client in clients:
        got = [next(client.call).split() for _ in range(3 * count)]
        for own in range(3):
            assert [int(n) for thread, n in got if int(thread) == own] == list(range(count))


def test_a_bug_in_an_errand_does_not_end_the_reading_thread(
    flushing: Flushing, caplog: pytest.LogCaptureFixture
) -> None:
    clients = flushing.clients(2)

    def broken() -> None:
        raise ZeroDivisionError("a bug in an errand")

    def work() -> None:
        flushing.server.flush()
        for _ in range(3):
            flushing.server.soon(broken)
        for client in clients:
            client.send(b"on")
        flushing.server.flush()

    on_engine_thread(work)
    assert [next(client.call) for client in clients] == [b"on", b"on"]
    assert caplog.text.count("the transport met a bug and goes on") == 3


def test_a_reply_with_a_bug_costs_the_others_of_its_flush_nothing(
    flushing: Flushing, caplog: pytest.LogCaptureFixture
) -> None:
    unlucky, *lucky = flushing.clients(4, connections=2)

    def work() -> None:
        flushing.server.flush()
        unlucky.server.call.finish(grpc.StatusCode.OK, "", (("x-text", b"\xff"),))  # no text
        for client in lucky:
            client.send(b"on")
        flushing.server.flush()

    on_engine_thread(work)
    assert [next(client.call) for client in lucky] == [b"on"] * 3
    assert unlucky.call.code() is grpc.StatusCode.CANCELLED
    assert "a reply met a bug" in caplog.text


def test_an_engine_goes_on_although_the_reading_thread_does_not(
    flushing: Flushing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "_LONGEST_ERRAND_SECONDS", 0.01)
    clients, free = flushing.clients(2), threading.Event()

    def work() -> None:
        flushing.server.flush()
        flushing.server.soon(lambda: free.wait(PATIENCE_SECONDS))
        for client in clients:
            client.send(b"late")
        flushing.server.flush()
        assert flushing.writers == []
        free.set()

    on_engine_thread(work)
    assert [next(client.call) for client in clients] == [b"late", b"late"]
