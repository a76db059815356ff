"""What serves gRPC: a server of our own, or gRPC's; and the stream method on both.

`http2` is our own (serving/http2.py); `threads` is gRPC's, on its public API, with two threads a stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import grpc

from .call import GONE, Listener, Metadata, Opener
from .errors import PoolFull, TenutoError
from .front_end import FrontSettings
from .front_ends import FrontEnds
from .http2 import Http2Server
from .http_call import OTHERS_BYTES, Limits
from .pooled_method import Methods
from .routed_call import RoutedCall
from .status import code_of, metadata_of
from .thread_call import ThreadCall, answered
from .tls import Tls

Mode = Literal["auto", "http2", "threads"]
# Raises TenutoError for the metadata of a call that may not be.
Check = Callable[[Callable[[], Metadata]], object]
# Calls of one connection beyond `max_streams`, for the other methods, and to be refused in words.
_SPARE_CALLS = 1024
# Streams on gRPC's server: each holds a thread of its pool and one more.
_THREAD_STREAMS = 256
# Threads of gRPC's server that no call that waits for its answer may have.
_FREE_THREADS = 4


class Stopping(Protocol):
    """Set when a server has stopped."""

    def wait(self, timeout: float | None = None) -> object: ...


class Transport(Protocol):
    """A gRPC server. Generated code registers its handlers here."""

    front_ends: FrontEnds | None  # the processes that receive for it

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None: ...
    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None: ...

    def listen(self, path: str, opener: Opener) -> None:
        """Calls of that method, which is unary, are opened so."""

    def listen_to_streams(self, path: str, opener: Opener) -> None:
        """And those of this one, which is a stream both ways."""

    def bind(self, host: str, port: int) -> int:
        """Listens there; 0 takes a free port. Returns the port. Raises: OSError, RuntimeError."""

    def start(self) -> None: ...

    def stop(self, grace_seconds: float) -> Stopping:
        """Takes no more calls; those that are left may go on for so long."""

    def flush(self) -> None:
        """To be called by an engine thread after its sends."""

    def defer(self, wake: Callable[[], None]) -> bool:
        """Called by whoever has put something into an engine's inbox: whether the engine is woken later, when
        all that was read is there."""


@dataclass(frozen=True)
class Terms:
    """What a transport keeps to."""

    services: tuple[str, ...]  # whose calls are the callers'; all others are for everybody
    threads: int  # for methods that nobody listens to
    max_message_bytes: int
    max_pending_bytes: int
    tls: Tls | None = None
    check: Check = lambda _: None
    front: FrontSettings | None = None  # what they are told; None: this process receives


class Http2Transport(Methods):
    """Our own server: the thread that reads takes streams and whatever is listened to; a pool's, the rest."""

    def __init__(self, places: StreamPlaces, terms: Terms) -> None:
        own = tuple(f"/{service}/" for service in terms.services)
        most = terms.max_pending_bytes
        super().__init__(ThreadPoolExecutor(terms.threads, "grpc"), places.max_streams, most, own)
        self._check = terms.check
        self._streams = places
        self._openers: dict[str, Callable[[RoutedCall], Listener]] = {}
        limits = Limits(terms.max_message_bytes, most, places.max_streams + _SPARE_CALLS)
        self._server = server = Http2Server(self._route, limits, terms.tls)
        self.front_ends: FrontEnds | None = None
        listens: Http2Server | FrontEnds = server
        if terms.front is not None:
            listens = self.front_ends = FrontEnds(
                replace(terms.front, calls=limits.calls),
                server,
                self._route,
            )
        self.bind = listens.bind
        self.start = listens.start
        self.stop = listens.stop
        self.flush = server.flush
        self.defer = server.defer

    def listen(self, path: str, opener: Opener) -> None:
        def open_or_refuse(call: RoutedCall) -> Listener:
            return opener(call) if self.take_place(call) else GONE

        self._openers[path] = open_or_refuse

    def listen_to_streams(self, path: str, opener: Opener) -> None:
        self._openers[path] = lambda call: self._streams.open(call, opener)

    def _route(self, call: RoutedCall) -> Listener:
        """Nothing of a stranger's call is read, and it takes nobody's place."""
        if not call.path.startswith(self.own):
            call.shrink(OTHERS_BYTES)
            return self.open(call)
        try:
            self._check(lambda: call.metadata)
        except TenutoError as error:
            call.finish(code_of(error), str(error), metadata_of(error))
            return GONE
        return self._openers.get(call.path, self.open)(call)


