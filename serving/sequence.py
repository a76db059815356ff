"""One caller's ordered input, and where it stands: samples not yet eaten, steps, endings.

Everything here is owned by the engine thread of the sequence's model. Other threads make `Chunk`s and read
`Sequence.id`; they touch nothing else.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import math
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .errors import TenutoError, WrongInput
from .manifest import Input, Manifest
from .pending import PendingBytes
from .sampling import Generation, Sampling
from .snapshot import Snapshot
from .text import Cutter, Text

DEFAULT_PERIOD_SECONDS = 0.2
# What a chunk costs beyond its samples, as counted against the pending limits.
CHUNK_BYTES = 256
# A chunk that comes so many periods after it was expected follows a pause.
_PAUSE_PERIODS = 4
# A slower pace than that does not make a chunk less urgent.
_LONGEST_PATIENCE_SECONDS = 1.0


class Wish(enum.Enum):
    """What a client asks for between two chunks."""

    CHECKPOINT = enum.auto()


class Ending(enum.IntEnum):
    """Why a sequence ended. The numbers are those of the wire's enum."""

    END = 1
    STREAM_ENDED = 2
    CANCELLED = 3
    IDLE_EXPIRED = 4
    EVICTED = 5
    DRAINING = 6
    REBALANCE = 7
    MAX_AGE = 8
    SUPERSEDED = 9
    WINDOW_EXCEEDED = 10
    STATE_NOT_FINITE = 11
    FAILED = 12


# After these the sequence can go on elsewhere: its client gets a token.
RESUMABLE = frozenset(
    {
        Ending.STREAM_ENDED,
        Ending.IDLE_EXPIRED,
        Ending.EVICTED,
        Ending.DRAINING,
        Ending.REBALANCE,
        Ending.MAX_AGE,
        Ending.FAILED,
    }
)


@dataclass(slots=True, eq=False)
class Chunk:
    """What a client sent for one step: per input its samples, C order, time first.

    For a stateless model a "sample" is one row of the client's batch.
    """

    step: int
    data: tuple[bytes, ...]  # empty once begun; then the sample that was drawn for this part
    arrived: float  # monotonic seconds
    nbytes: int  # as counted against the pending limit
    part: int = 0  # that is run next
    generate: int = 0  # the last part that is drawn from the one before
    last: bool = False  # its client says that no other comes; for models that are told
    frames: int = -1  # frames still to run; -1: not begun
    compute: float = 0.0  # seconds inside the model
    parts: tuple[tuple[bytes, ...], ...] = ()  # per turn, per output
    came_late: bool = False  # by its sequence's clock of periods

    @property
    def is_between_parts(self) -> bool:
        """Whether some parts are answered, and none is under way."""
        return self.frames == 0 and 0 < self.part <= self.generate


@dataclass(frozen=True, slots=True)
class Opened:
    """The sequence was admitted."""

    id: str
    version: int
    next_step: int
    window: int
    sampling: Sampling | None = None  # of a model that generates


