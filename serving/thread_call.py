"""A stream on gRPC's own server and its public API: two threads a stream."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

import grpc

from .call import GONE, Metadata, Opener, Outbox

log = logging.getLogger("tenuto.transport")


class ThreadCall:
    """The handler's thread sends, one more reads."""

    def __init__(self, context: grpc.ServicerContext, opener: Opener, limit_bytes: int) -> None:
        self._context = context
        self._outbox = Outbox(limit_bytes)
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

    @property
    def metadata(self) -> Metadata:
        return tuple((key, value) for key, value in self._context.invocation_metadata())

    def suggest_leaving(self) -> None:
        """gRPC's own server offers no such thing."""

    def peer(self) -> str:
        return str(self._context.peer())

    def read_one(self, request: bytes) -> None:
        """Takes the request of a unary call."""
        self._listener.received(request)
        self._listener.half_closed()

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
            self._outbox.close()
        self._room.release()
        self._wake.put(None)
        listener, self._listener = self._listener, GONE
        listener.terminated()


def answered(opener: Opener, request: bytes, context: grpc.ServicerContext) -> bytes:
    """Serves a unary call: this thread of gRPC's waits until it is answered."""
    call = ThreadCall(context, opener, limit_bytes=1 << 62)  # what holds back more is for streams
    call.read_one(request)
    return next(call.replies(), b"")  # without a reply its status is set, and is not OK