class ThreadTransport:
    """gRPC's server. It bounds no bytes of unary calls by itself."""

    def __init__(self, places: StreamPlaces, terms: Terms) -> None:
        """`terms.check` is the handlers' business here: they have the call's metadata, and gRPC its bytes."""
        self.front_ends: FrontEnds | None = None
        self._tls = terms.tls
        self._streams = places
        most = places.max_streams
        places.max_streams = min(most, _THREAD_STREAMS)
        options = (
            ("grpc.so_reuseport", 0),  # a forgotten server on this port would take half of the connections
            ("grpc.max_receive_message_length", terms.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # Calls that wait to be taken: above 1,000 gRPC cancels some by chance, and when a server is lost
            # another one gets more than that at once.
            ("grpc.server.max_pending_requests", most),
            ("grpc.server.max_pending_requests_hard_limit", most),
            # Clients keep quiet connections alive; the default answers them too_many_pings.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.http2.max_ping_strikes", 0),
            # A client that vanished is noticed.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        )
        pool = ThreadPoolExecutor(terms.threads + places.max_streams, "grpc")
        # Health and models are asked for while others wait.
        self._waiting = threading.BoundedSemaphore(max(1, terms.threads - _FREE_THREADS))
        self._server = grpc.server(pool, options=options)
        self.add_generic_rpc_handlers: Callable[[Iterable[Any]], None] = self._server.add_generic_rpc_handlers
        self.start = self._server.start

    def listen(self, path: str, opener: Opener) -> None:
        """Each call has a thread of the pool until it is answered."""

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            if not self._waiting.acquire(blocking=False):
                error = PoolFull("all threads for calls wait for answers; retry, or send on a stream")
                context.set_trailing_metadata(metadata_of(error))
                context.abort(code_of(error), str(error))
            try:
                return answered(opener, request, context)
            finally:
                self._waiting.release()

        self._add(path, grpc.unary_unary_rpc_method_handler(handle))

    def listen_to_streams(self, path: str, opener: Opener) -> None:
        def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._streams.threaded(opener, requests, context)

        self._add(path, grpc.stream_stream_rpc_method_handler(handle))

    def _add(self, path: str, handler: Any) -> None:
        service, method = path.strip("/").split("/")
        generic = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server.add_generic_rpc_handlers((generic,))

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """The generic ones are enough."""

    def bind(self, host: str, port: int) -> int:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self._tls is None:
            return int(self._server.add_insecure_port(address))
        known = [self._tls.contents]

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """Asked before every handshake."""
            assert self._tls is not None
            if self._tls.contents == known[0]:
                return None
            known[0] = self._tls.contents
            return _certificates(known[0])

        demanded = self._tls.files.client_authorities is not None
        fetch: Any = changed  # its stubs do not know that None means unchanged
        credentials = grpc.dynamic_ssl_server_credentials(_certificates(known[0]), fetch, demanded)
        return int(self._server.add_secure_port(address, credentials))

    def stop(self, grace_seconds: float) -> Stopping:
        return self._server.stop(grace_seconds)

    def flush(self) -> None:
        """Sends are on their way already."""

    def defer(self, _wake: Callable[[], None]) -> bool:
        return False


def _certificates(contents: tuple[bytes, ...]) -> grpc.ServerCertificateConfiguration:
    """Of `Tls.contents`."""
    chain, key, *authorities = contents
    return grpc.ssl_server_certificate_configuration(
        [(key, chain)], root_certificates=authorities[0] if authorities else None
    )


def transport(places: StreamPlaces, terms: Terms) -> Transport:
    """The server for that mode."""
    kind = Http2Transport if places.mode == "http2" else ThreadTransport
    return kind(places, terms)


class StreamPlaces:
    """Opens the streams, of all methods, and counts them.

    `max_streams` bounds them: one more is refused RESOURCE_EXHAUSTED at once. (`maximum_concurrent_rpcs` of
    gRPC's server would count unary calls as well.)
    """

    def __init__(self, *, mode: Mode, max_streams: int, outbox_bytes: int = 256 << 10) -> None:
        self.mode = "http2" if mode == "auto" else mode
        self.open_streams = 0
        self.refused = 0
        self.max_streams = max_streams
        self._outbox_bytes = outbox_bytes
        self._lock = threading.Lock()

    def open(self, call: RoutedCall, opener: Opener) -> Listener:
        """Opens a stream of our own server, or finishes it at once."""
        refusal = self._refusal()
        if refusal is not None:
            call.finish(code_of(refusal), str(refusal), metadata_of(refusal))
            return GONE
        call.closed = self._one_less
        listener = opener(call)
        call.metadata = ()  # nobody asks for it later, and a stream may last for days
        return listener

    def threaded(
        self, opener: Opener, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """A stream of gRPC's server."""
        refusal = self._refusal()
        if refusal is not None:
            context.set_code(code_of(refusal))
            context.set_details(str(refusal))
            context.set_trailing_metadata(metadata_of(refusal))
            return
        try:
            call = ThreadCall(context, opener, self._outbox_bytes)
            threading.Thread(
                target=call.read_all, args=(requests,), name="stream-reader", daemon=True
            ).start()
            yield from call.replies()
        finally:
            self._one_less()

    def _refusal(self) -> PoolFull | None:
        """Takes a place, or says why there is none."""
        with self._lock:
            if self.open_streams < self.max_streams:
                self.open_streams += 1
                return None
            self.refused += 1
        return PoolFull(f"{self.max_streams} streams are open; share streams, or raise --max-streams")

    def _one_less(self) -> None:
        with self._lock:
            self.open_streams -= 1
