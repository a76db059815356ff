"""Two batches in flight: one is gathered while another runs, and nobody can tell from the answers."""

from __future__ import annotations

import threading
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.errors import RunFailed
from tenuto.serving.sequence import Closed, Ending, Output, Sequence

from .fakes import BUG, EXPLODES, FAILS, Accumulator, Array, Bench, Doubler, accumulator, doubler

PATIENCE_SECONDS = 20.0
ROWS = 2  # of a batch


class Gated(Accumulator):
    """Each run takes a permit; who waits for a run that has none would wait in vain. All results lie in one
    buffer, as those of buffers that are kept do."""

    def __init__(self, permits: int = 0) -> None:
        super().__init__()
        self._permits = threading.Semaphore(permits)
        self.arrived = threading.Semaphore(0)  # a release for each run that has begun
        self.threads: list[int] = []
        self._kept: dict[tuple[int, ...], list[Array]] = {}

    def allow(self, runs: int = 1) -> None:
        self._permits.release(runs)

    def wait_for_run(self) -> None:
        assert self.arrived.acquire(timeout=PATIENCE_SECONDS), "no run began"

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        self.threads.append(threading.get_ident())
        self.arrived.release()
        assert self._permits.acquire(timeout=PATIENCE_SECONDS), "a run was not allowed"
        results = super().run(feeds)
        kept = self._kept.setdefault(feeds["x"].shape, results)
        for buffer, result in zip(kept, results, strict=True):
            buffer[...] = result
        return kept


def bench_of(runner: Accumulator, **more: Any) -> Bench:
    return Bench(accumulator(max_batch=ROWS), runner, max_sequences=8, in_flight=2, **more)


def opened(bench: Bench, count: int) -> list[Sequence]:
    sequences = [bench.open() for _ in range(count)]
    bench.engine.turn()
    return sequences


def test_one_batch_runs_while_the_next_is_gathered() -> None:
    runner = Gated()
    bench = bench_of(runner)
    a, b, c, d = opened(bench, 4)
    for n, one in enumerate((a, b, c, d), 1):
        bench.send(one, 1, [n])
    assert bench.engine.turn()  # it does not wait for a run that is not allowed to end
    runner.wait_for_run()
    assert bench.outputs(a) == []
    assert bench.engine.running_since == bench.now
    runner.allow(2)
    assert bench.engine.turn()
    assert (bench.outputs(a), bench.outputs(b)) == ([[1]], [[2]])
    bench.settle()
    assert (bench.outputs(c), bench.outputs(d)) == ([[3]], [[4]])
    assert bench.engine.running_since == 0
    assert threading.get_ident() not in runner.threads
    bench.check_at_rest()


def test_what_fills_no_second_batch_runs_at_once_and_on_the_engines_own_thread() -> None:
    runner = Gated(permits=2)
    bench = bench_of(runner)
    a, b, c = opened(bench, 3)
    for one in (a, b, c):
        bench.send(one, 1, [1])
    assert bench.engine.turn()
    assert len(bench.outputs(a)) == len(bench.outputs(b)) == 1
    assert bench.outputs(c) == []
    bench.settle()
    assert runner.threads == [threading.get_ident()] * 2
    bench.check_at_rest()


def test_a_batch_that_would_not_be_full_grows_while_another_runs() -> None:
    runner = Gated(permits=10)
    bench = bench_of(runner)
    sequences = opened(bench, 6)
    for one in sequences[:4]:
        bench.send(one, 1, [1])
    bench.engine.turn()  # the first is on its way
    bench.engine.turn()  # the second too, and the first lands
    bench.send(sequences[4], 1, [1])
    bench.engine.turn()  # one row fills nothing: the second lands
    bench.send(sequences[5], 1, [1])
    bench.settle()
    assert runner.batches == [2, 2, 2]


class Slow(Gated):
    """Each run takes seven seconds of the bench's clock."""

    def __init__(self) -> None:
        super().__init__(permits=1_000)
        self.bench: Bench

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        results = super().run(feeds)
        self.bench.now += 7
        return results


def slow_bench() -> tuple[Bench, Slow]:
    runner = Slow()
    runner.bench = bench_of(runner)
    return runner.bench, runner


def test_where_the_run_is_nearly_all_no_batch_is_gathered_ahead() -> None:
    """It would save nothing, and what comes later and is more urgent would wait for one run more."""
    bench, runner = slow_bench()
    sequences = opened(bench, 6)
    for step in range(1, 5):
        for one in sequences:
            bench.send(one, step, [1])
    bench.settle()
    assert runner.threads[2:] == [threading.get_ident()] * (len(runner.threads) - 2)
    assert [bench.outputs(one) for one in sequences] == [[[1], [2], [3], [4]]] * 6


def test_time_behind_another_batch_is_time_in_the_queue() -> None:
    bench, _ = slow_bench()
    a, b, c, d = opened(bench, 4)
    for one in (a, b, c, d):
        bench.send(one, 1, [1])
    bench.engine.turn()
    bench.settle()
    timed = [(r.queue_seconds, r.compute_seconds) for _, r in bench.sink.replies if isinstance(r, Output)]
    assert timed == [(0, 7), (0, 7), (7, 7), (7, 7)]
    assert bench.engine.metrics.stages["queue"].total == 14


