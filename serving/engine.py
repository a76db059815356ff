"""One model version: scheduler + pool + runner, and the one thread that turns them.

Other threads put commands into the inbox; everything else here happens on the engine thread, between two
batches or in one. That is what orders opening, resetting, ending and handing a slot on against the batches
that hold it, without a lock. Where a batch may be gathered while another one runs (`in_flight` 2), the run
alone is on a thread of its own, and whatever may open or end a sequence waits until nothing is in flight.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .controls import Controls
from .delivery import Delivery
from .errors import (
    RunFailed,
    StateNotFinite,
    TenutoError,
)
from .inbox import Command, Defer, Inbox, never
from .layout import Layout
from .manifest import Manifest
from .metrics import ModelMetrics
from .pending import PendingBytes
from .population import COMMAND_BYTES, Population
from .scheduler import Batch, Scheduler
from .sequence import Chunk, Ending, Sequence
from .snapshot import Checkpoints, Snapshot
from .state_pool import HostPool, StatePool

log = logging.getLogger("tenuto.engine")

Array = NDArray[Any]
Slots = NDArray[np.intp]  # of a batch's rows, padding included
NO_SLOTS: Slots = np.array([], np.intp)


class Runner(Protocol):
    """Runs the graph. `run` returns what the manifest has `fetched`, then its states' outputs, in order. The
    next run may overwrite them."""

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """Raises: RunFailed."""

    def enter_thread(self) -> None:
        """Called once, on the thread that will run."""

    def probe(self) -> None:
        """Runs what is known to run.

        Raises: RunFailed: no run will succeed any more.
        """


# Share of a run's time that the engine's own work on a batch must have for the next one to be gathered
# meanwhile: less is not worth that what comes later and is more urgent waits for one run more.
_WORTHWHILE = 0.1


class Ran(NamedTuple):
    """A run's results, when it began, and how long it took."""

    results: list[Array]
    began: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch whose run is on its way. `land` waits for it. Raises: RunFailed."""

    batch: Batch
    slots: Slots
    started: float
    gathered: float
    land: Callable[[], Ran]


class Engine:
    """Turns one model version. `in_flight`: batches that may be on their way at once.

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
        pool: StatePool | None = None,
        bucketed: bool = False,
        in_flight: int = 1,
        resume_reserve: float = 0.0,
        checkpoints: Checkpoints | None = None,
        pending: PendingBytes,
        metrics: ModelMetrics | None = None,
        flush: Callable[[], None] = lambda: None,
        defer: Defer = never,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = manifest
        self.version = version
        self.where = f"{manifest.name}/{version}"  # for logs
        self.metrics = metrics or ModelMetrics(manifest.name, version)
        self.running_since = 0.0  # when the run in progress began; 0: none. Read by the watchdog.
        self.broken = ""  # why no run will succeed any more. Read by the watchdog.
        self._runner = runner
        self._pending = pending
        self._clock = clock
        self._inbox = Inbox(defer)
        self._scheduler = Scheduler(manifest)
        self._layout = Layout(manifest, bucketed=bucketed)
        self._controls = Controls(manifest) if manifest.controls else None
        self._delivery = Delivery(pending, flush, self.where)
        slots = max_sequences if manifest.stateful else 0
        self._pool = pool or HostPool(manifest.states, slots, max_state_bytes)
        self.state_bytes = self._pool.nbytes
        self.max_sequences = self._pool.capacity if manifest.stateful else max_sequences
        self.metrics.slots = self.max_sequences
        self._population = Population(
            manifest,
            version,
            pool=self._pool,
            max_sequences=self.max_sequences,
            resume_reserve=resume_reserve,
            checkpoints=checkpoints,
            layout=self._layout,
            scheduler=self._scheduler,
            delivery=self._delivery,
            metrics=self.metrics,
            clock=clock,
            in_flight=in_flight,
        )
        self._admission = self._population.admission
        self.metrics.busy_ratio = lambda: self._admission.busy_ratio(self._clock())
        self._flights: deque[Flight] = deque()  # no sequence is in two of them
        self._in_flight = in_flight
        self._is_worthwhile = True  # as the last batch showed
        self._has_landed = False  # a batch, in this turn
        name = f"engine-run-{manifest.name}-{version}"
        self._running = ThreadPoolExecutor(1, name, runner.enter_thread) if in_flight > 1 else None
        self._harmless = (self._population.accept, self._population.request)
        self._thread = threading.Thread(
            target=self._loop, name=f"engine-{manifest.name}-{version}", daemon=True
        )

    # Any thread.

    def start(self) -> None:
        self._thread.start()

    def open(self, sequence: Sequence, snapshot: Snapshot | None = None) -> None:
        """Admits the sequence, or refuses it: it gets Opened, or Failed with PoolFull, Overloaded or
        ServerDraining. With a snapshot it goes on from there; a live one of the same id ends SUPERSEDED."""
        self._pending.add(COMMAND_BYTES + sum(map(len, sequence.given)))
        self._inbox.put((self._population.open, sequence, snapshot))

    def accept(self, sequence: Sequence, chunk: Chunk) -> None:
        """Takes the next chunk. Its bytes are already counted as pending."""
        self._inbox.put((self._population.accept, sequence, chunk))

    def request(self, sequence: Sequence, chunk: Chunk) -> None:
        """Runs one batch of a stateless model: `sequence` lives for this chunk alone and takes no slot."""
        self._inbox.put((self._population.request, sequence, chunk))

    def checkpoint(self, sequence: Sequence) -> None:
        """Gives it a Checkpoint once all its accepted chunks are answered."""
        self._pending.add(COMMAND_BYTES)
        self._inbox.put((self._population.wish_checkpoint, sequence, None))

    def finish(self, sequence: Sequence, ending: Ending | TenutoError) -> None:
        """Ends the sequence in that way once all its accepted chunks are answered."""
        self._pending.add(COMMAND_BYTES)
        self._inbox.put((self._population.finish, sequence, ending))

    def close(self, sequence: Sequence, reason: Ending) -> None:
        """Ends the sequence now; its unanswered chunks are dropped."""
        self._inbox.put((self._population.close, sequence, reason))

    def close_by_id(
        self, sequence_id: str, reason: Ending, may_see: Callable[[str], bool] = lambda _: True
    ) -> bool:
        """Ends a live sequence, of a caller that `may_see`, once its accepted chunks are answered. Returns
        whether there is one."""
        sequence = self._population.live.get(sequence_id)
        if sequence is None or not may_see(sequence.caller):
            return False
        self._inbox.put((self._population.end_after_pending, sequence, reason))
        return True

    def owner(self, sequence_id: str) -> str | None:
        """Whose live sequence that is; None: there is none."""
        sequence = self._population.live.get(sequence_id)
        return sequence.caller if sequence is not None else None

    def supersede(self, sequence_id: str) -> None:
        """Ends a live sequence of that id, if there is one, now: it goes on in another engine."""
        sequence = self._population.live.get(sequence_id)
        if sequence is not None:
            self.close(sequence, Ending.SUPERSEDED)

    def sequences(self) -> list[Sequence]:
        """The live ones, oldest first."""
        return sorted(self._population.live.copy().values(), key=lambda s: s.number)

    @property
    def emptied(self) -> threading.Event:
        """Set when draining or retiring, and no sequence is left."""
        return self._population.emptied

    @property
    def past_max_age(self) -> bool:
        """Whether its time is over: what was live ends, nothing resumes on it."""
        return self._population.past_max_age

    def drain(self) -> None:
        """Refuses new sequences from now on, and ends the live ones DRAINING once their accepted chunks are
        answered; `emptied` is set when none is left."""
        self._inbox.put((self._population.drain, None, None))

    def rebalance(self, used: float, count: int, age_seconds: float) -> None:
        """Ends up to `count` sequences REBALANCE, those that are here longest, so that no more than that
        share of the slots is `used`; but none that is here for less than `age_seconds`."""
        if self.metrics.slots_used > used * self.max_sequences:  # else the engine need not be woken
            self._inbox.put((self._population.rebalance, (used, count, age_seconds), None))

    def retire(self, max_age_seconds: float) -> None:
        """A newer version takes the new sequences. Those that are here, and those that were on their way, go
        on for `max_age_seconds` (0: until they end); `emptied` is set while there is none."""
        self._inbox.put((self._population.retire, max_age_seconds, None))

    def stop(self, reason: Ending, join_seconds: float = 5.0) -> None:
        """Ends every sequence and then the thread."""
        self._inbox.put((self._stop, reason, None))
        if self._thread.is_alive():
            self._thread.join(join_seconds)

    # The engine thread.

    def _loop(self) -> None:
        self._runner.enter_thread()
        while not self._population.stopped:
            try:
                self.turn(wait=True)
            except Exception:  # the loop must live on: its callers have no other
                log.exception("%s: the engine met a bug and goes on", self.where)
        if self._running is not None:
            self._running.shutdown(wait=False)
        flush = self._delivery.flush_nothing()  # whoever comes late sends its own replies
        self._inbox.close(self._carry_out_late)
        flush()

    def _carry_out_late(self, command: Command) -> None:
        """What came after the end, on the thread of whoever brought it."""
        what, subject, value = command
        try:
            what(subject, value)
            self._population.hand_over()
        except Exception:  # it may be the thread that reads, which must live on
            log.exception("%s: a command after the end met a bug", self.where)

    def turn(self, *, wait: bool = False) -> bool:
        """Takes all commands, then runs one batch. Returns whether there was a batch."""
        if wait and not self._scheduler and not self._flights:
            self._wait()
        now = self._clock()
        self._has_landed = False
        self._admission.begin(now)
        try:
            # Only what is there now: a flood of commands must not keep the batches waiting.
            take = self._inbox.take
            for _ in range(len(self._inbox)):
                command, subject, value = take()
                if self._flights and command not in self._harmless:  # it may end what is on its way
                    self._land_all()
                command(subject, value)
            self._population.look(now)
            self._population.hand_over()  # what needs no batch does not wait for one
            ran = self.step()
            self._population.hand_over()
            if self._has_landed:
                self._population.turn_seconds = self._clock() - now
            return ran
        finally:
            self._admission.end(self._clock(), self._population.paced, self._population.late)

    def _wait(self) -> None:
        """Until there is a command, or a sequence may have been silent, or is here, for too long."""
        due = self._population.next_look()
        self._inbox.wait(max(0.0, due - self._clock()) + 0.01 if due < math.inf else None)

    def step(self) -> bool:
        """One batch: schedule, gather, run, scatter, reply. Returns whether there was one.

        With two in flight it is the older one whose run is waited for, behind the newer one's gathering; but
        only where more is ready than one batch takes.
        """
        batch: Batch = []
        if not self._flights or self._fills_another:
            batch = self._scheduler.schedule()
        if batch:
            self._guarded(batch, self._depart)
        if self._flights and (len(self._flights) >= self._in_flight or not self._fills_another):
            self._land_one()
            return True
        return bool(batch)

    @property
    def _fills_another(self) -> bool:
        """Whether what is ready fills a batch. One that would not be full grows while a run is waited for."""
        return (
            self._running is not None
            and self._is_worthwhile
            and len(self._scheduler) >= self.manifest.rows_per_batch
        )

    def _guarded(self, batch: Batch, what: Callable[[Batch], None]) -> None:
        """A bug ends the batch's sequences, and none else."""
        try:
            what(batch)
        except Exception:
            log.exception("%s: a batch met a bug; its sequences end", self.where)
            for turn in batch:
                error = RunFailed(f"step {turn.chunk.step}: an error inside the server; its log says more")
                self._population.close(turn.sequence, Ending.FAILED, error)

    def _land_one(self) -> None:
        self._has_landed = True
        flight = self._flights.popleft()
        self._guarded(flight.batch, lambda _: self._land(flight))

    def _land_all(self) -> None:
        while self._flights:
            self._land_one()

    def _depart(self, batch: Batch) -> None:
        """Gathers the batch; its run begins, or will when it is waited for."""
        started = self._clock()
        batch, feeds, slots = self._gather(batch)
        if batch:
            self._flights.append(Flight(batch, slots, started, self._clock(), self._begin(feeds)))

    def _land(self, flight: Flight) -> None:
        """Waits for the run, then scatters and replies."""
        batch, gather = flight.batch, flight.gathered - flight.started
        try:
            results, began, seconds = flight.land()
        except RunFailed as error:
            if self._still_runs():
                self._rerun(batch, error)
            return
        computed = self._clock()
        queued_until = began - gather  # it may have waited for the run of another batch
        self.metrics.stages["queue"].add_all([queued_until - turn.chunk.arrived for turn in batch])
        self._scatter(batch, flight.slots, results)
        scattered = self._clock()
        self._reply(batch, results, queued_until, seconds)
        self._measure(batch, (gather, seconds, scattered - computed), scattered)
        own = gather + self._clock() - computed
        self._is_worthwhile = own >= _WORTHWHILE * seconds

    def _gather(self, batch: Batch) -> tuple[Batch, dict[str, Array], Slots]:
        """Rows and states of the batch as the graph's feeds, and whose slots they are. Turns with forbidden
        values end here."""
        size = self._layout.batch_size([t.frames for t in batch])
        rows = [[t.sequence.feeds[i].peek(t.frames) for t in batch] for i in range(len(self.manifest.inputs))]
        feeds, refused = self._layout.stack(rows, size)
        if refused:
            for i, error in refused.items():
                text = f"{error}, in step {batch[i].chunk.step}"
                self._population.close(batch[i].sequence, Ending.FAILED, type(error)(text))
            rest = [t for i, t in enumerate(batch) if i not in refused]
            return self._gather(rest) if rest else (rest, {}, NO_SLOTS)
        slots = NO_SLOTS
        if self.manifest.states:
            held = [t.sequence.slot for t in batch]
            if len(held) < size:  # or what pads would go on from batch to batch
                self._pool.reset(self._pool.dump)
            slots = np.array(held + [self._pool.dump] * (size - len(held)), np.intp)
            feeds.update(self._pool.gather(slots))
        if self._controls:
            feeds.update(self._controls.feeds(batch, size))
        if self.manifest.constants:
            feeds.update(self._layout.constants(batch[0].sequence.constants))
        return batch, feeds, slots

    def _begin(self, feeds: dict[str, Array]) -> Callable[[], Ran]:
        """What waits for the run of these feeds, and on this thread runs them. Raises, then: RunFailed."""
        if self._running is None or not (self._flights or self._fills_another):
            return partial(self._run, feeds)
        return self._running.submit(self._run_ahead, feeds).result

    def _run(self, feeds: dict[str, Array]) -> Ran:
        began = self.running_since = self._clock()
        try:
            results = self._runner.run(feeds)
        finally:
            self.running_since = 0.0
        return Ran(results, began, self._clock() - began)

    def _run_ahead(self, feeds: dict[str, Array]) -> Ran:
        ran = self._run(feeds)
        # The next run may begin before these are read, and would overwrite them.
        return ran._replace(results=[result.copy() for result in ran.results])

    def _probe(self) -> None:
        self.running_since = self._clock()
        try:
            self._runner.probe()
        finally:
            self.running_since = 0.0

    def _still_runs(self) -> bool:
        """Whether a chunk is to blame for a failed run. Else all runs fail from now on, a lost device, say:
        then nobody's sequence ends; the watchdog ends the process, and they go on elsewhere."""
        try:
            if self._running is None:
                self._probe()
            else:
                self._running.submit(self._probe).result()
        except RunFailed as own:
            self.broken = f"a run failed, and so does a run of zeros: {own}"
            log.critical("%s: %s", self.where, self.broken)
        return not self.broken

    def _rerun(self, batch: Batch, error: RunFailed) -> None:
        """The run failed and wrote no state: each row alone, so that only the guilty one fails."""
        if len(batch) == 1:
            turn = batch[0]
            self._population.close(
                turn.sequence, Ending.FAILED, RunFailed(f"step {turn.chunk.step}: {error}")
            )
            return
        log.warning("%s: a batch failed, running its rows alone", self.where)  # the error may quote an input
        for turn in batch:
            self.metrics.rows_rerun += 1
            one, feeds, slots = self._gather([turn])
            started = self._clock()
            try:
                results, _, seconds = self._begin(feeds)()
            except RunFailed as own:
                self._rerun(one, own)
            else:
                self._scatter(one, slots, results)
                self._reply(one, results, started, seconds)

    def _scatter(self, batch: Batch, slots: Slots, results: list[Array]) -> None:
        """Writes the new states back. A sequence whose state is not finite ends; its slot is reset when it
        is handed on."""
        states = results[len(self.manifest.fetched) :]
        if not states:
            return
        for row in self._pool.not_finite(states, len(batch)):
            turn = batch[row]
            text = f"the state became NaN or Inf in step {turn.chunk.step}; open a new sequence"
            self._population.close(turn.sequence, Ending.STATE_NOT_FINITE, StateNotFinite(text))
        self._pool.scatter(slots, states)

    def _reply(self, batch: Batch, results: list[Array], started: float, compute: float) -> None:
        """Cuts the outputs into rows, and answers each chunk that is done."""
        frames = [t.frames for t in batch]
        unfit = self._layout.unfit(results, frames, self._layout.batch_size(frames))
        if unfit:
            for row, error in unfit.items():
                turn = batch[row]
                text = f"{error}, in step {turn.chunk.step}"
                self._population.close(turn.sequence, Ending.FAILED, type(error)(text))
            if len(unfit) == len(batch):
                return
        parts = self._layout.cut(results, frames)
        if self._controls:
            self._controls.ran(batch)
        rows, now = len(batch), self._clock()
        if self._pool.reads_together:
            self._population.expect_tokens(t.sequence for t in batch if t.frames == t.chunk.frames)
        for turn, part in zip(batch, parts, strict=True):
            sequence, chunk = turn.sequence, turn.chunk
            if sequence.ended:
                continue
            chunk.parts += (part,)
            chunk.compute += compute
            chunk.frames -= turn.frames
            for feed in sequence.feeds:
                feed.eat(turn.frames)
            if chunk.frames:
                self._scheduler.add(sequence, chunk)
                continue
            self._population.answer(sequence, chunk, started - chunk.arrived, rows, now)
            if sequence.pending:
                self._population.advance(sequence)

    def _measure(self, batch: Batch, spent: tuple[float, float, float], scattered: float) -> None:
        m = self.metrics
        for stage, seconds in zip(("gather", "compute", "scatter"), spent, strict=True):
            m.stages[stage].add(seconds)
        m.stages["reply"].add(self._clock() - scattered)
        m.batches += 1
        frames = [turn.frames for turn in batch]
        rows = len(batch) if self.manifest.stateful else sum(frames)
        m.batch_size.add(rows)
        m.occupancy.add(rows / self.manifest.rows_per_batch)
        if self.manifest.stateful:
            m.padding.add(1 - sum(frames) / (max(frames) * self._layout.batch_size(frames)))

    # Commands, and what follows from them.

    def _stop(self, reason: Ending, _: None) -> None:
        for sequence in list(self._population.live.values()):
            self._population.close(sequence, reason)
        while self.step():  # single requests that were accepted are answered
            pass
        self._population.stopped = True

    def check(self) -> None:
        """Raises TenutoError if the pool lost count. For tests, while nothing runs."""
        self._pool.check()
        live = len(self._population.live)
        if self.manifest.stateful and self._pool.used != live:
            raise TenutoError(f"{self._pool.used} slots used, {live} sequences live. This is a bug.")
