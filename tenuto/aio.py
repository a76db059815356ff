"""The client for asyncio: the same names and promises as `tenuto.Client`, awaited."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from . import errors, message
from .conversation import Conversation
from .reply import Model, Output, Prediction
from .settings import Settings
from .tensor import Inputs
from .v1 import tenuto_pb2 as pb
from .v1.tenuto_pb2_grpc import TenutoStub


class Client:
    """A connection to one server, for one event loop; the arguments are those of `tenuto.Client`.

    async with Client("127.0.0.1:8001") as client:
        prediction = await client.predict("digits", images)
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
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self._stub: Any = TenutoStub(self._channel)
        self._closed = False

    async def close(self) -> None:
        """Close the connection. Calls that are open, and later ones, are Unavailable."""
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def predict(self, model: str, inputs: Inputs, version: int = 0) -> Prediction:
        """Return a stateless model's answer to one batch; see `tenuto.Client.predict`."""
        request = message.predict_request(model, inputs, version)
        return message.prediction(await self._unary(self._stub.Predict, request))

    async def models(self) -> list[Model]:
        """Return every model version that the server knows, without their manifests."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [message.model(one) for one in response.models]

    async def model(self, name: str, version: int = 0) -> Model:
        """Return one model with its manifest; raises NotFound. `version` 0 is the newest."""
        request = message.get_model_request(name, version)
        response = await self._unary(self._stub.GetModel, request)
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
    ) -> "Stream":
        """Return a sequence to be entered by `async with`; see `tenuto.Client.stream`."""
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

    async def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        seconds = self._settings.timeout_seconds
        try:
            return await method(request, timeout=seconds)
        except grpc.aio.UsageError as error:
            raise message.client_closed(self._settings.target) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task is not None and task.cancelling()):
                raise message.client_closed(self._settings.target) from None
            raise
        except grpc.aio.AioRpcError as status:
            raise _rpc_error(status, self._settings.target, seconds) from None


class Stream:
    """One sequence whose recurrent state the server holds; made by `Client.stream`.

        async with client.stream("spoken-digits") as stream:
            async for output in stream.run(microphone()):
                ...

    As `tenuto.Stream`: `send` waits for the server's window, never for this caller's own reading;
    one task may send while another iterates. Cancelling a task inside `send` ends the sequence.
    """

    def __init__(self, call: Callable[..., Any], event: pb.Open, settings: Settings) -> None:
        self._method = call
        self._event = event
        self._target = settings.target
        self._conversation = Conversation(
            timeout_seconds=settings.timeout_seconds,
            reply_seconds=settings.reply_seconds,
            buffer_bytes=settings.buffer_bytes,
        )
        self._changed = asyncio.Event()  # replaced each time the conversation changed
        self._writing = asyncio.Lock()  # one write at a time, in the order of steps
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None
        self._left = False

    # -- as a context manager ----------------------------------------------------------------------

    async def __aenter__(self) -> "Stream":
        if self._call is not None:
            raise errors.invalid("a stream is entered once; call stream() again", "ALREADY_OPEN")
        try:
            self._call = self._method()
        except grpc.aio.UsageError as error:
            raise message.client_closed(self._target) from error
        self._status = _Status(self._call)
        request = self._conversation.open(self._event, monotonic())
        self._reader = asyncio.create_task(self._read(), name="tenuto-stream")
        try:
            await self._write(request)
            await self._wait(self._conversation.is_open)
        except BaseException:
            await self._leave(clean=False)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave(self._conversation.closed)

    async def _leave(self, clean: bool) -> None:
        self._left = True
        self._notify()
        assert self._reader is not None
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])
            if not self._sender.cancelled():
                self._sender.exception()  # told by `run`, or to nobody who left it early
        if clean:  # the server has only its status left to say
            await asyncio.wait([self._reader], timeout=1)
        self._call.cancel()
        await asyncio.wait([self._reader])

    # -- sending -----------------------------------------------------------------------------------

    async def send(self, inputs: Inputs, *, generate: int = 0) -> int:
        """Send one chunk and return its step; see `tenuto.Stream.send`."""
        began = monotonic()
        async with self._writing:
            await self._wait(self._conversation.room)
            step, request = self._conversation.chunk(inputs, generate, began)
            await self._write(request)
        return step

    async def end(self) -> None:
        """Say that no more chunks come. Iterating then yields what is left, and stops."""
        async with self._writing:
            request = self._conversation.end(monotonic())
            if request is not None:
                await self._write(request)
                with suppress(grpc.RpcError, asyncio.InvalidStateError):
                    await self._call.done_writing()

    async def run(self, chunks: Iterable[Inputs] | AsyncIterable[Inputs]) -> AsyncIterator[Output]:
        """Send all `chunks`, end, and yield the outputs as they come, in order.

        A task of its own sends, so that outputs come while a live source pauses. An exception of
        `chunks` cancels the sequence and is raised here.
        """
        if self._sender is not None:
            raise errors.invalid("run is called once for a stream", "ALREADY_OPEN")
        self._sender = asyncio.create_task(self._send_all(chunks), name="tenuto-run")
        try:
            async for output in self:
                yield output
        except errors.TenutoError:
            if self._sender.done() and not self._sender.cancelled():
                self._sender.result()  # raises the cause, if the source was it
            raise

    async def _send_all(self, chunks: Iterable[Inputs] | AsyncIterable[Inputs]) -> None:
        try:
            if isinstance(chunks, AsyncIterable):
                async for chunk in chunks:
                    await self._wait(self._conversation.has_slack)
                    await self.send(chunk)
            else:
                for chunk in chunks:
                    await self._wait(self._conversation.has_slack)
                    await self.send(chunk)
            await self.end()
        except BaseException as error:
            if error is not self._conversation.error:
                self._call.cancel()
            raise

    # -- receiving ---------------------------------------------------------------------------------

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Output:
        """Return the next output; see `tenuto.Stream.__next__`."""
        await self._wait(self._conversation.readable)
        output = self._conversation.take(monotonic())
        self._notify()
        if output is None:
            raise StopAsyncIteration
        return output

    # -- what the server said ----------------------------------------------------------------------

    @property
    def window(self) -> int:
        """How many chunks may be unanswered at once."""
        return self._conversation.window

    @property
    def sequence_id(self) -> str:
        """The sequence's name to operators and in the server's log."""
        opened = self._conversation.opened
        return opened.sequence_id if opened is not None else ""

    @property
    def version(self) -> int:
        """The model version that this sequence stays on."""
        opened = self._conversation.opened
        return opened.version if opened is not None else 0

    @property
    def resume_token(self) -> bytes:
        """The newest sealed snapshot that the server sent; b"" if none yet."""
        checkpoint = self._conversation.checkpoint
        return checkpoint.resume_token if checkpoint is not None else b""

    # -- waiting, writing and reading --------------------------------------------------------------

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`; nothing else runs between that and the caller's next line."""
        while not ready():
            changed = self._changed
            seconds = self._conversation.patience(monotonic())
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await changed.wait()

    async def _write(self, request: pb.StreamRequest) -> None:
        """Write one message; on a call that is over, raise what ended it."""
        try:
            await self._call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError):
            self._notify()  # a reader that waits for room goes on, to the call's status
            await self._wait(lambda: self._conversation.over)
            if self._conversation.error is not None:
                raise self._conversation.error from None

    async def _read(self) -> None:
        """Feed the conversation until the call is over; a task of its own."""
        error: errors.TenutoError | None = None
        try:
            # Not call.read(): once a status is there, it gives up what was not read yet.
            async for response in self._call:
                await self._received(response)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass  # the status says more
        except errors.TenutoError as protocol:
            error = protocol
        except Exception as bug:  # noqa: BLE001 - else the caller waits for ever
            error = errors.ProtocolError(f"a reply could not be read: {bug!r}. This is a bug.")
        finally:
            self._call.cancel()  # no effect on a call that is over
        self._conversation.stop(error or await self._status.error(self._target))
        self._notify()

    async def _received(self, response: pb.StreamResponse) -> None:
        self._conversation.receive(response, monotonic())
        self._notify()
        while self._conversation.full and not self._left and not self._call.done():
            await self._changed.wait()