@dataclass(slots=True)  # not frozen: that costs a microsecond, and one is made for each chunk
class Output:
    """The answer to one step, or a part of it. `tensors`: per manifest output (shape without the batch axis,
    bytes); if it was `drawn`, the sample that was fed to the model's input instead."""

    step: int
    part: int
    last: bool
    tensors: tuple[tuple[tuple[int, ...], bytes], ...]
    queue_seconds: float
    compute_seconds: float
    batch_size: int
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A sealed snapshot of the sequence after `step`."""

    step: int
    token: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The sequence ended in an orderly way. With a token it can go on elsewhere."""

    reason: Ending
    last_step: int
    token: bytes = b""


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence ended by an error of its own, or was not admitted."""

    error: TenutoError
    token: bytes = b""


# Endings that need not wait for what a sequence still generates.
LEAVING = frozenset({Ending.EVICTED, Ending.DRAINING, Ending.REBALANCE, Ending.MAX_AGE})


Reply = Opened | Output | Checkpoint | Closed | Failed


class Sink(Protocol):
    """Where replies go. Called on engine threads; must not block and must not raise."""

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        """Takes all replies of one batch that are for this sink, in order."""

    @property
    def full(self) -> bool:
        """Whether this caller leaves more replies untaken than may wait."""

    @property
    def share(self) -> PendingBytes | None:
        """Where what came from this sink's caller is counted, besides the whole; it is taken off once it is
        dealt with and its replies were delivered."""


class Feed:
    """The samples of one input that are not yet eaten, with the left context before them.

    One run of bytes, `[context | unread]`, so that the next turn's row is one slice of it.
    """

    __slots__ = ("_context", "_data", "_frame_bytes", "_multiple", "_sample_bytes", "_start")

    waiting = b""  # text that waits for more

    def __init__(self, spec: Input, sample_bytes: int) -> None:
        self._sample_bytes = sample_bytes
        self._multiple = spec.multiple
        self._frame_bytes = spec.multiple * sample_bytes
        self._context = spec.left_context * sample_bytes
        self._data: bytes = b""
        if self._context:
            shape = (spec.left_context, *spec.sample_shape)
            self._data = np.full(shape, spec.left_context_value, spec.numpy_dtype).tobytes()
        self._start = self._context  # bytes before the first sample not eaten

    def add(self, samples: bytes) -> int:
        """Returns the frames that there are now.

        Raises: TenutoError for a text that cannot be cut; then nothing is added.
        """
        keep = self._start - self._context
        # The common case, nothing left over and no context, keeps the client's bytes as they are.
        self._data = data = samples if keep == len(self._data) else self._data[keep:] + samples
        self._start = self._context
        return (len(data) - self._context) // self._frame_bytes if self._frame_bytes else 0

    @property
    def unread(self) -> int:
        """Samples not yet eaten."""
        return (len(self._data) - self._start) // self._sample_bytes if self._sample_bytes else 0

    def padding(self) -> bytes:
        """The zeros that fill what is left over up to a whole frame; none if nothing is left over."""
        over = self.unread % self._multiple
        return bytes((self._multiple - over) * self._sample_bytes) if over else b""

    def rest(self) -> bytes:
        """The left context, and the samples not yet eaten."""
        return self._data[self._start - self._context :]

    def restore(self, rest: bytes) -> None:
        """The inverse of `rest`."""
        self._data, self._start = rest, self._context

    def peek(self, frames: int) -> bytes:
        """The next `frames` frames with their context; nothing is eaten."""
        begin, end = self._start - self._context, self._start + frames * self._frame_bytes
        return self._data if begin == 0 and end == len(self._data) else self._data[begin:end]

    def eat(self, frames: int) -> None:
        self._start = start = self._start + frames * self._frame_bytes
        if len(self._data) - start < self._frame_bytes:  # an idle sequence does not keep its last chunk alive
            self._data, self._start = self._data[start - self._context :], self._context


class TextFeed(Feed):
    """Of an input that takes text as well. `waiting` is UTF-8 that a later text may still change; samples
    that come as ids end it."""

    __slots__ = ("_cutter", "waiting")

    def __init__(self, spec: Input, cutter: Cutter) -> None:
        super().__init__(spec, spec.sample_bytes)
        self._cutter = cutter
        self.waiting = b""

    def add(self, samples: bytes) -> int:
        text = isinstance(samples, Text)
        if not text and not self.waiting:
            return super().add(samples)
        ids, waiting = self._cutter.cut(self.waiting, samples if text else b"", final=not text)
        self.waiting = waiting
        return super().add(ids.tobytes() if text else ids.tobytes() + samples)

    def padding(self) -> bytes:
        ids, _ = self._cutter.cut(self.waiting, b"", final=True)
        over = (self.unread + len(ids)) % self._multiple
        return bytes((self._multiple - over) * self._sample_bytes) if over else b""


_numbers = itertools.count(1)


class Sequence:
    """One caller's sequence on one model version.

    `pending` holds accepted chunks and wishes in order, then perhaps how it ends: an Ending, or the error
    that it ends with once the chunks before it are answered.
    """

    __slots__ = (
        "accepted", "answered", "begun", "caller", "checkpoint_every", "constants", "ended", "expected",
        "feeds", "generation", "given", "heard", "id", "idle_seconds", "key", "label", "last_outputs",
        "movable", "number", "patience_seconds", "pending", "period_seconds", "ran", "scheduled", "sealed",
        "sink", "slot", "window",
    )  # fmt: skip

    def __init__(
        self,
        sink: Sink,
        manifest: Manifest,
        *,
        key: int = 0,
        now: float = 0.0,
        period_seconds: float = 0.0,
        idle_seconds: float = 0.0,
        window: int = 4,
        constants: Mapping[str, float] | None = None,
        label: str = "",
        checkpoint_every: int = 0,
        movable: bool = True,
        sampling: Sampling | None = None,
        caller: str = "",
        given: tuple[bytes, ...] = (),
    ) -> None:
        self.sink = sink
        self.caller = caller  # whose it is; empty where nobody is asked
        self.key = key  # the client's number on its stream
        self.number = next(_numbers)  # order of opening; breaks ties
        self.id = secrets.token_hex(8)
        self.label = label
        self.period_seconds = period_seconds
        # How long after its arrival a chunk is due.
        self.patience_seconds = min(period_seconds or DEFAULT_PERIOD_SECONDS, _LONGEST_PATIENCE_SECONDS)
        self.idle_seconds = idle_seconds
        self.window = window
        self.constants = tuple(sorted((constants or {}).items()))
        self.slot = -1
        self.given = given  # where its states begin, if its client said so, until it is open
        self.ran = False  # whether a run had samples of it; kept for models that are told
        self.begun = now
        self.expected = -math.inf  # when the last chunk was due to come, by the declared period
        self.heard = now  # when the last chunk was accepted, monotonic seconds
        self.accepted = 0  # the last step accepted
        self.answered = 0  # the last step answered
        self.last_outputs: tuple[Output, ...] = ()  # all of that step, if they are small
        self.generation = Generation(sampling) if sampling else None
        self.checkpoint_every = checkpoint_every  # chunks; 0: the model's
        self.movable = movable  # whether its client can go on with it elsewhere, by a token
        self.sealed = 0  # the step of the last checkpoint
        # A list: a few at most, and an empty deque takes half a kilobyte.
        self.pending: list[Chunk | Wish | Ending | TenutoError] = []
        self.scheduled = False  # whether the scheduler holds it
        self.ended = False
        self.feeds = feeds_of(manifest)

    def begin(self, chunk: Chunk) -> None:
        """Joins the chunk to what was left over and counts the frames that can run.

        Raises: TenutoError for a text that cannot be cut, or another chunk than the one that was begun.
        """
        if self.generation is not None and (chunk.generate or self.generation.done):
            self._begin_to_generate(chunk, self.generation)
            return
        if len(self.feeds) == 1:  # without a generator
            chunk.frames = self.feeds[0].add(chunk.data[0])
        else:
            chunk.frames = min([f.add(samples) for f, samples in zip(self.feeds, chunk.data, strict=True)])
        chunk.data = ()

    def _begin_to_generate(self, chunk: Chunk, generation: Generation) -> None:
        digest = hashlib.blake2b(b"".join((b"%d " % chunk.generate, *chunk.data)), digest_size=8).hexdigest()
        if generation.done:  # it was begun where the sequence was before
            if digest != generation.digest:
                raise WrongInput(
                    f"parts 0 to {generation.done - 1} of it were answered when the resume token was sealed; "
                    "send the same chunk again"
                )
            chunk.part, chunk.data, chunk.frames = generation.done, (), 0
            return
        feed = self.feeds[0]
        chunk.frames = feed.add(chunk.data[0])
        chunk.data, chunk.frames = (), feed.add(b"")  # a text ends where the model goes on
        generation.digest = digest

    def feed_back(self, chunk: Chunk, sample: bytes) -> None:
        """The chunk's next part runs that sample."""
        self.feeds[0].add(sample)
        chunk.data, chunk.frames = (sample,), 1

    def falls_behind(self, arrived: float) -> bool:
        """Whether the next chunk, which came at that time, came more than a period late.

        By a clock that goes on a period a chunk, and is set anew where the client is late, paused or ahead.
        That is how a server sees that it reads too slowly: what it has not read has not arrived.
        """
        self.expected += self.period_seconds
        behind = arrived - self.expected
        if 0 <= behind <= self.period_seconds:
            return False
        self.expected = arrived  # or a client whose clock is a hundredth slow would be late for ever
        return 0 < behind <= _PAUSE_PERIODS * self.period_seconds

    @property
    def closing(self) -> bool:
        """Whether it ends once its accepted chunks are answered; what comes after is ignored."""
        return bool(self.pending) and not isinstance(self.pending[-1], Chunk | Wish)

    @property
    def generates(self) -> bool:
        """Whether some accepted chunk goes on by itself."""
        return any(isinstance(item, Chunk) and item.generate for item in self.pending)

    @property
    def unanswered(self) -> int:
        """Chunks accepted and not yet answered."""
        return sum([isinstance(item, Chunk) for item in self.pending])

    @property
    def at_rest(self) -> bool:
        """Whether it stands between two chunks, or two parts that are generated: no more of the first pending
        one is eaten or joined than its answered parts."""
        head = self.pending[0] if self.pending else None
        return not isinstance(head, Chunk) or head.frames < 0 or head.is_between_parts

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on where another sequence stood: all but the states, which are in the pool."""
        self.id, self.constants = snapshot.sequence_id, snapshot.constants
        self.accepted = self.answered = self.sealed = snapshot.step
        self.ran = snapshot.ran
        for feed, rest in zip(self.feeds, snapshot.feeds, strict=True):
            feed.restore(rest)
        if isinstance(self.feeds[0], TextFeed):
            self.feeds[0].waiting = snapshot.text
        if self.generation is not None and snapshot.generation is not None:
            self.generation = replace(snapshot.generation)


def feeds_of(manifest: Manifest) -> Items[Feed]:
    """Fresh feeds, one an input, in the manifest's order."""
    return tuple(
        TextFeed(spec, spec.text) if spec.text else Feed(spec, spec.sample_bytes) for spec in manifest.inputs
    )
