"""What the scheduler promises: the most urgent first, nothing starves, batches that can run together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
            scheduler.add(sequence, first(sequence))


def first(sequence: Sequence) -> Chunk:
    """The chunk whose turn it is."""
    chunk = sequence.pending[0]
    assert isinstance(chunk, Chunk)
    return chunk


def run(scheduler: Scheduler, batch: Batch) -> None:
    """What the engine does after a batch: eat, and add again what has frames left."""
    for turn in batch:
        turn.chunk.frames -= turn.frames
        turn.chunk.parts += ((b"",),)
        if turn.chunk.frames and not turn.sequence.ended:
            scheduler.add(turn.sequence, turn.chunk)


def members(batch: Batch) -> list[Sequence]:
    return [turn.sequence for turn in batch]


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
    scheduler.add(one, first(one))
    with pytest.raises(AssertionError):
        scheduler.add(one, first(one))


def test_one_step_looks_at_a_bounded_number_of_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait that do not fit: the search ends after a few batches' worth."""
    monkeypatch.setattr(scheduler_module, "_MAX_PASSED_OVER", 3)
    scheduler = create_scheduler(ragged=False, max_batch=2)
    first, others = create_sequences(1, frames=2), create_sequences(6, frames=1)
    behind = create_sequences(1, frames=2)
    add(scheduler, first, others, behind)
    assert members(scheduler.schedule()) == first  # 3 * 2 others stood before the fitting one
    assert len(scheduler) == 7


# Whatever arrives, and in which order.

TICK = 0.01  # seconds; one batch is formed in each
Clients = list[tuple[float, float | None]]  # period in seconds, 0 for none declared; gain
Arrivals = list[list[tuple[int, int]]]  # per tick: who sends how many frames


@dataclass(frozen=True)
class Key:
    """A turn's place in the one order, as a client knows it when it sends the chunk."""

    due: float
    opened: int
    step: int

    def __lt__(self, other: Key) -> bool:
        return (self.due, self.opened, self.step) < (other.due, other.opened, other.step)


class World:
    """Sequences that send chunks at any time, and a scheduler that forms one batch a tick.

    Keeps what is known of each chunk at its arrival: the keys of its turns.
    """

    def __init__(self, kind: str, max_batch: int) -> None:
        self.scheduler = create_scheduler(
            ragged=kind == "ragged", stateless=kind == "stateless", max_batch=max_batch, max_frames=4
        )
        self.stateless = kind == "stateless"
        self.turn_frames = max_batch if self.stateless else 4
        self.now = 0.0
        self.turns: dict[Chunk, list[Key]] = {}
        self.last: dict[Chunk, Key] = {}  # of its turns and those before them in its sequence
        self.batches = 0
        self.arrived: dict[Chunk, int] = {}  # batches formed before it
        self.waited: dict[Chunk, int] = {}  # batches until it was done
        self.undone: set[Chunk] = set()

    def open(self, period: float, gain: float | None) -> Sequence:
        constants = {} if gain is None else {"gain": gain}
        return Sequence(SINK, accumulator(), period_seconds=period, constants=constants)

    def send(self, sequence: Sequence, frames: int) -> Chunk:
        chunk = Chunk(len(self.turns), (), self.now, 0, frames=frames)
        patience = min(sequence.period_seconds or 0.2, 1.0)
        # The rows of a stateless request are due at once.
        turns = -(-frames // self.turn_frames)
        places = [1.0 if self.stateless else 1 + n for n in range(turns)]
        if sequence.period_seconds and not self.stateless:
            places = [(1 + n) / turns for n in range(turns)]
        keys = [Key(self.now + place * patience, sequence.number, chunk.step) for place in places]
        self.turns[chunk] = keys
        before = [self.last[other] for other in sequence.pending if isinstance(other, Chunk)]
        self.last[chunk] = max([*keys, *before])
        self.arrived[chunk] = self.batches
        self.undone.add(chunk)
        sequence.pending.append(chunk)
        if len(sequence.pending) == 1:
            self.scheduler.add(sequence, chunk)
        return chunk

    def tick(self) -> Batch:
        """A batch, and what an engine does after it."""
        self.now += TICK
        batch = self.scheduler.schedule()
        self.batches += bool(batch)
        for turn in batch:
            turn.chunk.frames -= turn.frames
            turn.chunk.parts += ((b"",),)
            assert turn.chunk.frames >= 0
            if not turn.chunk.frames:
                turn.sequence.pending.pop(0)
                self.undone.remove(turn.chunk)
                self.waited[turn.chunk] = self.batches - self.arrived[turn.chunk]
            if turn.sequence.pending:
                self.scheduler.add(turn.sequence, first(turn.sequence))
        return batch

    def key(self, chunk: Chunk) -> Key:
        """Of its next turn."""
        return self.turns[chunk][0 if self.stateless else len(chunk.parts)]

    def bound(self, chunk: Chunk) -> int:
        """Turns that are due no later than its last one, or the last one before it in its sequence."""
        last = self.last[chunk]
        return sum(not last < key for keys in self.turns.values() for key in keys)


KINDS = st.sampled_from(["ragged", "grouped", "stateless"])
CLIENTS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.001, 0.005, 0.02, 0.1, 5.0]), st.sampled_from([None, 1.0, 2.0])),
    min_size=1,
    max_size=8,
)
ARRIVALS = st.lists(
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 9)), max_size=6), min_size=1, max_size=30
)


