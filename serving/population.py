"""The live sequences of one model version: how they come, what they bring next, and how they end.

Everything here runs on the engine thread, between two batches or right behind one, and in the order in which
it was asked for: no batch holds a slot that is reset, restored or handed on, and no lock is needed to say so.
"""

from __future__ import annotations

import heapq
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

from .admission import Admission
from .delivery import Delivery
from .errors import (
    AlreadyOpen,
    ModelNotReady,
    PoolFull,
    RunFailed,
    ServerDraining,
    StepGap,
    TenutoError,
)
from .layout import Layout
from .manifest import Manifest
from .metrics import ModelMetrics
from .sampling import Sampler
from .scheduler import Scheduler
from .sequence import (
    LEAVING,
    RESUMABLE,
    Checkpoint,
    Chunk,
    Closed,
    Ending,
    Failed,
    Opened,
    Output,
    Sequence,
    Wish,
)
from .snapshot import Checkpoints, Snapshot
from .state_pool import StatePool

log = logging.getLogger("tenuto.population")

# What a command other than a chunk takes in memory until it is carried out, an Open's sequence included.
COMMAND_BYTES = 2048
# What the outputs kept for steps that are sent again may take, in a model whose slots are all used.
REPEATS_BYTES = 64 << 20
# The tokens of one delivery take no more than that. Whoever comes later gets his with a later one: many
# chunks and wishes in one message, or a drain, must not become as many large tokens at once.
SEALED_BYTES = 16 << 20
# What one part that was generated takes in memory, roughly.
PART_BYTES = 256
# How long those who wait for a token, to be sent away, or for their caller to read, wait for the next look.
_LOOK_SECONDS = 0.02


