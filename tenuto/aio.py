"""The client for asyncio: the same names and promises as `tenuto.Client`, awaited."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from itertools import cycle
from time import monotonic
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from . import errors, message
from .backoff import jitter
from .conversation import Conversation
from .reply import Loaded, Model, Output, Prediction, Sequence, Unloaded
from .sampling import Sampling, sampling_of
from .servers import Options, Servers
from .settings import Settings, check_seconds
from .tensor import Array, Inputs
from .v1 import tenuto_pb2 as pb


class Client:
    """Connections to servers, for one event loop; the arguments are those of `tenuto.Client`.

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

        def connect(target: str, options: Options) -> grpc.aio.Channel:
            if credentials is None:
                return grpc.aio.insecure_channel(target, options)
            return grpc.aio.secure_channel(target, credentials, options)

        self._servers = Servers(self._settings, connect)
        self._closed = False

    async def close(self) -> None:
        """Close the connections. Calls that are open, and later ones, are Unavailable."""
        self._closed = True
        for channel in self._servers.close():
            await channel.close()

    @property
    def resumes(self) -> int:
        """How often a stream of this client was lost and is open again."""
        return self._servers.resumes

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
        return message.prediction(await self._unary("Predict", request))

    async def models(self) -> list[Model]:
        """Return every model version that the server knows, without their manifests."""
        response = await self._unary("ListModels", pb.ListModelsRequest())
        return [message.model(one) for one in response.models]

    async def model(self, name: str, version: int = 0) -> Model:
        """Return one model with its manifest; raises NotFound. `version` 0 is the newest."""
        request = message.get_model_request(name, version)
        response = await self._unary("GetModel", request)
        return message.model(response.model, response.manifest_json)

    async def sequences(self, model: str = "") -> list[Sequence]:
        """Return the live sequences of one server; see `tenuto.Client.sequences`."""
        response = await self._unary("ListSequences", message.list_sequences_request(model))
        return [message.sequence(one) for one in response.sequences]

    async def end_sequence(self, sequence_id: str) -> None:
        """End a live sequence; see `tenuto.Client.end_sequence`."""
        await self._unary("EndSequence", message.end_sequence_request(sequence_id))

    async def load(self, model: str, *, timeout_seconds: float = 600.0) -> Loaded:
        """Have a model serve now, for operators; see `tenuto.Client.load`."""
        return message.loaded(await self._command("LoadModel", pb.LoadModelRequest, model, timeout_seconds))

    async def unload(self, model: str, *, timeout_seconds: float = 600.0) -> Unloaded:
        """Let go of a model, for operators; see `tenuto.Client.unload`."""
        response = await self._command("UnloadModel", pb.UnloadModelRequest, model, timeout_seconds)
        return message.unloaded(response)

    async def reload(self, model: str, *, timeout_seconds: float = 600.0) -> Loaded:
        """Load a model as its folder is now, for operators; see `tenuto.Client.reload`."""
        response = await self._command("ReloadModel", pb.ReloadModelRequest, model, timeout_seconds)
        return message.loaded(response)

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
            sampling=sampling,
            initial=initial,
        )
        return Stream(self._servers, event, self._settings)

    async def _unary(self, method: str, request: Any) -> Any:
        """Call the next server, and those behind it while they are unavailable, once round."""
        for target in self._servers.tries():
            try:
                return await self._call(method, request, target, self._settings.timeout_seconds)
            except errors.ServerError as refused:
                error = refused
            if not self._servers.may_try_on(error):
                break
        raise error

    async def _command(self, method: str, kind: type[message.Command], model: str, seconds: float) -> Any:
        """Call the only server, once."""
        check_seconds("timeout_seconds", seconds)
        return await self._call(method, message.command(kind, model), self._servers.only(), seconds)

    async def _call(self, method: str, request: Any, target: str, seconds: float) -> Any:
        stub = self._servers.stub(target)
        try:
            return await getattr(stub, method)(request, timeout=seconds, metadata=self._servers.metadata())
        except grpc.aio.UsageError as error:
            raise message.client_closed(self._settings.target) from error
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled():
                raise message.client_closed(self._settings.target) from None
            raise
        except grpc.aio.AioRpcError as status:
            raise _rpc_error(status, target, seconds) from None


