"""The second port, plain HTTP: /metrics for Prometheus, /livez and /readyz for probes that cannot speak gRPC
over TLS, as Kubernetes' own cannot."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import prometheus_client
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import CollectorRegistry

from .metrics import ServerMetrics, TenutoCollector

_StartResponse = Callable[[str, list[tuple[str, str]]], object]
# Each is one request and holds a thread: probes take milliseconds, a scrape a few more.
_MOST_CONNECTIONS = 32
_CONNECTION_SECONDS = 10.0
_LOOK_SECONDS = 0.5


class MetricsPort:
    """Listens from when it is built on, on threads of its own. `probes`: path to whether all is well.

    Raises (when built): OSError.
    """

    def __init__(
        self, metrics: ServerMetrics, host: str, port: int, probes: dict[str, Callable[[], bool]]
    ) -> None:
        registry = CollectorRegistry()
        registry.register(TenutoCollector(metrics))
        prometheus_client.ProcessCollector(registry=registry)
        scraped: Any = prometheus_client.make_wsgi_app(registry)

        def answer(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path in ("/", "/metrics"):
                body: Iterable[bytes] = scraped(environ, start_response)
                return body
            if path not in probes:  # who mistypes a probe must not find the server well
                status, text = "404 Not Found", b"there are /metrics, /livez and /readyz\n"
            else:
                status, text = ("200 OK", b"ok\n") if probes[path]() else ("503 Service Unavailable", b"no\n")
            start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
            return [text]

        kind = _Server6 if ":" in host else _Server
        self._server = make_server(host, port, answer, kind, handler_class=_Handler)
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOK_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answers no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingWSGIServer):
    """Has so many connections at most, each for so long at most.

    One too many takes the place of the oldest that has asked nothing yet: whoever says nothing must keep no
    probe out. Where all have asked, it is closed at once.
    """

    request_queue_size = 128  # of those who are not taken yet; 5 else, and each one more waits for a second

    def __init__(self, *arguments: Any) -> None:
        self._lock = threading.Lock()
        self._silent: dict[socket.socket, float] = {}  # since when they are here, the oldest first
        self._asking: dict[socket.socket, float] = {}  # the same, of those whose request was read
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            unwanted = None
            if len(self._silent) + len(self._asking) >= _MOST_CONNECTIONS:
                unwanted = next(iter(self._silent), request)
                self._silent.pop(unwanted, None)
            if unwanted is not request:
                self._silent[request] = time.monotonic()
        if unwanted is request:
            self.shutdown_request(request)
            return
        if unwanted is not None:
            _hang_up(unwanted)
        super().process_request(request, client_address)

    def has_asked(self, request: socket.socket) -> bool:
        """Its request was read. Whether it still has its place."""
        with self._lock:
            since = self._silent.pop(request, None)
            if since is not None:
                self._asking[request] = since
            return since is not None

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._silent.pop(request, None)
            self._asking.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Between two connections, and every `_LOOK_SECONDS`: ends those that are here for too long."""
        before = time.monotonic() - _CONNECTION_SECONDS
        with self._lock:
            slow = [r for held in (self._silent, self._asking) for r, since in held.items() if since < before]
        for request in slow:
            _hang_up(request)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # whoever left, or was ended, is not answered
            super().handle()

    def parse_request(self) -> bool:
        return super().parse_request() and self.server.has_asked(self.connection)

    def log_message(self, *_: object) -> None:
        """Its log would have a line for every scrape."""


def _hang_up(request: socket.socket) -> None:
    """The thread that reads it, or writes, goes on at once and closes it."""
    with contextlib.suppress(OSError):  # it did so meanwhile
        request.shutdown(socket.SHUT_RDWR)
