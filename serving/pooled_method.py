"""Methods other than the stream: any gRPC handler, on a pool's threads, by the rules of gRPC's own server.

What gRPC's packages bring (health, reflection) is registered here as there, by `add_generic_rpc_handlers`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any, NoReturn

import grpc

from .call import GONE, Listener
from .errors import PoolFull
from .pending import PendingBytes
from .routed_call import RoutedCall
from .status import code_of, metadata_of

log = logging.getLogger("tenuto.transport")

Metadata = tuple[tuple[str, str | bytes], ...]
_Code = grpc.StatusCode
# Messages of one call that wait for their handler; above it the client is not read.
_MOST_WAITING = 16
# Calls that stream their requests, each with a thread of the pool: others need threads, too.
_MOST_TALKS = 4
# Calls that are answered for as long as they stay, such as Health.Watch; and others than the server's own,
# such as Health.Check. Nobody is asked who he is for these: strangers must not take the places of callers,
# nor watchers those of probes.
_MOST_WATCHES, _MOST_OTHERS = 64, 128
# How often to look whether a client that is slow takes its replies.
_SLOW_SECONDS = 0.01


class Methods:
    """The handlers by name. Takes what generated code registers, as a grpc.Server does."""

    def __init__(self, pool: Executor, max_calls: int, max_bytes: int, own: tuple[str, ...] = ("/",)) -> None:
        """`own`: what the paths begin with that are not among the others."""
        self.pool = pool
        self.own = own
        self._handlers: list[Any] = []
        self._places = _Places(max_calls)
        self._talks = _Places(_MOST_TALKS)
        self._watches = _Places(_MOST_WATCHES)
        self._others = _Places(_MOST_OTHERS)
        self.pending = PendingBytes(max_bytes)  # of requests, until they are answered

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """The same handlers under another name; the generic ones are enough."""

    def open(self, call: RoutedCall) -> Listener:
        """Finds the method that a call names. Unknown, or one call too many: it is finished at once."""
        details = _Details(call.path, call.metadata)
        for generic in self._handlers:
            handler = generic.service(details)
            if handler is not None:
                break
        else:
            call.finish(_Code.UNIMPLEMENTED, f"method {call.path[:200]!r} is not here")
            return GONE
        return PooledMethod(call, handler, self)

    def take_place(self, call: RoutedCall, talks: bool = False, watches: bool = False) -> bool:
        """For a call that has brought a request. If there is none it is finished."""
        places = self._places if call.path.startswith(self.own) else self._others
        if talks or watches:
            places = self._talks if talks else self._watches
        if not self.pending.full and places.acquire(blocking=False):
            call.closed = places.release
            return True
        error = PoolFull(
            f"{places.most} such calls, or {self.pending.limit_bytes} bytes, wait already; retry"
        )
        call.finish(code_of(error), str(error), metadata_of(error))
        return False


class _Places(threading.BoundedSemaphore):
    """And how many there are."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most


