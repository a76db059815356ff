"""The unary methods: decode, ask, encode. They run on a few pool threads, and are meant to be rare."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from tenuto.v1 import tenuto_pb2 as pb

from .callers import Callers
from .catalogue import Catalogue, Loaded, Refused, Served, Unloaded
from .errors import ModelNotReady, NotSupported, TenutoError, UnknownModel, UnknownSequence, WrongMessage
from .sequence import Ending
from .status import code_of, metadata_of

log = logging.getLogger("tenuto.servicer")

SERVICE = pb.DESCRIPTOR.services_by_name["Tenuto"].full_name
Request = TypeVar("Request", bound=Message)
Parsed = TypeVar("Parsed", bound=Message, covariant=True)


class _Parser(Protocol[Parsed]):
    """A message class."""

    def FromString(self, data: bytes, /) -> Parsed: ...


class Control(Protocol):
    """Loads and unloads models. Raises: TenutoError."""

    def load(self, model: str) -> Loaded: ...

    def unload(self, model: str) -> Unloaded: ...

    def reload(self, model: str) -> Loaded: ...


class Servicer:
    """The models, and the operators' calls. Without `control` models are loaded by nobody's call."""

    def __init__(
        self, catalogue: Catalogue, callers: Callers | None = None, control: Control | None = None
    ) -> None:
        self._catalogue = catalogue
        self._callers = callers or Callers()
        self._control = control

    def handlers(self) -> dict[str, Any]:
        return {
            "ListModels": _unary(pb.ListModelsRequest, self.list_models),
            "GetModel": _unary(pb.GetModelRequest, self.get_model),
            "ListSequences": _unary(pb.ListSequencesRequest, self.list_sequences),
            "EndSequence": _unary(pb.EndSequenceRequest, self.end_sequence),
            "LoadModel": _unary(pb.LoadModelRequest, self.load_model),
            "UnloadModel": _unary(pb.UnloadModelRequest, self.unload_model),
            "ReloadModel": _unary(pb.ReloadModelRequest, self.reload_model),
        }

    def list_models(
        self, _request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        self._callers.identify(context.invocation_metadata)
        catalogue, loading = self._catalogue, self._catalogue.loading
        models = [_model(one, pb.Model.READY) for one in catalogue.served]
        models += [_model(one, pb.Model.RETIRING) for one in catalogue.retiring]
        loaded = {(m.name, m.version) for m in models}
        models += [
            pb.Model(name=name, version=version, state=pb.Model.LOADING) for name, version in loading - loaded
        ]
        models += [_failed(one) for one in catalogue.refused if (one.model, one.version) not in loading]
        told = {(m.name, m.version) for m in models}
        models += [
            pb.Model(name=name, version=version, state=pb.Model.UNLOADED)
            for name, version in catalogue.withdrawn.items()
            if (name, version) not in told
        ]
        models.sort(key=lambda m: (m.name, m.version))
        return pb.ListModelsResponse(models=models)

    def get_model(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        self._callers.identify(context.invocation_metadata)
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
        self, request: pb.ListSequencesRequest, context: grpc.ServicerContext
    ) -> pb.ListSequencesResponse:
        """The caller's own; an operator's are all."""
        caller = self._callers.identify(context.invocation_metadata)
        now = time.monotonic()
        response = pb.ListSequencesResponse()
        for engine in self._catalogue.engines:
            if request.model not in ("", engine.manifest.name):
                continue
            for s in filter(lambda s: caller.may_see(s.caller), engine.sequences()):
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
        self, request: pb.EndSequenceRequest, context: grpc.ServicerContext
    ) -> pb.EndSequenceResponse:
        """One of the caller's own; an operator's are all."""
        caller, wanted = self._callers.identify(context.invocation_metadata), request.sequence_id
        engines = self._catalogue.engines
        if not any(e.close_by_id(wanted, Ending.EVICTED, caller.may_see) for e in engines):
            raise UnknownSequence(f"no live sequence {request.sequence_id!r} here; see ListSequences")
        return pb.EndSequenceResponse()

    def load_model(self, request: pb.LoadModelRequest, context: grpc.ServicerContext) -> pb.LoadModelResponse:
        loaded = self._controlled(context).load(request.model)
        return pb.LoadModelResponse(model=_model(loaded.served, pb.Model.READY), changed=loaded.changed)

    def unload_model(
        self, request: pb.UnloadModelRequest, context: grpc.ServicerContext
    ) -> pb.UnloadModelResponse:
        unloaded = self._controlled(context).unload(request.model)
        return pb.UnloadModelResponse(versions=unloaded.versions, sequences=unloaded.ended)

    def reload_model(
        self, request: pb.ReloadModelRequest, context: grpc.ServicerContext
    ) -> pb.ReloadModelResponse:
        loaded = self._controlled(context).reload(request.model)
        return pb.ReloadModelResponse(
            model=_model(loaded.served, pb.Model.READY), changed=loaded.changed, sequences=loaded.ended
        )

    def _controlled(self, context: grpc.ServicerContext) -> Control:
        """Raises: Unauthenticated, NotAnOperator, NotSupported."""
        self._callers.identify(context.invocation_metadata).check_operator()
        if self._control is None:
            raise NotSupported("no call loads or unloads models here; start the server with --model-control")
        return self._control


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
        state_bytes=engine.state_bytes,
        state_bytes_used=engine.metrics.slots_used * sum(s.slot_bytes for s in engine.manifest.states),
        file_bytes=served.file_bytes,
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