def test_a_turn_that_only_sends_a_batch_off_is_not_taken_for_the_time_of_one() -> None:
    """Else chunks would count as late that were answered as soon as could be, and newcomers be refused."""
    bench, _ = slow_bench()
    sequences = opened(bench, 4)
    for one in sequences:
        bench.send(one, 1, [1])
    before = bench.engine._population.turn_seconds = 7.0
    bench.engine.turn()
    assert bench.outputs(sequences[0]) == []
    assert bench.engine._population.turn_seconds == before
    bench.settle()


def in_the_air(bench: Bench, runner: Gated) -> list[Sequence]:
    """Of four sequences the first two are in a batch that runs; it may end from now on."""
    sequences = opened(bench, 4)
    for n, one in enumerate(sequences, 1):
        bench.send(one, 1, [n])
    bench.engine.turn()
    runner.wait_for_run()
    runner.allow(100)
    return sequences


def test_who_is_closed_in_flight_is_answered_first_and_its_slot_is_not_handed_on_before() -> None:
    runner = Gated()
    bench = bench_of(runner)
    one, *_ = in_the_air(bench, runner)
    bench.engine.close(one, Ending.CANCELLED)
    newcomers = [bench.open() for _ in range(5)]  # one of them gets its slot
    bench.settle()
    assert [type(reply) for reply in bench.replies(one)][-2:] == [Output, Closed]
    assert bench.outputs(one) == [[1]]
    for newcomer in newcomers:
        bench.send(newcomer, 1, [10])
    bench.settle()
    assert [bench.outputs(newcomer) for newcomer in newcomers] == [[[10]]] * 5
    bench.engine.check()


def test_a_run_that_fails_in_flight_fails_the_guilty_row_alone() -> None:
    runner = Gated()
    bench = bench_of(runner)
    sequences = opened(bench, 6)
    for n, one in enumerate(sequences, 1):
        bench.send(one, 1, [FAILS if n == 2 else n])
    bench.engine.turn()
    runner.allow(100)
    bench.settle()
    assert isinstance(bench.ending(sequences[1]), RunFailed)
    assert [bench.outputs(one) for one in sequences] == [[[1]], [], [[3]], [[4]], [[5]], [[6]]]
    bench.check_at_rest()


@pytest.mark.parametrize("order", [BUG, EXPLODES])
def test_what_goes_wrong_in_one_batch_leaves_the_other(order: float) -> None:
    runner = Gated(permits=100)
    bench = bench_of(runner)
    sequences = opened(bench, 4)
    for n, one in enumerate(sequences):
        bench.send(one, 1, [order if n == 0 else n])
    bench.settle()
    assert bench.ending(sequences[0]) is not None
    assert [bench.outputs(one) for one in sequences[2:]] == [[[2]], [[3]]]
    bench.check_at_rest()


def test_a_lost_device_is_found_out_and_ends_nobody() -> None:
    runner = Gated(permits=100)
    runner.broken = True
    bench = bench_of(runner)
    sequences = opened(bench, 4)
    for one in sequences:
        bench.send(one, 1, [1])
    bench.settle()
    assert "the device is gone" in bench.engine.broken
    assert [bench.ending(one) for one in sequences] == [None] * 4


def test_the_end_waits_for_what_is_in_flight() -> None:
    runner = Gated()
    bench = bench_of(runner)
    sequences = in_the_air(bench, runner)
    bench.engine.stop(Ending.DRAINING)
    bench.settle()
    assert [bench.outputs(one) for one in sequences] == [[[1]], [[2]], [], []]
    assert [bench.ending(one) for one in sequences] == [Ending.DRAINING] * 4


def test_large_requests_are_answered_whole() -> None:
    bench = Bench(doubler(), Doubler(), in_flight=2)
    asked = [bench.request([[n, m] for m in range(9)]) for n in range(5)]
    bench.settle()
    for n, one in enumerate(asked):
        assert np.reshape(bench.outputs(one)[0], (9, 2)).tolist() == [[2 * n, 2 * m] for m in range(9)]
    bench.check_at_rest()


# What happens to one of six sequences: a chunk of so many samples, its end, or a turn of the engine.
HAPPENING = st.tuples(st.integers(0, 5), st.integers(-2, 6))


@given(st.lists(HAPPENING, max_size=60))
def test_answers_are_what_each_sequence_would_get_alone(happenings: list[tuple[int, int]]) -> None:
    bench = bench_of(Gated(permits=10_000))
    sequences = opened(bench, 6)
    sent: list[list[float]] = [[] for _ in sequences]
    steps = [0] * 6
    for who, what in happenings:
        one = sequences[who]
        if what == -2:
            bench.engine.turn()
        elif what == -1 and steps[who]:
            bench.engine.close(one, Ending.CANCELLED)
            bench.settle()
            sequences[who], sent[who], steps[who] = opened(bench, 1)[0], [], 0
        elif what >= 0:
            samples = [float(len(sent[who]) + k) for k in range(what)]
            sent[who] += samples
            steps[who] += 1
            bench.send(one, steps[who], samples)
            if steps[who] % 4 == 0:
                bench.settle()
    bench.settle()
    for one, samples in zip(sequences, sent, strict=True):
        assert [v for output in bench.outputs(one) for v in output] == list(accumulate(samples))
    bench.check_at_rest()
