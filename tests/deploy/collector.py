"""A collector of traces for tests: it takes what comes by OTLP over HTTP, and says at which path."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Export:
    path: str
    body: bytes


class Collector:
    """Listens on a free port of the loopback while it is entered."""

    def __init__(self) -> None:
        self._exports: queue.SimpleQueue[Export] = queue.SimpleQueue()
        exports = self._exports

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                exports.put(Export(self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="collector", daemon=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def next(self) -> Export:
        """Waits for one. Raises: queue.Empty."""
        return self._exports.get(timeout=_PATIENCE_SECONDS)
