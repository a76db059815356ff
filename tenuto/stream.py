"""A sequence on a stream, for threads."""

from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Condition, Thread
from time import monotonic
from types import TracebackType
from typing import Any

import grpc

from . import errors, message
from .conversation import Conversation
from .reply import Output
from .settings import Settings
from .tensor import Inputs
from .v1 import tenuto_pb2 as pb

_Requests = SimpleQueue[pb.StreamRequest | None]


class Stream:
    """One sequence whose recurrent state the server holds; made by `Client.stream`.

        with client.stream("spoken-digits") as stream:
            stream.send(pcm)                 # int16 [160]
            output = next(stream)            # or: for output in stream
            stream.end()
            rest = list(stream)

    Entering opens the sequence and raises what the server says to it (NotFound, Overloaded, …).
    Leaving after `end()` and the last output is clean; leaving earlier cancels the sequence.

    `send` may block, never for this caller's own reading: outputs are kept here as they arrive, up
    to `buffer_bytes`, so one thread may send everything first and iterate afterwards. One thread
    may send while another iterates.
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
        self._changed = Condition()  # guards the conversation; notified when it changed
        self._requests: _Requests = SimpleQueue()
        self._call: Any = None
        self._reader: Thread | None = None
        self._left = False

    # -- as a context manager ----------------------------------------------------------------------

    def __enter__(self) -> "Stream":
        if self._call is not None:
            raise errors.invalid("a stream is entered once; call stream() again", "ALREADY_OPEN")
        try:
            self._call = self._method(iter(self._requests.get, None))
        except ValueError as error:  # what gRPC raises on a closed channel
            raise message.client_closed(self._target) from error
        self._requests.put(self._conversation.open(self._event, monotonic()))
        self._reader = Thread(target=self._read, name="tenuto-stream", daemon=True)
        self._reader.start()
        try:
            with self._changed:
                self._wait(self._conversation.is_open)
        except BaseException:
            self._leave(clean=False)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            clean = self._conversation.closed
        self._leave(clean)

    def _leave(self, clean: bool) -> None:
        with self._changed:
            self._left = True
            self._changed.notify_all()
        assert self._reader is not None
        if clean:  # the server has only its status left to say
            self._requests.put(None)
            self._reader.join(timeout=1)
        self._call.cancel()
        self._requests.put(None)  # ends gRPC's thread; after cancel, or it would say half-close
        self._reader.join()

    # -- sending -----------------------------------------------------------------------------------

    def send(self, inputs: Inputs, *, generate: int = 0) -> int:
        """Send one chunk, any number of samples, and return its step (1, 2, 3 …).

        `inputs` is one array, or name -> array, without the batch axis: [160] for 20 ms of 8 kHz
        PCM, [3, 7] for three hours of seven sensors. `generate` feeds the output back that many
        times, for models whose manifest says how.

        Blocks while `window` chunks are unanswered. Raises InvalidInput for what cannot travel,
        ReplyTimeout after `reply_seconds` without an answer, OutputsUnread, and whatever ended the
        sequence.
        """
        began = monotonic()
        with self._changed:
            self._wait(self._conversation.room)
            step, request = self._conversation.chunk(inputs, generate, began)
            self._requests.put(request)
        return step

    def end(self) -> None:
        """Say that no more chunks come. Iterating then yields what is left, and stops."""
        with self._changed:
            request = self._conversation.end(monotonic())
            if request is not None:
                self._requests.put(request)
                self._requests.put(None)  # nothing follows: half-close

    def run(self, chunks: Iterable[Inputs]) -> Iterator[Output]:
        """Send all `chunks`, end, and yield the outputs as they come, in order.

        What arrived is yielded between two sends; pace live data by a slow iterable.
        """
        for chunk in chunks:
            self.send(chunk)
            while (output := self._arrived()) is not None:
                yield output
        self.end()
        yield from self

    # -- receiving ---------------------------------------------------------------------------------

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Output:
        """Return the next output. Stops after `end()` and the last one.

        Raises ReplyTimeout after `reply_seconds` if an answer is owed, SequenceEnded, and the
        errors of the server. While nothing is owed it waits for what another thread sends; the
        server's own idle limit ends that.
        """
        with self._changed:
            self._wait(self._conversation.readable)
            output = self._conversation.take(monotonic())
            self._changed.notify_all()
        if output is None:
            raise StopIteration
        return output

    def _arrived(self) -> Output | None:
        with self._changed:
            output = self._conversation.take(monotonic())
            self._changed.notify_all()
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

    # -- waiting and reading -----------------------------------------------------------------------

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait, holding the lock, until `ready()`."""
        while not ready():
            self._changed.wait(self._conversation.patience(monotonic()))

    def _read(self) -> None:
        """Feed the conversation until the call is over; runs in a thread of its own."""
        error: errors.TenutoError | None = None
        try:
            for response in self._call:
                self._received(response)
        except grpc.RpcError as status:
            error = rpc_error(status, self._target, None)
        except errors.TenutoError as protocol:
            error = protocol
        except Exception as bug:  # noqa: BLE001 - else the caller waits for ever
            error = errors.ProtocolError(f"a reply could not be read: {bug!r}. This is a bug.")
        self._call.cancel()  # no effect on a call that is over
        self._requests.put(None)
        with self._changed:
            self._conversation.stop(error)
            self._changed.notify_all()

    def _received(self, response: pb.StreamResponse) -> None:
        now = monotonic()
        with self._changed:
            self._conversation.receive(response, now)
            self._changed.notify_all()
            while self._conversation.full and not self._left:
                self._changed.wait()


def rpc_error(status: grpc.RpcError, target: str, seconds: float | None) -> errors.TenutoError:
    """Return the error for a gRPC status; `seconds` is the deadline the call had, None: none."""
    return message.status_error(
        status.code(),
        status.details(),
        message.plain(status.trailing_metadata()),
        target=target,
        seconds=seconds,
    )
