"""One gRPC stream: its events become commands to engines, their replies become messages.

`received` runs on the thread that reads, `deliver` on engine threads. Between them stands one lock, held
while the table of sequences is read or changed.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from tenuto.v1 import tenuto_pb2 as pb

from . import reply as wire
from .call import GONE, Call, Listener
from .callers import ANYBODY, Caller, Callers, Pacer
from .catalogue import Catalogue, Served
from .chunk_form import ChunkForm, ChunkForms, Habit, event_bytes
from .errors import (
    AlreadyOpen,
    NotOpen,
    NotSupported,
    ServerDraining,
    StreamIdle,
    TenutoError,
    TooLarge,
    Unauthenticated,
    WrongMessage,
    WrongSetting,
)
from .manifest import Manifest
from .metrics import ServerMetrics
from .pending import PendingBytes
from .population import COMMAND_BYTES
from .sampling import Sampling
from .sequence import (
    CHUNK_BYTES,
    Checkpoint,
    Chunk,
    Closed,
    Ending,
    Failed,
    Opened,
    Output,
    Reply,
    Sequence,
)
from .snapshot import Snapshot
from .status import code_of, metadata_of
from .tensor import read_given
from .text import Text
from .tracing import StreamTrace, Traces

log = logging.getLogger("tenuto.stream")

MAX_EVENTS = 4096
_MAX_LABEL_BYTES = 128
# A caller that owes more than that by its rate opens no further stream.
_PATIENCE_SECONDS = 5.0
_ID_BYTES = 8
# Of a seed that is drawn here: people type it again.
_SEED_BITS = 32
_MAX_PERIOD_MS = 3_600_000
# Numbers of sequences that the server ended and whose late events are still ignored.
_REMEMBERED = 4096


@dataclass(frozen=True)
class StreamLimits:
    """What every stream shares."""

    window: int
    idle_seconds: float
    unanswered_bytes: int = 16 << 20
    max_generate: int = 4096


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A sequence of this stream that has not ended."""

    sequence: Sequence
    served: Served
    habit: Habit


class Streams:
    """All streams of a server. Any thread."""

    def __init__(
        self,
        catalogue: Catalogue,
        pending: PendingBytes,
        metrics: ServerMetrics,
        limits: StreamLimits,
        unseal: Callable[[bytes, str], Snapshot],
        callers: Callers | None = None,
        traces: Traces | None = None,
    ) -> None:
        self._traces = traces
        self._catalogue = catalogue
        self._pending = pending
        self._metrics = metrics
        self._limits = limits
        self._unseal = unseal
        self._callers = callers or Callers()
        self._pacer = Pacer()
        self._lock = threading.Lock()
        self._open: set[Stream] = set()

    def open(self, call: Call) -> Listener:
        try:
            caller = self._callers.identify(lambda: call.metadata)
            # Its first message is read whatever is owed: or a stream for each message would dodge the rate.
            caller.check_rate(time.monotonic(), _PATIENCE_SECONDS)
        except TenutoError as error:
            call.finish(code_of(error), str(error), metadata_of(error))
            return GONE
        stream = Stream(
            call,
            self._catalogue,
            self._pending,
            self._metrics,
            self._limits,
            self._unseal,
            self._gone,
            caller,
            self._pacer,
            self._traces.begin(call.metadata, call.peer()) if self._traces else None,
        )
        with self._lock:
            self._open.add(stream)
        stream.drop_if_unknown()  # whose token was taken out of the file meanwhile
        return stream

    def _gone(self, stream: Stream) -> None:
        with self._lock:
            self._open.discard(stream)

    def leave(self) -> None:
        """Ends every stream behind its last replies."""
        self._pacer.close()
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            stream.leave()

    def drop_unknown(self) -> None:
        """Ends those that were opened with tokens that are known no more. To be called when the callers
        changed."""
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            stream.drop_if_unknown()

    @property
    def paced(self) -> int:
        """How many are read later, since their callers are too fast."""
        return self._pacer.waiting

    def expire(self, now: float) -> None:
        """Ends those that carried no sequence for as long as one may be silent. To be called now and then."""
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            stream.expire(now)


