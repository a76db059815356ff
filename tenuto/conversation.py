"""One sequence, over as many calls as it takes, without any I/O.

Both clients drive it: they make a call when `call_due` says so, tell it with `called`, write what
`outgoing` returns after every change, feed `receive` what they read, and say `lost` when the call
is over. They wait where it says so. Times are seconds of one monotonic clock, handed in as `now`.

The window. At most `window` chunks may be unanswered, so `room()` is false while that many are.
A chunk counts as answered when its last output *arrives*, not when the caller reads it: a caller
may send a thousand chunks and read afterwards. What waits unread is bounded by `buffer_bytes`;
above it `room()` raises OutputsUnread, and the clients stop reading from the network.

Resuming. The chunks since the newest resume token are kept, answered or not, in at most
`replay_bytes` (and one chunk); from half of that on a token is asked for, and at all of it `room()`
is false until one came. On a new call the sequence is opened with the token, or anew while there is
none, and the chunks since are sent again. Outputs that the caller has are dropped. A call that is
lost while nothing is owed is made again when something is.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from . import errors
from .backoff import TRIES_OF_A_NAME, Backoff
from .message import timing
from .replay import Replay
from .reply import Output
from .settings import Settings
from .tensor import Inputs, pack, unpack
from .v1 import tenuto_pb2 as pb

log = logging.getLogger("tenuto.client")

# What an output takes in memory besides its arrays, roughly.
_OUTPUT_BYTES = 512
# Endings of a sequence at one server that are not the end of the sequence.
_RESUMABLE = {pb.STREAM_ENDED, pb.IDLE_EXPIRED, pb.EVICTED, pb.DRAINING, pb.REBALANCE, pb.MAX_AGE}


# Refusals of a resume that hold for one server alone.
_ELSEWHERE = {"TOKEN_INVALID", "UNKNOWN_MODEL"}


@dataclass(slots=True)
class _Call:
    """What was said and heard on the present call."""

    began: float
    asked_open: bool = False
    opened: bool = False
    next_step: int = 0  # the next chunk to send on it
    unanswered: deque[int] = field(default_factory=deque)  # steps sent on it
    asked_token: bool = False  # CheckpointNow was sent, and not answered
    ended: bool = False  # End was sent
    owed_since: float | None = None  # None: the server owes nothing on it


class Conversation:
    """The state of one sequence as its client sees it."""

    def __init__(self, event: pb.Open, settings: Settings, jitter: Callable[[], float]) -> None:
        self.opened: pb.Opened | None = None  # the newest
        self.resume_token = event.resume_token  # the newest
        self.resumes = 0  # how often it was opened again
        self.ending = False  # the caller said that no more chunks come
        self.closed = False  # and the server has answered with Closed(END)
        self.error: errors.TenutoError | None = None
        self._event = event
        self._settings = settings
        self._resuming = settings.resume_seconds > 0
        self._backoff = Backoff(settings.resume_seconds, jitter)
        self._untried = len(settings.targets) - 1  # targets, for the first opening
        self._untried_behind_name = TRIES_OF_A_NAME - 1 if self._untried == 0 else 0
        self._refusals = 0  # of this resume, by servers that cannot take it
        self._refusal: errors.ServerError | None = None  # the last one by a server, of this opening
        self._call: _Call | None = None
        self._replay = Replay()
        self._token_step = 0  # the step that the newest token covers, at least
        self._next_step = 1
        self._had = (0, 0)  # step and part of the newest output that the caller has, or is to read
        self._repeated = (0, 0)  # of the furthest output that came again since the last progress
        self._answered = 0  # the last step whose last output arrived
        self._losses = 0  # calls lost since the last new output, with the same step unanswered
        self._unread: deque[tuple[Output, int]] = deque()  # with their bytes
        self._unread_bytes = 0
        self._began: dict[int, float] = {}  # unanswered step -> when its send began
        self._owed_since: float | None = None  # None: nothing is owed to the caller
        self._ended_at = 0.0

    # -- what the caller says ----------------------------------------------------------------------

    def chunk(
        self, inputs: Inputs | None, generate: int, began: float, now: float, *, last: bool = False
    ) -> int:
        """Take in the next chunk and return its step. The caller asked to send it when it `began`.

        Call it only when `room()` is true. Raises InvalidInput; then the step is not used up.
        """
        step = self._next_step
        try:
            chunk = pb.Chunk(step=step, inputs=pack(inputs), generate=generate, last=last)
        except (TypeError, ValueError) as error:
            if isinstance(error, errors.TenutoError):
                raise
            raise errors.invalid(f"generate: {error}", "WRONG_SETTING") from error
        self._next_step += 1
        self._replay.add(step, pb.StreamRequest(events=[pb.Event(chunk=chunk)]))
        self._began[step] = began
        self._owe(now)
        return step

    def end(self, now: float) -> None:
        """Take in that no more chunks come; no effect on a sequence that is over."""
        if self.ending or self.over:
            return
        self.ending = True
        self._ended_at = now
        self._owe(now)

    def _owe(self, now: float) -> None:
        if self._owed_since is None:
            self._owed_since = now

    # -- calls -------------------------------------------------------------------------------------

    @property
    def on_call(self) -> bool:
        """Whether there is a call."""
        return self._call is not None

    def call_due(self) -> float | None:
        """When a call is to be made; None: not before something else changes."""
        if self.over or self._call is not None or not self._owing():
            return None
        return self._backoff.due

    def called(self, now: float) -> None:
        """A call was made, on the next server in turn."""
        self._call = _Call(now, owed_since=now)
        if self._owed_since is None:
            self._owed_since = now

    def outgoing(self, now: float) -> list[pb.StreamRequest]:
        """Return what is to be written on the call now; each message is returned once a call."""
        call = self._call
        if call is None or self.over:
            return []
        if not call.asked_open:
            call.asked_open = True
            return [self._open_request()]
        requests = self._chunks_due(call)
        if self._asks_token(call):
            call.asked_token = True
            requests.append(pb.StreamRequest(events=[pb.Event(checkpoint=pb.CheckpointNow())]))
        if self._says_end(call):
            call.ended = True
            requests.append(pb.StreamRequest(events=[pb.Event(end=pb.End())]))
        if requests and call.owed_since is None:
            call.owed_since = now
        return requests

    def has_outgoing(self) -> bool:
        """Whether `outgoing` would return anything."""
        call = self._call
        if call is None or self.over:
            return False
        chunks = call.next_step < self._next_step and len(call.unanswered) < self.window
        return not call.asked_open or (
            call.opened and (chunks or self._asks_token(call) or self._says_end(call))
        )

    def _open_request(self) -> pb.StreamRequest:
        event = pb.Open()
        event.CopyFrom(self._event)
        event.resume_token = self.resume_token
        if self.resume_token:
            event.ClearField("initial")  # the token has the states
        if self.opened is not None and not self.resume_token and self._had > (0, 0):
            # The caller has outputs of this version: another one's would be those of another sequence.
            event.version = self.opened.version
        if self.opened is not None and self.opened.HasField("sampling"):
            event.sampling.CopyFrom(self.opened.sampling)  # with the seed that the server drew
        return pb.StreamRequest(events=[pb.Event(open=event)])

    def _chunks_due(self, call: _Call) -> list[pb.StreamRequest]:
        requests = []
        while call.opened and call.next_step < self._next_step and len(call.unanswered) < self.window:
            requests.append(self._replay[call.next_step])
            call.unanswered.append(call.next_step)
            call.next_step += 1
        return requests

    def _asks_token(self, call: _Call) -> bool:
        asking = call.opened and not call.asked_token and not self.ending
        return asking and self._needs_token() and call.next_step > self._token_step + 1

    def _says_end(self, call: _Call) -> bool:
        return self.ending and call.opened and not call.ended and call.next_step == self._next_step

    def _needs_token(self) -> bool:
        return self._resuming and 2 * self._replay.nbytes > self._settings.replay_bytes

    def _owing(self) -> bool:
        """Whether the server has to say something before the caller may go on for ever."""
        if self.opened is None or self._began or self.ending:
            return not self.closed
        return self._needs_token()

    # -- a call that is over -----------------------------------------------------------------------

    def lost(self, error: errors.TenutoError | None, now: float) -> None:
        """The call is over: by `error`, or in order (None)."""
        call, self._call = self._call, None
        if self.over or call is None:
            return
        error = error or errors.Unavailable(
            f"the stream ended before the sequence, after step {self._answered}; open a new one",
            code="UNAVAILABLE",
        )
        if not call.opened and isinstance(error, errors.ServerError) and error.reason:
            self._refusal = error  # says more than that no server answers elsewhere
        if self.opened is None:
            self._go_on_to_untried(error, now)
        elif not _is_loss(error) and not self._may_resume_elsewhere(call, error):
            self.error = error if call.opened else self._unresumed(error, "")
        elif not self._resuming:
            self.error = error
        else:
            self._count_loss(call, error)
            self._retry(error, now)

    def stop(self, error: errors.TenutoError) -> None:
        """End the sequence for its caller. What comes first counts."""
        if not self.over:
            self.error = error
            self._call = None

    def leave(self) -> None:
        """The caller wants no more: no call is made from here on."""
        text = "its caller has left the sequence; make a new one with stream()"
        self.stop(errors.Unavailable(text, code="CANCELLED"))

    def break_down(self, bug: Exception) -> None:
        """What makes the calls cannot go on."""
        self.stop(errors.ProtocolError(f"the stream stopped working: {bug!r}. This is a bug."))

    def _may_resume_elsewhere(self, call: _Call, error: errors.TenutoError) -> bool:
        """Whether a server refused the sequence for what another one may have: in the middle of a rollout not
        all have the same versions, or keys. Each other server is asked once."""
        refused = isinstance(error, errors.ServerError) and error.reason in _ELSEWHERE
        if call.opened or not refused or self._refusals + 1 >= len(self._settings.targets):
            return False
        self._refusals += 1
        return True

    def _go_on_to_untried(self, error: errors.TenutoError, now: float) -> None:
        if not _is_loss(error):
            self.error = error
        elif self._untried:
            self._untried -= 1
            self._backoff.due = now
        elif errors.drains(error) and self._untried_behind_name:
            self._untried_behind_name -= 1
            self._backoff.again(now)
        else:
            self.error = self._refusal or error

    def _count_loss(self, call: _Call, error: errors.TenutoError) -> None:
        """Blame the first unanswered step for the loss, if the server was given it."""
        if call.next_step <= self._answered + 1 and not call.ended:
            return
        self._losses += 1
        if self._losses >= self._settings.poison_losses:
            self.error = errors.PoisonedChunk(
                f"{self._losses} streams were lost at {self._missing()}, which is sent no more; look at "
                f"that chunk and at those right behind it. The last loss: {error}",
                step=min(self._answered + 1, self._next_step - 1),
            )

    def _retry(self, error: errors.TenutoError, now: float) -> None:
        """Fix when the sequence is opened again, or give it up."""
        if self.over:
            return
        if not self._owing():
            self._backoff.again(now, self._asked_seconds(error))
            log.info("sequence %s is opened again when it is needed: %s", self._name(), error)
            return
        level = logging.INFO if self._backoff.since is not None else logging.WARNING
        self._backoff.miss(now)
        if self._backoff.again(now, self._asked_seconds(error)):
            log.log(level, "sequence %s is opened again for %s: %s", self._name(), self._missing(), error)
        else:
            self.error = self._unresumed(
                self._refusal or error, f" within {self._settings.resume_seconds:g} s"
            )

    def _asked_seconds(self, error: errors.TenutoError) -> float:
        """Return the pause that the server asked for, once as many as there are were asked."""
        if not isinstance(error, errors.ServerError) or self._backoff.tries < len(self._settings.targets):
            return 0.0
        return error.retry_after_seconds or 0.0

    def _unresumed(self, error: errors.TenutoError, within: str) -> errors.TenutoError:
        """Return `error` with the words that it prevented a resume."""
        text = f"{self._missing()} could not be resumed{within}: "
        if isinstance(error, errors.ServerError):
            return type(error)(
                text + error.message,
                code=error.code,
                reason=error.reason,
                retry_after_seconds=error.retry_after_seconds,
                resume_token=self.resume_token,
            )
        if isinstance(error, errors.SequenceEnded):
            return errors.SequenceEnded(
                f"{text}{error}",
                reason=error.reason,
                last_step=error.last_step,
                resume_token=self.resume_token,
            )
        return type(error)(f"{text}{error}")

    def _name(self) -> str:
        return self.opened.sequence_id if self.opened is not None else ""

    def _missing(self) -> str:
        """What the caller waits for first."""
        if self._began:
            return f"step {min(self._began)}"
        return "End" if self.ending else f"the checkpoint after step {self._answered}"

    # -- what was read -----------------------------------------------------------------------------

    def receive(self, response: pb.StreamResponse, now: float) -> None:
        """Take in one message of the server; raises ProtocolError where it makes no sense."""
        for reply in response.replies:
            call = self._call
            if self.over or call is None:
                return
            self._reply(call, reply, now)
        call = self._call
        if call is not None:
            owed = not call.opened or call.unanswered or call.asked_token or call.ended
            call.owed_since = now if owed and not self.closed else None
        if not self._owing():
            self._owed_since = None

    def _reply(self, call: _Call, reply: pb.Reply, now: float) -> None:
        kind = reply.WhichOneof("reply")
        if reply.sequence != 0 or kind is None:
            raise errors.ProtocolError(
                f"a reply of a kind that this client does not know, or for sequence "
                f"{reply.sequence} where only 0 is open; upgrade the client"
            )
        if kind == "opened":
            self._open(call, reply.opened, now)
            return
        if kind == "output":
            self._output(call, reply.output, now)
        elif kind == "checkpoint":
            call.asked_token = False
            self._take_token(reply.checkpoint.resume_token, reply.checkpoint.step, now)
        elif kind == "closed":
            self._close(call, reply.closed, now)
        else:
            self._fail(call, reply.failed, now)

    def _progress(self, now: float) -> None:
        """Something new came. Only that ends the wait: calls that open, and say again what the caller has,
        may be lost for ever at the same place."""
        self._owed_since = now
        self._repeated = (0, 0)
        self._backoff.progress()

    def _open(self, call: _Call, message: pb.Opened, now: float) -> None:
        step = message.next_step
        if self.opened is None:
            self._next_step = step
            self._answered = step - 1
            self._had = (step - 1, 0)
        elif call.opened or not self._replay.first <= step <= self._answered + 1:
            raise errors.ProtocolError(
                f"the server goes on at step {step}; expected one from {self._replay.first} to "
                f"{self._answered + 1}, once a call; report this to the server's maintainers"
            )
        else:
            self.resumes += 1
            log.info("sequence %s goes on at step %d as %s", self._name(), step, message.sequence_id)
            if step > self._token_step + 1:  # the token of a failed run was a newer one
                self._progress(now)
        self._token_step = step - 1
        self._replay.drop_through(step - 1)
        self._refusals = 0
        self._refusal = None
        self.opened = message
        call.opened = True
        call.next_step = step

    def _output(self, call: _Call, message: pb.Output, now: float) -> None:
        step, part = message.step, message.part
        expected = call.unanswered[0] if call.unanswered else None
        # The tail at End comes as a further part of the last step, which is answered already.
        tail = call.ended and not call.unanswered and step == self._answered
        if step != expected and not tail and (step, part) > self._had:
            raise errors.ProtocolError(
                f"an output for step {step}; unanswered are {list(call.unanswered) or 'none'}; "
                "report this to the server's maintainers"
            )
        if (step, part) > self._had:
            self._keep(message, now)
        elif (step, part) > self._repeated:  # a long replay
            self._repeated = (step, part)
            self._owed_since = now
            self._backoff.nearer()
        if step == expected and message.last:
            call.unanswered.popleft()

    def _keep(self, message: pb.Output, now: float) -> None:
        """Hand the caller an output that it does not have yet."""
        step = message.step
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
        self._had = (step, message.part)
        self._losses = 0
        self._progress(now)
        if message.last:
            self._began.pop(step, None)
            self._answered = step
            if not self._resuming:
                self._replay.drop_through(step)

    def _take_token(self, token: bytes, step: int, now: float) -> None:
        """Keep the newest token, and forget the chunks that it covers."""
        if step > self._answered or not token:
            raise errors.ProtocolError(
                f"a resume token of {len(token)} bytes after step {step}, where {self._answered} is the "
                "last one answered; report this to the server's maintainers"
            )
        if step > self._token_step:
            self._progress(now)
        if step >= self._token_step:
            self.resume_token, self._token_step = token, step
            self._replay.drop_through(step)

    def _close(self, call: _Call, message: pb.Closed, now: float) -> None:
        if message.reason == pb.END and call.ended:
            if self._began:
                raise errors.ProtocolError(
                    f"the sequence was closed before {self._missing()} was answered; report this to "
                    "the server's maintainers"
                )
            self.closed = True
            return
        names = {number: name for name, number in pb.Ending.items()}
        reason = names.get(message.reason, str(message.reason))
        hint = "; it can go on with its resume_token" if message.resume_token else ""
        error = errors.SequenceEnded(
            f"the server ended the sequence: {reason}, after step {message.last_step}{hint}",
            reason=reason,
            last_step=message.last_step,
            resume_token=message.resume_token,
        )
        # A server that drains without a token loses nothing: all chunks since the last one are here.
        carried = message.resume_token or message.reason == pb.DRAINING
        if not (self._resuming and message.reason in _RESUMABLE and carried):
            self.stop(error)
            return
        if message.resume_token:
            self._take_token(message.resume_token, message.last_step, now)
        self._call = None
        self._retry(error, now)

    def _fail(self, call: _Call, message: pb.Failed, now: float) -> None:
        error = _failure(message)
        if not call.opened:
            self.lost(error, now)
        elif self._resuming and message.reason == "RUN_FAILED" and message.resume_token:
            # Its step is what the next Opened says, so the chunks that it covers are kept until then.
            self.resume_token = message.resume_token
            self.lost(error, now)
        else:
            self.stop(error)

    # -- what the caller may do --------------------------------------------------------------------

    @property
    def window(self) -> int:
        """How many chunks may be unanswered at once; 0 before the sequence is open."""
        return self.opened.window if self.opened is not None else 0

    @property
    def full(self) -> bool:
        """Whether no more may be read from the network before the caller reads."""
        return self._unread_bytes >= self._settings.buffer_bytes

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
                f"{self._settings.buffer_bytes}; iterate over the stream, then send again, or raise "
                "buffer_bytes"
            )
        kept = self._resuming and self._replay.nbytes >= self._settings.replay_bytes
        return len(self._began) < self.window and not kept

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
            if was_full:
                self._read_on(now)
            return output
        if self.error is not None:
            raise self.error
        return None

    def _read_on(self, now: float) -> None:
        """Reading goes on: what is owed may have come long ago."""
        if self._owed_since is not None:
            self._owed_since = now
        if self._call is not None and self._call.owed_since is not None:
            self._call.owed_since = now
        self._backoff.read_on(now)

    # -- what is overdue ---------------------------------------------------------------------------

    def patience(self, now: float) -> float | None:
        """Return how many seconds to wait for the server; None: as long as it takes.

        Nothing is overdue while nothing is owed, or while nothing is read from the network because
        too much waits unread.
        """
        ends = [end for end in (self._call_ends(), self._answer_ends()) if end is not None]
        return None if self.full or not ends else max(0.0, min(ends) - now)

    def overdue(self, now: float) -> bool:
        """Give up a call on which something is overdue; then it is to be cancelled.

        Raises ReplyTimeout where the answer is not waited for on other calls, or was for long enough; or
        the last refusal of a server, if no other one opened the sequence since.
        """
        if self.full or self.over:
            return False
        settings = self._settings
        if (end := self._answer_ends()) is not None and end <= now:
            limit = (settings.reply_seconds or 0.0) + settings.resume_seconds
            if self._refusal is not None:
                raise self._unresumed(self._refusal, f" within {limit:g} s")
            raise errors.ReplyTimeout(
                f"no answer to {self._missing()} within {limit:g} s; raise reply_seconds, or look at "
                "the server's metrics"
            )
        if (end := self._call_ends()) is None or end > now:
            return False
        assert self._call is not None
        if self._call.opened:
            error = f"no answer to {self._missing()} within {settings.reply_seconds:g} s"
        else:
            error = f"the server did not open the sequence within {settings.timeout_seconds:g} s"
        late = errors.ReplyTimeout(error)
        if self.opened is None and not self._untried:
            raise self._refusal or late
        self.lost(late, now)
        return True

    def _call_ends(self) -> float | None:
        """When the call is given up."""
        call, seconds = self._call, self._settings.reply_seconds
        if call is None:
            return None
        if not call.opened:
            return call.began + self._settings.timeout_seconds
        if call.owed_since is None or seconds is None or not self._resuming:
            return None
        return call.owed_since + seconds

    def _answer_ends(self) -> float | None:
        """When waiting for what is owed to the caller ends."""
        seconds = self._settings.reply_seconds
        if self.opened is None or self._owed_since is None or seconds is None:
            return None
        return self._owed_since + seconds + self._settings.resume_seconds


def _is_loss(error: errors.TenutoError) -> bool:
    """Whether another call may fare better than the one that ended by `error`."""
    if isinstance(error, errors.ServerError) and error.reason == "CLIENT_CLOSED":
        return False
    if isinstance(error, errors.Unavailable | errors.Overloaded | errors.ReplyTimeout):
        return True
    return isinstance(error, errors.ServerError) and error.code == "INTERNAL"


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
