"""What the scheduler promises: the most urgent first, nothing starves, batches that can run together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving import scheduler as scheduler_module
from tenuto.serving.manifest import Manifest
from tenuto.serving.scheduler import Batch, Scheduler
from tenuto.serving.sequence import Chunk, Sequence

from .fakes import FakeSink, accumulator, doubler

SINK = FakeSink()


def create_scheduler(*, ragged: bool = True, stateless: bool = False, **changes: Any) -> Scheduler:
    return Scheduler(doubler(**changes) if stateless else accumulator(ragged=ragged, **changes))


def create_sequences(
    count: int, *, frames: int = 1, arrived: float = 0.0, period: float = 0.0, gain: float | None = None
) -> list[Sequence]:
    """Sequences whose first chunk is ready to run."""
    manifest: Manifest = accumulator()
    made = []
    for _ in range(count):
        constants = {} if gain is None else {"gain": gain}
        sequence = Sequence(SINK, manifest, period_seconds=period, constants=constants)
        sequence.pending.append(Chunk(1, (), arrived, 0, frames=frames))
        made.append(sequence)
    return made


def add(scheduler: Scheduler, *groups: list[Sequence]) -> None:
    for group in groups:
        for sequence in group:
            scheduler.add(sequence)


def run(scheduler: Scheduler, batch: Batch) -> None:
    """What the engine does after a batch: eat, and add again what has frames left."""
    for turn in batch:
        turn.chunk.frames -= turn.frames
        if turn.chunk.frames and not turn.sequence.ended:
            scheduler.add(turn.sequence)


def members(batch: Batch) -> list[Sequence]:
    return [turn.sequence for turn in batch]


def due(sequence: Sequence) -> tuple[float, int]:
    chunk = sequence.pending[0]
    assert isinstance(chunk, Chunk)
    return chunk.arrived + (sequence.period_seconds or 0.2), sequence.number


def test_nothing_ready_is_an_empty_batch() -> None:
    assert create_scheduler().schedule() == []


def test_takes_all_that_is_ready_without_waiting_for_more() -> None:
    scheduler = create_scheduler(max_batch=8)
    three = create_sequences(3)
    add(scheduler, three)
    assert members(scheduler.schedule()) == three
    assert not scheduler


def test_takes_no_more_than_max_batch() -> None:
    scheduler = create_scheduler(max_batch=2)
    five = create_sequences(5)
    add(scheduler, five)
    assert [members(scheduler.schedule()) for _ in range(3)] == [five[:2], five[2:4], five[4:]]


def test_declared_periods_come_before_undeclared_ones() -> None:
    scheduler = create_scheduler(max_batch=1)
    undeclared = create_sequences(1, arrived=0.0)
    slow = create_sequences(1, arrived=0.0, period=0.1)
    fast = create_sequences(1, arrived=0.0, period=0.02)
    add(scheduler, undeclared, slow, fast)
    order = [members(scheduler.schedule()) for _ in range(3)]
    assert order == [fast, slow, undeclared]


def test_an_undeclared_period_counts_as_200_ms() -> None:
    scheduler = create_scheduler(max_batch=1)
    undeclared = create_sequences(1, arrived=0.0)
    before, after = create_sequences(1, period=0.199), create_sequences(1, period=0.201)
    add(scheduler, after, undeclared, before)
    assert [members(scheduler.schedule()) for _ in range(3)] == [before, undeclared, after]


def test_equally_urgent_ones_run_in_order_of_opening() -> None:
    scheduler = create_scheduler(max_batch=1)
    three = create_sequences(3)
    add(scheduler, three[::-1])
    assert [members(scheduler.schedule())[0] for _ in range(3)] == three


def test_a_sequence_has_one_turn_a_batch() -> None:
    """However long its chunk, and with places free."""
    scheduler = create_scheduler(max_batch=8, max_frames=4)
    add(scheduler, create_sequences(1, frames=100))
    assert len(scheduler.schedule()) == 1


def test_a_turn_is_at_most_max_frames() -> None:
    scheduler = create_scheduler(max_frames=4)
    add(scheduler, create_sequences(1, frames=10))
    turns = []
    while batch := scheduler.schedule():
        turns.append(batch[0].frames)
        run(scheduler, batch)
    assert turns == [4, 4, 2]


def test_a_model_of_exact_chunks_takes_one_frame_a_turn() -> None:
    scheduler = create_scheduler(max_frames=4, ragged=False, x={"chunk": {"exact": 3}})
    add(scheduler, create_sequences(1, frames=10))
    assert scheduler.schedule()[0].frames == 1


def test_without_lengths_only_equal_ones_share_a_batch() -> None:
    scheduler = create_scheduler(ragged=False, max_batch=8)
    two, one = create_sequences(2, frames=2), create_sequences(2, frames=1)
    add(scheduler, two[:1], one, two[1:])
    assert members(scheduler.schedule()) == two
    assert members(scheduler.schedule()) == one


def test_who_is_passed_over_keeps_its_place() -> None:
    scheduler = create_scheduler(ragged=False, max_batch=8)
    first, other = create_sequences(1, frames=2, arrived=0.0), create_sequences(1, frames=1, arrived=0.1)
    add(scheduler, first, other)
    assert members(scheduler.schedule()) == first
    add(scheduler, create_sequences(3, frames=2, arrived=0.2))
    assert members(scheduler.schedule()) == other


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_at_most_half_of_a_ragged_batch_is_padding(lengths: list[int]) -> None:
    scheduler = create_scheduler(max_batch=8, max_frames=8)
    for frames in lengths:
        add(scheduler, create_sequences(1, frames=frames))
    while batch := scheduler.schedule():
        cells = max(t.frames for t in batch) * len(batch)
        assert cells - sum(t.frames for t in batch) <= cells / 2
        run(scheduler, batch)


def test_padding_up_to_half_is_taken() -> None:
    scheduler = create_scheduler(max_batch=8, max_frames=8)
    add(scheduler, create_sequences(1, frames=4), create_sequences(1, frames=1))
    assert [t.frames for t in scheduler.schedule()] == [4, 1]


def test_other_constants_are_another_batch() -> None:
    scheduler = create_scheduler(max_batch=8)
    ones, twos = create_sequences(2, gain=1.0), create_sequences(2, gain=2.0)
    add(scheduler, ones[:1], twos, ones[1:])
    assert members(scheduler.schedule()) == ones
    assert members(scheduler.schedule()) == twos


def test_small_stateless_requests_join_one_batch() -> None:
    scheduler = create_scheduler(stateless=True, max_batch=8)
    requests = create_sequences(4, frames=2)
    add(scheduler, requests)
    assert members(scheduler.schedule()) == requests


def test_a_large_stateless_request_is_split_and_the_rest_of_the_batch_filled() -> None:
    scheduler = create_scheduler(stateless=True, max_batch=8)
    large, small = create_sequences(1, frames=11), create_sequences(3, frames=2)
    add(scheduler, large, small)
    batches = []
    while batch := scheduler.schedule():
        batches.append([t.frames for t in batch])
        run(scheduler, batch)
    assert batches == [[8], [3, 2, 2, 1], [1]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(1, 8))
def test_no_row_of_a_stateless_request_is_lost_or_run_twice(rows: list[int], max_batch: int) -> None:
    scheduler = create_scheduler(stateless=True, max_batch=max_batch)
    requests = [create_sequences(1, frames=n)[0] for n in rows]
    add(scheduler, requests)
    done = dict.fromkeys(requests, 0)
    while batch := scheduler.schedule():
        assert sum(t.frames for t in batch) <= max_batch
        for turn in batch:
            done[turn.sequence] += turn.frames
        run(scheduler, batch)
    assert list(done.values()) == rows


def test_ended_sequences_are_skipped_and_take_no_place() -> None:
    scheduler = create_scheduler(max_batch=2)
    four = create_sequences(4)
    add(scheduler, four)
    four[0].ended = four[1].ended = True
    assert members(scheduler.schedule()) == four[2:]
    assert not any(s.scheduled for s in four)


def test_a_sequence_is_added_once() -> None:
    scheduler = create_scheduler()
    (one,) = create_sequences(1)
    scheduler.add(one)
    with pytest.raises(AssertionError):
        scheduler.add(one)


def test_one_step_looks_at_a_bounded_number_of_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait that do not fit: the search ends after a few batches' worth."""
    monkeypatch.setattr(scheduler_module, "_MAX_PASSED_OVER", 3)
    scheduler = create_scheduler(ragged=False, max_batch=2)
    first, others = create_sequences(1, frames=2), create_sequences(6, frames=1)
    behind = create_sequences(1, frames=2)
    add(scheduler, first, others, behind)
    assert members(scheduler.schedule()) == first  # 3 * 2 others stood before the fitting one
    assert len(scheduler) == 7


