"""A simulation of many pods and very many live sequences: a lost pod, a lost zone, a rolling update.

Time is discrete (`Plan.tick_seconds`) while something happens, and jumps (simpy) while nothing does. Only
sequences that have lost their pod are looked at one by one; those that are due in the same tick go as one
cohort. What a pod does for the others is a rate. A pod is one process that does one thing at a time: first it
opens, then it answers the chunks that come, and what time is left it gives in equal parts to the sequences
that have something to catch up with, each of which has `window` chunks unanswered at most. So sequences stay
whole at any size, and the cost of a run is that of arrays.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from tenuto import backoff

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Steps = Generator[simpy.Event, Any, None]

FIRST_SECONDS, LONGEST_SECONDS = backoff._FIRST_SECONDS, backoff._LONGEST_SECONDS
WAITING, REPLAYING, RUNNING, GIVEN_UP = range(4)
RANDOM, NEXT = "random", "next"
PLACING_ROUNDS = 10_000
MIN_READY_SECONDS = 10.0  # deploy/kubernetes/base
MANY, LOOK_SECONDS = 50_000, 0.25  # above so many that catch up, how they stand is looked at that often


@dataclass(frozen=True, slots=True)
class Plan:
    """A fleet, its load, and what was measured. Times in seconds, CPU in seconds of the pod's one process."""

    pods: int
    sequences: int
    slots: int  # --max-sequences
    chunk_seconds: float  # CPU of a chunk
    open_seconds: float  # CPU of a resumed Open with its connection
    notice_seconds: tuple[float, float] = (
        0.0,
        0.0,
    )  # from a killed server to the client's knowing, least and most
    reopen_seconds: float = 0.0  # of the client alone, from knowing to its Open at the server
    latency_seconds: float = 0.003  # of one chunk at a pod that has time
    start_seconds: float = 3.0  # of a pod, until it is ready
    min_ready_seconds: float = MIN_READY_SECONDS
    pre_stop_seconds: float = 5.0
    surge: int = 1
    reserve: float = 0.1  # --resume-reserve
    period_seconds: float = 0.02
    checkpoint_every: int = 50
    window: int = 4
    reply_seconds: float = 30.0  # the client's settings
    resume_seconds: float = 30.0
    timeout_seconds: float = 10.0
    keepalive_seconds: float = 40.0  # until a channel to a silent server is known to be dead
    choice: str = RANDOM
    tick_seconds: float = 0.01
    horizon_seconds: float = 90.0
    seed: int = 0

    @property
    def use(self) -> float:
        """The share of a pod's process that one live sequence takes."""
        return self.chunk_seconds / self.period_seconds


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the sequences that lost their pod; times in seconds, `inf` for not in the run."""

    lost: int  # sequences, or moves of sequences in a rolling update
    half: float  # until that share had its first new output
    most: float  # 99 %
    every: float
    whole: float  # until 99 % had caught up with their period
    longest_backlog: float  # age of the oldest unanswered chunk, of anybody
    refused: int  # opens, for want of slots
    given_up: int  # sequences
    peak_use: float  # of the busiest survivor over one second
    settled_use: float  # of the fullest pod at the end, by its live sequences alone
    peak_live: int  # sequences at the fullest pod, at any time
    counts: tuple[int, int, int]  # at the end: live, waiting, given up
    seconds: float  # simulated


def wait_seconds(tries: Ints, jitter: Floats) -> Floats:
    """How long a client waits before it opens again, after so many tries; see `tenuto.backoff.Backoff`."""
    longest = np.minimum(FIRST_SECONDS * 2.0 ** np.minimum(tries - 1, 30), LONGEST_SECONDS)
    return np.where(tries > 0, longest * jitter, 0.0)


@dataclass(slots=True)
class _Lost:
    """Each move of a sequence that has lost its pod, by number."""

    at: Floats = field(default_factory=lambda: np.empty(0))
    since: Floats = field(default_factory=lambda: np.empty(0))  # when its client knew
    ran: Floats = field(default_factory=lambda: np.empty(0))  # when it had its first new output
    whole: Floats = field(default_factory=lambda: np.empty(0))  # when it had caught up
    tries: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    replay: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # chunks since the token
    pod: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # that it was at, or asked last
    state: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    count: int = 0

    def add(self, pods: Ints, replay: Ints, at: float, since: Floats) -> Ints:
        """Notes these; their numbers. The arrays double, so that thousands of drains stay cheap."""
        first, self.count = self.count, self.count + len(pods)
        if self.count > len(self.at):
            room = max(self.count, 2 * len(self.at))
            for name in ("at", "since", "ran", "whole", "tries", "replay", "pod", "state"):
                old = getattr(self, name)
                new = np.zeros(room, old.dtype)
                new[: len(old)] = old
                setattr(self, name, new)
        part = slice(first, self.count)
        self.at[part], self.since[part], self.ran[part], self.whole[part] = at, since, inf, inf
        self.tries[part], self.replay[part], self.pod[part], self.state[part] = 1, replay, pods, WAITING
        return np.arange(first, self.count)


class Fleet:
    """The pods of one plan with their sequences, placed as clients that know nothing of each other do."""

    def __init__(self, plan: Plan) -> None:
        if plan.pods < 1 or plan.sequences > plan.pods * (plan.slots - int(plan.slots * plan.reserve)):
            raise ValueError(f"{plan.sequences} new sequences do not fit into {plan.pods} pods' slots")
        self.plan = plan
        self.env = simpy.Environment()
        self.random = np.random.default_rng(plan.seed)
        room = plan.pods + 2 * plan.surge  # beside the old ones: those that come, those that leave
        self.takes = np.zeros(room, bool)  # opens
        self.takes[: plan.pods] = True
        self.silent = np.zeros(room, bool)  # is lost, and its peers were not told
        self.live = np.zeros(room, np.int64)
        self.opening = np.zeros(room)  # CPU seconds of opens that wait
        self.late = np.zeros(room)  # CPU seconds of chunks that wait, of live sequences
        self.caught = np.zeros(
            room
        )  # chunks beyond its pace that each that catches up there was given so far
        self.given = np.zeros(room)  # the same, those of its pace included
        self.replaying = np.zeros(room, np.int64)
        self.lost = _Lost()
        self.refused = 0
        self.longest = self.peak = 0.0
        self.peak_live = 0
        # Those that catch up, and what `given` must reach for the first new output, and `caught` for all.
        self.active = np.empty(0, np.int64)
        self.first = np.empty(0)
        self.whole = np.empty(0)
        self._unseen = 0  # of them without a new output
        self._look_at = 0.0
        self._moves = False  # whether anybody was given something to catch up with, in the last tick
        self._due: list[Ints] = []
        self._asleep: simpy.Event | None = None
        self._used = np.zeros(room)
        self._window_began = 0.0
        self._place()
        self.env.process(self._clock())

    def _place(self) -> None:
        """Each sequence at a pod by chance; those refused, for the reserve is not theirs, at another."""
        plan = self.plan
        open_to_new = plan.slots - int(plan.slots * plan.reserve)
        left = plan.sequences
        for _ in range(PLACING_ROUNDS):
            wish = np.bincount(self.random.integers(0, plan.pods, left), minlength=plan.pods)
            taken = np.minimum(wish, open_to_new - self.live[: plan.pods])
            self.live[: plan.pods] += taken
            left -= int(taken.sum())
            if not left:
                break
        else:  # the last few fill up whatever is free
            free = np.repeat(np.arange(plan.pods), open_to_new - self.live[: plan.pods])[:left]
            np.add.at(self.live, free, 1)
        self.peak_live = int(self.live.max())

    # -- what happens to it ------------------------------------------------------------------------

    def kill(self, pods: Ints, silent: bool = False) -> None:
        """These pods are gone now. `silent`: no connection is reset, and clients wait for `reply_seconds`."""
        plan = self.plan
        at = np.repeat(pods, self.live[pods])
        self.live[pods] = 0
        self.takes[pods] = False
        self.silent[pods] = silent
        low, high = (
            (plan.reply_seconds, plan.reply_seconds + plan.period_seconds) if silent else plan.notice_seconds
        )
        since = self.env.now + self.random.uniform(low, high, len(at))
        replay = self.random.integers(0, plan.checkpoint_every, len(at))
        numbers = self.lost.add(at, replay, self.env.now, since)
        self._come_at(numbers, since + plan.reopen_seconds)

    def rollout(self) -> Steps:
        """A process: replaces every pod, `surge` at a time, as a Deployment without unavailable pods does."""
        plan = self.plan
        old = [int(pod) for pod in self.random.permutation(plan.pods)]
        self._free = list(range(plan.pods, len(self.live)))
        drain: simpy.Event = self.env.timeout(0)
        while old:
            count = min(plan.surge, len(old))
            new, self._free = self._free[:count], self._free[count:]
            yield self.env.timeout(plan.start_seconds)
            self.takes[new] = True
            yield self.env.timeout(plan.min_ready_seconds)
            leaving, old = np.array(old[:count]), old[count:]
            drain = self.env.process(self._drain(leaving))
        yield drain

    def _drain(self, pods: Ints) -> Steps:
        """Out of the names, then SIGTERM: every sequence gets its token and goes at once."""
        self.takes[pods] = False
        yield self.env.timeout(self.plan.pre_stop_seconds)
        mine = np.isin(self.lost.pod[self.active], pods)
        moved = self.active[mine]  # what still catches up goes on with what it has left
        left = np.maximum(0.0, self.whole[mine] - self.caught[self.lost.pod[moved]])
        self.active, self.first, self.whole = self.active[~mine], self.first[~mine], self.whole[~mine]
        counts = self.live[pods] - np.bincount(self.lost.pod[moved], minlength=len(self.live))[pods]
        again = np.concatenate([np.repeat(pods, counts), self.lost.pod[moved]])
        replay = np.concatenate([np.zeros(int(counts.sum()), np.int64), np.ceil(left).astype(np.int64)])
        self.lost.state[moved] = RUNNING
        self.lost.whole[moved] = self.env.now
        unseen = moved[self.lost.ran[moved] == inf]
        self._unseen -= len(unseen)
        self.lost.ran[unseen] = self.env.now  # its next move counts the rest
        for array in (self.live, self.replaying, self.late, self.opening, self.caught, self.given):
            array[pods] = 0
        since = np.full(len(again), self.env.now)
        numbers = self.lost.add(again, replay, self.env.now, since)
        self._come_at(numbers, since + self.plan.reopen_seconds)
        self._free.extend(int(pod) for pod in pods)

    # -- cohorts of clients ------------------------------------------------------------------------

    def _come_at(self, numbers: Ints, due: Floats) -> None:
        """One process for those that are due in the same tick."""
        if not len(numbers):
            return
        ticks = np.ceil(due / self.plan.tick_seconds).astype(np.int64)
        order = np.argsort(ticks, kind="stable")
        values, begins = np.unique(ticks[order], return_index=True)
        for tick, cohort in zip(values, np.split(numbers[order], begins[1:]), strict=True):
            self.env.process(self._cohort(float(tick) * self.plan.tick_seconds, cohort))

    def _cohort(self, due: float, numbers: Ints) -> Steps:
        yield self.env.timeout(max(0.0, due - self.env.now))
        self._due.append(numbers)
        self._wake()

    def _try(self, numbers: Ints) -> None:
        """Each opens at one pod: it is taken, or comes again later."""
        plan, lost = self.plan, self.lost
        known_dead = self.env.now >= plan.keepalive_seconds
        if plan.choice == NEXT:
            pods = (lost.pod[numbers] + 1) % plan.pods
        else:
            targets = np.flatnonzero(self.takes if known_dead else self.takes | self.silent)
            pods = targets[self.random.integers(0, len(targets), len(numbers))]
        lost.pod[numbers] = pods
        order = self.random.permutation(len(numbers))
        order = order[np.argsort(pods[order], kind="stable")]
        numbers, pods = numbers[order], pods[order]
        counts = np.bincount(pods, minlength=len(self.live))
        rank = np.arange(len(pods)) - (np.cumsum(counts) - counts)[pods]
        there = self.takes[pods]
        taken = there & (rank < plan.slots - self.live[pods])
        turned_away = np.bincount(pods[there & ~taken], minlength=len(self.live))
        self.refused += int(turned_away.sum())
        self.opening += turned_away * plan.open_seconds  # the token is opened before there is no slot
        self._take(numbers[taken], pods[taken])
        unanswered = self.silent[pods] & ~there
        self._again(numbers[~taken], np.where(unanswered[~taken], plan.timeout_seconds, 0.0))

    def _take(self, numbers: Ints, pods: Ints) -> None:
        if not len(numbers):
            return
        counts = np.bincount(pods, minlength=len(self.live))
        self.live += counts
        self.replaying += counts
        self.opening += counts * self.plan.open_seconds
        self.lost.state[numbers] = REPLAYING
        missed = np.floor((self.env.now - self.lost.at[numbers]) / self.plan.period_seconds)
        replay = self.lost.replay[numbers]
        self.active = np.concatenate([self.active, numbers])
        self._unseen += len(numbers)
        self.first = np.concatenate([self.first, self.given[pods] + replay + 1])
        self.whole = np.concatenate([self.whole, self.caught[pods] + replay + np.maximum(1, missed)])
        self.peak_live = max(self.peak_live, int(self.live.max()))

    def _again(self, numbers: Ints, asked_seconds: Floats) -> None:
        """The client's backoff, until its patience ends."""
        lost, now = self.lost, self.env.now
        jitter = self.random.uniform(0.5, 1.5, len(numbers))
        due = now + asked_seconds + wait_seconds(lost.tries[numbers], jitter)
        lost.tries[numbers] += 1
        ends = due >= lost.since[numbers] + self.plan.resume_seconds
        lost.state[numbers[ends]] = GIVEN_UP
        self._come_at(numbers[~ends], due[~ends])

    # -- the pods' work ----------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._asleep is not None and not self._asleep.triggered:
            self._asleep.succeed()

    def _clock(self) -> Steps:
        """Ticks while a pod opens, is late, or has time for those that catch up."""
        while True:
            if not (self._due or self._moves or self._unseen or self.opening.any() or self.late.any()):
                self._close_window(self.env.now)
                self._asleep = self.env.event()
                yield self._asleep
                self._asleep = None
                self._window_began = self.env.now
            due, self._due = self._due, []
            if due:
                self._try(np.concatenate(due))
            self._serve(self.plan.tick_seconds)
            yield self.env.timeout(self.plan.tick_seconds)

    def _serve(self, seconds: float) -> None:
        plan = self.plan
        left = np.full(len(self.live), seconds)
        opened = np.minimum(self.opening, left)
        self.opening -= opened
        left -= opened
        work = self.late + self.live * (plan.use * seconds)
        served = np.minimum(work, left)
        self.late = np.where(work - served > 1e-12, work - served, 0.0)
        left -= served
        most = self.replaying * (plan.window / plan.latency_seconds * seconds * plan.chunk_seconds)
        extra = np.minimum(left, most)
        extra[extra < plan.chunk_seconds * seconds * self.replaying] = 0.0  # a chunk a second each: for good
        self._moves = bool(extra.any())
        self._used += seconds - left + extra
        moving = self.replaying > 0
        more = extra[moving] / (plan.chunk_seconds * self.replaying[moving])
        self.caught[moving] += more
        self.given[moving] += more + seconds / plan.period_seconds
        if self.late.any():
            behind = self.late / np.maximum(plan.use * self.live, 1e-12)
            self.longest = max(self.longest, float(behind.max()))
        self._finish(seconds)
        if self.env.now + seconds - self._window_began >= 1.0 - 1e-9:
            self._close_window(self.env.now + seconds)

    def _finish(self, seconds: float) -> None:
        """Those that have their first new output, and those that have caught up."""
        if not len(self.active) or self.env.now < self._look_at:
            return
        if len(self.active) > MANY:
            self._look_at = self.env.now + LOOK_SECONDS - seconds / 2
        lost, pods = self.lost, self.lost.pod[self.active]
        ready = self.opening[pods] == 0.0
        ran = self.active[ready & (self.given[pods] >= self.first)]
        ran = ran[lost.ran[ran] == inf]
        if len(ran):
            self._unseen -= len(ran)
            lost.ran[ran] = self.env.now + seconds
            self.longest = max(self.longest, float((lost.ran[ran] - lost.at[ran]).max()))
        done = ready & (self.caught[pods] >= self.whole) & (lost.ran[self.active] < inf)
        if done.any():
            lost.state[self.active[done]] = RUNNING
            lost.whole[self.active[done]] = self.env.now + seconds
            self.replaying -= np.bincount(pods[done], minlength=len(self.live))
            keep = ~done
            self.active, self.first, self.whole = self.active[keep], self.first[keep], self.whole[keep]

    def _close_window(self, now: float) -> None:
        """The use of each pod over a second, or over less and what it does anyhow for the rest of it."""
        elapsed = now - self._window_began
        usual = np.minimum(1.0, self.live * self.plan.use) * max(0.0, 1.0 - elapsed)
        self.peak = max(self.peak, min(1.0, float(((self._used + usual) / max(1.0, elapsed)).max())))
        self._used[:] = 0.0
        self._window_began = now

    # -- the end -----------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int, int]:
        """How many sequences live, wait, and were given up; together all there are."""
        state = self.lost.state[: self.lost.count]
        return int(self.live.sum()), int((state == WAITING).sum()), int((state == GIVEN_UP).sum())

    def result(self) -> Result:
        lost = self.lost
        state = lost.state[: lost.count]

        def share(part: float, when: Floats) -> float:
            after = np.sort(when[: lost.count] - lost.at[: lost.count])
            return float(after[max(0, ceil(part * len(after)) - 1)]) if len(after) else 0.0

        waiting = (state == WAITING) | ((state == REPLAYING) & (lost.ran[: lost.count] == inf))
        ages = self.env.now - lost.at[: lost.count][waiting]
        self._close_window(self.env.now)
        return Result(
            lost=lost.count,
            half=share(0.5, lost.ran),
            most=share(0.99, lost.ran),
            every=share(1.0, lost.ran),
            whole=share(0.99, lost.whole),
            longest_backlog=max(self.longest, float(ages.max()) if len(ages) else 0.0),
            refused=self.refused,
            given_up=self.counts()[2],
            peak_use=self.peak,
            settled_use=float(self.live.max() * self.plan.use),
            peak_live=self.peak_live,
            counts=self.counts(),
            seconds=self.env.now,
        )


def pod_lost(plan: Plan) -> Result:
    """One pod is killed, the one with the most sequences."""
    fleet = Fleet(plan)
    fleet.kill(np.array([int(fleet.live.argmax())]))
    fleet.env.run(until=plan.horizon_seconds)
    return fleet.result()


def zone_lost(plan: Plan, silent: bool) -> Result:
    """Every third pod is gone at once; `silent`: with its network, so that nothing tells the clients."""
    fleet = Fleet(plan)
    fleet.kill(np.arange(0, plan.pods, 3), silent)
    fleet.env.run(until=plan.horizon_seconds)
    return fleet.result()


def rolled(plan: Plan) -> Result:
    """Every pod is replaced; the run ends a horizon after the last one has left."""
    fleet = Fleet(plan)
    fleet.env.run(until=fleet.env.process(fleet.rollout()))
    fleet.env.run(until=fleet.env.now + plan.resume_seconds + 1.0)
    return fleet.result()
