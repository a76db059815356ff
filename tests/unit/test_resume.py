"""A sequence that goes on from a snapshot gives what it would have given, and takes no one's place."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenuto.serving.errors import PoolFull, RunFailed, StepGap, TokenInvalid
from tenuto.serving.manifest import Manifest
from tenuto.serving.population import SEALED_BYTES
from tenuto.serving.resume_token import TokenSealer
from tenuto.serving.sequence import Checkpoint, Closed, Ending, Failed, Opened, Sequence
from tenuto.serving.snapshot import Checkpoints, Snapshot
from tenuto.serving.state_pool import HostPool

from .fakes import FAILS, Accumulator, Bench, accumulator, doubler

SEALER = TokenSealer()


def bench(manifest: Manifest | None = None, *, every: int = 0, **settings: Any) -> Bench:
    return Bench(manifest, checkpoints=Checkpoints(SEALER.seal, "f", "s", every), **settings)


def tokens(bench: Bench, sequence: Sequence) -> list[tuple[int, Snapshot]]:
    found = [r for r in bench.replies(sequence) if isinstance(r, Checkpoint)]
    return [(r.step, SEALER.unseal(r.token)) for r in found]


def last_token(bench: Bench, sequence: Sequence) -> Snapshot:
    closed = bench.replies(sequence)[-1]
    assert isinstance(closed, Closed | Failed)
    assert closed.token
    return SEALER.unseal(closed.token)


def resume(bench: Bench, snapshot: Snapshot) -> Sequence:
    sequence = Sequence(bench.sink, bench.manifest, now=bench.now)
    bench.engine.open(sequence, snapshot)
    return sequence


def test_a_checkpoint_comes_with_the_first_answer_and_after_so_many_chunks() -> None:
    one = bench(every=2)
    live = one.open()
    for step in range(1, 6):
        one.send(live, step, [step])
        one.settle()
    assert [
        (step, s.step, np.frombuffer(s.states[0], np.float32).tolist()) for step, s in tokens(one, live)
    ] == [
        (1, 1, [1]),
        (3, 3, [6]),
        (5, 5, [15]),
    ]
    kinds = [type(r).__name__ for r in one.replies(live)]
    assert kinds == [
        "Opened",
        "Output",
        "Checkpoint",
        "Output",
        "Output",
        "Checkpoint",
        "Output",
        "Output",
        "Checkpoint",
    ]


def test_a_client_may_choose_how_often() -> None:
    one = bench(every=50)
    live = one.open(checkpoint_every=1)
    one.send(live, 1, [1])
    one.send(live, 2, [1])
    one.settle()
    assert [step for step, _ in tokens(one, live)] == [1, 2]


def test_a_checkpoint_that_is_asked_for_comes_once_all_before_it_is_answered() -> None:
    one = bench(accumulator(max_frames=1))
    live = one.open()
    one.send(live, 1, [1, 1, 1])
    one.engine.checkpoint(live)
    one.send(live, 2, [1])
    one.settle()
    kinds = [type(r).__name__ for r in one.replies(live)]
    assert kinds == ["Opened", "Output", "Checkpoint", "Output"]
    assert [(step, s.step) for step, s in tokens(one, live)] == [(1, 1)]
    one.check_at_rest()


def test_wishes_neither_pile_up_nor_fill_the_window() -> None:
    one = bench()
    live = one.open(window=2)
    one.send(live, 1, [1])
    for _ in range(100):
        one.engine.checkpoint(live)
    one.send(live, 2, [1])
    one.settle()
    for _ in range(100):
        one.engine.checkpoint(live)
    one.settle()
    assert [step for step, _ in tokens(one, live)] == [1, 2]
    assert one.outputs(live) == [[1], [2]]
    one.check_at_rest()


def test_the_window_holds_among_wishes() -> None:
    one = bench(accumulator(max_frames=1))
    live = one.open(window=2)
    for step in (1, 2, 3):
        one.send(live, step, [1, 1])
        one.engine.checkpoint(live)
    one.settle()
    assert one.ending(live) is Ending.WINDOW_EXCEEDED
    assert one.outputs(live) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "reason",
    [
        Ending.STREAM_ENDED,
        Ending.IDLE_EXPIRED,
        Ending.EVICTED,
        Ending.DRAINING,
        Ending.MAX_AGE,
        Ending.REBALANCE,
    ],
)
def test_an_ending_that_can_be_resumed_brings_a_token(reason: Ending) -> None:
    one = bench()
    live = one.open()
    one.send(live, 1, [5])
    one.engine.finish(live, reason)
    one.settle()
    assert one.ending(live) is reason
    assert last_token(one, live).step == 1
    goes_on = resume(one, last_token(one, live))
    one.send(goes_on, 2, [1])
    one.settle()
    assert one.replies(goes_on)[0] == Opened(live.id, 3, 2, 4)
    assert one.outputs(goes_on) == [[6]]


@pytest.mark.parametrize("reason", [Ending.END, Ending.CANCELLED, Ending.SUPERSEDED, Ending.WINDOW_EXCEEDED])
def test_other_endings_bring_none(reason: Ending) -> None:
    one = bench()
    live = one.open()
    one.engine.finish(live, reason)
    one.settle()
    closed = one.replies(live)[-1]
    assert isinstance(closed, Closed)
    assert closed.token == b""


def test_idle_and_evicted_sequences_get_a_token() -> None:
    one = bench()
    silent, evicted = one.open(idle_seconds=10), one.open()
    one.send(silent, 1, [1])
    one.send(evicted, 1, [2])
    one.settle()
    one.send(evicted, 2, [2])
    assert one.engine.close_by_id(evicted.id, Ending.EVICTED)
    one.now += 11
    one.settle()
    assert (one.ending(silent), last_token(one, silent).step) == (Ending.IDLE_EXPIRED, 1)
    assert (one.ending(evicted), last_token(one, evicted).step) == (
        Ending.EVICTED,
        2,
    )  # accepted, so answered


def test_a_mistake_brings_a_token_of_before_it() -> None:
    one = bench()
    live = one.open()
    one.send(live, 1, [1])
    one.send(live, 5, [1])
    one.settle()
    assert isinstance(one.ending(live), StepGap)
    assert last_token(one, live).step == 1


def test_a_sequence_that_ends_within_a_chunk_brings_none() -> None:
    """What is eaten of the chunk cannot be told apart from what is not: an older token is right."""
    one = bench(accumulator(max_frames=1))
    cut, failed = one.open(), one.open()
    one.send(cut, 1, [1, 1, 1])
    one.send(failed, 1, [1, FAILS])
    one.engine.turn()
    one.engine.close(cut, Ending.DRAINING)
    one.settle()
    assert isinstance(one.ending(failed), RunFailed)
    for sequence in (cut, failed):
        ended = one.replies(sequence)[-1]
        assert isinstance(ended, Closed | Failed)
        assert ended.token == b""


def test_a_token_opened_where_its_sequence_lives_takes_its_slot_over() -> None:
    one = bench(max_sequences=1, every=1)
    old = one.open()
    one.send(old, 1, [1])
    one.send(old, 2, [1])
    one.settle()
    new = resume(one, tokens(one, old)[0][1])
    one.send(old, 3, [100])
    one.send(new, 2, [1])
    one.settle()
    assert one.ending(old) is Ending.SUPERSEDED
    assert one.outputs(old) == [[1], [2]]
    assert one.outputs(new) == [[2]]
    assert one.engine.sequences() == [new]
    one.check_at_rest()


def test_a_part_of_the_slots_is_kept_for_those_that_resume() -> None:
    one = bench(max_sequences=4, resume_reserve=0.5)
    first, second = one.open(), one.open()
    one.settle()
    third = one.open()
    one.engine.close(first, Ending.EVICTED)
    one.settle()
    assert isinstance(one.ending(third), PoolFull)
    assert "2 of them kept for sequences that resume" in str(one.ending(third))
    one.engine.finish(second, Ending.DRAINING)
    one.settle()
    again = [one.open() for _ in range(2)]
    goes_on = resume(one, last_token(one, second))
    one.settle()
    assert [one.ending(s) for s in (*again, goes_on)] == [None, None, None]


def test_an_overloaded_engine_takes_those_that_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(now: float, where: str) -> None:
        raise PoolFull("overloaded")

    one = bench()
    live = one.open()
    one.engine.finish(live, Ending.DRAINING)
    one.settle()
    monkeypatch.setattr(one.engine._admission, "check", refuse)
    new, goes_on = one.open(), resume(one, last_token(one, live))
    one.settle()
    assert isinstance(one.ending(new), PoolFull)
    assert one.ending(goes_on) is None
    assert one.engine.metrics.resumed == 1


def test_a_stateless_model_resumes_at_its_step() -> None:
    one = bench(doubler(), runner=None)
    live = one.open()
    one.engine.finish(live, Ending.STREAM_ENDED)
    one.settle()
    assert last_token(one, live).states == ()
    goes_on = resume(one, last_token(one, live))
    one.settle()
    assert isinstance(one.replies(goes_on)[0], Opened)


CHUNKS = st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=8)


@settings(deadline=None)
@given(CHUNKS, st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.data())
def test_resumed_at_any_boundary_it_gives_what_it_would_have_given(
    chunks: list[list[int]], multiple: int, context: int, max_frames: int, data: st.DataObject
) -> None:
    """Left context and samples not yet eaten are inside: any chunking, at any boundary, more than once."""
    x = {"chunk": {"multiple": multiple}, "left_context": context}
    manifest = (
        accumulator(ragged=False, max_frames=max_frames, x=x) if not context else _windowed(multiple, context)
    )
    runner = Accumulator() if not context else Windowed(context)
    whole, parts = bench(manifest, runner=runner), bench(manifest, runner=runner, every=1)
    alone = whole.open()
    for step, chunk in enumerate(chunks, 1):
        whole.send(alone, step, chunk)
        whole.settle()
    live, outputs = parts.open(), []
    for step, chunk in enumerate(chunks, 1):
        if step > 1 and data.draw(st.booleans()):
            snapshot = tokens(parts, live)[-1][1]
            other = bench(manifest, runner=runner, every=1)
            for neighbour in range(data.draw(st.integers(0, 2))):  # it need not get the same slot
                other.send(other.open(), 1, [100 + neighbour] * multiple)
            parts, live = other, resume(other, snapshot)
        parts.send(live, step, chunk)
        parts.settle()
        outputs.append(parts.outputs(live)[-1])
    assert outputs == whole.outputs(alone)


def _windowed(multiple: int, context: int) -> Manifest:
    return accumulator(ragged=False, x={"chunk": {"multiple": multiple}, "left_context": context})


class Windowed(Accumulator):
    """As the accumulator, of a sum over each sample and those before it that are context."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self._context = context

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        x = feeds["x"]
        sums = sum(x[:, at : x.shape[1] - self._context + at] for at in range(self._context + 1))
        return super().run({"x": np.asarray(sums, np.float32), "total": feeds["total"]})


