"""The stream method on a public `grpc.server`: bytes in, bytes out, no thread held by an open stream.

The handler is non-blocking (the hook that grpcio's own health `Watch` uses): it keeps the call object and
posts core operation batches itself. That touches two private names, `context._rpc_event.call` and the
operations of `grpc._cython.cygrpc`; they are used in this file alone and probed before the server starts. If
the probe fails, an ordinary iterator handler takes over, which admits no more streams than it has threads.

What is already paid for, each with a test in tests/integration/test_transport.py:
- one send and one read outstanding a call: `start_server_batch` *returns* an error code and raises nothing;
- a fresh operation object each time: a shared one is freed twice;
- a tag callback that raises kills gRPC's only serve thread: tags return `_CONTINUE` whatever happens;
- a call is finished once;
- the read is armed before the message is answered, so one stream may carry many sequences.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import grpc

from .errors import PlatformError, PoolFull
from .status import code_of, metadata_of

_operations: Any
try:
    _operations = importlib.import_module("grpc._cython.cygrpc")
except ImportError:  # the probe says so
    _operations = None

log = logging.getLogger("tenuto.transport")

Mode = Literal["auto", "nonblocking", "threads"]
Metadata = tuple[tuple[str, str | bytes], ...]
# What grpc._server expects of a tag: no RPC state to forget, no callbacks to run.
_CONTINUE: tuple[None, tuple[()]] = (None, ())


class Listener(Protocol):
    """One stream's receiver. All calls come one after another; none may block."""

    def received(self, message: bytes) -> None:
        """One message of the client."""

    def half_closed(self) -> None:
        """The client sends no more. It may still read."""

    def terminated(self) -> None:
        """The call is over, in whatever way. Nothing that is sent from now on arrives."""

    def wait(self, resume: Callable[[], None]) -> bool:
        """Whether reading must pause; then `resume` is called once, when it may go on."""


class Call(Protocol):
    """One stream's sender. Any thread; nothing blocks."""

    def send(self, message: bytes) -> None:
        """Queues a message; dropped if the call is over."""

    def finish(self, code: grpc.StatusCode = ..., details: str = ..., metadata: Metadata = ...) -> None:
        """Ends the call with that status once all that was queued is sent."""

    def cancel(self) -> None:
        """Ends the call now."""

    @property
    def backed_up(self) -> bool:
        """Whether the client leaves more replies untaken than the outbox may hold."""

    def peer(self) -> str:
        """The client's address, for logs."""


Opener = Callable[[Call], Listener]


class _Gone:
    """The listener of a call that is over."""

    def received(self, message: bytes) -> None: ...
    def half_closed(self) -> None: ...
    def terminated(self) -> None: ...
    def wait(self, resume: Callable[[], None]) -> bool:
        return True


_GONE = _Gone()


class _Outbox:
    """What waits to be sent on one call, and what its ending will be. Guarded by its lock."""

    def __init__(self, limit_bytes: int) -> None:
        self.lock = threading.Lock()
        self.messages: deque[bytes] = deque()
        self.bytes = 0
        self.limit_bytes = limit_bytes
        self.ending: tuple[grpc.StatusCode, str, Metadata] | None = None
        self.over = False

    def put(self, message: bytes) -> None:
        self.messages.append(message)
        self.bytes += len(message)

    def take(self) -> bytes | None:
        if not self.messages:
            return None
        message = self.messages.popleft()
        self.bytes -= len(message)
        return message

    @property
    def full(self) -> bool:
        return self.bytes > self.limit_bytes


