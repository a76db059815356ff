"""The sockets of a gRPC server, and the one thread that reads them.

A server of our own for HTTP/2 in place of gRPC's: one read brings the messages of many streams, one write
takes the replies of a whole batch to a connection. That is a third of the CPU a message (docs/decisions.md).
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .connection import Connection
from .frame import ProtocolError
from .http_call import Limits, Partial
from .routed_call import Route, RoutedCall
from .tls import Tls, TlsWire

log = logging.getLogger("tenuto.transport")

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
READ_BYTES = 1 << 16  # a read; larger ones are mapped and unmapped every time
_BACKLOG = 4096
_ACCEPTED_AT_ONCE = 64
# Steps of TLS handshakes in one turn, a millisecond each, so that newcomers do not hold up who is here; and
# connections that may be in the middle of one.
_HANDSHAKES_AT_ONCE = 4
_MOST_UNPROVEN = 1_024
_PING_SECONDS, _PONG_SECONDS = 30.0, 20.0  # a silent client is asked; it answers, or is gone
_HANDSHAKE_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_LEAVE_SECONDS = 0.01  # the same, while the server ends
# A connection that ends is read on for so long, or what was sent last might be lost with it.
_LINGER_SECONDS = 1.0
# The reading thread answers in microseconds; should it not, an engine goes on all the same.
_LONGEST_ERRAND_SECONDS = 1.0


def bound(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    """Sockets for all addresses of the host, on one port; `shared`: other processes may bind the same.

    Raises: OSError.
    """
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            one = socket.socket(family, kind, protocol)
            try:
                port = _bind(one, (address[0], port, *address[2:]), shared)
            except OSError:
                one.close()
                raise
        except OSError as error:  # a name with an IPv6 address where there is no IPv6, say
            failed = error
        else:
            sockets.append(one)
    if not sockets or (failed is not None and failed.errno == errno.EADDRINUSE):
        for one in sockets:
            one.close()
        raise failed or OSError(f"{host} has no address")
    return sockets


def _bind(one: socket.socket, address: tuple[object, ...], shared: bool) -> int:
    """Returns the port."""
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(address)
    return int(one.getsockname()[1])


class Http2Server:
    """Serves gRPC calls on its addresses from `start` on. `route` opens a call, on the reading thread."""

    def __init__(self, route: Route, limits: Limits, tls: Tls | None = None) -> None:
        self._route = route
        self._limits = limits
        self._tls = tls
        self._handshakes_left = _HANDSHAKES_AT_ONCE  # in this turn
        self._unproven: dict[_Peer, None] = {}  # whose handshakes are not over, in the order of their coming
        self._turned_away = 0  # of them, since the last look: there were too many
        self._selector: selectors.BaseSelector
        self._read_end: socket.socket  # the reading thread wakes when something is written to the other end
        self._write_end: socket.socket
        self._listening: list[socket.socket] = []
        self._peers: dict[Connection, _Peer] = {}
        self._thread = threading.Thread(target=self._run, name="http2", daemon=True)
        self._own = threading.local()  # .calls: what this thread holds back until it flushes
        self._errands: deque[Callable[[], object]] = deque()
        self._awake = False  # somebody has woken the reading thread, and it has not looked yet
        self._look_at = 0.0  # when the connections are looked at
        self._accepts_at = 0.0  # when connections are taken again; 0: they are
        self._partial = Partial()
        self._dirty: dict[Connection, None] = {}
        self._deferred: list[Callable[[], None]] = []  # engines to be woken
        self._grace_at = 0.0  # when calls that are left are cancelled; 0: not leaving
        self._stopped = threading.Event()
        self._started = False

    def bind(self, host: str, port: int, *, shared: bool = False) -> int:
        """Listens there, `shared`: with others. Returns the port.

        Raises: OSError.
        """
        self._listening = bound(host, port, shared=shared)
        try:
            for listening in self._listening:
                listening.listen(_BACKLOG)
                listening.setblocking(False)
        except OSError:
            self._close_listening()
            raise
        return int(self._listening[0].getsockname()[1])

    @property
    def stopped(self) -> threading.Event:
        """Set at the end."""
        return self._stopped

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

    def submit(self, call: RoutedCall) -> None:
        held: list[RoutedCall] | None = getattr(self._own, "calls", None)
        if held is None:
            call.connection.write((call,))
        else:
            held.append(call)

    def flush(self) -> None:
        """Sends what this thread has held back, and holds back from now on.

        An engine does not go on before its replies are on their way: what their clients send next then shares
        a batch. Nothing here waits for a client, slow or not.
        """
        calls: list[RoutedCall] = getattr(self._own, "calls", [])
        self._own.calls = []
        if len(calls) == 1:
            calls[0].connection.write(calls)
        elif calls:
            done = threading.Lock()
            done.acquire()
            self.soon(lambda: self._write(calls, done))
            done.acquire(timeout=_LONGEST_ERRAND_SECONDS)

    def defer(self, wake: Callable[[], None]) -> bool:
        """Has an engine woken when all that was read is handed on. Not on other threads: False."""
        if threading.get_ident() != self._thread.ident or self._stopped.is_set():
            return False
        self._deferred.append(wake)
        return True

    def watch(self, watched: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        """Calls `ready` with the events, from now on. On the reading thread."""
        if watched in self._selector.get_map():
            self._selector.modify(watched, events, ready)
        else:
            self._selector.register(watched, events, ready)

    def unwatch(self, watched: socket.socket) -> None:
        """On the reading thread."""
        with suppress(KeyError):
            self._selector.unregister(watched)

    def blocked(self, connection: Connection) -> None:
        self.soon(lambda: self._watch(connection))

    # The reading thread.

    def _run(self) -> None:
        self._own.calls = []
        while not self._stopped.is_set():
            try:
                self._turn()
            except Exception:  # the loop must live on: its clients have no other
                log.exception("the transport met a bug and goes on")
        self._close()

    def _turn(self) -> None:
        self._handshakes_left = _HANDSHAKES_AT_ONCE
        for key, events in self._selector.select(self._patience()):
            key.data(events)
        while self._errands:
            self._errands.popleft()()
        self._write_own()
        while self._dirty:
            connection, _ = self._dirty.popitem()
            connection.write()
            if connection.fault is not None and (peer := self._peers.get(connection)) is not None:
                peer.end(connection.fault)
        self._ring()
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + (_LOOK_SECONDS if not self._grace_at else _LEAVE_SECONDS)
            self._look(now)
            self._write_own()

    def _ring(self) -> None:
        """Wakes the engines that have something new in their inboxes."""
        deferred, self._deferred = self._deferred, []
        for wake in deferred:
            wake()

    def _write_own(self) -> None:
        """What was sent on this thread."""
        calls, self._own.calls = self._own.calls, []
        self._write(calls)

    def _patience(self) -> float:
        if self._errands or self._deferred or self._dirty:
            return 0.0
        return max(0.0, self._look_at - time.monotonic())

    def _write(self, calls: list[RoutedCall], done: threading.Lock | None = None) -> None:
        of: dict[Any, list[RoutedCall]] = {}  # by connection
        for call in calls:
            own = of.get(call.connection)
            if own is None:
                of[call.connection] = [call]
            else:
                own.append(call)
        try:
            for connection, own in of.items():
                connection.write(own)
        finally:
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
                except ConnectionAbortedError:  # it left before it was taken
                    continue
                except OSError as error:  # no file descriptor is left, say
                    log.warning("a connection could not be taken: %s", error)
                    self._pause_accepting()
                    return
                self._begin(accepted, address)

    def _pause_accepting(self) -> None:
        if not self._accepts_at:
            self._accepts_at = time.monotonic() + _LOOK_SECONDS
            for listening in self._listening:
                self._selector.unregister(listening)

    def _accept_again(self) -> None:
        self._accepts_at = 0.0
        for listening in self._listening:
            self._selector.register(listening, selectors.EVENT_READ, self._accept)

    def _begin(self, accepted: socket.socket, address: tuple[str, int]) -> None:
        accepted.setblocking(False)
        with suppress(OSError):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = address[:2]
        name = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
        wire = TlsWire(accepted, self._tls.context) if self._tls is not None else accepted
        holds = (lambda: wire.holds) if isinstance(wire, TlsWire) else (lambda: False)
        connection = Connection(wire, name, self._limits, self._route, self, self._partial, holds)
        peer = _Peer(self, wire, connection)
        self._peers[connection] = peer
        self._selector.register(peer.socket, selectors.EVENT_READ, peer.ready)
        if peer.is_proven:
            self._dirty[connection] = None
        else:
            self._unproven[peer] = None
            if len(self._unproven) > _MOST_UNPROVEN:  # who came first had the most time
                self.forget(next(iter(self._unproven)))
                self._turned_away += 1

    def may_shake_hands(self) -> bool:
        """Whether a handshake may go on in this turn."""
        self._handshakes_left -= 1
        return self._handshakes_left >= 0

    def proven(self, peer: _Peer) -> None:
        """Its handshake is over."""
        self._unproven.pop(peer, None)
        self._dirty[peer.connection] = None

    def dirty(self, connection: Connection) -> None:
        """Something is to be written when this turn is over."""
        self._dirty[connection] = None

    def _watch(self, connection: Connection) -> None:
        """Waits until the socket takes more."""
        peer = self._peers.get(connection)
        if peer is not None:
            peer.watch()

    def watch_peer(self, peer: _Peer, events: int) -> None:
        self._selector.modify(peer.socket, events, peer.ready)

    def forget(self, peer: _Peer) -> None:
        """The connection is over."""
        self._dirty.pop(peer.connection, None)
        if self._peers.pop(peer.connection, None) is None:
            return
        peer.gone = True
        self._unproven.pop(peer, None)
        self._selector.unregister(peer.socket)
        # In this order: a thread that writes would else write to whoever gets the same file descriptor next.
        peer.connection.lost()
        peer.socket.close()

    def _look(self, now: float) -> None:
        if self._accepts_at and now >= self._accepts_at:
            self._accept_again()
        for peer in list(self._peers.values()):
            peer.look(now)
        if self._turned_away:
            log.warning("%d connections did not get through their handshakes: too many", self._turned_away)
            self._turned_away = 0
        if self._grace_at:
            self._see_whether_all_left(now)

    def _leave(self, until: float) -> None:
        self._grace_at = until
        for listening in self._listening:
            with suppress(KeyError):
                self._selector.unregister(listening)
        self._close_listening()
        for peer in list(self._peers.values()):
            if peer.is_proven:
                peer.connection.leave()
            else:
                self.forget(peer)
        self._look_at = 0.0

    def _see_whether_all_left(self, now: float) -> None:
        if now >= self._grace_at:
            for peer in list(self._peers.values()):
                peer.connection.finish_all()
            self._write_own()
        for peer in list(self._peers.values()):
            if peer.connection.is_idle:
                peer.linger()
        if not self._peers or now >= self._grace_at + _LINGER_SECONDS:
            self._stopped.set()

    def _close(self) -> None:
        for peer in list(self._peers.values()):
            self.forget(peer)
        while self._errands:
            self._errands.popleft()()
        self._ring()
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

    def __init__(self, server: Http2Server, wire: socket.socket | TlsWire, connection: Connection) -> None:
        self.socket = wire.socket if isinstance(wire, TlsWire) else wire
        self.connection = connection
        self.is_proven = wire is self.socket  # no handshake is needed, or it is over
        self._wire = wire
        self._server = server
        self._lingers_until = 0.0  # 0: it does not end
        self.gone = False

    def ready(self, events: int) -> None:
        if self.gone:  # kqueue tells of one socket twice
            return
        if not self.is_proven and not self._shake_hands():
            return
        if events & selectors.EVENT_WRITE:
            self._server.watch_peer(self, selectors.EVENT_READ)
            self.connection.write_on()
        if not events & selectors.EVENT_READ:
            return
        try:
            read = self._wire.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            read = b""
        if not read:
            self._server.forget(self)
        elif not self._lingers_until:
            self._receive(read)

    def _shake_hands(self) -> bool:
        """Whether all that was to be said is said."""
        assert isinstance(self._wire, TlsWire)
        if not self._server.may_shake_hands():
            return False
        try:
            self._wire.handshake()
        except BlockingIOError:
            self._server.watch_peer(self, _READ | (_WRITE if self._wire.holds else 0))
            return False
        except OSError as error:
            log.info("%s: the TLS handshake failed: %s", self.connection.peer, error)
            self._server.forget(self)
            return False
        self._server.watch_peer(self, _READ)
        self.is_proven = True
        self._server.proven(self)
        return True

    def _receive(self, read: bytes) -> None:
        try:
            self.connection.receive(read)
            self._server.dirty(self.connection)
        except ProtocolError as error:
            self.end(error)
        except Exception:
            log.exception("%s: what came met a bug; the connection ends", self.connection.peer)
            self._server.forget(self)

    def end(self, why: ProtocolError) -> None:
        """The client broke the rules."""
        log.info("%s: %s; the connection ends", self.connection.peer, why)
        self.connection.leave(why.code, str(why))
        self.connection.lost()
        self.linger()

    def linger(self) -> None:
        """Says that no more will come, and waits for the client to end it."""
        if not self._lingers_until:
            self._lingers_until = time.monotonic() + _LINGER_SECONDS
            with suppress(OSError):
                if isinstance(self._wire, TlsWire):
                    self._wire.shutdown()
                else:
                    self._wire.shutdown(socket.SHUT_WR)

    def look(self, now: float) -> None:
        if self._lingers_until:
            if now > self._lingers_until:
                self._server.forget(self)
            return
        if not self.is_proven and now - self.connection.began > _HANDSHAKE_SECONDS:
            self._server.forget(self)
            return
        why = self.connection.look(now, _PING_SECONDS, _PONG_SECONDS)
        if why:
            log.info("%s: %s; the connection ends", self.connection.peer, why)
            self._server.forget(self)

    def watch(self) -> None:
        if self.connection.is_blocked:
            self._server.watch_peer(self, selectors.EVENT_READ | selectors.EVENT_WRITE)
