"""The client for threads."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import grpc

from . import message
from .reply import Model, Prediction
from .settings import Settings
from .stream import Stream, rpc_error
from .tensor import Inputs
from .v1 import tenuto_pb2 as pb
from .v1.tenuto_pb2_grpc import TenutoStub


class Client:
    """A connection to one server. Safe to share among threads; close it, or use it in a `with`.

        with Client("127.0.0.1:8001") as client:
            prediction = client.predict("digits", images)

    `timeout_seconds` bounds every unary call and the opening of a stream, `reply_seconds` the wait
    for an output that a stream owes (None: for ever). Keepalive pings go out every
    `keepalive_seconds` while a call is open. A message may have `max_message_bytes`, the unread
    outputs of one stream `buffer_bytes`. With `credentials` (`grpc.ssl_channel_credentials(…)`) the
    connection is encrypted.

    The connection is made at the first call. Raises InvalidInput for a setting out of its bounds.
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
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._settings = Settings(
            target,
            timeout_seconds,
            reply_seconds,
            keepalive_seconds,
            max_message_bytes,
            buffer_bytes,
        )
        options = self._settings.channel_options()
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._stub: Any = TenutoStub(self._channel)

    def close(self) -> None:
        """Close the connection. Calls that are open, and later ones, are Unavailable."""
        self._channel.close()

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
        return message.prediction(self._unary(self._stub.Predict, request))

    def models(self) -> list[Model]:
        """Return every model version that the server knows, without their manifests."""
        response = self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [message.model(one) for one in response.models]

    def model(self, name: str, version: int = 0) -> Model:
        """Return one model with its manifest; raises NotFound. `version` 0 is the newest."""
        request = message.get_model_request(name, version)
        response = self._unary(self._stub.GetModel, request)
        return message.model(response.model, response.manifest_json)

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
    ) -> Stream:
        """Return a sequence to be entered by `with`; see Stream.

        `period_ms` is how often chunks come, if they come at a steady pace (0: they do not).
        `idle_seconds` is how long it may say nothing (0: the server's limit). `constants` are
        values that the manifest lets a client choose, by input name. `label`, at most 128 bytes, is
        shown to operators. With the `resume_token` of a sequence that ended, that one goes on.
        """
        event = message.open_event(
            model,
            version=version,
            period_ms=period_ms,
            idle_seconds=idle_seconds,
            constants=constants,
            label=label,
            resume_token=resume_token,
        )
        return Stream(self._stub.Stream, event, self._settings)

    def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        seconds = self._settings.timeout_seconds
        try:
            return method(request, timeout=seconds)
        except ValueError as error:  # what gRPC raises on a closed channel
            raise message.client_closed(self._settings.target) from error
        except grpc.RpcError as status:
            raise rpc_error(status, self._settings.target, seconds) from None
