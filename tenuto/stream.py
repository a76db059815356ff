"""A sequence on a stream, for threads."""

from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from queue import SimpleQueue
from threading import Condition, Thread
from time import monotonic
from types import TracebackType
from typing import Any

import grpc

from . import errors, message
from .backoff import jitter
from .conversation import Conversation
from .reply import Output
from .sampling import Sampling, sampling_of
from .servers import Servers
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

    Where the server is lost, or ends the sequence so that it can go on elsewhere, it is opened again
    on the next server: outputs come late, but each once and in order. `resumes` counts that.

    `send` may block, never for this caller's own reading: outputs are kept here as they arrive, up
    to `buffer_bytes`, so one thread may send everything first and iterate afterwards. One thread
    may send while another iterates.
    """

    def __init__(self, servers: Servers, event: pb.Open, settings: Settings) -> None:
        self._servers = servers
        self._target = settings.target  # of the present call, once there is one
        self._conversation = Conversation(event, settings, jitter)
        self._changed = Condition()  # guards the conversation; notified when it changed
        self._requests: _Requests = SimpleQueue()  # of the present call
        self._call: Any = None
        self._caller: Thread | None = None

    # -- as a context manager ----------------------------------------------------------------------

    def __enter__(self) -> "Stream":
        if self._caller is not None:
            raise errors.invalid("a stream is entered once; call stream() again", "ALREADY_OPEN")
        self._round = cycle(self._servers.round())
        self._caller = Thread(target=self._make_calls, name="tenuto-stream", daemon=True)
        self._caller.start()
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
            self._conversation.leave()
            self._changed.notify_all()
        assert self._caller is not None
        if clean:  # the server has only its status left to say
            self._caller.join(timeout=1)
        if self._call is not None:
            self._hang_up()
        self._caller.join()

    # -- sending -----------------------------------------------------------------------------------

    def send(self, inputs: Inputs | None, *, generate: int = 0, last: bool = False) -> int:
        """Send one chunk, any number of samples, and return its step (1, 2, 3 …).

        `inputs` is one array, or name -> array, without the batch axis: [160] for 20 ms of 8 kHz
        PCM, [3, 7] for three hours of seven sensors; a `str` for models whose manifest says how text
        becomes ids, in pieces cut anywhere. `generate` draws a sample from the output and feeds it
        to the model that many times, for models whose manifest says how; None as `inputs` then goes
        on from the last output. `last` tells a model that has a control for it that no other samples come;
        `end` is to be called all the same.

        Blocks while `window` chunks are unanswered, or `replay_bytes` are kept until the server sends
        a resume token. Raises InvalidInput for what cannot travel, ReplyTimeout where no server
        answered for `reply_seconds` and `resume_seconds`, OutputsUnread, PoisonedChunk, and whatever
        ended the sequence.
        """
        began = monotonic()
        with self._changed:
            self._wait(self._conversation.room)
            now = monotonic()
            step = self._conversation.chunk(inputs, generate, began, now, last=last)
            self._write(now)
        return step

    def end(self) -> None:
        """Say that no more chunks come. Iterating then yields what is left, and stops."""
        with self._changed:
            now = monotonic()
            self._conversation.end(now)
            self._write(now)

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

    def generate(self, inputs: Inputs | None, count: int) -> Iterator[Output]:
        """Send one chunk, have the model go on from it `count` times, and yield each output as it comes.

        The first one, part 0, is the chunk's own; part i holds the sample that the model was fed i-th,
        under its input's name. None as `inputs` goes on from the last output. Outputs of earlier chunks
        that are still unread come before them.
        """
        step = self.send(inputs, generate=count)
        for output in self:
            yield output
            if output.step == step and output.last:
                return

    # -- receiving ---------------------------------------------------------------------------------

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Output:
        """Return the next output. Stops after `end()` and the last one.

        Raises ReplyTimeout where no server answered for `reply_seconds` and `resume_seconds`,
        PoisonedChunk, SequenceEnded, and the errors of the server. While nothing is owed it waits
        for what another thread sends.
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

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait, holding the lock, until `ready()`."""
        while not ready():
            now = monotonic()
            if self._conversation.overdue(now):
                self._hang_up()
                self._changed.notify_all()
            else:
                self._changed.wait(self._conversation.patience(now))

    def _write(self, now: float) -> None:
        """Hand gRPC what the conversation has to say, holding the lock."""
        if not self._conversation.on_call:
            self._changed.notify_all()  # the thread that makes calls may have to make one
        for request in self._conversation.outgoing(now):
            self._requests.put(request)
            if request.events[0].HasField("end"):
                self._requests.put(None)  # nothing follows: half-close

    def _hang_up(self) -> None:
        self._call.cancel()  # no effect on a call that is over
        self._requests.put(None)  # ends gRPC's thread; after cancel, or it would say half-close

    # -- calling and reading, in a thread of its own -----------------------------------------------

    def _make_calls(self) -> None:
        """Make one call after another, as the conversation wants them, until it is over."""
        try:
            while self._dial():
                error = self._read()
                self._hang_up()
                with self._changed:
                    self._conversation.lost(error, monotonic())  # no effect where it knows
                    self._changed.notify_all()
        except Exception as bug:  # noqa: BLE001 - else the caller waits for ever
            with self._changed:
                self._conversation.break_down(bug)
                self._changed.notify_all()
            if self._call is not None:
                self._hang_up()

    def _dial(self) -> bool:
        """Make the next call when it is due; False if none ever will be."""
        with self._changed:
            while not self._conversation.over:
                now, due = monotonic(), self._conversation.call_due()
                if due is not None and due <= now:
                    self._call_next(now)
                    return self._conversation.on_call
                self._changed.wait(None if due is None else due - now)
        return False

    def _call_next(self, now: float) -> None:
        requests: _Requests = SimpleQueue()
        try:
            self._target = next(self._round)
            stub = self._servers.stub(self._target)
            self._call = stub.Stream(iter(requests.get, None), metadata=self._servers.metadata())
        except errors.TenutoError as closed:
            self._conversation.stop(closed)
        except ValueError:  # what gRPC raises on a closed channel
            self._conversation.stop(message.client_closed(self._target))
        else:
            self._requests = requests
            self._conversation.called(now)
            self._write(now)
        self._changed.notify_all()

    def _read(self) -> errors.TenutoError | None:
        """Feed the conversation until the call is over, and return why it is."""
        try:
            for response in self._call:
                if not self._received(response):
                    break
        except grpc.RpcError as status:
            return rpc_error(status, self._target, None)
        except errors.TenutoError as protocol:
            return protocol
        return None

    def _received(self, response: pb.StreamResponse) -> bool:
        """Take in one message; False if the conversation is done with the call."""
        with self._changed:
            now, resumes = monotonic(), self._conversation.resumes
            self._conversation.receive(response, now)
            self._servers.resumed(self._conversation.resumes - resumes)
            self._write(now)
            self._changed.notify_all()
            while not self._conversation.has_slack():
                self._changed.wait()
            return self._conversation.on_call


def rpc_error(status: grpc.RpcError, target: str, seconds: float | None) -> errors.TenutoError:
    """Return the error for a gRPC status; `seconds` is the deadline the call had, None: none."""
    return message.status_error(
        status.code(),
        status.details(),
        message.plain(status.trailing_metadata()),
        target=target,
        seconds=seconds,
    )
