"""The unary methods: decode, call the engine, encode. And the table of all methods.

Unary calls run on a few pool threads and are meant to be rare; the fast path is the stream.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from tenuto.v1 import tenuto_pb2 as pb

from .catalogue import Catalogue, Refused, Served
from .errors import (
    DeadlinePassed,
    ModelNotReady,
    NotStateless,
    PoolFull,
    ServerDraining,
    TenutoError,
    UnknownModel,
    UnknownSequence,
    WrongMessage,
)
from .pending import PendingBytes
from .reply import write_tensors, write_timing
from .sequence import CHUNK_BYTES, Chunk, Closed, Ending, Failed, Output, Reply, Sequence
from .status import code_of, metadata_of

log = logging.getLogger("tenuto.servicer")

SERVICE = pb.DESCRIPTOR.services_by_name["Tenuto"].full_name
# A caller without a deadline does not wait for ever.
_LONGEST_WAIT_SECONDS = 3600.0

Request = TypeVar("Request", bound=Message)
Parsed = TypeVar("Parsed", bound=Message, covariant=True)


class _Parser(Protocol[Parsed]):
    """A message class."""

    def FromString(self, data: bytes, /) -> Parsed: ...


class _Answer:
    """The sink of one Predict."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.reply: Reply | None = None

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        self.reply = replies[-1][1]
        self.there.set()

    full = False
    share = None  # one request, one answer: there is nothing to hold back