class Stream:
    """The conversation on one call. Implements transport.Listener and sequence.Sink."""

    __slots__ = (
        "__weakref__", "_call", "_caller", "_catalogue", "_empty_since", "_ended", "_forms", "_gone",
        "_half_closed", "_held", "_limits", "_lock", "_metrics", "_over", "_pacer", "_pause", "_pending",
        "_resume", "_trace", "_unseal", "share",
    )  # fmt: skip

    def __init__(
        self,
        call: Call,
        catalogue: Catalogue,
        pending: PendingBytes,
        metrics: ServerMetrics,
        limits: StreamLimits,
        unseal: Callable[[bytes, str], Snapshot],
        gone: Callable[[Stream], None] = lambda _: None,
        caller: Caller = ANYBODY,
        pacer: Pacer | None = None,
        trace: StreamTrace | None = None,
    ) -> None:
        self._call = call
        self._caller = caller
        self._pacer = pacer or Pacer()
        self._trace = trace
        self._over = False
        self._pause = 0.0  # seconds until it is read on: its caller is too fast
        self._catalogue = catalogue
        self._pending = pending
        self.share = PendingBytes(limits.unanswered_bytes, pending)  # this stream's part of them
        self._resume: Callable[[], None] | None = None
        self._metrics = metrics
        self._limits = limits
        self._unseal = unseal
        self._gone = gone
        self._empty_since = time.monotonic()  # when it last had no sequence; held ones make it meaningless
        self._lock = threading.Lock()
        self._held: dict[int, _Held] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._half_closed = False
        self._forms: ChunkForms[_Held] = ChunkForms()

    # transport.Listener

    def received(self, message: bytes) -> None:
        at, end, now = 0, len(message), time.monotonic()
        for taken in range(MAX_EVENTS + 1):
            if at == end:
                if self._caller.rate:
                    self._pause = self._caller.spend(taken, now)
                return
            found = self._forms.find(message, at)
            if found is None or (samples := found[0].take(message, at)) is None:
                self._parse(message, at, taken, now)
                return
            form, held = found
            at += form.size
            nbytes = len(samples) + CHUNK_BYTES
            self.share.add_to_both(nbytes)
            held.served.engine.accept(held.sequence, Chunk(form.step - 1, (samples,), now, nbytes))
        self._abort(_too_many(MAX_EVENTS + 1))

    def _parse(self, message: bytes, at: int, taken: int, now: float) -> None:
        """From there on; before it are so many chunks that were taken. Events stand one behind the other, so
        the rest of a message is a message as well."""
        message = message[at:]
        try:
            request = pb.StreamRequest.FromString(message)
        except DecodeError:
            self._abort(WrongMessage(f"{len(message)} bytes are no tenuto.v1.StreamRequest"))
            return
        events = request.events
        if taken + len(events) > MAX_EVENTS:
            self._abort(_too_many(taken + len(events)))
            return
        if self._caller.rate:
            chunks = sum(event.HasField("chunk") for event in events)
            self._pause = self._caller.spend(taken + chunks, now)
        alike: dict[int, int] = {}  # by sequence, which event is to get a form
        for number, event in enumerate(events):
            kind = event.WhichOneof("event")
            held = self._held.get(event.sequence)
            if kind == "chunk" and held is not None:
                if self._chunk(held, event.chunk, now):
                    alike[event.sequence] = number
                else:
                    alike.pop(event.sequence, None)
            elif kind == "open":
                self._open(event.sequence, event.open, held, now)
            elif held is None:
                self._strayed(event.sequence, kind)
            elif kind == "end":
                self._finish(held, Ending.END)
            elif kind == "checkpoint":
                self.share.add(COMMAND_BYTES)
                held.served.engine.checkpoint(held.sequence)
            else:
                text = "an Event without open, chunk, checkpoint or end"
                self._finish(held, WrongMessage(text))
        if alike:
            self._learn(message, events, alike)

    def _learn(self, message: bytes, events: Items[pb.Event], alike: dict[int, int]) -> None:
        """Makes forms for those: what comes next may look like them."""
        at = 0
        for number, event in enumerate(events):
            held = self._held.get(event.sequence)
            if held is not None and alike.get(event.sequence) == number:
                form = ChunkForm.behind(event, message, at)
                with self._lock:  # the sequence does not end meanwhile
                    self._forms.drop(held.habit.form)
                    held.habit.expect(form)
                    if form is not None and self._held.get(event.sequence) is held:
                        self._forms.put(form, held)
            at += event_bytes(event)

    def half_closed(self) -> None:
        with self._lock:
            self._half_closed = True
            held = list(self._held.values())
        for one in held:
            self._finish(one, Ending.STREAM_ENDED)
        if not held:
            self._call.finish()

    def terminated(self) -> None:
        with self._lock:
            self._over = True  # `_open` may be under way on another thread, and adds nothing from here on
            held, self._held = list(self._held.values()), {}
            self._forms.clear()  # or it and its sequences would keep each other alive
        self._caller.leave_places(len(held))
        for one in held:
            one.served.engine.close(one.sequence, Ending.CANCELLED)
        if self._resume is not None:
            self._pending.forget(self._resume)
            self._pacer.forget(self._resume)
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.close()
        self._gone(self)

    def leave(self) -> None:
        """Ends the stream behind its last replies: the server goes."""
        error = ServerDraining("the server has left; go to another one")
        self._call.finish(code_of(error), str(error), metadata_of(error))

    def drop_if_unknown(self) -> None:
        """Ends the stream, and what it carries, if the token that opened it is known no more."""
        if not self._caller.is_known:
            self.terminated()  # its sequences at once, whether or not the client reads how it ends
            error = Unauthenticated("the token that opened this stream is not known here any more")
            self._call.finish(code_of(error), str(error), metadata_of(error))

    def expire(self, now: float) -> None:
        """Ends the stream if it carried no sequence for too long."""
        seconds = self._limits.idle_seconds
        with self._lock:
            if not seconds or self._held or now - self._empty_since < seconds:
                return
        error = StreamIdle(
            f"the stream carried no sequence for {seconds:g} s; open another when one is needed"
        )
        self._call.finish(code_of(error), str(error), metadata_of(error))

    def wait(self, resume: Callable[[], None]) -> bool:
        if self._pause:
            self._resume, seconds, self._pause = resume, self._pause, 0.0
            self._pacer.later(seconds, resume)
            return True
        if not self.share.full and not self._pending.full:
            return False
        self._resume = resume
        return self.share.wait(resume) or self._pending.wait(resume)

    # sequence.Sink

    @property
    def full(self) -> bool:
        return self._call.backed_up

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        try:
            sequence, reply = replies[0]
            if len(replies) == 1 and isinstance(reply, Output):  # nearly always
                held = self._held.get(sequence.key)
                if held is not None:
                    self._call.send(held.served.writer.write(sequence.key, reply))
                    if (trace := self._trace) is not None:
                        trace.answered(held.served.engine.metrics, sequence, reply)
                return
            self._deliver(replies)
        except Exception:
            log.exception("replies could not be written; their stream is cancelled")
            self._call.cancel()

    def _deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        messages: list[bytes] = []
        endings: list[tuple[Sequence, Closed | Failed]] = []
        for sequence, reply in replies:
            key = sequence.key
            if isinstance(reply, Output):
                held = self._held.get(key)
                if held is not None:
                    messages.append(held.served.writer.write(key, reply))
                    if (trace := self._trace) is not None:
                        trace.answered(held.served.engine.metrics, sequence, reply)
            elif isinstance(reply, Opened):
                messages.append(wire.opened(key, reply))
            elif isinstance(reply, Checkpoint):
                messages.append(wire.checkpoint(key, reply))
            else:
                messages.append(
                    wire.closed(key, reply) if isinstance(reply, Closed) else wire.failed(key, reply)
                )
                endings.append((sequence, reply))
                if (trace := self._trace) is not None:
                    trace.ended(sequence, reply)
        if not messages:  # the call is over
            return
        if not endings:
            for message in wire.joined(messages):
                self._call.send(message)
            return
        # In one step with its last reply: `half_closed` must not finish the call between the two.
        with self._lock:
            for sequence, ending in endings:
                self._forget(sequence, ending)
            for message in wire.joined(messages):
                self._call.send(message)
            done = self._half_closed and not self._held
        if any(_is_rebalance(ending) for _, ending in endings):
            self._call.suggest_leaving()
        if done:
            self._call.finish()
        elif self._call.backed_up and any(_is_expiry(ending) for _, ending in endings):
            log.info("%s leaves its replies untaken; its stream is cancelled", self._call.peer())
            self._call.cancel()

    # Events.

    def _open(self, key: int, wish: pb.Open, held: _Held | None, now: float) -> None:
        if held is not None:
            text = f"sequence {key} is open on this stream; end it first, or use another number"
            self._finish(held, AlreadyOpen(text))
            return
        snapshot = None
        try:
            if wish.resume_token:
                snapshot = self._unsealed(wish)
                served = self._catalogue.resume(snapshot.model, snapshot.fingerprint, snapshot.schema)
                _constants(dict(snapshot.constants), served.manifest)  # a newer version may offer others
                _same_sampling(wish, snapshot)
            else:
                served = self._catalogue.find(wish.model, wish.version)
            given = () if snapshot else read_given(wish.initial, served.manifest)
            sequence = self._sequence(key, wish, served.manifest, now, given)
            # The sequence of that token may still live here, on a connection that is lost unnoticed.
            instead = snapshot is not None and self._is_own(snapshot.sequence_id)
            self._caller.take_place(instead)
        except TenutoError as error:
            if wish.resume_token:
                self._metrics.resumes_refused[error.reason] += 1
            self._refuse(key, error)
            return
        with self._lock:
            over = (
                self._over
            )  # as it is now: from here on `terminated` finds the sequence, and gives its place back
            if not over:
                self._ended.pop(key, None)
                self._held[key] = _Held(sequence, served, Habit())
        if over:
            self._caller.leave_places(1)
            return
        self.share.add(COMMAND_BYTES + sum(map(len, given)))
        if snapshot is not None:
            for other in self._catalogue.engines:
                if other is not served.engine:
                    other.supersede(snapshot.sequence_id)
        served.engine.open(sequence, snapshot)

    def _is_own(self, sequence_id: str) -> bool:
        """Whether a live sequence of that id is the caller's."""
        return any(e.owner(sequence_id) == self._caller.name for e in self._catalogue.engines)

    def _unsealed(self, wish: pb.Open) -> Snapshot:
        """Where the sequence of that token stands.

        Raises: TokenInvalid, WrongSetting if the Open asks for something else than the token.
        """
        snapshot = self._unseal(wish.resume_token, self._caller.name)
        if wish.model not in ("", snapshot.model):
            raise WrongSetting(f"the resume token is of model {snapshot.model!r}, Open names {wish.model!r}")
        if wish.constants and tuple(sorted(wish.constants.items())) != snapshot.constants:
            raise WrongSetting("a sequence that resumes keeps its constants; leave them out of Open")
        return snapshot

    def _sequence(
        self, key: int, wish: pb.Open, manifest: Manifest, now: float, given: tuple[bytes, ...]
    ) -> Sequence:
        if len(wish.label.encode()) > _MAX_LABEL_BYTES:
            raise WrongSetting(f"label has {len(wish.label.encode())} bytes, the limit is {_MAX_LABEL_BYTES}")
        if wish.period_ms > _MAX_PERIOD_MS:
            raise WrongSetting(f"period_ms is {wish.period_ms}, the limit is {_MAX_PERIOD_MS}")
        limit = self._limits.idle_seconds
        return Sequence(
            self,
            manifest,
            key=key,
            now=now,
            period_seconds=wish.period_ms / 1000,
            idle_seconds=min(wish.idle_seconds or limit, limit) if limit else wish.idle_seconds,
            window=self._limits.window,
            constants=_constants(dict(wish.constants), manifest),
            label=wish.label,
            checkpoint_every=wish.checkpoint_every,
            sampling=_sampling(wish, manifest),
            caller=self._caller.name,
            given=given,
        )

    def _chunk(self, held: _Held, chunk: pb.Chunk, now: float) -> bool:
        """Hands it on. Whether the next one may look like it."""
        engine = held.served.engine
        try:
            if chunk.generate:
                self._check_generate(chunk.generate, engine.manifest)
            if chunk.generate and not chunk.inputs:  # it goes on from the last output
                data: tuple[bytes, ...] = (b"",)
            else:
                data = held.served.reader.read(chunk.inputs, engine.manifest.max_batch)
        except TenutoError as error:
            self._finish(held, type(error)(f"{error}, in step {chunk.step}"))
            return False
        nbytes = len(data[0]) + CHUNK_BYTES if len(data) == 1 else sum(map(len, data)) + CHUNK_BYTES
        if isinstance(data[0], Text):
            nbytes += _ID_BYTES * len(data[0])  # what it may be cut into
        self.share.add_to_both(nbytes)
        read = Chunk(chunk.step, data, now, nbytes, generate=chunk.generate, last=chunk.last)
        engine.accept(held.sequence, read)
        return held.habit.is_kept(chunk, held.served.reader.takes_as_it_is)

    def _check_generate(self, parts: int, manifest: Manifest) -> None:
        if manifest.generate is None:
            raise NotSupported(f"model {manifest.name!r} does not generate; leave generate at 0")
        if parts > self._limits.max_generate:
            raise TooLarge(
                f"generate is {parts}, the limit is {self._limits.max_generate} (--max-generate); send "
                "further chunks without samples, which go on from there"
            )

    def _finish(self, held: _Held, ending: Ending | TenutoError) -> None:
        self.share.add(COMMAND_BYTES)
        held.served.engine.finish(held.sequence, ending)

    def _strayed(self, key: int, kind: str | None) -> None:
        """An event for no live sequence: late for one that the server ended, or a mistake."""
        if key not in self._ended:
            text = f"{kind or 'an empty event'} for sequence {key}, which is not open; send Open first"
            self._refuse(key, NotOpen(text))

    def _refuse(self, key: int, error: TenutoError) -> None:
        self._metrics.refuse(error.reason)
        with self._lock:
            self._remember(key)
        self._call.send(wire.failed(key, Failed(error)))

    def _abort(self, error: TenutoError) -> None:
        """The stream itself is at fault: it ends, and all that it carries."""
        self._metrics.messages_refused += 1
        self.terminated()
        self._call.finish(code_of(error), str(error), metadata_of(error))

    def _forget(self, sequence: Sequence, ending: Closed | Failed) -> None:
        held = self._held.get(sequence.key)
        if held is not None and held.sequence is sequence:
            del self._held[sequence.key]
            self._caller.leave_places(1)
            self._forms.drop(held.habit.form)
            self._empty_since = time.monotonic()
            # After its own End the client sends no more of that number.
            if isinstance(ending, Failed) or ending.reason is not Ending.END:
                self._remember(sequence.key)

    def _remember(self, key: int) -> None:
        self._ended[key] = None
        self._ended.move_to_end(key)
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)


