"""The protocol's methods beside inference. They run on a few pool threads, and are meant to be rare."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from tenuto.oip import inference_pb2 as pb
from tenuto.serving.callers import Caller, Callers
from tenuto.serving.errors import TenutoError, UnknownModel

from .description import configuration, metadata, statistics, versions_of
from .form import Form, form_of
from .inference import Shared, served_of
from .question import version_of
from .refusal import Code, Refusal

log = logging.getLogger("tenuto.oip")

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
Request = TypeVar("Request", bound=Message)
Parsed = TypeVar("Parsed", bound=Message, covariant=True)
# What works without a flag.
_EXTENSIONS = (
    "classification", "sequence", "sequence(string_id)", "model_configuration", "binary_tensor_data",
    "parameters", "statistics",
)  # fmt: skip


class _Parser(Protocol[Parsed]):
    """A message class."""

    def FromString(self, data: bytes, /) -> Parsed: ...


class Control(Protocol):
    """Loads and unloads models. Raises: TenutoError."""

    def load(self, model: str) -> object: ...

    def unload(self, model: str) -> object: ...


@dataclass(frozen=True)
class Site:
    """The server as the protocol's clients see it."""

    version: str
    is_ready: Callable[[], bool]
    idle_seconds: float
    control: Control | None  # None: models are loaded by nobody's call