class Servicer:
    """Predict, the models, and the operators' calls. `max_predicts` bounds the calls that wait at once."""

    def __init__(
        self,
        catalogue: Catalogue,
        pending: PendingBytes,
        *,
        max_predicts: int,
        is_draining: Callable[[], bool],
    ) -> None:
        self._catalogue = catalogue
        self._pending = pending
        self._max_predicts = max_predicts
        self._is_draining = is_draining
        self._places = threading.BoundedSemaphore(max_predicts)
        self._lock = threading.Lock()  # of the models' rejected_calls

    def handlers(self) -> dict[str, Any]:
        return {
            "Predict": _unary(pb.PredictRequest, self.predict),
            "ListModels": _unary(pb.ListModelsRequest, self.list_models),
            "GetModel": _unary(pb.GetModelRequest, self.get_model),
            "ListSequences": _unary(pb.ListSequencesRequest, self.list_sequences),
            "EndSequence": _unary(pb.EndSequenceRequest, self.end_sequence),
        }

    def predict(self, request: pb.PredictRequest, context: grpc.ServicerContext) -> pb.PredictResponse:
        """One batch through a stateless model."""
        served = self._catalogue.find(request.model, request.version)
        if served.manifest.stateful:
            raise NotStateless(f"model {request.model!r} holds state; use Stream, where a sequence keeps it")
        self._admit(served)
        try:
            return self._predict(served, request, context)
        finally:
            self._places.release()

    def _admit(self, served: Served) -> None:
        """Takes a place among the calls that wait, or counts the refusal.

        Raises: ServerDraining, PoolFull.
        """
        error: TenutoError
        if self._is_draining():
            error = ServerDraining("the server is leaving; call another one")
        elif self._pending.full:
            error = PoolFull(f"more than {self._pending.limit_bytes} bytes are pending; retry")
        elif self._places.acquire(blocking=False):
            return
        else:
            text = f"{self._max_predicts} Predict calls wait already; retry, or send chunks on a Stream"
            error = PoolFull(text)
        with self._lock:
            served.engine.metrics.rejected_calls[error.reason] += 1
        raise error

    def _predict(
        self, served: Served, request: pb.PredictRequest, context: grpc.ServicerContext
    ) -> pb.PredictResponse:
        data = served.reader.read(request.inputs)
        answer = _Answer()
        now = time.monotonic()
        sequence = Sequence(answer, served.manifest, now=now)
        nbytes = sum(map(len, data)) + CHUNK_BYTES
        self._pending.add(nbytes)
        served.engine.request(sequence, Chunk(1, data, now, nbytes))
        context.add_callback(answer.there.set)  # a caller that leaves is not waited for
        seconds = min(context.time_remaining(), _LONGEST_WAIT_SECONDS)
        answer.there.wait(seconds)
        reply = answer.reply
        if isinstance(reply, Failed):
            raise reply.error
        if isinstance(reply, Output):
            response = pb.PredictResponse(version=served.engine.version)
            write_tensors(response.outputs, reply, served.manifest)
            write_timing(response.timing, reply)
            return response
        if isinstance(reply, Closed):
            raise ServerDraining("this version, or the server, left before the answer was there; call again")
        served.engine.close(sequence, Ending.CANCELLED)
        raise DeadlinePassed(
            f"no answer from {request.model!r} within {seconds:.3f} s; allow more, or send less"
        )

    def list_models(
        self, _request: pb.ListModelsRequest, _context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        models = [_model(one, pb.Model.READY) for one in self._catalogue.served]
        models += [_model(one, pb.Model.RETIRING) for one in self._catalogue.retiring]
        models += [_failed(refused) for refused in self._catalogue.refused]
        models.sort(key=lambda m: (m.name, m.version))
        return pb.ListModelsResponse(models=models)

    def get_model(self, request: pb.GetModelRequest, _context: grpc.ServicerContext) -> pb.GetModelResponse:
        retiring = self._catalogue.retired(request.model, request.version)
        if retiring is not None:
            return _described(retiring, pb.Model.RETIRING)
        try:
            return _described(self._catalogue.find(request.model, request.version), pb.Model.READY)
        except ModelNotReady:
            refused = self._catalogue.refusal(request.model, request.version)
            if refused is None:  # it began to serve just now
                raise
            return pb.GetModelResponse(model=_failed(refused))

    def list_sequences(
        self, request: pb.ListSequencesRequest, _context: grpc.ServicerContext
    ) -> pb.ListSequencesResponse:
        now = time.monotonic()
        response = pb.ListSequencesResponse()
        for engine in self._catalogue.engines:
            if request.model not in ("", engine.manifest.name):
                continue
            for s in engine.sequences():
                response.sequences.add(
                    sequence_id=s.id,
                    model=engine.manifest.name,
                    version=engine.version,
                    label=s.label,
                    last_step=s.answered,
                    age_seconds=now - s.begun,
                    idle_seconds=now - s.heard,
                )
        if request.model and not any(e.manifest.name == request.model for e in self._catalogue.engines):
            raise UnknownModel(f"no model {request.model!r} serves here")
        return response

    def end_sequence(
        self, request: pb.EndSequenceRequest, _context: grpc.ServicerContext
    ) -> pb.EndSequenceResponse:
        if not any(e.close_by_id(request.sequence_id, Ending.EVICTED) for e in self._catalogue.engines):
            raise UnknownSequence(f"no live sequence {request.sequence_id!r} here; see ListSequences")
        return pb.EndSequenceResponse()


def _described(served: Served, state: pb.Model.State) -> pb.GetModelResponse:
    return pb.GetModelResponse(model=_model(served, state), manifest_json=served.manifest.to_json())


def _failed(refused: Refused) -> pb.Model:
    return pb.Model(name=refused.model, version=refused.version, state=pb.Model.FAILED, why=refused.why)


def _model(served: Served, state: pb.Model.State) -> pb.Model:
    engine = served.engine
    return pb.Model(
        name=engine.manifest.name,
        version=engine.version,
        state=state,
        stateful=engine.manifest.stateful,
        provider=served.provider,
        sha256=served.sha256,
        fingerprint=served.fingerprint,
        description=engine.manifest.description,
        sequences=engine.metrics.active_sequences,
        slots=engine.max_sequences,
    )


def _unary(parser: _Parser[Request], method: Callable[[Request, grpc.ServicerContext], Message]) -> Any:
    """The handler of one method: bytes that are no request, and the server's errors, become statuses here.

    gRPC's own deserializer would answer INTERNAL, and an exception would leak its text.
    """

    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            request = parser.FromString(message)
        except DecodeError:
            _abort(context, WrongMessage(f"{len(message)} bytes are no request of this method"))
        try:
            return method(request, context).SerializeToString()
        except TenutoError as error:
            _abort(context, error)
        except Exception:
            log.exception("a call met a bug")
            context.abort(grpc.StatusCode.INTERNAL, "an error inside the server; its log says more")
        raise AssertionError("abort raises. This is a bug.")

    return grpc.unary_unary_rpc_method_handler(handle)


def _abort(context: grpc.ServicerContext, error: TenutoError) -> None:
    context.set_trailing_metadata(metadata_of(error))
    context.abort(code_of(error), str(error))
