"""The second port, plain HTTP: /metrics for Prometheus, /livez and /readyz for probes that cannot speak gRPC
over TLS, as Kubernetes' own cannot."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import prometheus_client
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import CollectorRegistry

from .metrics import ServerMetrics, TenutoCollector

_StartResponse = Callable[[str, list[tuple[str, str]]], object]


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

        kind = _Server6 if ":" in host else ThreadingWSGIServer
        self._server = make_server(host, port, answer, kind, handler_class=_Silent)
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answers no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    """Its log would have a line for every scrape."""

    def log_message(self, *_: object) -> None:
        pass
