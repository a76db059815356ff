"""The sockets of a gRPC server, and the one thread that reads them.

A server of our own for HTTP/2 in place of gRPC's: one read brings the messages of many streams, one write
takes the replies of a whole batch to a connection. That is a third of the CPU a message (docs/decisions.md).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from .connection import Connection, HttpCall, Limits, Route
from .frame import ProtocolError

log = logging.getLogger("tenuto.transport")

READ_BYTES = 1 << 16  # a read; larger ones are mapped and unmapped every time
_BACKLOG = 4096
_ACCEPTED_AT_ONCE = 64
_PING_SECONDS, _PONG_SECONDS = 30.0, 20.0  # a silent client is asked; it answers, or is gone
_LOOK_SECONDS = 1.0
# A connection that ends is read on for so long, or what was sent last might be lost with it.
_LINGER_SECONDS = 1.0
# The reading thread answers in microseconds; should it not, an engine goes on all the same.
_LONGEST_ERRAND_SECONDS = 1.0


class Http2Server:
    """Serves gRPC calls on its addresses from `start` on. `route` opens a call, on the reading thread."""

    def __init__(self, route: Route, limits: Limits) -> None:
        self._route = route
        self._limits = limits
        self._selector: selectors.BaseSelector
        self._read_end: socket.socket  # the reading thread wakes when something is written to the other end
        self._write_end: socket.socket
        self._listening: list[socket.socket] = []
        self._peers: dict[Connection, _Peer] = {}
        self._thread = threading.Thread(target=self._run, name="http2", daemon=True)
        self._own = threading.local()  # .calls: what this thread holds back until it flushes
        self._errands: deque[Callable[[], object]] = deque()
        self._awake = False  # somebody has woken the reading thread, and it has not looked yet
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._dirty: dict[Connection, None] = {}
        self._deferred: list[Callable[[], None]] = []  # engines to be woken
        self._grace_at = 0.0  # when calls that are left are cancelled; 0: not leaving
        self._stopped = threading.Event()
        self._started = False

    def bind(self, host: str, port: int) -> int:
        """Listens there. Returns the port.

        Raises: OSError.
        """
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, kind, protocol, _, address in dict.fromkeys(found):
                listening = socket.socket(family, kind, protocol)
                self._listening.append(listening)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind((address[0], port, *address[2:]))
                port = int(listening.getsockname()[1])
                listening.listen(_BACKLOG)
                listening.setblocking(False)
        except OSError:
            self._close_listening()
            raise
        return port

    def start(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._read_end, self._write_end = socket.socketpair()
        for end in (self._read_end, self._write_end):
            end.setblocking(False)
        self._selector.register(self._read_end, selectors.EVENT_READ, self._woken)
        for listening in self._listening:
            self._selector.register(listening, selectors.EVENT_READ, self._accept)
        self._started = True
        self._thread.start()

    def stop(self, grace_seconds: float) -> threading.Event:
        """Takes no more calls; those that are left go on for so long. Returns what is set at the end."""
        if self._started:
            self.soon(lambda: self._leave(time.monotonic() + grace_seconds))
        else:
            self._close_listening()
            self._stopped.set()
        return self._stopped

    # Loop; any thread.

    def soon(self, what: Callable[[], object]) -> None:
        self._errands.append(what)
        if not self._awake and threading.get_ident() != self._thread.ident:
            self._wake()

    def submit(self, call: HttpCall) -> None:
        held: list[HttpCall] | None = getattr(self._own, "calls", None)
        if held is None:
            call.connection.write((call,))
        else:
            held.append(call)

    def flush(self) -> None:
        """Sends what this thread has held back, and holds back from now on.

        An engine does not go on before its replies are on their way: what their clients send next then shares
        a batch. Nothing here waits for a client, slow or not.
        """
        calls: list[HttpCall] = getattr(self._own, "calls", [])
        self._own.calls = []
        if threading.get_ident() == self._thread.ident:
            self._write(calls)
        elif len(calls) == 1:
            calls[0].connection.write(calls)
        elif calls:
            done = threading.Lock()
            done.acquire()
            self.soon(lambda: self._write(calls, done))
            done.acquire(timeout=_LONGEST_ERRAND_SECONDS)

    def defer(self, wake: Callable[[], None]) -> bool:
        """Has an engine woken when all that was read is handed on. Not on other threads: False."""
        if threading.get_ident() != self._thread.ident:
            return False
        self._deferred.append(wake)
        return True

    def blocked(self, connection: Connection) -> None:
        self.soon(lambda: self._watch(connection))

    # The reading thread.

    def at(self, when: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), what))

    def _run(self) -> None:
        self._own.calls = []
        self.at(time.monotonic() + _LOOK_SECONDS, self._look)
        while not self._stopped.is_set():
            try:
                self._turn()
            except Exception:  # the loop must live on: its clients have no other
                log.exception("the transport met a bug and goes on")
        self._close()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._patience()):
            key.data(events)
        while self._errands:
            self._errands.popleft()()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        self._write_own()
        for connection in list(self._dirty):
            connection.write()
        self._dirty.clear()
        if self._deferred:
            deferred, self._deferred = self._deferred, []
            for wake in deferred:
                wake()

    def _write_own(self) -> None:
        """What was sent on this thread."""
        calls, self._own.calls = self._own.calls, []
        self._write(calls)

    def _patience(self) -> float:
        if self._errands or self._deferred:
            return 0.0
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _write(self, calls: list[HttpCall], done: threading.Lock | None = None) -> None:
        of: dict[Connection, list[HttpCall]] = {}
        for call in calls:
            of.setdefault(call.connection, []).append(call)
        for connection, own in of.items():
            connection.write(own)
            self._dirty.pop(connection, None)
        if done is not None:
            done.release()

    def _wake(self) -> None:
        self._awake = True
        with suppress(OSError):  # full, so it will wake; or closed
            self._write_end.send(b"\0")

    def _woken(self, _events: int) -> None:
        with suppress(OSError):
            self._read_end.recv(4096)
        # Behind that, or a byte that is sent in between would be taken and nobody else send one; and before
        # the errands are looked at, or one that comes in between would wait.
        self._awake = False

    def _accept(self, _events: int) -> None:
        for listening in self._listening:
            for _ in range(_ACCEPTED_AT_ONCE):
                try:
                    accepted, address = listening.accept()
                except BlockingIOError:
                    break
                except OSError as error:  # no file descriptor is left, say
                    log.warning("a connection could not be taken: %s", error)
                    self._pause_accepting()
                    return
                self._begin(accepted, address)

    def _pause_accepting(self) -> None:
        for listening in self._listening:
            self._selector.unregister(listening)
        self.at(time.monotonic() + _LOOK_SECONDS, self._accept_again)

    def _accept_again(self) -> None:
        for listening in self._listening:
            self._selector.register(listening, selectors.EVENT_READ, self._accept)

    def _begin(self, accepted: socket.socket, address: tuple[str, int]) -> None:
        accepted.setblocking(False)
        with suppress(OSError):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = address[:2]
        name = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
        peer = _Peer(self, accepted, Connection(accepted, name, self._limits, self._route, self))
        self._peers[peer.connection] = peer
        self._selector.register(accepted, selectors.EVENT_READ, peer.ready)
        self._dirty[peer.connection] = None

    def dirty(self, connection: Connection) -> None:
        """Something is to be written when this turn is over."""
        self._dirty[connection] = None

    def _watch(self, connection: Connection) -> None:
        """Waits until the socket takes more."""
        peer = self._peers.get(connection)
        if peer is not None:
            peer.watch()

    def watch(self, peer: _Peer, events: int) -> None:
        self._selector.modify(peer.socket, events, peer.ready)

    def forget(self, peer: _Peer) -> None:
        """The connection is over."""
        self._dirty.pop(peer.connection, None)
        if self._peers.pop(peer.connection, None) is None:
            return
        self._selector.unregister(peer.socket)
        peer.socket.close()
        peer.connection.lost()

    def _look(self) -> None:
        now = time.monotonic()
        for peer in list(self._peers.values()):
            peer.look(now)
        if self._grace_at:
            self._see_whether_all_left(now)
        self.at(now + (_LOOK_SECONDS if not self._grace_at else 0.01), self._look)

    def _leave(self, until: float) -> None:
        self._grace_at = until
        for listening in self._listening:
            with suppress(KeyError):
                self._selector.unregister(listening)
        self._close_listening()
        for peer in list(self._peers.values()):
            peer.connection.leave()
        self.at(time.monotonic(), self._look)

    def _see_whether_all_left(self, now: float) -> None:
        if now >= self._grace_at:
            for peer in list(self._peers.values()):
                peer.connection.finish_all()
            self._write_own()
        for peer in list(self._peers.values()):
            if not peer.connection.calls and not peer.connection.is_blocked:
                peer.linger()
        if not self._peers or now >= self._grace_at + _LINGER_SECONDS:
            self._stopped.set()

    def _close(self) -> None:
        for peer in list(self._peers.values()):
            self.forget(peer)
        while self._errands:
            self._errands.popleft()()
        self._close_listening()
        for end in (self._read_end, self._write_end):
            end.close()
        self._selector.close()
        self._stopped.set()

    def _close_listening(self) -> None:
        for listening in self._listening:
            listening.close()
        self._listening.clear()


class _Peer:
    """One client's socket."""

    def __init__(self, server: Http2Server, own: socket.socket, connection: Connection) -> None:
        self.socket = own
        self.connection = connection
        self._server = server
        self._lingers_until = 0.0  # 0: it does not end

    def ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._server.watch(self, selectors.EVENT_READ)
            self.connection.write_blocked()
        if not events & selectors.EVENT_READ:
            return
        try:
            read = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            read = b""
        if not read:
            self._server.forget(self)
        elif not self._lingers_until:
            self._receive(read)

    def _receive(self, read: bytes) -> None:
        try:
            self.connection.receive(read)
            self._server.dirty(self.connection)
        except ProtocolError as error:
            log.info("%s: %s; the connection ends", self.connection.peer, error)
            self._end(error.code, str(error))
        except Exception:
            log.exception("%s: what came met a bug; the connection ends", self.connection.peer)
            self._server.forget(self)

    def _end(self, code: int, text: str) -> None:
        self.connection.leave(code, text)
        self.connection.lost()
        self.linger()

    def linger(self) -> None:
        """Says that no more will come, and waits for the client to end it."""
        if not self._lingers_until:
            self._lingers_until = time.monotonic() + _LINGER_SECONDS
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    def look(self, now: float) -> None:
        if self._lingers_until:
            if now > self._lingers_until:
                self._server.forget(self)
            return
        try:
            why = self.connection.look(now, _PING_SECONDS, _PONG_SECONDS)
        except ProtocolError as error:
            why = str(error)
        if why:
            log.info("%s: %s; the connection ends", self.connection.peer, why)
            self._server.forget(self)

    def watch(self) -> None:
        if self.connection.is_blocked:
            self._server.watch(self, selectors.EVENT_READ | selectors.EVENT_WRITE)
