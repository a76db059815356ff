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
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import grpc

from .call import GONE, Call, Listener, Metadata, Opener, Outbox
from .errors import PlatformError, PoolFull
from .status import code_of, metadata_of
from .thread_call import ThreadCall

_operations: Any
try:
    _operations = importlib.import_module("grpc._cython.cygrpc")
except ImportError:  # the probe says so
    _operations = None

log = logging.getLogger("tenuto.transport")

Mode = Literal["auto", "nonblocking", "threads"]
# What grpc._server expects of a tag: no RPC state to forget, no callbacks to run.
_CONTINUE: tuple[None, tuple[()]] = (None, ())
# The serve thread answers in microseconds; should it not, an engine goes on all the same.
_LONGEST_ERRAND_SECONDS = 1.0


class Relay:
    """Has the serve thread post what an engine thread sends to several calls after one batch.

    A post gives the interpreter lock away and takes it back, and its completion wakes the serve thread: from
    the engine thread that is two switches of threads a message. And an engine that does not wait for its
    replies to be on their way finds few chunks for its next batch: at 64 streams 5 rows instead of 44, and
    59 µs of CPU a message instead of 34. Nothing here waits for a client, slow or not.

    Only a thread that calls `flush` after its sends is relayed; a single send it posts itself.
    """

    def __init__(self) -> None:
        self._own = threading.local()  # .calls: what this thread holds back until it flushes

    def submit(self, call: NonBlockingCall) -> None:
        calls: list[NonBlockingCall] | None = getattr(self._own, "calls", None)
        if calls is None:
            call.post_next()
        else:
            calls.append(call)

    def flush(self) -> None:
        """Sends what this thread has held back, and holds back from now on."""
        calls: list[NonBlockingCall] = getattr(self._own, "calls", [])
        self._own.calls = []
        if len(calls) == 1:
            calls[0].post_next()
        elif calls:
            _Errand(calls).run()


class _Errand:
    """Some calls' sends, posted by the serve thread while the thread that has them waits."""

    def __init__(self, calls: list[NonBlockingCall]) -> None:
        self._calls = calls
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        if self._calls[0].wake(self._post):
            self._post(None)
        self._done.acquire(timeout=_LONGEST_ERRAND_SECONDS)

    def _post(self, _event: Any) -> tuple[None, tuple[()]]:
        for call in self._calls:
            call.post_next()
        # Behind what gRPC has ready by now: the completed sends, and the answers that clients gave meanwhile.
        if self._calls[0].wake(self._finish):
            self._finish(None)
        return _CONTINUE

    def _finish(self, _event: Any) -> tuple[None, tuple[()]]:
        self._done.release()
        return _CONTINUE


class NonBlockingCall:
    """A stream that holds no thread. Tags run on gRPC's serve thread, sends on any."""

    def __init__(
        self,
        context: Any,
        finish: Callable[[None], None],
        opener: Opener,
        limit_bytes: int,
        closed: Callable[[], None],
        relay: Relay,
    ) -> None:
        self._context = context
        self._relay = relay
        self._core = context._rpc_event.call
        self._finish = finish
        self._outbox = Outbox(limit_bytes)
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
            box.put(message)
            if self._sending:
                return
            self._sending = True
        self._relay.submit(self)

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

    def post_next(self) -> None:
        """Posts the send that is due. Does not raise."""
        try:
            with self._outbox.lock:
                message = self._outbox.take()
            if message is not None:  # else the call is over
                self._post_send(message)
        except Exception:
            log.exception("a reply met a bug; its stream is cancelled")
            self.cancel()

    def wake(self, tag: Callable[[Any], tuple[None, tuple[()]]]) -> int:
        """Has the serve thread call `tag`. gRPC's call error, 0 if there is none.

        gRPC completes an empty batch of operations at once, on a call that is over, too.
        """
        return int(self._core.start_server_batch((), tag))

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
                if not box.messages and box.ending is None and not self._held:  # nothing waits for it
                    self._sending = False
                    return _CONTINUE
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
            box.close()
        listener, self._listener = self._listener, GONE  # or each would keep the other alive
        try:
            listener.terminated()
        finally:
            self._closed()


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
        self._relay = Relay()

    def flush(self) -> None:
        """To be called by an engine thread after its sends."""
        self._relay.flush()

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
                NonBlockingCall(
                    context, finish, self._opener, self._outbox_bytes, self._one_less, self._relay
                )
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

    relay = Relay()

    def handle(_requests: Any, context: Any, finish: Callable[[None], None]) -> None:
        NonBlockingCall(context, finish, _Echo, 1 << 20, lambda: None, relay)

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