ARRIVALS = st.lists(  # per tick: (period in ms, 0 for none declared; frames) of each arrival
    st.lists(st.tuples(st.sampled_from([0, 5, 10, 20, 100]), st.integers(1, 9)), max_size=6),
    min_size=1,
    max_size=30,
)


@given(ARRIVALS, st.booleans(), st.integers(1, 4))
def test_every_batch_holds_the_most_urgent_and_nothing_starves(
    arrivals: list[list[tuple[int, int]]], ragged: bool, max_batch: int
) -> None:
    """Each sequence runs before more batches have passed than there were turns due before it."""
    scheduler = create_scheduler(ragged=ragged, max_batch=max_batch, max_frames=4)
    everyone: list[Sequence] = []
    ready: set[Sequence] = set()
    waited: dict[Sequence, int] = {}
    ran: dict[Sequence, int] = {}
    tick = 0
    while tick < len(arrivals) or scheduler:
        now = tick * 0.01
        for period, frames in arrivals[tick] if tick < len(arrivals) else ():
            (new,) = create_sequences(1, frames=frames, arrived=now, period=period / 1000)
            everyone.append(new)
            ready.add(new)
            waited[new] = 0
            ran[new] = 0
            scheduler.add(new)
        batch = scheduler.schedule()
        assert bool(batch) == bool(ready)
        if batch:
            assert batch[0].sequence is min(ready, key=due)
            assert len({t.sequence for t in batch}) == len(batch) <= max_batch
        for turn in batch:
            ran[turn.sequence] += 1
        for sequence in ready - set(members(batch)):
            waited[sequence] += 1
        run(scheduler, batch)
        ready -= {t.sequence for t in batch if not t.chunk.frames}
        tick += 1
    assert not ready
    for sequence in everyone:
        before = sum(ran[other] for other in everyone if due(other) < due(sequence))
        assert waited[sequence] <= before