class Stream:
    """One sequence whose recurrent state the server holds; made by `Client.stream`.

        async with client.stream("spoken-digits") as stream:
            async for output in stream.run(microphone()):
                ...

    As `tenuto.Stream`: `send` waits for the server's window, never for this caller's own reading;
    one task may send while another iterates. Cancelling a task inside `send` may end the sequence.
    """

    def __init__(self, servers: Servers, event: pb.Open, settings: Settings) -> None:
        self._servers = servers
        self._target = settings.target  # of the present call, once there is one
        self._resuming = settings.resume_seconds > 0
        self._conversation = Conversation(event, settings, jitter)
        self._changed = asyncio.Event()  # replaced each time the conversation changed
        self._sending = asyncio.Lock()  # one `send` at a time, in the order in which they were called
        self._call: Any = None
        self._caller: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None

    # -- as a context manager ----------------------------------------------------------------------

    async def __aenter__(self) -> "Stream":
        if self._caller is not None:
            raise errors.invalid("a stream is entered once; call stream() again", "ALREADY_OPEN")
        self._round = cycle(self._servers.round())
        self._caller = asyncio.create_task(self._make_calls(), name="tenuto-stream")
        try:
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
        self._conversation.leave()
        self._notify()
        assert self._caller is not None
        for task in (self._sender, self._writer):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.exception()  # told by `run`, or to nobody who left it early
        if clean:  # the server has only its status left to say
            await asyncio.wait([self._caller], timeout=1)
        if self._call is not None:
            self._call.cancel()
        await asyncio.wait([self._caller])

    # -- sending -----------------------------------------------------------------------------------

    async def send(self, inputs: Inputs | None, *, generate: int = 0, last: bool = False) -> int:
        """Send one chunk and return its step; see `tenuto.Stream.send`."""
        began = monotonic()
        async with self._sending:
            await self._wait(self._conversation.room)
            step = self._conversation.chunk(inputs, generate, began, monotonic(), last=last)
            await self._write_out()
        return step

    async def end(self) -> None:
        """Say that no more chunks come. Iterating then yields what is left, and stops."""
        async with self._sending:
            self._conversation.end(monotonic())
            await self._write_out()

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

    async def generate(self, inputs: Inputs | None, count: int) -> AsyncIterator[Output]:
        """Have the model go on from one chunk; see `tenuto.Stream.generate`."""
        step = await self.send(inputs, generate=count)
        async for output in self:
            yield output
            if output.step == step and output.last:
                return

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
        except BaseException:
            self._give_up()
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
        """The model version that this sequence is on; it may change when the sequence moves."""
        opened = self._conversation.opened
        return opened.version if opened is not None else 0

    @property
    def sampling(self) -> Sampling | None:
        """How the sequence is sampled, its seed included; None for a model that does not generate."""
        opened = self._conversation.opened
        return sampling_of(opened) if opened is not None else None

    @property
    def resume_token(self) -> bytes:
        """The newest sealed snapshot of the sequence; b"" if there is none yet."""
        return self._conversation.resume_token

    @property
    def resumes(self) -> int:
        """How often the sequence was opened again."""
        return self._conversation.resumes

    # -- waiting and writing -----------------------------------------------------------------------

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`; nothing else runs between that and the caller's next line."""
        while not ready():
            now = monotonic()
            if self._conversation.overdue(now):
                self._call.cancel()
                self._notify()
            else:
                await self._pause(self._conversation.patience(now))

    async def _pause(self, seconds: float | None) -> None:
        """Wait until something changes, but no longer than that."""
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await changed.wait()

    async def _write_out(self) -> None:
        """Have the conversation's words written, and wait for that as long as it is of use.

        Cancelled meanwhile, end the sequence: nobody could say whether the chunk is part of it.
        """
        self._write_soon()
        if not self._conversation.on_call:
            self._notify()  # the task that makes calls may have to make one
        try:
            # What is overdue is for the next call to raise: this one's chunk is taken in.
            with suppress(errors.TenutoError):
                await self._wait(self._is_written)
        except asyncio.CancelledError:
            self._give_up()
            raise

    def _is_written(self) -> bool:
        """Whether nothing is left to write, or nothing is until the caller reads."""
        writing = self._writer is not None and not self._writer.done()
        return not writing or self._conversation.over or self._conversation.full

    def _write_soon(self) -> None:
        """Have a task write what the conversation has to say: one at a time, so that all stays in order."""
        if self._conversation.has_outgoing() and (self._writer is None or self._writer.done()):
            self._writer = asyncio.create_task(self._write(), name="tenuto-write")
            self._writer.add_done_callback(lambda _: self._notify())

    async def _write(self) -> None:
        try:
            while self._conversation.has_outgoing():
                call = self._call
                for request in self._conversation.outgoing(monotonic()):
                    if not await self._write_one(call, request):
                        break  # the task that reads hears why, and another call says it all again
        except Exception as bug:  # noqa: BLE001 - else the caller waits for ever
            self._conversation.break_down(bug)
            self._call.cancel()

    async def _write_one(self, call: Any, request: pb.StreamRequest) -> bool:
        """Write one message; False on a call that is over."""
        try:
            await call.write(request)
            if request.events[0].HasField("end"):
                await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            self._notify()  # a reader that waits for room goes on, to the call's status
            return False
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return False
        return True

    def _give_up(self) -> None:
        self._conversation.leave()
        if self._call is not None:
            self._call.cancel()
        self._notify()

    # -- calling and reading, in a task of its own -------------------------------------------------

    async def _make_calls(self) -> None:
        """Make one call after another, as the conversation wants them, until it is over."""
        try:
            while await self._is_due():
                status = self._call_next()
                if status is None:
                    return
                error = await self._read(self._call)
                if self._conversation.on_call:
                    # Of a stream that goes on, the status is worth no second.
                    seconds = 0.05 if self._resuming else 1.0
                    error = error or await status.error(self._target, seconds)
                self._conversation.lost(error, monotonic())  # no effect where it knows
                self._notify()
        except Exception as bug:  # noqa: BLE001 - else the caller waits for ever
            self._conversation.break_down(bug)
            self._notify()

    async def _is_due(self) -> bool:
        """Wait until a call is due; False if none ever will be."""
        while not self._conversation.over:
            now, due = monotonic(), self._conversation.call_due()
            if due is not None and due <= now:
                return True
            await self._pause(None if due is None else due - now)
        return False

    def _call_next(self) -> "_Status | None":
        """Make a call to the next server; None if the client is closed."""
        try:
            self._target = next(self._round)
            stub = self._servers.stub(self._target)
            self._call = stub.Stream(metadata=self._servers.metadata())
        except (errors.TenutoError, grpc.aio.UsageError) as error:
            closed = message.client_closed(self._servers.target)
            self._conversation.stop(error if isinstance(error, errors.TenutoError) else closed)
            self._notify()
            return None
        self._conversation.called(monotonic())
        self._write_soon()
        self._notify()  # from now on the server owes something
        return _Status(self._call)

    async def _read(self, call: Any) -> errors.TenutoError | None:
        """Feed the conversation until the call is over; return what its status does not say."""
        try:
            # Not call.read(): once a status is there, it gives up what was not read yet.
            async for response in call:
                if not await self._received(response):
                    break
        except grpc.aio.AioRpcError:
            pass  # the status says more
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
        except errors.TenutoError as protocol:
            return protocol
        finally:
            call.cancel()  # no effect on a call that is over
        return None

    async def _received(self, response: pb.StreamResponse) -> bool:
        """Take in one message; False if the conversation is done with the call."""
        resumes = self._conversation.resumes
        self._conversation.receive(response, monotonic())
        self._servers.resumed(self._conversation.resumes - resumes)
        self._write_soon()
        self._notify()
        while not self._conversation.has_slack() and not self._call.done():
            await self._changed.wait()
        return self._conversation.on_call


def _is_cancelled() -> bool:
    """Whether the present task is to end, not only the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Status:
    """The status that a streaming call ended with.

    When a write fails because the call is over, grpc.aio replaces the server's status by an INTERNAL
    of its own (github.com/grpc/grpc/issues/36066), before or after the server's, or for good. So
    each status is noted as it is set, and gRPC's own one passed over.
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

    async def error(self, target: str, seconds: float) -> errors.TenutoError | None:
        """Return the error of the call, which is over; None if its status is OK.

        The server's status is waited for that long: it comes at once, or never.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
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
