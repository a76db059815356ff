"""What an engine thread sends to several calls is posted by gRPC's serve thread, and waits for no client."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tenuto.serving.call import Call
from tenuto.serving.transport import NonBlockingCall, StreamMethod

from .wire import PATIENCE_SECONDS, connect

METHOD = "/tests.Relay/Stream"
HUGE = bytes(4 << 20)  # more than flow control lets through to a client that does not read


class Ears:
    """A listener that tells of its call and of its end."""

    def __init__(self, call: Call, opened: queue.SimpleQueue[Ears]) -> None:
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

    def leave(self) -> None:
        self.call.cancel()
        self._requests.put(None)
        assert self.server.over.wait(PATIENCE_SECONDS)


class Relayed:
    """A server of that method alone; its clients; and who posted each send."""

    def __init__(self, channel: grpc.Channel, method: StreamMethod, opened: queue.SimpleQueue[Ears]) -> None:
        self.method = method
        self.posters: list[str] = []
        self._channel = channel
        self._opened = opened
        self._clients: list[Client] = []

    def clients(self, count: int) -> list[Client]:
        """One after another, so that each gets its own call."""
        new = [Client(self._channel, self._opened) for _ in range(count)]
        self._clients += new
        return new

    def leave(self) -> None:
        for client in self._clients:
            client.leave()


@pytest.fixture
def relayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Relayed]:
    opened: queue.SimpleQueue[Ears] = queue.SimpleQueue()
    method = StreamMethod(lambda call: Ears(call, opened), mode="nonblocking", max_streams=64)
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    handlers: dict[str, Any] = {"Stream": method.handler()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tests.Relay", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with connect(port) as channel:
        relayed = Relayed(channel, method, opened)
        own = NonBlockingCall.post_next

        def recorded(call: NonBlockingCall) -> None:
            relayed.posters.append(threading.current_thread().name)
            own(call)

        monkeypatch.setattr(NonBlockingCall, "post_next", recorded)
        yield relayed
        relayed.leave()
    server.stop(0).wait()


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


def test_what_goes_to_several_calls_is_posted_by_the_serve_thread(relayed: Relayed) -> None:
    clients = relayed.clients(5)

    def work() -> None:
        relayed.method.flush()  # from here on this thread holds back
        for turn in range(3):
            for client in clients:
                client.server.call.send(b"%d" % turn)
            assert relayed.posters.count("engine") == 0
            relayed.method.flush()

    on_engine_thread(work)
    for client in clients:
        assert [next(client.call) for _ in range(3)] == [b"0", b"1", b"2"]
    assert len(relayed.posters) >= 5
    assert set(relayed.posters).isdisjoint({"engine"})


def test_a_single_send_is_posted_by_its_own_thread(relayed: Relayed) -> None:
    """One stream alone is not sent through another thread."""
    (client,) = relayed.clients(1)

    def work() -> None:
        relayed.method.flush()
        client.server.call.send(b"one")
        relayed.method.flush()

    on_engine_thread(work)
    assert next(client.call) == b"one"
    assert relayed.posters == ["engine"]


def test_a_thread_that_does_not_flush_posts_at_once(relayed: Relayed) -> None:
    clients = relayed.clients(2)

    def work() -> None:
        for client in clients:
            client.server.call.send(b"now")

    on_engine_thread(work)
    assert [next(client.call) for client in clients] == [b"now", b"now"]
    assert relayed.posters == ["engine", "engine"]


def test_a_client_that_does_not_read_holds_nobody_back(relayed: Relayed) -> None:
    """The engine waits until the sends are posted, never until they are taken."""
    deaf, *others = relayed.clients(4)

    def work() -> None:
        relayed.method.flush()
        for turn in range(4):
            for client in (deaf, *others):
                client.server.call.send(HUGE if client is deaf else b"%d" % turn)
            relayed.method.flush()

    on_engine_thread(work)
    for client in others:
        assert [next(client.call) for _ in range(4)] == [b"0", b"1", b"2", b"3"]


def test_calls_that_are_over_cost_the_others_nothing(relayed: Relayed) -> None:
    gone, *others = relayed.clients(3)
    gone.leave()

    def work() -> None:
        relayed.method.flush()
        for client in (gone, *others):
            client.server.call.send(b"on")
        relayed.method.flush()
        assert relayed.method.open_streams == 2

    on_engine_thread(work)
    assert [next(client.call) for client in others] == [b"on", b"on"]


def test_a_call_that_ends_between_send_and_flush_costs_the_others_nothing(relayed: Relayed) -> None:
    """It is the first of the batch, the one whose call wakes the serve thread."""
    gone, *others = relayed.clients(3)

    def work() -> None:
        relayed.method.flush()
        for client in (gone, *others):
            client.server.call.send(b"on")
        gone.leave()
        relayed.method.flush()

    on_engine_thread(work)
    assert [next(client.call) for client in others] == [b"on", b"on"]


def test_if_grpc_refuses_to_wake_the_sends_go_out_all_the_same(
    relayed: Relayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = relayed.clients(3)
    monkeypatch.setattr(NonBlockingCall, "wake", lambda self, tag: 8)

    def work() -> None:
        relayed.method.flush()
        for client in clients:
            client.server.call.send(b"on")
        relayed.method.flush()

    on_engine_thread(work)
    assert [next(client.call) for client in clients] == [b"on", b"on", b"on"]
