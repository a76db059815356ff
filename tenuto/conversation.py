"""One sequence on one stream, without any I/O: what to write next, what was read, what is owed.

Both clients drive it: they write the messages it returns, feed it the messages they read, and wait
where it says so. Times are seconds of one monotonic clock, handed in as `now`.

The window. At most `window` chunks may be unanswered, so `room()` is false while that many are.
A chunk counts as answered when its last output *arrives*, not when the caller reads it: a caller
may send a thousand chunks and read afterwards. What waits unread is bounded by `buffer_bytes`;
above it `room()` raises OutputsUnread, and the clients stop reading from the network.
"""

from collections import deque

from . import errors
from .message import timing
from .reply import Output
from .tensor import Inputs, pack, unpack
from .v1 import tenuto_pb2 as pb

# What an output takes in memory besides its arrays, roughly.
_OUTPUT_BYTES = 512


class Conversation:
    """The state of one sequence as its client sees it."""

    def __init__(self, *, timeout_seconds: float, reply_seconds: float | None, buffer_bytes: int) -> None:
        self.opened: pb.Opened | None = None
        self.checkpoint: pb.Checkpoint | None = None  # the newest that the server sent
        self.ending = False  # End was sent
        self.closed = False  # and answered by Closed(END)
        self.error: errors.TenutoError | None = None
        self._timeout_seconds = timeout_seconds
        self._reply_seconds = reply_seconds
        self._buffer_bytes = buffer_bytes
        self._unread: deque[tuple[Output, int]] = deque()  # with their bytes
        self._unread_bytes = 0
        self._next_step = 1
        self._answered = 0  # the last step whose last output arrived
        self._began: dict[int, float] = {}  # unanswered step -> when its send began
        self._owed_since: float | None = None  # None: the server owes nothing
        self._ended_at = 0.0

    # -- what to write -----------------------------------------------------------------------------

    def open(self, event: pb.Open, now: float) -> pb.StreamRequest:
        """Begin the sequence."""
        self._owed_since = now
        return pb.StreamRequest(events=[pb.Event(open=event)])

    def chunk(self, inputs: Inputs, generate: int, now: float) -> tuple[int, pb.StreamRequest]:
        """Return the next step and its message. `now` is when the caller asked to send it.

        Call it only when `room()` is true. Raises InvalidInput; then the step is not used up.
        """
        step = self._next_step
        try:
            chunk = pb.Chunk(step=step, inputs=pack(inputs), generate=generate)
        except (TypeError, ValueError) as error:
            if isinstance(error, errors.TenutoError):
                raise
            raise errors.invalid(f"generate: {error}", "WRONG_SETTING") from error
        self._next_step += 1
        self._began[step] = now
        if self._owed_since is None:
            self._owed_since = now
        return step, pb.StreamRequest(events=[pb.Event(chunk=chunk)])

    def end(self, now: float) -> pb.StreamRequest | None:
        """Return the message that ends the sequence; None if there is nothing to end any more."""
        if self.ending or self.closed or self.error is not None:
            return None
        self.ending = True
        self._ended_at = now
        if self._owed_since is None:
            self._owed_since = now
        return pb.StreamRequest(events=[pb.Event(end=pb.End())])

    # -- what was read -----------------------------------------------------------------------------

    def receive(self, response: pb.StreamResponse, now: float) -> None:
        """Take in one message of the server; raises ProtocolError where it makes no sense."""
        for reply in response.replies:
            if self.closed or self.error is not None:
                return
            self._reply(reply, now)
        owed = self.opened is None or self._began or (self.ending and not self.closed)
        self._owed_since = now if owed else None

    def _reply(self, reply: pb.Reply, now: float) -> None:
        kind = reply.WhichOneof("reply")
        if reply.sequence != 0 or kind is None:
            raise errors.ProtocolError(
                f"a reply of a kind that this client does not know, or for sequence "
                f"{reply.sequence} where only 0 is open; upgrade the client"
            )
        if kind == "opened":
            self.opened = reply.opened
            self._next_step = reply.opened.next_step
            self._answered = reply.opened.next_step - 1
        elif kind == "output":
            self._output(reply.output, now)
        elif kind == "checkpoint":
            self.checkpoint = reply.checkpoint
        elif kind == "closed":
            self._close(reply.closed)
        else:
            self.error = _failure(reply.failed)

    def _output(self, message: pb.Output, now: float) -> None:
        step = message.step
        # The tail at End comes as a further part of the last step, which is answered already.
        if step not in self._began and not (self.ending and step == self._answered):
            raise errors.ProtocolError(
                f"an output for step {step}; unanswered are {sorted(self._began) or 'none'}; "
                "report this to the server's maintainers"
            )
        output = Output(
            step=step,
            part=message.part,
            last=message.last,
            outputs=unpack(message.outputs),
            timing=timing(message.timing),
            latency_seconds=now - self._began.get(step, self._ended_at),
        )
        size = _OUTPUT_BYTES + sum(len(tensor.data) for tensor in message.outputs)
        self._unread.append((output, size))
        self._unread_bytes += size
        if message.last:
            self._began.pop(step, None)
            self._answered = step

    def _close(self, message: pb.Closed) -> None:
        names = {number: name for name, number in pb.Ending.items()}
        reason = names.get(message.reason, str(message.reason))
        if message.reason == pb.END and self.ending:
            self.closed = True
            return
        hint = "; it can go on with its resume_token" if message.resume_token else ""
        self.error = errors.SequenceEnded(
            f"the server ended the sequence: {reason}, after step {message.last_step}{hint}",
            reason=reason,
            last_step=message.last_step,
            resume_token=message.resume_token,
        )

    def stop(self, error: errors.TenutoError | None = None) -> None:
        """The call is over, by `error` or in order. What comes first counts."""
        if self.closed or self.error is not None:
            return
        self.error = error or errors.Unavailable(
            f"the stream ended before the sequence, after step {self._answered}; open a new one",
            code="UNAVAILABLE",
        )

    # -- what the caller may do --------------------------------------------------------------------

    @property
    def window(self) -> int:
        """How many chunks may be unanswered at once; 0 before the sequence is open."""
        return self.opened.window if self.opened is not None else 0

    @property
    def full(self) -> bool:
        """Whether no more may be read from the network before the caller reads."""
        return self._unread_bytes >= self._buffer_bytes

    @property
    def over(self) -> bool:
        """Whether the sequence has ended, well or not."""
        return self.closed or self.error is not None

    def is_open(self) -> bool:
        """Whether the server has opened the sequence; raises what prevented it."""
        if self.error is not None:
            raise self.error
        return self.opened is not None

    def room(self) -> bool:
        """Whether a chunk may be sent now; raises if none may ever be, and OutputsUnread."""
        if self.error is not None:
            raise self.error
        if self.opened is None or self.ending:
            raise errors.Refused(
                "send: the sequence is not open; send inside `with client.stream(…)`, before end()",
                code="FAILED_PRECONDITION",
                reason="NOT_OPEN",
            )
        if self.full:
            raise errors.OutputsUnread(
                f"{self._unread_bytes} bytes of outputs wait unread, the limit is "
                f"{self._buffer_bytes}; iterate over the stream, then send again, or raise "
                "buffer_bytes"
            )
        return len(self._began) < self.window

    def readable(self) -> bool:
        """Whether `take` has something to say."""
        return bool(self._unread) or self.over

    def has_slack(self) -> bool:
        """Whether there is space for more outputs, or none are to come."""
        return self.over or not self.full

    def take(self, now: float) -> Output | None:
        """Return the next output in the order of steps; None after the last; or raise the error."""
        if self._unread:
            was_full = self.full
            output, size = self._unread.popleft()
            self._unread_bytes -= size
            if was_full and self._owed_since is not None:
                self._owed_since = now  # reading goes on: what is owed may have come long ago
            return output
        if self.error is not None:
            raise self.error
        return None

    def patience(self, now: float) -> float | None:
        """Return how many seconds to wait for the server; None: as long as it takes.

        Raises ReplyTimeout where it is overdue. Nothing is overdue while nothing is owed, or while
        nothing is read from the network because too much waits unread.
        """
        limit = self._reply_seconds if self.opened is not None else self._timeout_seconds
        if limit is None or self._owed_since is None or self.full:
            return None
        left = self._owed_since + limit - now
        if left > 0:
            return left
        if self.opened is None:
            raise errors.ReplyTimeout(f"the server did not open the sequence within {limit:g} s")
        missing = f"step {min(self._began)}" if self._began else "End"
        raise errors.ReplyTimeout(
            f"no answer to {missing} within {limit:g} s; raise reply_seconds, or look at the server's metrics"
        )


def _failure(message: pb.Failed) -> errors.ServerError:
    known = 0 <= message.code < len(errors.CODES)
    return errors.refusal(
        message.message,
        code=errors.CODES[message.code] if known else str(message.code),
        reason=message.reason,
        retry_after_ms=message.retry_after_ms,
        resume_token=message.resume_token,
        otherwise=errors.SequenceFailed,
    )