class OipServicer:
    """All but ModelInfer and ModelStreamInfer."""

    def __init__(self, shared: Shared, site: Site, callers: Callers) -> None:
        self._shared = shared
        self._catalogue = shared.catalogue
        self._site = site
        self._callers = callers

    def handlers(self) -> dict[str, Any]:
        """Only of what works: anything else is UNIMPLEMENTED."""
        methods: dict[str, tuple[_Parser[Any], Callable[[Any, Caller, str], Message]]] = {
            "ServerLive": (pb.ServerLiveRequest, self._server_live),
            "ServerReady": (pb.ServerReadyRequest, self._server_ready),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": (pb.ModelConfigRequest, self._model_config),
            "ModelStatistics": (pb.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self._repository_index),
            "CudaSharedMemoryUnregister": (pb.CudaSharedMemoryUnregisterRequest, self._cuda_unregister),
            "SystemSharedMemoryUnregister": (pb.SystemSharedMemoryUnregisterRequest, self._unregister),
        }
        if self._site.control is not None:
            methods["RepositoryModelLoad"] = (pb.RepositoryModelLoadRequest, self._load)
            methods["RepositoryModelUnload"] = (pb.RepositoryModelUnloadRequest, self._unload)
        if self._shared.regions.prefix:
            methods["SystemSharedMemoryRegister"] = (pb.SystemSharedMemoryRegisterRequest, self._register)
            methods["SystemSharedMemoryStatus"] = (pb.SystemSharedMemoryStatusRequest, self._regions)
        return {name: self._handler(*method) for name, method in methods.items()}

    def _handler(self, parser: _Parser[Request], method: Callable[[Request, Caller, str], Message]) -> Any:
        """Bytes that are no request, and errors, become statuses here."""

        def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                caller = self._callers.identify(context.invocation_metadata)
                return method(parser.FromString(message), caller, context.peer()).SerializeToString()
            except Refusal as refused:
                refusal = refused
            except TenutoError as error:
                refusal = Refusal.of(error)
            except DecodeError:
                refusal = Refusal(f"{len(message)} bytes are no request of this method", Code.INTERNAL)
            except Exception:
                log.exception("a call met a bug")
                refusal = Refusal.of_bug()
            context.set_trailing_metadata(refusal.metadata)
            context.abort(refusal.code, str(refusal))
            raise AssertionError("abort raises. This is a bug.")

        return grpc.unary_unary_rpc_method_handler(handle)

    # The protocol itself.

    def _server_live(self, _: pb.ServerLiveRequest, _caller: Caller, _peer: str) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def _server_ready(self, _: pb.ServerReadyRequest, _caller: Caller, _peer: str) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._site.is_ready())

    def _model_ready(
        self, request: pb.ModelReadyRequest, _caller: Caller, _peer: str
    ) -> pb.ModelReadyResponse:
        """A version that is no number is an error, one that is not there is not ready."""
        version_of(request.version)
        try:
            served_of(self._catalogue, request.name, request.version)
        except Refusal:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._site.is_ready())

    def _server_metadata(
        self, _: pb.ServerMetadataRequest, _caller: Caller, _peer: str
    ) -> pb.ServerMetadataResponse:
        extensions = list(_EXTENSIONS)
        if self._site.control is not None:
            extensions.append("model_repository")
        if self._shared.regions.prefix:
            extensions.append("system_shared_memory")
        return pb.ServerMetadataResponse(name="tenuto", version=self._site.version, extensions=extensions)

    def _model_metadata(
        self, request: pb.ModelMetadataRequest, _caller: Caller, _peer: str
    ) -> pb.ModelMetadataResponse:
        return metadata(self._form(request.name, request.version), versions_of(self._catalogue, request.name))

    def _form(self, model: str, version: str) -> Form:
        """Raises: Refusal."""
        return form_of(served_of(self._catalogue, model, version))

    # Triton's.

    def _model_config(
        self, request: pb.ModelConfigRequest, _caller: Caller, _peer: str
    ) -> pb.ModelConfigResponse:
        form = self._form(request.name, request.version)
        return pb.ModelConfigResponse(config=configuration(form, self._site.idle_seconds))

    def _model_statistics(
        self, request: pb.ModelStatisticsRequest, _caller: Caller, _peer: str
    ) -> pb.ModelStatisticsResponse:
        if request.name:
            found = [served_of(self._catalogue, request.name, request.version).engine.metrics]
        else:
            found = [one.engine.metrics for one in self._catalogue.served]
        return pb.ModelStatisticsResponse(model_stats=[statistics(metrics) for metrics in found])

    def _repository_index(
        self, request: pb.RepositoryIndexRequest, _caller: Caller, _peer: str
    ) -> pb.RepositoryIndexResponse:
        response = pb.RepositoryIndexResponse()
        for one in self._catalogue.served:
            response.models.add(name=one.manifest.name, version=str(one.engine.version), state="READY")
        if request.ready:
            return response
        for one in self._catalogue.retiring:
            response.models.add(
                name=one.manifest.name,
                version=str(one.engine.version),
                state="UNAVAILABLE",
                reason="unloading",
            )
        for name in sorted(self._catalogue.withdrawn):
            response.models.add(name=name, state="UNAVAILABLE", reason="unloaded")
        for refused in self._catalogue.refused:
            response.models.add(
                name=refused.model, version=str(refused.version), state="UNAVAILABLE", reason=refused.why
            )
        return response

    def _load(
        self, request: pb.RepositoryModelLoadRequest, caller: Caller, _peer: str
    ) -> pb.RepositoryModelLoadResponse:
        caller.check_operator()
        if request.parameters:
            names = ", ".join(sorted(request.parameters))
            raise Refusal(
                f"failed to load '{request.model_name}': a model is what its folder says; no parameters are "
                f"taken, got {names}"
            )
        try:
            self._control.load(request.model_name)
        except UnknownModel as error:
            text = f"failed to load '{request.model_name}', failed to poll from model repository"
            raise Refusal(text, Code.NOT_FOUND, error.reason) from error
        return pb.RepositoryModelLoadResponse()

    def _unload(
        self, request: pb.RepositoryModelUnloadRequest, caller: Caller, _peer: str
    ) -> pb.RepositoryModelUnloadResponse:
        """(There are no dependents that `unload_dependents` could mean.)"""
        caller.check_operator()
        self._control.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    @property
    def _control(self) -> Control:
        assert self._site.control is not None, "else these methods are not registered"
        return self._site.control

    def _register(
        self, request: pb.SystemSharedMemoryRegisterRequest, caller: Caller, peer: str
    ) -> pb.SystemSharedMemoryRegisterResponse:
        memory = self._shared.regions.of(caller.name, peer)
        memory.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def _unregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, caller: Caller, peer: str
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Without shared memory there is nothing to unregister, which clients ask for before they look."""
        if request.name or self._shared.regions.prefix:
            self._shared.regions.of(caller.name, peer).unregister(request.name)  # which says if it is off
        return pb.SystemSharedMemoryUnregisterResponse()

    def _regions(
        self, request: pb.SystemSharedMemoryStatusRequest, caller: Caller, peer: str
    ) -> pb.SystemSharedMemoryStatusResponse:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._shared.regions.of(caller.name, peer).status(request.name):
            told = response.regions[region.name]
            told.name, told.key = region.name, region.key
            told.offset, told.byte_size = region.offset, region.nbytes
        return response

    def _cuda_unregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, _caller: Caller, _peer: str
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        if request.name:
            text = "regions of CUDA shared memory cannot be registered here"
            raise Refusal(text, Code.UNIMPLEMENTED, "NOT_SUPPORTED")
        return pb.CudaSharedMemoryUnregisterResponse()