class _Status:
    """The status that a streaming call ended with.

    When a write fails because the call is over, grpc.aio replaces the server's status by an INTERNAL
    of its own (github.com/grpc/grpc/issues/36066), before or after the server's. So each status is
    noted as it is set, and gRPC's own one passed over.
    """

    def __init__(self, call: Any) -> None:
        self._set = asyncio.Event()
        self._code = grpc.StatusCode.UNAVAILABLE
        self._details = "the call was over when a message was to be written"
        self._metadata: dict[str, str] = {}
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        details = _at_once(call.details())
        if self._set.is_set() or details == "Internal error from Core":
            return
        self._code, self._details = _at_once(call.code()), details
        self._metadata = message.plain(_at_once(call.trailing_metadata()))
        self._set.set()

    async def error(self, target: str) -> errors.TenutoError | None:
        """Return the error of the call, which is over; None if its status is OK."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._set.wait()
        if self._code is grpc.StatusCode.OK:
            return None
        return message.status_error(self._code, self._details, self._metadata, target=target, seconds=None)


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that need not wait, as those of a finished call."""
    try:
        coroutine.send(None)
    except StopIteration as result:
        return result.value
    coroutine.close()
    raise AssertionError("a finished call's status is not there. This is a bug.")


def _rpc_error(status: grpc.aio.AioRpcError, target: str, seconds: float | None) -> errors.TenutoError:
    return message.status_error(
        status.code(),
        status.details(),
        message.plain(status.trailing_metadata()),
        target=target,
        seconds=seconds,
    )