def play(world: World, clients: Clients, arrivals: Arrivals) -> Iterator[tuple[dict[Chunk, Key], Batch]]:
    """Each batch, with the turns that were ready for it: the first of each sequence."""
    sequences = [world.open(period, gain) for period, gain in clients]
    tick = 0
    while tick < len(arrivals) or world.undone:
        for who, frames in arrivals[tick] if tick < len(arrivals) else ():
            world.send(sequences[who % len(sequences)], frames)
        ready = [s.pending[0] for s in sequences if s.pending]
        keys = {chunk: world.key(chunk) for chunk in ready if isinstance(chunk, Chunk)}
        yield keys, world.tick()
        tick += 1
    assert not world.scheduler


@given(KINDS, st.integers(1, 4), CLIENTS, ARRIVALS)
def test_the_order_is_that_of_due_times_fixed_at_arrival(
    kind: str,
    max_batch: int,
    clients: Clients,
    arrivals: Arrivals,
) -> None:
    """Each batch begins with the most urgent turn of all, and goes on in their order."""
    world = World(kind, max_batch)
    for ready, batch in play(world, clients, arrivals):
        assert bool(batch) == bool(ready)
        keys = [ready[turn.chunk] for turn in batch]
        assert keys[:1] == sorted(ready.values())[:1]
        assert keys == sorted(keys)


@given(st.integers(1, 4), CLIENTS, ARRIVALS)
def test_of_chunks_that_may_all_share_a_batch_the_most_urgent_run(
    max_batch: int, clients: Clients, arrivals: Arrivals
) -> None:
    world = World("ragged", max_batch)
    alike = [[(who, 1) for who, _ in tick] for tick in arrivals]
    for ready, batch in play(world, [(period, None) for period, _ in clients], alike):
        assert [ready[turn.chunk] for turn in batch] == sorted(ready.values())[:max_batch]


@given(KINDS, st.integers(1, 4), CLIENTS, ARRIVALS)
def test_a_sequence_has_at_most_one_turn_a_batch(
    kind: str,
    max_batch: int,
    clients: Clients,
    arrivals: Arrivals,
) -> None:
    """However many chunks of it wait, however long they are, and however few others there are."""
    world = World(kind, max_batch)
    for _, batch in play(world, clients, arrivals):
        assert len({turn.sequence for turn in batch}) == len(batch) <= max_batch


@given(KINDS, st.integers(1, 4), CLIENTS, ARRIVALS)
def test_a_chunk_is_done_within_as_many_batches_as_turns_are_due_before_its_last(
    kind: str,
    max_batch: int,
    clients: Clients,
    arrivals: Arrivals,
) -> None:
    world = World(kind, max_batch)
    for _ in play(world, clients, arrivals):
        pass
    for chunk, waited in world.waited.items():
        assert waited <= world.bound(chunk)


@given(
    KINDS,
    st.integers(1, 4),
    st.tuples(st.sampled_from([0.0, 0.02, 0.1, 3600.0]), st.sampled_from([None, 1.0]), st.integers(1, 9)),
    st.lists(st.tuples(st.sampled_from([None, 1.0]), st.integers(1, 9)), min_size=1, max_size=3),
)
def test_a_flood_that_never_ends_holds_nobody_up_for_ever(
    kind: str,
    max_batch: int,
    victim: tuple[float, float | None, int],
    flood: list[tuple[float | None, int]],
) -> None:
    """In each tick more arrives than can run, each by a newcomer that declares a period of 1 ms."""
    world = World(kind, max_batch)
    period, gain, frames = victim
    waits = world.send(world.open(period, gain), frames)
    turns = sum(-(-n // world.turn_frames) for _, n in flood)
    own = len(world.turns[waits])
    waited = 1 if world.stateless or period else own
    before_due = math.ceil(waited * min(period or 0.2, 1.0) / TICK)  # ticks; what comes later is due later
    while waits in world.undone:
        for own_gain, n in flood:
            world.send(world.open(0.001, own_gain), n)
        world.tick()
        assert world.batches <= own + before_due * turns


def test_a_long_overdue_chunk_does_not_hold_short_ones_to_a_row_a_batch() -> None:
    """Beside a turn of 32 frames only one of a single frame fits; the 64 must not wait for a hundred such."""
    scheduler = create_scheduler(max_batch=64, max_frames=32)
    bulk = create_sequences(1, frames=3_200)
    short = create_sequences(64, arrived=0.3, period=0.02)
    add(scheduler, bulk, short)
    served: list[Sequence] = []
    batches = 0
    while len(served) < len(short):
        batch = scheduler.schedule()
        run(scheduler, batch)
        served += [s for s in members(batch) if s not in bulk]
        batches += 1
    assert batches <= 3


def test_a_long_chunk_with_a_declared_period_is_done_in_it_beside_a_flood() -> None:
    """Four turns a second, as its client said it would need; the others ask for all that is left."""
    scheduler = create_scheduler(max_batch=4, max_frames=32)
    (paced,) = create_sequences(1, frames=128, period=1.0)
    add(scheduler, [paced])
    now, chunk = 0.0, paced.pending[0]
    assert isinstance(chunk, Chunk)
    while chunk.frames:
        now += 0.01
        add(scheduler, create_sequences(4, arrived=now))
        run(scheduler, scheduler.schedule())
    assert now <= 1.0