class NonBlockingCall:
    """A stream that holds no thread. Tags run on gRPC's serve thread, sends on any."""

    def __init__(
        self,
        context: Any,
        finish: Callable[[None], None],
        opener: Opener,
        limit_bytes: int,
        closed: Callable[[], None],
    ) -> None:
        self._context = context
        self._core = context._rpc_event.call
        self._finish = finish
        self._outbox = _Outbox(limit_bytes)
        self._sending = False
        self._held = False  # reading is paused
        self._reads_done = False
        self._closed = closed
        self._listener: Listener = opener(self)
        if not context.add_callback(self._terminated):
            self._terminated()
            return
        try:
            context.send_initial_metadata(())
        except grpc.RpcError:  # cancelled already; the callback tells
            return
        self._arm()

    # Any thread.

    def send(self, message: bytes) -> None:
        box = self._outbox
        with box.lock:
            if box.over or box.ending is not None:
                return
            if self._sending:
                box.put(message)
                return
            self._sending = True
        self._post_send(message)

    def finish(
        self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "", metadata: Metadata = ()
    ) -> None:
        box = self._outbox
        with box.lock:
            if box.over or box.ending is not None:
                return
            box.ending = (code, details, metadata)
            if self._sending:
                return
        self._post_status()

    def cancel(self) -> None:
        self._context.cancel()

    @property
    def backed_up(self) -> bool:
        return self._outbox.full

    def peer(self) -> str:
        return str(self._context.peer())

    # Operation batches. Each has its own operation object.

    def _post_send(self, message: bytes) -> None:
        error = self._core.start_server_batch((_operations.SendMessageOperation(message, 0),), self._sent)
        if error:
            self._lost("send", error)

    def _arm(self) -> None:
        error = self._core.start_server_batch((_operations.ReceiveMessageOperation(0),), self._read)
        if error:
            self._lost("read", error)

    def _lost(self, what: str, error: int) -> None:
        # On a call that is over that is how it ends; else it is a bug, and the stream must not hang.
        if not self._outbox.over:
            log.error("a %s was refused by gRPC with call error %d; the stream is cancelled", what, error)
            self.cancel()

    def _post_status(self) -> None:
        ending = self._outbox.ending
        assert ending is not None
        code, details, metadata = ending
        try:
            if code is not grpc.StatusCode.OK:
                self._context.set_code(code)
                self._context.set_details(details)
            if metadata:
                self._context.set_trailing_metadata(metadata)
            self._finish(None)
        except Exception:
            log.exception("a stream could not be finished")

    # Tags and callbacks, on the serve thread.

    def _read(self, event: Any) -> tuple[None, tuple[()]]:
        try:
            message = event.batch_operations[0].message()
            if message is None and not self._reads_done:
                self._reads_done = True
                self._arm()  # asked twice: see read_all
            elif message is None:
                self._listener.half_closed()
            else:
                self._listener.received(message)
                self._read_on()
        except Exception:
            log.exception("a message met a bug; its stream is cancelled")
            self.cancel()
        return _CONTINUE

    def _read_on(self) -> None:
        """Arms the next read, unless this client does not take its replies or the process holds too much."""
        box = self._outbox
        with box.lock:
            if box.over or box.ending is not None:
                return
            if box.full:
                self._held = True
                return
        if not self._listener.wait(self._resume):
            self._arm()

    def _resume(self) -> None:
        try:
            self._read_on()
        except Exception:
            log.exception("a stream could not be read on; it is cancelled")
            self.cancel()

    def _sent(self, event: Any) -> tuple[None, tuple[()]]:
        try:
            box = self._outbox
            with box.lock:
                message = box.take()
                resume = self._held and not box.full
                if resume:
                    self._held = False
                if message is None:
                    self._sending = False
                finish = message is None and box.ending is not None and not box.over
            if message is not None:
                self._post_send(message)
            elif finish:
                self._post_status()
            if resume:
                self._read_on()
        except Exception:
            log.exception("a reply met a bug; its stream is cancelled")
            self.cancel()
        return _CONTINUE

    def _terminated(self) -> None:
        box = self._outbox
        with box.lock:
            if box.over:
                return
            box.over = True
            box.messages.clear()
            box.bytes = 0
        listener, self._listener = self._listener, _GONE  # or each would keep the other alive
        try:
            listener.terminated()
        finally:
            self._closed()


class ThreadCall:
    """A stream on public API alone: the handler's thread sends, one more reads."""

    def __init__(self, context: grpc.ServicerContext, opener: Opener, limit_bytes: int) -> None:
        self._context = context
        self._outbox = _Outbox(limit_bytes)
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._room = threading.Semaphore(0)
        self._held = False
        self._listener = opener(self)
        if not context.add_callback(self._terminated):
            self._terminated()

    def send(self, message: bytes) -> None:
        with self._outbox.lock:
            if self._outbox.over or self._outbox.ending is not None:
                return
            self._outbox.put(message)
        self._wake.put(None)

    def finish(
        self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "", metadata: Metadata = ()
    ) -> None:
        with self._outbox.lock:
            if self._outbox.over or self._outbox.ending is not None:
                return
            self._outbox.ending = (code, details, metadata)
        self._wake.put(None)

    def cancel(self) -> None:
        self._context.cancel()

    @property
    def backed_up(self) -> bool:
        return self._outbox.full

    def peer(self) -> str:
        return str(self._context.peer())

    def read_all(self, requests: Iterator[bytes]) -> None:
        """Reads until the client is done; run on a thread of its own."""
        try:
            for message in requests:
                self._listener.received(message)
                if not self._may_read():
                    return
            # A cancelled call looks like a half-close at first: whoever asks again is told the truth.
            if next(requests, None) is None:
                self._listener.half_closed()
        except grpc.RpcError:  # the call is over
            pass
        except Exception as error:
            if not self._outbox.over and not isinstance(error, StopIteration):
                log.exception("a message met a bug; its stream is cancelled")
                self.cancel()

    def _may_read(self) -> bool:
        """Waits until the next message may be read; False once the call is over."""
        while True:
            with self._outbox.lock:
                if self._outbox.over or self._outbox.ending is not None:
                    return False
                self._held = self._outbox.full
            if not self._held and not self._listener.wait(self._room.release):
                return True
            self._room.acquire()

    def replies(self) -> Iterator[bytes]:
        """What is to be sent, in order, until the ending."""
        while True:
            self._wake.get()
            with self._outbox.lock:
                message, over, ending = self._outbox.take(), self._outbox.over, self._outbox.ending
                resume = self._held and not self._outbox.full
                self._held = self._held and not resume
            if resume:
                self._room.release()
            if message is not None:
                yield message
            elif over:
                return
            elif ending is not None:
                code, details, metadata = ending
                if metadata:
                    self._context.set_trailing_metadata(metadata)
                if code is not grpc.StatusCode.OK:
                    self._context.set_code(code)
                    self._context.set_details(details)
                return

    def _terminated(self) -> None:
        with self._outbox.lock:
            if self._outbox.over:
                return
            self._outbox.over = True
            self._outbox.messages.clear()
        self._room.release()
        self._wake.put(None)
        listener, self._listener = self._listener, _GONE
        listener.terminated()