def _too_many(events: int) -> TooLarge:
    return TooLarge(f"{events} events or more in one message, the limit is {MAX_EVENTS}")


def _constants(wished: dict[str, float], manifest: Manifest) -> dict[str, float]:
    """The constants that a client chose.

    Raises: WrongSetting.
    """
    choices = {c.name: c.allowed for c in manifest.constants if c.allowed}
    for name, value in wished.items():
        if name not in choices:
            names = ", ".join(choices) or "none"
            raise WrongSetting(f"constant {name!r} cannot be chosen; model {manifest.name!r} offers {names}")
        if value not in choices[name]:
            raise WrongSetting(
                f"constant {name!r} is {value:g}; allowed: {', '.join(f'{v:g}' for v in choices[name])}"
            )
    return wished


def _sampling(wish: pb.Open, manifest: Manifest) -> Sampling | None:
    """How the sequence is to be sampled: as its client wishes, else as the manifest says, with a seed drawn
    here.

    Raises: WrongSetting.
    """
    rule, wished = manifest.generate, wish.sampling
    if rule is None:
        if wish.HasField("sampling") and not wish.resume_token:
            raise WrongSetting(f"model {manifest.name!r} does not generate; leave sampling out of Open")
        return None
    if wished.top_k and rule.sampling == "bernoulli":
        raise WrongSetting(f"model {manifest.name!r} draws each number by itself; leave top_k at 0")
    return Sampling(
        wished.seed if wished.HasField("seed") else secrets.randbits(_SEED_BITS),
        wished.temperature or rule.temperature,
        wished.top_k or rule.top_k,
    )


def _same_sampling(wish: pb.Open, snapshot: Snapshot) -> None:
    """What the Open of a sequence that resumes says of its sampling must be what it had.

    Raises: WrongSetting.
    """
    if snapshot.generation is None:
        return
    wished, had = wish.sampling, snapshot.generation.sampling
    seed = wished.seed if wished.HasField("seed") else had.seed
    if (seed, wished.temperature or had.temperature, wished.top_k or had.top_k) != (
        had.seed,
        had.temperature,
        had.top_k,
    ):
        raise WrongSetting("a sequence that resumes keeps its sampling; leave it out of Open")


def _is_rebalance(ending: Closed | Failed) -> bool:
    return isinstance(ending, Closed) and ending.reason is Ending.REBALANCE


def _is_expiry(ending: Closed | Failed) -> bool:
    return isinstance(ending, Closed) and ending.reason is Ending.IDLE_EXPIRED