# What a caller may make a server hold.


def large(**more: Any) -> Bench:
    """Each token takes a quarter of what one delivery may have."""
    one = bench(**more)
    one.engine._population._checkpoints = Checkpoints(lambda *_: bytes(SEALED_BYTES // 4), "f", "s", 1)
    return one


def count(bench: Bench, kind: type) -> int:
    return sum(isinstance(reply, kind) for _, reply in bench.sink.replies)


def test_many_empty_chunks_in_one_message_become_one_token_and_the_newest() -> None:
    """An empty chunk is answered at once and never fills the window: each would be a step with a token."""
    one = bench(every=1)
    live = one.open()
    for step in range(1, 1001):
        one.send(live, step, [])
        one.engine.checkpoint(live)
    one.settle()
    one.settle()
    assert [step for step, _ in tokens(one, live)] == [1, 1000]
    one.check_at_rest()


def test_the_tokens_of_one_delivery_are_bounded_and_the_others_come_later() -> None:
    one = large(max_sequences=20)
    live = [one.open() for _ in range(10)]
    for sequence in live:
        one.send(sequence, 1, [1])
    seen = []
    for _ in range(12):
        one.engine.turn()
        seen.append(count(one, Checkpoint))
    assert all(after - before <= 4 for before, after in itertools.pairwise(seen))
    assert seen[-1] == 10


def test_a_caller_who_takes_no_replies_gets_no_more_tokens() -> None:
    one = large()
    live = one.open()
    one.settle()
    one.sink.full = True
    for step in range(1, 4):
        one.send(live, step, [1])
        one.settle()
    assert tokens_of(one) == []
    one.sink.full = False
    assert one.engine._population.next_look() < 2000  # somebody waits: the engine does not sleep for ever
    one.settle()
    assert tokens_of(one) == [3]


def tokens_of(bench: Bench) -> list[int]:
    return [reply.step for _, reply in bench.sink.replies if isinstance(reply, Checkpoint)]


def test_a_drain_sends_as_many_away_at_once_as_get_their_tokens() -> None:
    one = large(max_sequences=20)
    live = [one.open() for _ in range(10)]
    one.settle()
    one.engine.drain()
    seen = []
    for _ in range(12):
        one.engine.turn()
        seen.append(count(one, Closed))
    assert all(after - before <= 5 for before, after in itertools.pairwise(seen))
    assert seen[-1] == 10
    assert one.engine.emptied.is_set()
    assert all(one.replies(s)[-1].token for s in live)  # type: ignore[union-attr]


def test_a_drain_waits_for_those_who_do_not_read_until_it_is_stopped() -> None:
    one = large()
    live = one.open()
    one.settle()
    one.sink.full = True
    one.engine.drain()
    one.settle()
    assert one.ending(live) is None
    one.engine.stop(Ending.DRAINING)
    one.settle()
    assert one.replies(live)[-1] == Closed(Ending.DRAINING, 0)


def test_a_token_of_another_layout_is_refused_and_takes_no_slot() -> None:
    one = bench()
    live = one.open()
    one.engine.finish(live, Ending.DRAINING)
    one.settle()
    good = last_token(one, live)
    for wrong in (
        dataclasses.replace(good, states=(b"123",)),
        dataclasses.replace(good, states=()),
        dataclasses.replace(good, feeds=()),
    ):
        goes_on = resume(one, wrong)
        one.settle()
        assert isinstance(one.ending(goes_on), TokenInvalid)
    one.check_at_rest()
    assert one.engine.metrics.resumes_refused == {"TOKEN_INVALID": 3}


class Together(HostPool):
    """A pool that is told what will be read, and can be out of reach."""

    reads_together = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.expected: list[list[int]] = []
        self.lost = False

    def expect(self, slots: list[int]) -> None:
        if self.lost:
            raise RunFailed("the device is lost")
        self.expected.append(sorted(slots))

    def read(self, slot: int) -> tuple[bytes, ...]:
        if self.lost:
            raise RunFailed("the device is lost")
        return super().read(slot)


def together(**settings: Any) -> tuple[Bench, Together]:
    pool = Together(accumulator().states, 4)
    return bench(pool=pool, **settings), pool


def test_a_pool_is_told_of_a_batch_whose_tokens_are_due_and_of_no_other() -> None:
    one, pool = together(every=2)
    live = [one.open() for _ in range(3)]
    for step in range(1, 4):
        for sequence in live[: 2 if step == 1 else 3]:
            one.send(sequence, sequence.accepted + 1, [1])
        one.settle()
    slots = [sequence.slot for sequence in live]
    # At first the two that came; then the third; then the two again, two chunks later.
    assert pool.expected == [sorted(slots[:2]), slots[2:], sorted(slots[:2])]
    assert [[step for step, _ in tokens(one, sequence)] for sequence in live] == [[1, 3], [1, 3], [1]]


def test_a_pool_is_told_of_those_who_leave() -> None:
    one, pool = together()
    live = [one.open() for _ in range(3)]
    one.settle()
    one.engine.drain()
    one.settle()
    assert pool.expected == [sorted(sequence.slot for sequence in live)]
    assert all(last_token(one, sequence).step == 0 for sequence in live)


def test_a_state_that_cannot_be_read_costs_its_token_and_nothing_else() -> None:
    one, pool = together(every=1)
    live = one.open()
    pool.lost = True
    one.send(live, 1, [1])
    one.settle()
    assert len(one.outputs(live)) == 1
    assert tokens(one, live) == []
    pool.lost = False
    one.send(live, 2, [1])
    one.settle()
    assert [step for step, _ in tokens(one, live)] == [2]