class StreamMethod:
    """Makes the handler of one stream method and counts its open calls.

    `max_streams` bounds them: one more is refused RESOURCE_EXHAUSTED at once. (`maximum_concurrent_rpcs` does
    not count non-blocking calls.)
    """

    def __init__(
        self, opener: Opener, *, mode: Mode, max_streams: int, outbox_bytes: int = 256 << 10
    ) -> None:
        self.mode = choose_mode(mode)
        self.open_streams = 0
        self.refused = 0
        self._opener = opener
        self.max_streams = max_streams
        self._outbox_bytes = outbox_bytes
        self._lock = threading.Lock()

    def handler(self) -> Any:
        behaviour: Any = self._non_blocking if self.mode == "nonblocking" else self._threaded
        return grpc.stream_stream_rpc_method_handler(behaviour)

    @property
    def _non_blocking(self) -> Any:
        def handle(_requests: Any, context: Any, finish: Callable[[None], None]) -> None:
            if not self._admitted(context):
                finish(None)
                return
            try:
                NonBlockingCall(context, finish, self._opener, self._outbox_bytes, self._one_less)
            except Exception:  # gRPC answers it; the place must not be lost
                self._one_less()
                raise

        handle.experimental_non_blocking = True  # type: ignore[attr-defined]
        return handle

    def _threaded(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if not self._admitted(context):
            return
        try:
            call = ThreadCall(context, self._opener, self._outbox_bytes)
            threading.Thread(
                target=call.read_all, args=(requests,), name="stream-reader", daemon=True
            ).start()
            yield from call.replies()
        finally:
            self._one_less()

    def _admitted(self, context: grpc.ServicerContext) -> bool:
        with self._lock:
            if self.open_streams < self.max_streams:
                self.open_streams += 1
                return True
            self.refused += 1
        error = PoolFull(f"{self.max_streams} streams are open; share streams, or raise --max-streams")
        context.set_code(code_of(error))
        context.set_details(str(error))
        context.set_trailing_metadata(metadata_of(error))
        return False

    def _one_less(self) -> None:
        with self._lock:
            self.open_streams -= 1


def choose_mode(mode: Mode) -> Mode:
    """The transport that works here.

    Raises: PlatformError if "nonblocking" was demanded and the probe fails.
    """
    if mode == "threads":
        return "threads"
    why = probe()
    if not why:
        return "nonblocking"
    if mode == "nonblocking":
        raise PlatformError(f"--transport nonblocking does not work with grpcio {grpc.__version__}: {why}")
    log.warning(
        "the non-blocking transport does not work with grpcio %s (%s): streams use threads",
        grpc.__version__,
        why,
    )
    return "threads"


class _Echo:
    """The probe's listener."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def received(self, message: bytes) -> None:
        self._call.send(message)

    def half_closed(self) -> None:
        self._call.finish()

    def terminated(self) -> None:
        pass

    def wait(self, resume: Callable[[], None]) -> bool:
        return False


def probe() -> str:
    """Echoes two messages over loopback through the private names. Why that failed, or nothing."""
    names = ("SendMessageOperation", "ReceiveMessageOperation")
    if _operations is None or not all(hasattr(_operations, name) for name in names):
        return "grpc._cython.cygrpc has no message operations"

    def handle(_requests: Any, context: Any, finish: Callable[[None], None]) -> None:
        NonBlockingCall(context, finish, _Echo, 1 << 20, lambda: None)

    handle.experimental_non_blocking = True  # type: ignore[attr-defined]
    handlers: dict[str, Any] = {"Echo": grpc.stream_stream_rpc_method_handler(handle)}
    server = grpc.server(ThreadPoolExecutor(1), options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tenuto.probe", handlers),))
    try:
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            echo: Any = channel.stream_stream("/tenuto.probe/Echo")
            replies = list(echo(iter([b"one", b"two"]), timeout=5.0))
        return "" if replies == [b"one", b"two"] else f"the echo returned {replies!r}"
    except Exception as error:  # noqa: BLE001  whatever it is, the other transport is there
        return f"the echo failed: {type(error).__name__}"
    finally:
        server.stop(None)
