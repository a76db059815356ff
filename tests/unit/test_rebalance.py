"""A server that is fuller than it should be sends its oldest sequences elsewhere, and no more than it may."""

from __future__ import annotations

import pytest

from tenuto.serving.resume_token import TokenSealer
from tenuto.serving.sequence import Closed, Ending, Sequence
from tenuto.serving.snapshot import Checkpoints

from .fakes import Bench

SEALER = TokenSealer()


def bench(live: int, sealed: bool = True) -> tuple[Bench, list[Sequence]]:
    """Of eight slots, so many in use; each sequence came a second after the one before."""
    checkpoints = Checkpoints(SEALER.seal, "f", "s", 0) if sealed else None
    one = Bench(max_sequences=8, checkpoints=checkpoints)
    sequences = []
    for _ in range(live):
        sequences.append(one.open())
        one.settle()
        one.now += 1
    return one, sequences


def sent_away(one: Bench, sequences: list[Sequence]) -> list[int]:
    """Which of them."""
    one.settle()
    return [n for n, sequence in enumerate(sequences) if one.ending(sequence) is Ending.REBALANCE]


@pytest.mark.parametrize(
    "live, used, count, age, expected",
    [
        (8, 0.5, 10, 0.0, [0, 1, 2, 3]),
        (8, 0.5, 3, 0.0, [0, 1, 2]),  # no more than so many at once
        (8, 0.5, 10, 7.0, [0, 1]),  # none that came less than 7 s ago
        (4, 0.5, 10, 0.0, []),
        (5, 0.5, 10, 0.0, [0]),
        (8, 1.0, 10, 0.0, []),
    ],
)
def test_the_oldest_leave_until_the_share_is_kept(
    live: int, used: float, count: int, age: float, expected: list[int]
) -> None:
    one, sequences = bench(live)
    one.engine.rebalance(used, count, age)
    assert sent_away(one, sequences) == expected


def test_they_take_what_was_answered_along() -> None:
    one, (first, *_) = bench(8)
    one.send(first, 1, [5])
    one.engine.rebalance(0.5, 1, 0.0)
    one.settle()
    assert one.outputs(first) == [[5.0]]
    (closed,) = [r for r in one.replies(first) if isinstance(r, Closed)]
    assert (closed.reason, closed.last_step) == (Ending.REBALANCE, 1)
    assert SEALER.unseal(closed.token).step == 1


def test_who_is_to_be_sent_away_is_counted_once() -> None:
    """Those who do not read wait; meanwhile no others are sent in their place."""
    one, sequences = bench(8)
    one.sink.full = True
    for _ in range(3):
        one.engine.rebalance(0.75, 10, 0.0)
        assert sent_away(one, sequences) == []
    one.sink.full = False
    assert sent_away(one, sequences) == [0, 1]


def test_without_tokens_nobody_is_sent_away() -> None:
    one, sequences = bench(8, sealed=False)
    one.engine.rebalance(0.5, 10, 0.0)
    assert sent_away(one, sequences) == []


def test_an_engine_with_room_is_not_woken() -> None:
    one, _ = bench(4)
    one.engine.rebalance(0.5, 10, 0.0)
    assert not len(one.engine._inbox)