class _Details(grpc.HandlerCallDetails):  # type: ignore[misc,unused-ignore]
    def __init__(self, method: str, metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = metadata


class PooledMethod:
    """One call of such a method. A Listener."""

    def __init__(self, call: RoutedCall, handler: Any, methods: Methods) -> None:
        self._call = call
        self._methods = methods
        self._handler = handler
        self._context = Context(call)
        self._requests = _Requests()
        self._begun = False

    def received(self, message: bytes) -> None:
        if self._handler.request_streaming:
            self._requests.put(message)
            if not self._begun:  # not before: an idle call needs no thread
                self._begin(self._requests.decoded(self._handler.request_deserializer), 0)
        elif not self._begun:
            self._begin(message, len(message))

    def half_closed(self) -> None:
        self._requests.put(None)
        if not self._begun and self._handler.request_streaming:
            self._begin(iter(()), 0)
        elif not self._begun:
            self._call.finish(_Code.UNIMPLEMENTED, "the call brought no request")

    def terminated(self) -> None:
        self._requests.put(None)
        self._context.terminated()

    def wait(self, resume: Callable[[], None]) -> bool:
        return self._requests.wait(resume)

    def _begin(self, request: Any, nbytes: int) -> None:
        self._begun = True
        handler = self._handler
        if self._methods.take_place(self._call, handler.request_streaming, handler.response_streaming):
            self._methods.pending.add(nbytes)
            self._methods.pool.submit(self._run, request, nbytes)

    def _run(self, request: Any, nbytes: int) -> None:
        """On a thread of the pool."""
        context = self._context
        try:
            if not context.is_active():  # it left while it waited for a thread
                return
            if self._handler.request_streaming:
                self._answer(request)
            else:
                self._answer(_decoded(request, self._handler.request_deserializer))
        except _Aborted:
            context.end()
        except _Undecodable:
            self._call.finish(_Code.INTERNAL, "the bytes are no request of this method")
        except Exception:
            log.exception("a call met a bug")
            self._call.finish(_Code.UNKNOWN, "an error inside the server; its log says more")
        finally:
            self._methods.pending.remove(nbytes)

    def _answer(self, request: Any) -> None:
        handler, context = self._handler, self._context
        if handler.response_streaming:
            method = handler.stream_stream if handler.request_streaming else handler.unary_stream
            if getattr(method, "experimental_non_blocking", False):  # gRPC's health: no thread a watcher
                method(request, context, self._reply_or_end)
                return
            for reply in method(request, context):
                self._reply(reply)
                while self._call.backed_up and context.is_active():  # its client is slow
                    time.sleep(_SLOW_SECONDS)
                if not context.is_active():
                    return
        else:
            method = handler.stream_unary if handler.request_streaming else handler.unary_unary
            self._reply(method(request, context))
        context.end()

    def _reply(self, reply: Any) -> None:
        serialize = self._handler.response_serializer
        self._call.send(reply if serialize is None else serialize(reply))

    def _reply_or_end(self, reply: Any) -> None:
        if reply is None:
            self._context.end()
        else:
            self._reply(reply)


def _decoded(message: bytes, deserialize: Callable[[bytes], Any] | None) -> Any:
    """Raises: _Undecodable."""
    try:
        return message if deserialize is None else deserialize(message)
    except Exception as error:
        raise _Undecodable from error


class _Requests:
    """What a client streams to a handler that takes it one by one."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._resume: Callable[[], None] | None = None

    def put(self, message: bytes | None) -> None:
        self._waiting.put(message)

    def wait(self, resume: Callable[[], None]) -> bool:
        with self._lock:
            if self._waiting.qsize() < _MOST_WAITING:
                return False
            self._resume = resume
            return True

    def decoded(self, deserialize: Callable[[bytes], Any] | None) -> Iterator[Any]:
        while (message := self._waiting.get()) is not None:
            with self._lock:
                resume, self._resume = self._resume, None
            if resume is not None:
                resume()
            yield _decoded(message, deserialize)


class _Undecodable(Exception):
    """A client's bytes are no message of this method."""


class _Aborted(Exception):
    """The handler ended its call."""


class Context(grpc.ServicerContext):  # type: ignore[misc,unused-ignore]
    """What a handler may ask and say of its call, as gRPC documents it."""

    def __init__(self, call: RoutedCall) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []  # None: it is over
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: Metadata = ()

    def end(self) -> None:
        """The handler is done."""
        self._call.finish(self._code or _Code.OK, self._details, self._trailing)

    def terminated(self) -> None:
        with self._lock:
            callbacks, self._callbacks = self._callbacks or [], None
        for callback in callbacks:
            try:
                callback()
            except Exception:  # the others are to be called all the same
                log.exception("a callback of a call met a bug")

    def is_active(self) -> bool:
        return self._callbacks is not None

    def time_remaining(self) -> float:
        return self._call.seconds_left

    def cancel(self) -> bool:
        self._call.cancel()
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def invocation_metadata(self) -> Metadata:
        return self._call.metadata

    def peer(self) -> str:
        return self._call.peer()

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> dict[str, bytes]:
        return {}

    def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        self._call.initial_metadata = tuple(initial_metadata)

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        self._trailing = tuple(trailing_metadata)

    def trailing_metadata(self) -> Metadata:
        return self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def set_details(self, details: str) -> None:
        self._details = details

    def details(self) -> str:
        return self._details

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self._code = _Code.UNKNOWN if code is _Code.OK else code  # as gRPC's own server has it
        self._details = details
        raise _Aborted

    def abort_with_status(self, status: Any) -> NoReturn:
        self._trailing = tuple(status.trailing_metadata or ())
        self.abort(status.code, status.details)
