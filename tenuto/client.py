"""The client for threads."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import grpc

from . import errors, message
from .reply import Loaded, Model, Prediction, Sequence, Unloaded
from .sampling import Sampling
from .servers import Options, Servers
from .settings import Settings, check_seconds
from .stream import Stream, rpc_error
from .tensor import Array, Inputs
from .v1 import tenuto_pb2 as pb


class Client:
    """Connections to servers. Safe to share among threads; close it, or use it in a `with`.

        with Client("127.0.0.1:8001") as client:
            prediction = client.predict("digits", images)

    `target` is a server, or several behind commas ("a:8001,b:8001"), or a name with several
    addresses: calls and streams take them in turn. A unary call that finds a server unavailable
    goes to the next. A stream that is lost is opened again on the next, and its caller notices
    nothing but the delay; `resume_seconds` bounds the time without a server (0: a lost stream is an
    error at once). For that the chunks since the last resume token are kept, `replay_bytes` and one
    chunk at most. A chunk whose stream was lost `poison_losses` times is sent no more
    (PoisonedChunk).

    `timeout_seconds` bounds every unary call and each opening of a stream, `reply_seconds` the wait
    for an output that a stream owes (None: for ever) before it is asked of the next server.
    Keepalive pings go out every `keepalive_seconds` while a call is open. A message may have
    `max_message_bytes`, the unread outputs of one stream `buffer_bytes`. With `credentials`
    (`grpc.ssl_channel_credentials(…)`) the connections are encrypted. `token` says who calls, where the
    server asks (`--callers`); a function is asked before every call, so that a token may change.

    Connections are made at the first call. Raises InvalidInput for a setting out of its bounds.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float = 10.0,
        reply_seconds: float | None = 30.0,
        keepalive_seconds: float = 30.0,
        max_message_bytes: int = 64 << 20,
        buffer_bytes: int = 64 << 20,
        resume_seconds: float = 30.0,
        replay_bytes: int = 16 << 20,
        poison_losses: int = 2,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | Callable[[], str] = "",
    ) -> None:
        self._settings = Settings(
            target,
            timeout_seconds=timeout_seconds,
            reply_seconds=reply_seconds,
            keepalive_seconds=keepalive_seconds,
            max_message_bytes=max_message_bytes,
            buffer_bytes=buffer_bytes,
            resume_seconds=resume_seconds,
            replay_bytes=replay_bytes,
            poison_losses=poison_losses,
            token=token,
        )

        def connect(target: str, options: Options) -> grpc.Channel:
            if credentials is None:
                return grpc.insecure_channel(target, options)
            return grpc.secure_channel(target, credentials, options)

        self._servers = Servers(self._settings, connect)

    def close(self) -> None:
        """Close the connections. Calls that are open, and later ones, are Unavailable."""
        for channel in self._servers.close():
            channel.close()

    @property
    def resumes(self) -> int:
        """How often a stream of this client was lost and is open again."""
        return self._servers.resumes

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def predict(self, model: str, inputs: Inputs, version: int = 0) -> Prediction:
        """Return a stateless model's answer to one batch.

        `inputs` is an array with the batch axis, e.g. uint8 [8, 28, 28]; the bytes of one PNG or
        JPEG file, or a list of such bytes as one batch; or name -> one of these. `version` 0 is the
        newest that serves.

        Raises InvalidInput, NotFound, Refused (the model holds state: use `stream`), Overloaded,
        Unavailable, ReplyTimeout after `timeout_seconds`.
        """
        request = message.predict_request(model, inputs, version)
        return message.prediction(self._unary("Predict", request))

    def models(self) -> list[Model]:
        """Return every model version that the server knows, without their manifests."""
        response = self._unary("ListModels", pb.ListModelsRequest())
        return [message.model(one) for one in response.models]

    def model(self, name: str, version: int = 0) -> Model:
        """Return one model with its manifest; raises NotFound. `version` 0 is the newest."""
        request = message.get_model_request(name, version)
        response = self._unary("GetModel", request)
        return message.model(response.model, response.manifest_json)

    def sequences(self, model: str = "") -> list[Sequence]:
        """Return the live sequences of one server, oldest first; `model` "" is all of them.

        Raises NotFound.
        """
        response = self._unary("ListSequences", message.list_sequences_request(model))
        return [message.sequence(one) for one in response.sequences]

    def end_sequence(self, sequence_id: str) -> None:
        """End a live sequence, on whichever server of the list it is; raises NotFound.

        Its client may go on with it: it gets a resume token.
        """
        self._unary("EndSequence", message.end_sequence_request(sequence_id))

    def load(self, model: str, *, timeout_seconds: float = 600.0) -> Loaded:
        """Have the newest version of a model that passes its checks serve, now; return what serves.

        For operators, at a client of one server that runs with `--model-control`. A server does one such
        thing at a time, and finishes it even if this call does not wait for it.

        Raises NotFound (the repository has no such model), Unavailable (the newest version was refused: the
        text says why, and what serves; or another operator's call is not finished), Refused
        (NOT_AN_OPERATOR, NOT_SUPPORTED), InvalidInput, ReplyTimeout after `timeout_seconds`.
        """
        return message.loaded(self._command("LoadModel", pb.LoadModelRequest, model, timeout_seconds))

    def unload(self, model: str, *, timeout_seconds: float = 600.0) -> Unloaded:
        """Let go of all versions of a model until `load` or `reload`; return what was taken away.

        Its sequences end with resume tokens. Raises NotFound (it is not loaded), and what `load` raises.
        """
        return message.unloaded(self._command("UnloadModel", pb.UnloadModelRequest, model, timeout_seconds))

    def reload(self, model: str, *, timeout_seconds: float = 600.0) -> Loaded:
        """Load a model as its folder is now; return what serves.

        As `load`; and files that changed under the version that serves are loaded in its place, which ends
        its sequences with resume tokens. What is refused changes nothing. Raises what `load` raises.
        """
        return message.loaded(self._command("ReloadModel", pb.ReloadModelRequest, model, timeout_seconds))

    def stream(
        self,
        model: str,
        *,
        version: int = 0,
        period_ms: int = 0,
        idle_seconds: int = 0,
        constants: Mapping[str, float] | None = None,
        label: str = "",
        resume_token: bytes = b"",
        sampling: Sampling | None = None,
        initial: Mapping[str, Array] | None = None,
    ) -> Stream:
        """Return a sequence to be entered by `with`; see Stream.

        `period_ms` is how often chunks come, if they come at a steady pace (0: they do not).
        `idle_seconds` is how long it may say nothing (0: the server's limit). `constants` are
        values that the manifest lets a client choose, by input name. `label`, at most 128 bytes, is
        shown to operators. With the `resume_token` of an earlier sequence, that one goes on. `sampling` is
        for models that generate, `initial` for those whose manifest has clients say where the states begin:
        by the states' input names, without the batch axis.
        """
        event = message.open_event(
            model,
            version=version,
            period_ms=period_ms,
            idle_seconds=idle_seconds,
            constants=constants,
            label=label,
            resume_token=resume_token,
            sampling=sampling,
            initial=initial,
        )
        return Stream(self._servers, event, self._settings)

    def _unary(self, method: str, request: Any) -> Any:
        """Call the next server, and those behind it while they are unavailable, once round."""
        for target in self._servers.tries():
            try:
                return self._call(method, request, target, self._settings.timeout_seconds)
            except errors.ServerError as refused:
                error = refused
            if not self._servers.may_try_on(error):
                break
        raise error

    def _command(self, method: str, kind: type[message.Command], model: str, seconds: float) -> Any:
        """Call the only server, once."""
        check_seconds("timeout_seconds", seconds)
        return self._call(method, message.command(kind, model), self._servers.only(), seconds)

    def _call(self, method: str, request: Any, target: str, seconds: float) -> Any:
        stub = self._servers.stub(target)
        metadata = self._servers.metadata()
        try:
            return getattr(stub, method)(request, timeout=seconds, metadata=metadata)
        except ValueError as closed:  # what gRPC raises on a closed channel
            raise message.client_closed(self._settings.target) from closed
        except grpc.RpcError as status:
            error = rpc_error(status, target, seconds)
        raise error