class Population:
    """The sequences of one engine, owned by its thread. Other threads read `live` and the plain attributes.

    `resume_reserve` is the share of `max_sequences` that only sequences that resume may take; without
    `checkpoints` none can.
    """

    def __init__(
        self,
        manifest: Manifest,
        version: int,
        *,
        pool: StatePool,
        max_sequences: int,
        resume_reserve: float,
        checkpoints: Checkpoints | None,
        layout: Layout,
        scheduler: Scheduler,
        delivery: Delivery,
        metrics: ModelMetrics,
        clock: Callable[[], float],
        in_flight: int = 1,
    ) -> None:
        self.live: dict[str, Sequence] = {}
        self.emptied = threading.Event()  # set when draining or retiring, and no sequence is left
        self.past_max_age = False  # its time is over: what was live ends, nothing resumes on it
        self.stopped = False  # nothing is run any more
        self.admission = Admission(clock())
        self.turn_seconds = 0.0  # the engine's last turn that ran a batch
        self.paced = self.late = 0  # chunks answered that have a declared period; and later than that
        self._manifest = manifest
        self._version = version
        self._where = f"{manifest.name}/{version}"
        self._pool = pool
        self._max_sequences = max_sequences
        self._reserved = int(max_sequences * resume_reserve)  # places that only a resume takes
        self._checkpoints = checkpoints
        self._layout = layout
        self._scheduler = scheduler
        self._delivery = delivery
        self._metrics = metrics
        self._clock = clock
        self._turns = 1 + in_flight  # from a chunk's coming to its answer: the one in progress, and its own
        self._idle: list[tuple[float, str]] = []  # (deadline, sequence id); rechecked when due
        self._kept_bytes = REPEATS_BYTES // max_sequences  # a sequence keeps its last output up to that
        self._repeated: set[int] = set()  # numbers of sequences that got their last output again
        self._sealed: set[int] = set()  # numbers of sequences that got a token with this delivery
        self._sealed_bytes = 0  # of this delivery
        self._owed: dict[int, Sequence] = {}  # by number: those that wait for a token
        self._leaving: deque[tuple[Sequence, Ending]] = deque()  # are still to be sent away
        self._latencies: list[float] = []  # of chunks answered, not yet in the metrics
        self._sampler = Sampler(manifest) if manifest.generate else None
        self._paused: dict[int, Sequence] = {}  # by number: go on once their callers take their replies
        self._wake_at = 0.0
        self._draining = False
        self._retiring = False
        self._max_age_at = math.inf  # when a retiring version's live sequences end

    def next_look(self) -> float:
        """When somebody waits for a token, was silent or here for too long; infinity: nobody."""
        if self._owed or self._leaving or self._paused:
            return self._clock() + _LOOK_SECONDS
        return min(self._idle[0][0] if self._idle else math.inf, self._max_age_at)

    def look(self, now: float) -> None:
        """Ends those that were silent, or here, for too long, and those that are to be sent away."""
        if self._idle and self._idle[0][0] <= now:
            self._expire(now)
        if now >= self._max_age_at:
            self._come_of_age()
        if self._leaving:
            self._send_away()
        if self._paused and now >= self._wake_at:
            self._wake_at = now + _LOOK_SECONDS  # thousands may wait: not at every turn of the others
            self._wake()

    def hand_over(self) -> None:
        """All replies go out, and what was answered is counted."""
        if self._owed:
            self._seal_owed()
        if self._delivery.is_empty:
            return
        self._account()
        self._repeated.clear()
        self._sealed.clear()
        self._sealed_bytes = 0
        self._delivery.hand_over()

    def answer(self, sequence: Sequence, chunk: Chunk, queued: float, rows: int, now: float) -> None:
        """The first pending chunk is done, or a part of it: its Output goes out."""
        tensors = self._layout.join(chunk.parts)
        output = Output(chunk.step, chunk.part, True, tensors, queued, chunk.compute, rows)
        if not sequence.answered and not chunk.part:
            self._metrics.first_output.add(now - sequence.begun)
        if self._sampler and sequence.generation and self._goes_on(sequence, chunk, output, now):
            return
        sequence.pending.pop(0)
        sequence.answered = chunk.step
        self._delivery.send(sequence, output, chunk.nbytes)
        # A single request has no step that may be sent again, and none to resume; a sequence whose client
        # knows of no tokens has its last answer where its repetitions are known.
        if sequence.accepted and sequence.movable:
            self._keep(sequence, output)
            if self._is_due(sequence, chunk.step):
                self._checkpoint(sequence)
        self._latencies.append(now - chunk.arrived)
        if sequence.period_seconds:
            lag = now - chunk.arrived - sequence.period_seconds
            # No answer comes sooner than these turns, whatever period was declared.
            waited = lag > 0 and now - chunk.arrived > self._turns * self.turn_seconds
            self.paced += 1
            self.late += waited or chunk.came_late
            self._metrics.chunk_lag.add(max(lag, 0.0))
            self._metrics.deadline_misses += lag > 0

    def _is_due(self, sequence: Sequence, step: int) -> bool:
        """Whether a token follows that step's output."""
        every = sequence.checkpoint_every  # the first one at once: until then a resume is a new sequence
        due = every and (not sequence.sealed or step - sequence.sealed >= every)
        return bool(due or (self._owed and sequence.number in self._owed))

    def expect_tokens(self, sequences: Iterable[Sequence]) -> None:
        """Those of a batch whose chunk is about to be answered: of them the pool reads at once all that a
        token follows."""
        if self._checkpoints is not None:
            self._expect(s for s in sequences if not s.ended and self._is_due(s, s.answered + 1))

    def _expect(self, sequences: Iterable[Sequence]) -> None:
        """As many as one delivery may bring."""
        most = max(1, SEALED_BYTES // max(1, self._manifest.slot_bytes))
        slots = [s.slot for s in islice(sequences, most) if s.slot >= 0]
        try:
            self._pool.expect(slots)
        except RunFailed as error:  # a token that cannot be sealed says so itself
            log.debug("%s: %s", self._where, error)

    def _keep(self, sequence: Sequence, output: Output) -> None:
        """Keeps the outputs of the last step for a client who sends it again, if all of them are small."""
        kept = sequence.last_outputs
        if not output.part:
            tensors = output.tensors
            size = len(tensors[0][1]) if len(tensors) == 1 else sum([len(data) for _, data in tensors])
            small = size <= self._kept_bytes
            sequence.last_outputs = (output,) if small else ()
        elif kept and kept[0].step == output.step:
            small = len(kept) * PART_BYTES <= self._kept_bytes
            sequence.last_outputs = (*kept, output) if small else ()

    def _goes_on(self, sequence: Sequence, chunk: Chunk, output: Output, now: float) -> bool:
        """Takes from the chunk's outputs what the next part is drawn from. Whether there is a next part: then
        this one goes out, and the chunk stays where it is."""
        generation, sampler = sequence.generation, self._sampler
        assert generation is not None and sampler is not None
        if chunk.parts:
            generation.frame = sampler.last_frame(chunk.parts[-1])
        if chunk.part and chunk.generate:
            output.tensors, output.drawn = ((sampler.shape, chunk.data[0]),), True
            self._metrics.generated_parts += 1
            sequence.heard = now  # nobody is idle whose parts go out
        output.last = chunk.part >= chunk.generate
        if output.last:
            generation.done = 0
            return False
        generation.done = chunk.part = chunk.part + 1
        # As if its client had sent the sample now: so it shares batches with all others, and is timed alike.
        chunk.parts, chunk.compute, chunk.arrived = (), 0.0, now
        self._keep(sequence, output)
        self._delivery.send(sequence, output)
        return True

    def _account(self) -> None:
        """What was answered since the last time, at once: a lock and a histogram cost as much as a row."""
        if self._latencies:
            latencies, self._latencies = self._latencies, []
            self._metrics.chunks["answered"] += len(latencies)
            self._metrics.pending_chunks -= len(latencies)
            self._metrics.chunk_latency.add_all(latencies)

    def open(self, sequence: Sequence, snapshot: Snapshot | None) -> None:
        self._delivery.settle(sequence, COMMAND_BYTES + sum(map(len, sequence.given)))
        if sequence.ended:  # its call was over before it got here
            return
        try:
            self._admit(sequence, snapshot)
        except TenutoError as error:
            sequence.ended = True
            self._metrics.rejected[error.reason] += 1
            if snapshot is not None:
                self._metrics.resumes_refused[error.reason] += 1
            self._delivery.send(sequence, Failed(error))
            return
        self.live[sequence.id] = sequence
        if self._checkpoints is not None and sequence.movable:
            sequence.checkpoint_every = self._checkpoints.interval(sequence.checkpoint_every)
        if snapshot is not None:
            self._metrics.resumed += 1
        if self._retiring:
            self.emptied.clear()
        if sequence.idle_seconds:
            self._watch_idle(self._clock() + sequence.idle_seconds, sequence)
        self._metrics.sequences_started += 1
        self._count_live()
        self._delivery.send(
            sequence,
            Opened(
                sequence.id,
                self._version,
                sequence.accepted + 1,
                sequence.window,
                sequence.generation.sampling if sequence.generation else None,
            ),
        )

    def _admit(self, sequence: Sequence, snapshot: Snapshot | None) -> None:
        """Finds the sequence a slot and sets its state.

        Raises: ServerDraining, ModelNotReady, Overloaded, PoolFull, TokenInvalid. A sequence that resumes is
        no new load on the whole, and is not refused for OVERLOADED.
        """
        if self._draining:
            raise ServerDraining("the server is leaving and takes no new sequences; open it on another one")
        if self.past_max_age or self.stopped:
            raise ModelNotReady(f"{self._where} was replaced and is unloaded; open a newer version")
        if snapshot is None:
            self.admission.check(self._clock(), self._where)
        else:
            snapshot.check(self._manifest)
            sequence.restore(snapshot)
            old = self.live.get(sequence.id)
            if old is not None:
                self.close(old, Ending.SUPERSEDED)
        spare = 0 if snapshot else self._reserved
        if self._manifest.stateful:
            sequence.slot = self._pool.allocate(sequence.id, spare)
            states = snapshot.states if snapshot is not None else sequence.given
            if states:
                self._pool.write(sequence.slot, states)
            sequence.given = ()
        elif len(self.live) >= self._max_sequences - spare:
            raise PoolFull(f"{self._max_sequences} sequences are open; retry, or raise --max-sequences")

    def accept(self, sequence: Sequence, chunk: Chunk) -> None:
        if sequence.ended or (sequence.pending and sequence.closing):
            self._drop(sequence, chunk)
            return
        sequence.heard = chunk.arrived
        if chunk.step != sequence.accepted + 1:
            self._out_of_step(sequence, chunk)
        elif len(sequence.pending) >= sequence.window and sequence.unanswered >= sequence.window:
            self._drop(sequence, chunk)
            sequence.pending.append(Ending.WINDOW_EXCEEDED)
        else:
            sequence.accepted = chunk.step
            if sequence.period_seconds and sequence.falls_behind(chunk.arrived):
                chunk.came_late = True
                self._metrics.late_arrivals += 1
            self._metrics.pending_chunks += 1
            sequence.pending.append(chunk)
            if len(sequence.pending) == 1:
                self.advance(sequence)

    def _out_of_step(self, sequence: Sequence, chunk: Chunk) -> None:
        """A repeated step is answered again or ignored; a skipped one ends the sequence."""
        self._delivery.settle(sequence, chunk.nbytes)
        if 0 < chunk.step <= sequence.accepted:
            self._metrics.steps_repeated += 1
            again = sequence.last_outputs if chunk.step == sequence.answered else ()
            # Once a delivery: a message of many small repeats must not become as many large outputs.
            if again and sequence.number not in self._repeated:
                self._repeated.add(sequence.number)
                for output in again:
                    self._delivery.send(sequence, output)
            return
        text = f"step {chunk.step} came, expected {sequence.accepted + 1}; number chunks without gaps"
        self.end_after_pending(sequence, StepGap(text))

    def request(self, sequence: Sequence, chunk: Chunk) -> None:
        if self.stopped:  # nothing will run it
            self.close(sequence, Ending.DRAINING)
        if sequence.ended:
            self._drop(sequence, chunk)
            return
        self._metrics.pending_chunks += 1
        sequence.pending.append(chunk)
        self.advance(sequence)

    def wish_checkpoint(self, sequence: Sequence, _: None) -> None:
        self._delivery.settle(sequence, COMMAND_BYTES)
        if sequence.ended or sequence.closing:
            return
        if sequence.pending and sequence.pending[-1] is Wish.CHECKPOINT:
            return
        sequence.pending.append(Wish.CHECKPOINT)
        if len(sequence.pending) == 1:
            self.advance(sequence)

    def _checkpoint(self, sequence: Sequence) -> None:
        """Seals the sequence, which is between two chunks, or has it wait for a later delivery."""
        if sequence.number in self._sealed and sequence.sealed == sequence.answered:
            return  # this delivery brings that token
        if self._may_seal(sequence) and (token := self._token(sequence)):
            sequence.sealed = sequence.answered
            self._owed.pop(sequence.number, None)
            self._delivery.send(sequence, Checkpoint(sequence.answered, token))
        elif self._checkpoints is not None:
            self._owed[sequence.number] = sequence

    def _may_seal(self, sequence: Sequence) -> bool:
        """Once a delivery, so many bytes in all, and none for a caller who leaves his replies untaken."""
        fresh = sequence.number not in self._sealed
        return fresh and self._sealed_bytes < SEALED_BYTES and not sequence.sink.full

    def _seal_owed(self) -> None:
        """Those that rest now. The others come by when their chunk is answered."""
        if self._pool.reads_together:
            self._expect(s for s in self._owed.values() if s.at_rest and not s.ended and self._may_seal(s))
        for sequence in list(self._owed.values()):
            if sequence.ended:
                del self._owed[sequence.number]
            elif sequence.at_rest:
                self._checkpoint(sequence)

    def _token(self, sequence: Sequence) -> bytes:
        """A resume token of the sequence after its last answered step."""
        sealing = self._checkpoints
        if sealing is None or not sequence.movable:
            return b""
        if not sequence.at_rest or sequence.id not in self.live:
            return b""
        try:
            states = self._pool.read(sequence.slot) if self._manifest.stateful else ()
        except RunFailed as error:  # a lost device: the next run finds out, and the watchdog ends the process
            log.warning("%s: no token for %s: %s", self._where, sequence.id, error)
            return b""
        snapshot = Snapshot(
            self._manifest.name,
            self._version,
            sealing.fingerprint,
            sealing.schema,
            sequence.id,
            sequence.answered,
            sequence.constants,
            tuple([feed.rest() for feed in sequence.feeds]),
            states,
            sequence.feeds[0].waiting,
            replace(sequence.generation) if sequence.generation else None,
            sequence.ran or not self._manifest.controls,
        )
        token = sealing.seal(snapshot, sequence.caller)
        self._sealed.add(sequence.number)
        self._sealed_bytes += len(token)
        self._metrics.token_bytes.add(len(token))
        return token

    def finish(self, sequence: Sequence, ending: Ending | TenutoError) -> None:
        self._delivery.settle(sequence, COMMAND_BYTES)
        if sequence.closing and isinstance(ending, AlreadyOpen):
            sequence.pending[-1] = ending  # whoever opened a number too early must hear of it
        else:
            self.end_after_pending(sequence, ending)

    def end_after_pending(self, sequence: Sequence, ending: Ending | TenutoError) -> None:
        if not sequence.ended and not sequence.closing:
            sequence.pending.append(ending)
            if len(sequence.pending) == 1:
                self.advance(sequence)

    def advance(self, sequence: Sequence) -> None:
        """Looks at what the sequence brings next: a chunk that can run goes to the scheduler, one that
        completes no frame is answered, an ending is carried out."""
        while sequence.pending:
            head = sequence.pending[0]
            if isinstance(head, Chunk):
                try:
                    if head.frames < 0:
                        sequence.begin(head)
                    if head.generate and head.is_between_parts and not self._draw(sequence, head):
                        return
                except TenutoError as error:
                    self._fail(sequence, head, error)
                    return
                if head.frames:
                    self._scheduler.add(sequence, head)
                    return
                now = self._clock()
                self.answer(sequence, head, now - head.arrived, 0, now)
            elif isinstance(head, Wish):
                sequence.pending.pop(0)
                self._checkpoint(sequence)
            elif isinstance(head, TenutoError):
                self.close(sequence, Ending.FAILED, head)
                return
            elif head is not Ending.END or not self._tail(sequence):
                self.close(sequence, head)
                return

    def _fail(self, sequence: Sequence, chunk: Chunk, error: TenutoError) -> None:
        """The chunk cannot run: its sequence ends."""
        place = f"part {chunk.part} of step {chunk.step}" if chunk.part else f"step {chunk.step}"
        self.close(sequence, Ending.FAILED, type(error)(f"{error}, in {place}"))

    def _draw(self, sequence: Sequence, chunk: Chunk) -> bool:
        """Draws the sample that the chunk runs next. False if the sequence waits for its caller to take its
        replies, or ends: whoever is to leave does so between two parts, if he can take a token along, and
        generates the others elsewhere."""
        assert self._sampler is not None and sequence.generation is not None
        ending = sequence.pending[-1]
        if sequence.sink.full:
            self._paused[sequence.number] = sequence
            return False
        if isinstance(ending, Ending) and ending in LEAVING and self._sealed_bytes < SEALED_BYTES:
            self.close(sequence, ending)
            return False
        sequence.feed_back(chunk, self._sampler.draw(sequence.generation, chunk.step, chunk.part))
        return True

    def _wake(self) -> None:
        """Those whose callers take their replies again."""
        paused, self._paused = self._paused, {}
        for sequence in paused.values():
            if not sequence.ended:
                self.advance(sequence)

    def _tail(self, sequence: Sequence) -> bool:
        """At End, a text ends, and what is left over is padded to a frame where the manifest says so. Whether
        there was any of both; it is a further part of the last step."""
        specs = self._manifest.inputs
        try:
            padding = tuple(
                f.padding() if s.tail == "pad" else b"" for s, f in zip(specs, sequence.feeds, strict=True)
            )
        except TenutoError as error:  # the text ends within a character
            self.close(sequence, Ending.FAILED, error)
            return True
        if not any(padding) and not sequence.feeds[0].waiting:
            return False
        tail = Chunk(sequence.accepted, padding, self._clock(), 0, part=1, last=True)
        self._metrics.pending_chunks += 1
        sequence.pending.insert(0, tail)
        return True

    def close(self, sequence: Sequence, reason: Ending, error: TenutoError | None = None) -> None:
        """The one way in which a sequence ends. Its slot is free from here on: no batch holds it now."""
        if sequence.ended:
            return
        sequence.ended = True
        resumable = reason in RESUMABLE and self._sealed_bytes < SEALED_BYTES and not sequence.sink.full
        token = self._token(sequence) if resumable else b""
        for item in sequence.pending:
            if isinstance(item, Chunk):
                self._metrics.pending_chunks -= 1
                self._drop(sequence, item, "failed" if error else "dropped")
        sequence.pending.clear()
        sequence.last_outputs = ()
        if self.live.pop(sequence.id, None) is not None:
            self._metrics.ended[reason.name] += 1
            if sequence.slot >= 0:
                self._pool.free(sequence.slot, sequence.id)
            self._count_live()
            if log.isEnabledFor(logging.INFO):
                self._log(sequence, reason, error)
        self._delivery.send(
            sequence, Failed(error, token) if error else Closed(reason, sequence.answered, token)
        )
        self._look_if_empty()

    def _log(self, sequence: Sequence, ending: Ending, error: TenutoError | None) -> None:
        """An ending's line. An error's text may quote what its caller sent, so its reason stands for it."""
        seconds = self._clock() - sequence.begun
        reason = error.reason if error else ending.name
        log.info(
            "%s: %s ended %s after step %d, %.1f s",
            self._where,
            sequence.id,
            ending.name if reason == ending.name else f"{ending.name}, {reason},",
            sequence.answered,
            seconds,
            extra={
                "model": self._manifest.name,
                "version": self._version,
                "sequence": sequence.id,
                "caller": sequence.caller,
                "ending": ending.name,
                "reason": reason,
                "steps": sequence.answered,
                "seconds": round(seconds, 3),
            },
        )

    def _drop(self, sequence: Sequence, chunk: Chunk, outcome: str = "dropped") -> None:
        self._metrics.chunks[outcome] += 1
        self._delivery.settle(sequence, chunk.nbytes)

    def _watch_idle(self, deadline: float, sequence: Sequence) -> None:
        heapq.heappush(self._idle, (deadline, sequence.id))
        if len(self._idle) > 2 * len(self.live) + 64:  # those that ended do not stay until they are due
            self._idle = [entry for entry in self._idle if entry[1] in self.live]
            heapq.heapify(self._idle)

    def _expire(self, now: float) -> None:
        """Ends what has been silent for too long. Idle counts from the last chunk accepted."""
        while self._idle and self._idle[0][0] <= now:
            sequence = self.live.get(heapq.heappop(self._idle)[1])
            if sequence is None:  # ended; only its id was kept
                continue
            deadline = sequence.heard + sequence.idle_seconds
            if deadline <= now and (not sequence.pending or sequence.number in self._paused):
                self.close(sequence, Ending.IDLE_EXPIRED)
            else:
                self._watch_idle(max(deadline, now + 1.0), sequence)

    def drain(self, _: None, __: None) -> None:
        self._draining = True
        self._leaving.extend((sequence, Ending.DRAINING) for sequence in self.live.values())
        self._look_if_empty()

    def _send_away(self) -> None:
        """As many as get their tokens with one delivery; those who leave their replies untaken wait."""
        if self._pool.reads_together:
            self._expect(s for s, _ in self._leaving if s.at_rest and not s.ended and self._may_seal(s))
        for _ in range(len(self._leaving)):
            if self._sealed_bytes >= SEALED_BYTES:
                return
            sequence, reason = self._leaving.popleft()
            if sequence.sink.full and not sequence.ended:
                self._leaving.append((sequence, reason))
                continue
            if sequence.closing and sequence.generates and isinstance(sequence.pending[-1], Ending):
                sequence.pending[-1] = reason  # its End is said elsewhere, behind what is still generated
            self.end_after_pending(sequence, reason)

    def rebalance(self, how: tuple[float, int, float], _: None) -> None:
        """As `Engine.rebalance` says. The oldest come first in `live`."""
        used, count, age_seconds = how
        count = min(count, self._pool.used - len(self._leaving) - int(used * self._max_sequences))
        if count <= 0 or self._checkpoints is None or self._draining:
            return
        before = self._clock() - age_seconds
        old = (s for s in self.live.values() if s.begun <= before and s.movable and not s.closing)
        self._leaving.extend((sequence, Ending.REBALANCE) for sequence in islice(old, count))

    def retire(self, max_age_seconds: float, _: None) -> None:
        self._retiring = True
        if max_age_seconds:
            self._max_age_at = self._clock() + max_age_seconds
        self._look_if_empty()

    def _come_of_age(self) -> None:
        """A retiring version's time is over: each sequence ends behind its accepted chunks."""
        self._max_age_at = math.inf
        self.past_max_age = True
        self._leaving.extend((sequence, Ending.MAX_AGE) for sequence in self.live.values())

    def _look_if_empty(self) -> None:
        if (self._draining or self._retiring) and not self.live:
            self.emptied.set()

    def _count_live(self) -> None:
        self._metrics.active_sequences = len(self.live)
        self._metrics.slots_used = self._pool.used
