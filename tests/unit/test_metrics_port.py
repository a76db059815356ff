"""The port for metrics and probes: who says nothing takes nothing that others need."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tenuto.serving import metrics_port
from tenuto.serving.metrics import ServerMetrics
from tenuto.serving.metrics_port import MetricsPort
from tests.integration.running import wait_for

PATIENCE_SECONDS = 30.0
REQUEST = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


@contextmanager
def listening(probe: Callable[[], bool] = lambda: True) -> Iterator[MetricsPort]:
    before = threading.active_count()
    port = MetricsPort(ServerMetrics("0"), "127.0.0.1", 0, {"/livez": probe})
    try:
        yield port
    finally:
        port.close()
    wait_for(lambda: threading.active_count() <= before, "all of its threads to end")


def connect(port: MetricsPort) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port.port), PATIENCE_SECONDS)


def ask(port: MetricsPort, path: str = "/livez") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port.port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def is_closed(connection: socket.socket) -> bool:
    """Waits for that."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_probes_and_metrics_are_answered() -> None:
    with listening() as port:
        assert [ask(port, path) for path in ("/livez", "/metrics", "/", "/nowhere")] == [200, 200, 200, 404]


def test_those_who_say_nothing_hold_so_many_threads_and_no_place_of_a_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_port, "_MOST_CONNECTIONS", 4)
    with listening() as port, contextlib.ExitStack() as stack:
        others = threading.active_count()
        silent = [stack.enter_context(connect(port)) for _ in range(20)]
        assert all(is_closed(connection) for connection in silent[:16])  # the oldest
        wait_for(lambda: threading.active_count() - others == 4, "a thread for each of the others")
        assert [ask(port) for _ in range(4)] == [200] * 4
        assert is_closed(silent[16])


def test_one_too_many_is_closed_at_once_where_all_have_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_port, "_MOST_CONNECTIONS", 3)
    arrived, goes_on = threading.Semaphore(0), threading.Event()

    def slow() -> bool:
        arrived.release()
        return goes_on.wait(PATIENCE_SECONDS)

    with listening(slow) as port, contextlib.ExitStack() as stack:
        asking = [stack.enter_context(connect(port)) for _ in range(3)]
        for connection in asking:
            connection.sendall(REQUEST)
            assert arrived.acquire(timeout=PATIENCE_SECONDS)
        with connect(port) as one_too_many:
            assert is_closed(one_too_many)
        goes_on.set()
        assert [connection.recv(12) for connection in asking] == [b"HTTP/1.0 200"] * 3
        wait_for(lambda: ask(port) == 200, "a place")


@pytest.mark.parametrize("sent", [b"", REQUEST[:-2]], ids=["nothing", "half a request"])
def test_who_takes_too_long_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_port, "_CONNECTION_SECONDS", 0.05)
    monkeypatch.setattr(metrics_port, "_LOOK_SECONDS", 0.01)
    with listening() as port, connect(port) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


def test_who_takes_no_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_port, "_CONNECTION_SECONDS", 0.05)
    monkeypatch.setattr(metrics_port, "_LOOK_SECONDS", 0.01)
    begun = threading.Event()

    def endless(_: object, start_response: Callable[..., object]) -> Iterator[bytes]:
        start_response("200 OK", [])
        begun.set()
        while True:
            yield bytes(1 << 20)

    with listening() as port, contextlib.ExitStack() as stack:
        others = threading.active_count()
        connection = stack.enter_context(connect(port))
        monkeypatch.setattr(port._server, "application", endless)
        connection.sendall(REQUEST)
        assert begun.wait(PATIENCE_SECONDS)
        wait_for(lambda: threading.active_count() <= others, "its thread to end")


def test_who_breaks_off_leaves_no_stack_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with listening() as port:
        for sent in (b"", b"GET /liv", REQUEST[:-2]):
            with connect(port) as connection:
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert ask(port) == 200
    assert capfd.readouterr().err == ""
