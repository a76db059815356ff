"""One model version: scheduler + pool + runner, and the one thread that turns them.

Other threads put commands into the inbox; everything else here happens on the engine thread, between two
batches or in one. That is what orders opening, resetting, ending and handing a slot on against the batches
that hold it, without a lock.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .admission import Admission
from .delivery import Delivery
from .errors import (
    AlreadyOpen,
    ModelNotReady,
    PoolFull,
    RunFailed,
    ServerDraining,
    StateNotFinite,
    StepGap,
    TenutoError,
)
from .inbox import Command, Inbox
from .layout import Layout
from .manifest import Manifest
from .metrics import ModelMetrics
from .pending import PendingBytes
from .scheduler import Batch, Scheduler
from .sequence import (
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

log = logging.getLogger("tenuto.engine")

# What a command other than a chunk takes in memory until it is carried out, an Open's sequence included.
COMMAND_BYTES = 2048
# What the outputs kept for steps that are sent again may take, in a model whose slots are all used.
REPEATS_BYTES = 64 << 20

# Endings that come by the thousand, by the clients or the server's own: in the log at level debug.
_ORDINARY = frozenset({Ending.END, Ending.STREAM_ENDED, Ending.CANCELLED, Ending.DRAINING})

Array = NDArray[Any]


class Runner(Protocol):
    """Runs the graph. `run` returns the manifest's outputs, then its states' outputs, each in order."""

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """Raises: RunFailed."""

    def enter_thread(self) -> None:
        """Called once, on the thread that will run."""

    def probe(self) -> None:
        """Runs what is known to run.

        Raises: RunFailed: no run will succeed any more.
        """


class Engine:
    """Turns one model version.

    Any thread: `open`, `accept`, `request`, `finish`, `close`, `drain`, `retire`, `stop`, `sequences`. Engine
    thread: all else. A test may call `turn` itself instead of `start`.
    """

    def __init__(
        self,
        manifest: Manifest,
        runner: Runner,
        *,
        version: int,
        max_sequences: int,
        max_state_bytes: int = 0,
        resume_reserve: float = 0.0,
        checkpoints: Checkpoints | None = None,
        pending: PendingBytes,
        metrics: ModelMetrics | None = None,
        flush: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = manifest
        self.version = version
        self.where = f"{manifest.name}/{version}"  # for logs
        self._pool = StatePool(manifest.states, max_sequences if manifest.stateful else 0, max_state_bytes)
        self.max_sequences = self._pool.capacity if manifest.stateful else max_sequences
        self.state_bytes = self._pool.nbytes
        self._reserved = int(self.max_sequences * resume_reserve)  # places that only a resume takes
        self._checkpoints = checkpoints  # none: no sequence can resume
        self.metrics = metrics or ModelMetrics(manifest.name, version)
        self.metrics.slots = self.max_sequences
        self.running_since = 0.0  # when the run in progress began; 0: none. Read by the watchdog.
        self.broken = ""  # why no run will succeed any more. Read by the watchdog.
        self.emptied = threading.Event()  # set when draining or retiring, and no sequence is left
        self.past_max_age = False  # its time is over: what was live ends, nothing resumes on it
        self._runner = runner
        self._pending = pending
        self._clock = clock
        self._scheduler = Scheduler(manifest)
        self._layout = Layout(manifest)
        self._inbox = Inbox()
        self._live: dict[str, Sequence] = {}
        self._idle: list[tuple[float, str]] = []  # (deadline, sequence id); rechecked when due
        self._delivery = Delivery(pending, flush, self.where)
        self._kept_bytes = REPEATS_BYTES // self.max_sequences  # a sequence keeps its last output up to that
        self._repeated: set[int] = set()  # numbers of sequences that got their last output again
        self._resealed: set[int] = set()  # numbers of sequences that got a token
        self._latencies: list[float] = []  # of chunks answered, not yet in the metrics
        self._admission = Admission(clock())
        self._paced = self._late = 0  # chunks answered that have a declared period; and later than that
        self._turn_seconds = 0.0  # the last turn that ran a batch
        self.metrics.busy_ratio = lambda: self._admission.busy_ratio(self._clock())
        self._draining = False
        self._retiring = False
        self._max_age_at = math.inf  # when a retiring version's live sequences end
        self._stopped = False
        self._thread = threading.Thread(
            target=self._loop, name=f"engine-{manifest.name}-{version}", daemon=True
        )

    # Any thread.

    def start(self) -> None:
        self._thread.start()

    def open(self, sequence: Sequence, snapshot: Snapshot | None = None) -> None:
        """Admits the sequence, or refuses it: it gets Opened, or Failed with PoolFull, Overloaded or
        ServerDraining. With a snapshot it goes on from there; a live one of the same id ends SUPERSEDED."""
        self._pending.add(COMMAND_BYTES)
        self._inbox.put((self._open, sequence, snapshot))

    def accept(self, sequence: Sequence, chunk: Chunk) -> None:
        """Takes the next chunk. Its bytes are already counted as pending."""
        self._inbox.put((self._accept, sequence, chunk))

    def request(self, sequence: Sequence, chunk: Chunk) -> None:
        """Runs one batch of a stateless model: `sequence` lives for this chunk alone and takes no slot."""
        self._inbox.put((self._request, sequence, chunk))

    def checkpoint(self, sequence: Sequence) -> None:
        """Gives it a Checkpoint once all its accepted chunks are answered."""
        self._pending.add(COMMAND_BYTES)
        self._inbox.put((self._wish_checkpoint, sequence, None))

    def finish(self, sequence: Sequence, ending: Ending | TenutoError) -> None:
        """Ends the sequence in that way once all its accepted chunks are answered."""
        self._pending.add(COMMAND_BYTES)
        self._inbox.put((self._finish, sequence, ending))

    def close(self, sequence: Sequence, reason: Ending) -> None:
        """Ends the sequence now; its unanswered chunks are dropped."""
        self._inbox.put((self._close, sequence, reason))

    def close_by_id(self, sequence_id: str, reason: Ending) -> bool:
        """Ends a live sequence once its accepted chunks are answered. Returns whether there is one."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self._inbox.put((self._end_after_pending, sequence, reason))
        return sequence is not None

    def supersede(self, sequence_id: str) -> None:
        """Ends a live sequence of that id, if there is one, now: it goes on in another engine."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self.close(sequence, Ending.SUPERSEDED)

    def sequences(self) -> list[Sequence]:
        """The live ones, oldest first."""
        return sorted(self._live.copy().values(), key=lambda s: s.number)

    def drain(self) -> None:
        """Refuses new sequences from now on, and ends the live ones DRAINING once their accepted chunks are
        answered; `emptied` is set when none is left."""
        self._inbox.put((self._drain, None, None))

    def retire(self, max_age_seconds: float) -> None:
        """A newer version takes the new sequences. Those that are here, and those that were on their way, go
        on for `max_age_seconds` (0: until they end); `emptied` is set while there is none."""
        self._inbox.put((self._retire, max_age_seconds, None))

    def stop(self, reason: Ending, join_seconds: float = 5.0) -> None:
        """Ends every sequence and then the thread."""
        self._inbox.put((self._stop, reason, None))
        if self._thread.is_alive():
            self._thread.join(join_seconds)

    # The engine thread.

    def _loop(self) -> None:
        self._runner.enter_thread()
        while not self._stopped:
            try:
                self.turn(wait=True)
            except Exception:  # the loop must live on: its callers have no other
                log.exception("%s: the engine met a bug and goes on", self.where)
        flush = self._delivery.flush_nothing()  # whoever comes late sends its own replies
        self._inbox.close(self._carry_out_late)
        flush()

    def _carry_out_late(self, command: Command) -> None:
        """What came after the end, on the thread of whoever brought it."""
        what, subject, value = command
        try:
            what(subject, value)
            self._deliver()
        except Exception:  # it may be gRPC's serve thread, which must live on
            log.exception("%s: a command after the end met a bug", self.where)

    def turn(self, *, wait: bool = False) -> bool:
        """Takes all commands, then runs one batch. Returns whether there was a batch."""
        first = self._wait() if wait and not self._scheduler else None
        now = self._clock()
        self._admission.begin(now)
        try:
            if first:
                command, subject, value = first
                command(subject, value)
            # Only what is there now: a flood of commands must not keep the batches waiting.
            for _ in range(self._inbox.qsize()):
                command, subject, value = self._inbox.get_nowait()
                command(subject, value)
            self._expire(now)
            self._come_of_age(now)
            self._deliver()  # what needs no batch does not wait for one
            ran = self.step()
            self._deliver()
            if ran:
                self._turn_seconds = self._clock() - now
            return ran
        finally:
            self._admission.end(self._clock(), self._paced, self._late)

    def _wait(self) -> Command | None:
        """The next command, or nothing once a sequence may have been silent, or is here, for too long."""
        due = min(self._idle[0][0] if self._idle else math.inf, self._max_age_at)
        timeout = max(0.0, due - self._clock()) + 0.01 if due < math.inf else None
        with contextlib.suppress(queue.Empty):
            return self._inbox.get(timeout=timeout)
        return None

    def step(self) -> bool:
        """One batch: schedule, gather, run, scatter, reply. Returns whether there was one."""
        batch = self._scheduler.schedule()
        if not batch:
            return False
        started = self._clock()
        self.metrics.stages["queue"].add_all([started - turn.chunk.arrived for turn in batch])
        try:
            self._run_batch(batch, started)
        except Exception:
            log.exception("%s: a batch met a bug; its sequences end", self.where)
            for turn in batch:
                error = RunFailed(f"step {turn.chunk.step}: an error inside the server; its log says more")
                self._close(turn.sequence, Ending.FAILED, error)
        return True

    def _run_batch(self, batch: Batch, started: float) -> None:
        batch, feeds = self._gather(batch)
        if not batch:
            return
        gathered = self._clock()
        try:
            results = self._run(feeds, gathered)
        except RunFailed as error:
            if self._still_runs(error):
                self._rerun(batch, error)
            return
        computed = self._clock()
        self._scatter(batch, results)
        scattered = self._clock()
        self._reply(batch, results, started, computed - gathered)
        self._measure(batch, (gathered - started, computed - gathered, scattered - computed), scattered)

    def _gather(self, batch: Batch) -> tuple[Batch, dict[str, Array]]:
        """Rows and states of the batch as the graph's feeds. Turns with forbidden values end here."""
        rows = [[t.sequence.feeds[i].peek(t.frames) for t in batch] for i in range(len(self.manifest.inputs))]
        feeds, refused = self._layout.stack(rows, self._layout.batch_size([t.frames for t in batch]))
        if refused:
            for i, error in refused.items():
                text = f"{error}, in step {batch[i].chunk.step}"
                self._close(batch[i].sequence, Ending.FAILED, type(error)(text))
            rest = [t for i, t in enumerate(batch) if i not in refused]
            return self._gather(rest) if rest else (rest, {})
        if self.manifest.states:
            feeds.update(self._pool.gather(self._slots(batch)))
        if self.manifest.constants:
            feeds.update(self._layout.constants(batch[0].sequence.constants))
        return batch, feeds

    def _slots(self, batch: Batch) -> NDArray[np.intp]:
        slots = [t.sequence.slot for t in batch]
        slots += [self._pool.dump] * (self._layout.batch_size([t.frames for t in batch]) - len(slots))
        return np.array(slots, np.intp)

    def _run(self, feeds: dict[str, Array], now: float) -> list[Array]:
        self.running_since = now
        try:
            return self._runner.run(feeds)
        finally:
            self.running_since = 0.0

    def _still_runs(self, error: RunFailed) -> bool:
        """Whether a chunk is to blame for a failed run. Else all runs fail from now on, a lost device, say:
        then nobody's sequence ends; the watchdog ends the process, and they go on elsewhere."""
        try:
            self._runner.probe()
        except RunFailed as own:
            self.broken = f"a run failed ({error}), and so does a run of zeros ({own})"
            log.critical("%s: %s", self.where, self.broken)
        return not self.broken

    def _rerun(self, batch: Batch, error: RunFailed) -> None:
        """The run failed and wrote no state: each row alone, so that only the guilty one fails."""
        if len(batch) == 1:
            turn = batch[0]
            self._close(turn.sequence, Ending.FAILED, RunFailed(f"step {turn.chunk.step}: {error}"))
            return
        log.warning("%s: a batch failed, running its rows alone: %s", self.where, error)
        for turn in batch:
            self.metrics.rows_rerun += 1
            one, feeds = self._gather([turn])
            started = self._clock()
            try:
                results = self._run(feeds, started)
            except RunFailed as own:
                self._rerun(one, own)
            else:
                self._scatter(one, results)
                self._reply(one, results, started, self._clock() - started)

    def _scatter(self, batch: Batch, results: list[Array]) -> None:
        """Writes the new states back. A sequence whose state is not finite ends; its slot is reset when it
        is handed on."""
        states = results[len(self.manifest.outputs) :]
        if not states:
            return
        for row in self._pool.not_finite(states, len(batch)):
            turn = batch[row]
            text = f"the state became NaN or Inf in step {turn.chunk.step}; open a new sequence"
            self._close(turn.sequence, Ending.STATE_NOT_FINITE, StateNotFinite(text))
        self._pool.scatter(self._slots(batch), states)

    def _reply(self, batch: Batch, results: list[Array], started: float, compute: float) -> None:
        """Cuts the outputs into rows, and answers each chunk that is done."""
        parts = self._layout.cut(results, [t.frames for t in batch])
        rows, now = len(batch), self._clock()
        for turn, part in zip(batch, parts, strict=True):
            sequence, chunk = turn.sequence, turn.chunk
            if sequence.ended:
                continue
            chunk.parts += (part,)
            chunk.compute += compute
            sequence.eat(chunk, turn.frames)
            if chunk.frames:
                self._scheduler.add(sequence)
                continue
            self._answer(sequence, chunk, started - chunk.arrived, rows, now)
            if sequence.pending:
                self._advance(sequence)

    def _answer(self, sequence: Sequence, chunk: Chunk, queued: float, rows: int, now: float) -> None:
        """The first pending chunk is done: its Output goes out."""
        tensors = self._layout.join(chunk.parts)
        output = Output(chunk.step, chunk.part, True, tensors, queued, chunk.compute, rows)
        sequence.pending.popleft()
        if not sequence.answered:
            self.metrics.first_output.add(now - sequence.begun)
        sequence.answered = chunk.step
        self._delivery.send(sequence, output, chunk.nbytes)
        if sequence.accepted:  # a single request has no step that may be sent again, and none to resume
            small = sum([len(data) for _, data in tensors]) <= self._kept_bytes
            sequence.last_output = output if small else None
            if sequence.checkpoint_every and chunk.step - sequence.sealed >= sequence.checkpoint_every:
                self._checkpoint(sequence)
        self._latencies.append(now - chunk.arrived)
        if sequence.period_seconds:
            lag = now - chunk.arrived - sequence.period_seconds
            # No answer comes sooner than the turn in progress and its own, whatever period was declared.
            waited = lag > 0 and now - chunk.arrived > 2 * self._turn_seconds
            self._paced += 1
            self._late += waited or chunk.came_late
            self.metrics.chunk_lag.add(max(lag, 0.0))
            self.metrics.deadline_misses += lag > 0

    def _account(self) -> None:
        """What was answered since the last time, at once: a lock and a histogram cost as much as a row."""
        if self._latencies:
            latencies, self._latencies = self._latencies, []
            self.metrics.chunks["answered"] += len(latencies)
            self.metrics.pending_chunks -= len(latencies)
            self.metrics.chunk_latency.add_all(latencies)

    def _measure(self, batch: Batch, spent: tuple[float, float, float], scattered: float) -> None:
        m = self.metrics
        for stage, seconds in zip(("gather", "compute", "scatter"), spent, strict=True):
            m.stages[stage].add(seconds)
        m.stages["reply"].add(self._clock() - scattered)
        m.batches += 1
        stateful = self.manifest.stateful
        rows = len(batch) if stateful else sum(t.frames for t in batch)
        m.batch_size.add(rows)
        m.occupancy.add(rows / self.manifest.rows_per_batch)
        if stateful:
            longest = max(t.frames for t in batch)
            m.padding.add(1 - sum(t.frames for t in batch) / (longest * rows))

    # Commands, and what follows from them.

    def _open(self, sequence: Sequence, snapshot: Snapshot | None) -> None:
        self._delivery.settle(sequence, COMMAND_BYTES)
        try:
            self._admit(sequence, snapshot)
        except TenutoError as error:
            sequence.ended = True
            self.metrics.rejected[error.reason] += 1
            self._delivery.send(sequence, Failed(error))
            return
        self._live[sequence.id] = sequence
        if self._checkpoints is not None:
            sequence.checkpoint_every = self._checkpoints.interval(sequence.checkpoint_every)
        if snapshot is not None:
            self.metrics.resumed += 1
        if self._retiring:
            self.emptied.clear()
        if sequence.idle_seconds:
            self._watch_idle(self._clock() + sequence.idle_seconds, sequence)
        self.metrics.sequences_started += 1
        self._count_live()
        self._delivery.send(
            sequence, Opened(sequence.id, self.version, sequence.accepted + 1, sequence.window)
        )

    def _admit(self, sequence: Sequence, snapshot: Snapshot | None) -> None:
        """Finds the sequence a slot and sets its state.

        Raises: ServerDraining, ModelNotReady, Overloaded, PoolFull. A sequence that resumes is no new load on
        the whole, and is not refused for OVERLOADED.
        """
        if self._draining:
            raise ServerDraining("the server is leaving and takes no new sequences; open it on another one")
        if self.past_max_age or self._stopped:
            raise ModelNotReady(f"{self.where} was replaced and is unloaded; open a newer version")
        if snapshot is None:
            self._admission.check(self._clock(), self.where)
        else:
            sequence.restore(snapshot)
            old = self._live.get(sequence.id)
            if old is not None:
                self._close(old, Ending.SUPERSEDED)
        spare = 0 if snapshot else self._reserved
        if self.manifest.stateful:
            sequence.slot = self._pool.allocate(sequence.id, spare)
            if snapshot is not None:
                self._pool.write(sequence.slot, snapshot.states)
        elif len(self._live) >= self.max_sequences - spare:
            raise PoolFull(f"{self.max_sequences} sequences are open; retry, or raise --max-sequences")

    def _accept(self, sequence: Sequence, chunk: Chunk) -> None:
        if sequence.ended or sequence.closing:
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
                self.metrics.late_arrivals += 1
            self._enqueue(sequence, chunk)

    def _out_of_step(self, sequence: Sequence, chunk: Chunk) -> None:
        """A repeated step is answered again or ignored; a skipped one ends the sequence."""
        self._delivery.settle(sequence, chunk.nbytes)
        if 0 < chunk.step <= sequence.accepted:
            self.metrics.steps_repeated += 1
            again = sequence.last_output if chunk.step == sequence.answered else None
            # Once a delivery: a message of many small repeats must not become as many large outputs.
            if again is not None and sequence.number not in self._repeated:
                self._repeated.add(sequence.number)
                self._delivery.send(sequence, again)
            return
        text = f"step {chunk.step} came, expected {sequence.accepted + 1}; number chunks without gaps"
        self._end_after_pending(sequence, StepGap(text))

    def _request(self, sequence: Sequence, chunk: Chunk) -> None:
        if self._stopped:  # nothing will run it
            self._close(sequence, Ending.DRAINING)
        if sequence.ended:
            self._drop(sequence, chunk)
            return
        self._enqueue(sequence, chunk)

    def _enqueue(self, sequence: Sequence, chunk: Chunk) -> None:
        self.metrics.pending_chunks += 1
        sequence.pending.append(chunk)
        if len(sequence.pending) == 1:
            self._advance(sequence)

    def _wish_checkpoint(self, sequence: Sequence, _: None) -> None:
        self._delivery.settle(sequence, COMMAND_BYTES)
        if sequence.ended or sequence.closing:
            return
        if sequence.pending and sequence.pending[-1] is Wish.CHECKPOINT:
            return
        sequence.pending.append(Wish.CHECKPOINT)
        if len(sequence.pending) == 1:
            self._advance(sequence)

    def _checkpoint(self, sequence: Sequence) -> None:
        """Seals the sequence, which is between two chunks. Once a step and delivery: a message of many wishes
        must not become as many large tokens."""
        if sequence.sealed == sequence.answered and sequence.number in self._resealed:
            return
        token = self._token(sequence)
        if token:
            sequence.sealed = sequence.answered
            self._resealed.add(sequence.number)
            self._delivery.send(sequence, Checkpoint(sequence.answered, token))

    def _token(self, sequence: Sequence) -> bytes:
        """A resume token of the sequence after its last answered step."""
        sealing = self._checkpoints
        if sealing is None or not sequence.at_rest or sequence.id not in self._live:
            return b""
        snapshot = Snapshot(
            self.manifest.name,
            self.version,
            sealing.fingerprint,
            sealing.schema,
            sequence.id,
            sequence.answered,
            sequence.constants,
            tuple([feed.rest() for feed in sequence.feeds]),
            self._pool.read(sequence.slot) if self.manifest.stateful else (),
        )
        token = sealing.seal(snapshot)
        self.metrics.token_bytes.add(len(token))
        return token

    def _finish(self, sequence: Sequence, ending: Ending | TenutoError) -> None:
        self._delivery.settle(sequence, COMMAND_BYTES)
        if sequence.closing and isinstance(ending, AlreadyOpen):
            sequence.pending[-1] = ending  # whoever opened a number too early must hear of it
        else:
            self._end_after_pending(sequence, ending)

    def _end_after_pending(self, sequence: Sequence, ending: Ending | TenutoError) -> None:
        if not sequence.ended and not sequence.closing:
            sequence.pending.append(ending)
            if len(sequence.pending) == 1:
                self._advance(sequence)

    def _advance(self, sequence: Sequence) -> None:
        """Looks at what the sequence brings next: a chunk that can run goes to the scheduler, one that
        completes no frame is answered, an ending is carried out."""
        while sequence.pending:
            head = sequence.pending[0]
            if isinstance(head, Chunk):
                if head.frames < 0:
                    sequence.begin(head)
                if head.frames:
                    self._scheduler.add(sequence)
                    return
                now = self._clock()
                self._answer(sequence, head, now - head.arrived, 0, now)
            elif isinstance(head, Wish):
                sequence.pending.popleft()
                self._checkpoint(sequence)
            elif isinstance(head, TenutoError):
                self._close(sequence, Ending.FAILED, head)
                return
            elif head is Ending.END and self._tail(sequence):
                continue
            else:
                self._close(sequence, head)
                return

    def _tail(self, sequence: Sequence) -> bool:
        """At End, what is left over is padded to a frame where the manifest says so. Whether it was."""
        specs = self.manifest.inputs
        padding = tuple(
            f.padding() if s.tail == "pad" else b"" for s, f in zip(specs, sequence.feeds, strict=True)
        )
        if not any(padding):
            return False
        tail = Chunk(sequence.accepted, padding, self._clock(), 0, part=1)
        self.metrics.pending_chunks += 1
        sequence.pending.appendleft(tail)
        return True

    def _close(self, sequence: Sequence, reason: Ending, error: TenutoError | None = None) -> None:
        """The one way in which a sequence ends. Its slot is free from here on: no batch holds it now."""
        if sequence.ended:
            return
        sequence.ended = True
        token = self._token(sequence) if reason in RESUMABLE else b""
        for item in sequence.pending:
            if isinstance(item, Chunk):
                self.metrics.pending_chunks -= 1
                self._drop(sequence, item, "failed" if error else "dropped")
        sequence.pending.clear()
        sequence.last_output = None
        if self._live.pop(sequence.id, None) is not None:
            self.metrics.ended[reason.name] += 1
            if sequence.slot >= 0:
                self._pool.free(sequence.slot, sequence.id)
            self._count_live()
            level = logging.DEBUG if reason in _ORDINARY else logging.INFO
            log.log(
                level,
                "%s: %s ended %s%s",
                self.where,
                sequence.id,
                reason.name,
                f": {error}" if error else "",
            )
        self._delivery.send(
            sequence, Failed(error, token) if error else Closed(reason, sequence.answered, token)
        )
        self._look_if_empty()

    def _drop(self, sequence: Sequence, chunk: Chunk, outcome: str = "dropped") -> None:
        self.metrics.chunks[outcome] += 1
        self._delivery.settle(sequence, chunk.nbytes)

    def _watch_idle(self, deadline: float, sequence: Sequence) -> None:
        heapq.heappush(self._idle, (deadline, sequence.id))
        if len(self._idle) > 2 * len(self._live) + 64:  # those that ended do not stay until they are due
            self._idle = [entry for entry in self._idle if entry[1] in self._live]
            heapq.heapify(self._idle)

    def _expire(self, now: float) -> None:
        """Ends what has been silent for too long. Idle counts from the last chunk accepted."""
        while self._idle and self._idle[0][0] <= now:
            sequence = self._live.get(heapq.heappop(self._idle)[1])
            if sequence is None:  # ended; only its id was kept
                continue
            deadline = sequence.heard + sequence.idle_seconds
            if deadline <= now and not sequence.pending:
                self._close(sequence, Ending.IDLE_EXPIRED)
            else:
                self._watch_idle(max(deadline, now + 1.0), sequence)

    def _drain(self, _: None, __: None) -> None:
        self._draining = True
        for sequence in list(self._live.values()):
            self._end_after_pending(sequence, Ending.DRAINING)
        self._look_if_empty()

    def _retire(self, max_age_seconds: float, _: None) -> None:
        self._retiring = True
        if max_age_seconds:
            self._max_age_at = self._clock() + max_age_seconds
        self._look_if_empty()

    def _come_of_age(self, now: float) -> None:
        """Once a retiring version's time is over, each sequence ends behind its accepted chunks."""
        if now < self._max_age_at:
            return
        self._max_age_at = math.inf
        self.past_max_age = True
        for sequence in list(self._live.values()):
            self._end_after_pending(sequence, Ending.MAX_AGE)

    def _look_if_empty(self) -> None:
        if (self._draining or self._retiring) and not self._live:
            self.emptied.set()

    def _stop(self, reason: Ending, _: None) -> None:
        for sequence in list(self._live.values()):
            self._close(sequence, reason)
        while self.step():  # single requests that were accepted are answered
            pass
        self._stopped = True

    def _count_live(self) -> None:
        self.metrics.active_sequences = len(self._live)
        self.metrics.slots_used = self._pool.used

    def _deliver(self) -> None:
        self._account()
        self._repeated.clear()
        self._resealed.clear()
        self._delivery.hand_over()

    def check(self) -> None:
        """Raises TenutoError if the pool lost count. For tests, while nothing runs."""
        self._pool.check()
        if self.manifest.stateful and self._pool.used != len(self._live):
            raise TenutoError(
                f"{self._pool.used} slots used, {len(self._live)} sequences live. This is a bug."
            )
