"""A TCP proxy that cuts, stalls and slows bytes, between a client and a server that are both well."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

# SO_LINGER on with 0 seconds: closing sends RST, as a machine that lost the connection would.
_RESET = struct.pack("ii", 1, 0)
_PIECE_BYTES = 16 << 10
_SLICE_SECONDS = 0.005


class Proxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`, which may change for later connections.

    `stall` holds all bytes in both directions until `flow`; connections stay open. `cut` resets all
    connections. `cut_after` resets each later connection once it carried so many bytes to the client, in the
    middle of whatever they are. `bytes_per_second` slows each direction; 0 does not.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.bytes_per_second = 0.0
        self.cut_after = 0  # 0: never
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._threads: list[threading.Thread] = []
        self._over = False

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.flow()
        self.cut()
        for thread in self._threads:
            thread.join()

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def stall(self) -> None:
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        """Resets every connection that is there now."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._reset(pair)

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                server.settimeout(None)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client.close()
                continue
            pair = (client, server)
            with self._lock:
                self._pairs.add(pair)
            self._start(self._pump, client, server, pair, 0)
            self._start(self._pump, server, client, pair, self.cut_after)

    def _pump(
        self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket], most: int
    ) -> None:
        """Forwards until either side is gone, or `most` bytes went (0: for ever)."""
        carried = 0
        try:
            while data := source.recv(_PIECE_BYTES):
                self._flowing.wait()
                if most and carried + len(data) >= most:
                    sink.sendall(data[: most - carried])
                    break
                carried += len(data)
                self._send(sink, data)
        except OSError:
            pass
        self._reset(pair)

    def _send(self, sink: socket.socket, data: bytes) -> None:
        while data:
            size = len(data)
            if self.bytes_per_second:
                size = max(1, int(self.bytes_per_second * _SLICE_SECONDS))
                threading.Event().wait(_SLICE_SECONDS)
            sink.sendall(data[:size])
            data = data[size:]

    def _reset(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            self._pairs.remove(pair)
            self.cuts += 1
        for side in pair:
            with contextlib.suppress(OSError):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                side.shutdown(socket.SHUT_RDWR)
            side.close()
