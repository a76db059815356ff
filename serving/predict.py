"""Predict: one batch through a stateless model, on any thread, answered to whoever asked.

On our own server the thread that reads takes a call and an engine's thread answers it, as on a stream: no
thread waits. What takes long to read goes to other threads first; its bytes are pending from the moment when
it is there. On gRPC's server a thread of its pool waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Executor
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError

from tenuto.v1 import tenuto_pb2 as pb

from .call import GONE, Listener, Metadata
from .callers import Callers
from .catalogue import Catalogue, Served
from .errors import (
    NotStateless,
    PoolFull,
    RunFailed,
    ServerDraining,
    TenutoError,
    WrongMessage,
)
from .pending import PendingBytes
from .reply import write_tensors, write_timing
from .sequence import CHUNK_BYTES, Chunk, Closed, Ending, Failed, Output, Reply, Sequence
from .status import code_of, metadata_of
from .tensor import WireTensor

log = logging.getLogger("tenuto.predict")

# What takes longer to read than that would hold up the streams of all others.
_MOST_AT_ONCE = 64 << 10

Answer = Output | TenutoError


class UnaryCall(Protocol):
    """A call that is answered once."""

    @property
    def metadata(self) -> Metadata: ...

    def send(self, message: bytes) -> None: ...

    def finish(self, code: grpc.StatusCode = ..., details: str = ..., metadata: Metadata = ...) -> None: ...


class Predicts:
    """All Predicts of a server; no more than `most` of them wait at once. Any thread."""

    def __init__(
        self,
        catalogue: Catalogue,
        pending: PendingBytes,
        *,
        most: int,
        is_draining: Callable[[], bool],
        readers: Executor,
        callers: Callers | None = None,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`readers` are the threads that read requests which take long to read; `refused` counts, by reason,
        those that no model had."""
        self._readers = readers
        self._callers = callers or Callers()
        self._catalogue = catalogue
        self._pending = pending
        self._most = most
        self._is_draining = is_draining
        self.refused = refused
        self.waiting = 0
        self._lock = threading.Lock()  # of that, and of the models' rejected_calls

    def open(self, call: UnaryCall) -> Listener:
        """Takes a call of our own server."""
        try:
            self._check_caller(lambda: call.metadata)
        except TenutoError as error:
            call.finish(code_of(error), str(error), metadata_of(error))
            return GONE
        return PredictCall(call, self)

    def read_later(self, read: Callable[[], None], nbytes: int) -> None:
        """On one of the readers' threads. Until then so many bytes are pending.

        Raises: PoolFull, ServerDraining.
        """
        if self._pending.full:
            raise PoolFull(f"more than {self._pending.limit_bytes} bytes are pending; retry")
        self._pending.add(nbytes)

        def run() -> None:
            self._pending.remove(nbytes)  # or a request could be refused for its own bytes
            read()

        try:
            self._readers.submit(run)
        except RuntimeError as error:  # they were shut down
            self._pending.remove(nbytes)
            raise ServerDraining("the server is leaving; call another one") from error

    def close(self) -> None:
        """Nothing more is read: what waits for it is forgotten."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def find(self, model: str, version: int) -> Served:
        """The stateless model of that name.

        Raises: UnknownModel, ModelNotReady, NotStateless; counted.
        """
        try:
            served = self._catalogue.find(model, version)
            if served.manifest.stateful:
                raise NotStateless(f"model {model!r} holds state; use Stream, where a sequence keeps it")
        except TenutoError as unknown:
            self.refused(unknown.reason)
            raise
        return served

    def admit(self, served: Served, done: Callable[[Answer], None]) -> Prediction:
        """Takes a place among those that wait. `done` is called at most once, on an engine's thread.

        Raises: ServerDraining, PoolFull; counted.
        """
        error: TenutoError
        if self._is_draining():
            error = ServerDraining("the server is leaving; call another one")
        elif self._pending.full:
            error = PoolFull(f"more than {self._pending.limit_bytes} bytes are pending; retry")
        elif self._take_place():
            return Prediction(served, self._pending, done, self._leave_place)
        else:
            error = PoolFull(f"{self._most} Predict calls wait already; retry, or send chunks on a Stream")
        with self._lock:
            served.engine.metrics.rejected_calls[error.reason] += 1
        raise error

    def _check_caller(self, metadata: Callable[[], Iterable[tuple[str, str | bytes]]]) -> None:
        """Raises: Unauthenticated, RateExceeded; counted."""
        try:
            caller, now = self._callers.identify(metadata), time.monotonic()
            caller.check_rate(now)
            caller.spend(1, now)
        except TenutoError as error:
            self.refused(error.reason)
            raise

    def _take_place(self) -> bool:
        with self._lock:
            free = self.waiting < self._most
            self.waiting += free
            return free

    def _leave_place(self) -> None:
        with self._lock:
            self.waiting -= 1


class Prediction:
    """One request on its way through an engine. Implements sequence.Sink."""

    full = False
    share = None  # one request, one answer: there is nothing to hold back

    def __init__(
        self,
        served: Served,
        pending: PendingBytes,
        done: Callable[[Answer], None],
        release: Callable[[], None],
    ) -> None:
        self._served = served
        self._pending = pending
        self._done = done
        self._release = release
        self._lock = threading.Lock()
        self._over = False  # answered, or nobody waits
        self._sequence: Sequence | None = None  # once the engine has it

    def has_pictures(self, tensors: Items[WireTensor]) -> bool:
        """Whether there are files to decode among the tensors that the model takes."""
        specs = self._served.manifest.inputs
        return any(t.dtype in spec.wire_encodings for t in tensors[: len(specs)] for spec in specs)

    def run(self, tensors: Items[WireTensor]) -> None:
        """Reads the request's tensors and hands them to the engine.

        Raises: what `Reader.read` raises; then the prediction is over.
        """
        try:
            data = self._served.reader.read(tensors)
        except TenutoError:
            self._end()
            raise
        self.start(data)

    def start(self, data: tuple[bytes, ...]) -> None:
        """Hands what `Reader.read` gave to the engine."""
        now = time.monotonic()
        sequence = Sequence(self, self._served.manifest, now=now)
        nbytes = sum(map(len, data)) + CHUNK_BYTES
        with self._lock:
            if self._over:  # its caller left meanwhile
                return
            self._sequence = sequence
        self._pending.add(nbytes)
        self._served.engine.request(sequence, Chunk(1, data, now, nbytes))  # it may answer at once

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        if not self._end():
            return
        try:
            self._done(self._answer(replies[-1][1]))
        except Exception:
            log.exception("an answer could not be written")
            self._done(RunFailed("an error inside the server; its log says more"))

    def _answer(self, reply: Reply) -> Answer:
        if isinstance(reply, Failed):
            return reply.error
        if isinstance(reply, Closed):
            text = "this version, or the server, left before the answer was there; call again"
            return ServerDraining(text)
        assert isinstance(reply, Output)  # a request gets nothing else
        return reply

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        sequence = self._sequence
        if self._end() and sequence is not None:
            self._served.engine.close(sequence, Ending.CANCELLED)

    def _end(self) -> bool:
        """Gives the place back. Whether it was not over yet."""
        with self._lock:
            if self._over:
                return False
            self._over = True
        self._sequence = None  # or each would keep the other alive
        self._release()
        return True


def _response(served: Served, output: Output) -> pb.PredictResponse:
    response = pb.PredictResponse(version=served.engine.version)
    write_tensors(response.outputs, output, served.manifest)
    write_timing(response.timing, output)
    return response


class PredictCall:
    """One call on our own server. Implements call.Listener, on the thread that reads."""

    __slots__ = ("_call", "_came", "_gone", "_prediction", "_predicts")

    def __init__(self, call: UnaryCall, predicts: Predicts) -> None:
        self._call = call
        self._predicts = predicts
        self._prediction: Prediction | None = None
        self._came = False  # its request
        self._gone = False

    def received(self, message: bytes) -> None:
        if self._came:  # one is all that there may be
            return
        self._came = True
        if len(message) > _MOST_AT_ONCE:
            self._later(lambda: self._guarded(lambda: self._begin(message, later=True)), len(message))
        else:
            self._guarded(lambda: self._begin(message, later=False))

    def half_closed(self) -> None:
        if not self._came:
            self._call.finish(grpc.StatusCode.UNIMPLEMENTED, "the call brought no request")

    def terminated(self) -> None:
        self._gone = True
        prediction, self._prediction = self._prediction, None  # or each would keep the other alive
        if prediction is not None:
            prediction.leave()

    def wait(self, resume: Callable[[], None]) -> bool:
        return False

    def _left(self) -> bool:
        """Whether the call is over. On any thread, and at any moment."""
        return self._gone

    def _later(self, read: Callable[[], None], nbytes: int) -> None:
        try:
            self._predicts.read_later(read, nbytes)
        except TenutoError as error:
            self._refuse(error)

    def _begin(self, message: bytes, *, later: bool) -> None:
        """Reads the request; `later` on a thread that may take its time."""
        if self._left():
            return
        try:
            request = pb.PredictRequest.FromString(message)
        except DecodeError:
            self._refuse(WrongMessage(f"{len(message)} bytes are no request of this method"))
            return
        try:
            served = self._predicts.find(request.model, request.version)
            prediction = self._predicts.admit(served, lambda answer: self._answer(served, answer))
            self._prediction = prediction
        except TenutoError as error:
            self._refuse(error)
            return
        if self._left():  # meanwhile, and did not see it
            prediction.leave()
        elif later or not prediction.has_pictures(request.inputs):
            self._run(prediction, request)
        else:
            self._later(lambda: self._guarded(lambda: self._run(prediction, request)), len(message))

    def _run(self, prediction: Prediction, request: pb.PredictRequest) -> None:
        if self._left():
            return
        try:
            prediction.run(request.inputs)
        except TenutoError as error:
            self._refuse(error)

    def _guarded(self, step: Callable[[], None]) -> None:
        """A bug is no silence, on whatever thread."""
        try:
            step()
        except Exception:
            log.exception("a call met a bug")
            if self._prediction is not None:
                self._prediction.leave()
            self._call.finish(grpc.StatusCode.INTERNAL, "an error inside the server; its log says more")

    def _answer(self, served: Served, answer: Answer) -> None:
        if isinstance(answer, TenutoError):
            self._refuse(answer)
        else:
            self._call.send(_response(served, answer).SerializeToString())
            self._call.finish()

    def _refuse(self, error: TenutoError) -> None:
        self._call.finish(code_of(error), str(error), metadata_of(error))
