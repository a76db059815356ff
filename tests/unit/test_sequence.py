"""Feeds: however the samples come, the model sees the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.manifest import Input
from tenuto.serving.sequence import Chunk, Ending, Feed, Sequence
from tenuto.v1 import tenuto_pb2 as pb

from .fakes import FakeSink, accumulator


def create_feed(
    *, multiple: int = 1, context: int = 0, context_value: float = 0.0, columns: int = 1
) -> tuple[Feed, int]:
    """A feed of int16 samples of `columns` numbers, and the bytes of one."""
    spec = Input.model_validate({
        "name": "x", "dtype": "int16", "shape": ["batch", "time", columns], "time_axis": 1,
        "chunk": {"multiple": multiple}, "left_context": context, "left_context_value": context_value,
    })  # fmt: skip
    return Feed(spec, spec.sample_bytes), spec.sample_bytes


def samples(*values: int) -> bytes:
    return np.array(values, np.int16).tobytes()


def numbers(data: bytes) -> list[int]:
    return np.frombuffer(data, np.int16).tolist()


@given(
    cuts=st.lists(st.integers(0, 9), max_size=12),
    turns=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    multiple=st.integers(1, 4),
    context=st.integers(0, 3),
    columns=st.integers(1, 2),
)
def test_any_chunking_gives_the_same_rows_as_the_whole(
    cuts: list[int], turns: list[int], multiple: int, context: int, columns: int
) -> None:
    feed, size = create_feed(multiple=multiple, context=context, context_value=-5, columns=columns)
    stream = np.arange(sum(cuts) * columns, dtype=np.int16).tobytes()
    at, eaten = 0, 0
    padded = np.full(context * columns, -5, np.int16).tobytes() + stream
    for number, cut in enumerate(cuts):
        ready = feed.add(stream[at * size : (at + cut) * size])
        at += cut
        assert ready == (at - eaten) // multiple
        while ready:
            frames = min(turns[number % len(turns)], ready)
            ready -= frames
            end = eaten + frames * multiple
            assert feed.peek(frames) == padded[eaten * size : (context + end) * size]
            feed.eat(frames)
            eaten = end
    assert feed.unread == at - eaten < multiple


def test_peeking_eats_nothing() -> None:
    feed, _ = create_feed()
    feed.add(samples(1, 2, 3))
    assert feed.peek(2) == feed.peek(2) == samples(1, 2)
    assert feed.unread == 3


def test_the_left_context_is_the_samples_before() -> None:
    feed, _ = create_feed(context=2, context_value=9)
    feed.add(samples(1, 2, 3))
    assert numbers(feed.peek(2)) == [9, 9, 1, 2]
    feed.eat(2)
    assert numbers(feed.peek(1)) == [1, 2, 3]


@pytest.mark.parametrize("sent, missing", [(0, 0), (1, 3), (3, 1), (4, 0), (6, 2)])
def test_padding_fills_what_is_left_over_and_no_more(sent: int, missing: int) -> None:
    feed, size = create_feed(multiple=4)
    feed.add(bytes(sent * size))
    assert feed.padding() == bytes(missing * size)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("over", [0, 1])
def test_an_idle_sequence_does_not_keep_its_last_chunk_alive(context: int, over: int) -> None:
    """What is kept is the context and what does not fill a frame."""
    feed, size = create_feed(context=context, multiple=2)
    feed.add(bytes((1000 + over) * size))
    feed.eat(500)
    assert len(feed._data) == (context + over) * size


def test_a_chunk_without_copies_is_the_clients_own_bytes() -> None:
    """The common case costs no copy."""
    feed, _ = create_feed()
    data = samples(1, 2, 3)
    feed.add(data)
    assert feed.peek(3) is data


def two_inputs(**second: Any) -> Sequence:
    first = {"name": "x", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
    return Sequence(FakeSink(), accumulator(inputs=[first, first | {"name": "z"} | second]))


def test_a_sequence_runs_as_many_frames_as_all_inputs_have() -> None:
    sequence = two_inputs(chunk={"multiple": 2})
    chunk = Chunk(1, (bytes(4 * 3), bytes(4 * 5)), 0.0, 0)
    sequence.begin(chunk)
    assert chunk.frames == 2
    for feed in sequence.feeds:
        feed.eat(2)
    assert [feed.unread for feed in sequence.feeds] == [1, 1]


def test_a_begun_chunk_lets_go_of_its_bytes() -> None:
    sequence = Sequence(FakeSink(), accumulator())
    chunk = Chunk(1, (bytes(4),), 0.0, 0)
    sequence.begin(chunk)
    assert chunk.data == ()


def test_every_sequence_has_its_own_id_and_number() -> None:
    made = [Sequence(FakeSink(), accumulator()) for _ in range(100)]
    assert len({s.id for s in made}) == 100
    assert [s.number for s in made] == sorted({s.number for s in made})


def test_the_order_of_constants_makes_no_difference() -> None:
    one = Sequence(FakeSink(), accumulator(), constants={"a": 1.0, "b": 2.0})
    other = Sequence(FakeSink(), accumulator(), constants={"b": 2.0, "a": 1.0})
    assert one.constants == other.constants


def test_endings_have_the_numbers_of_the_wire() -> None:
    wire = {name: number for name, number in pb.Ending.items() if number}
    assert {e.name: e.value for e in Ending} == wire


@pytest.mark.parametrize(
    "arrivals, behind",
    [
        ([0.0, 1.0, 2.0, 3.0], [False] * 4),
        ([0.5, 1.4, 2.6, 3.5], [False] * 4),  # jitter
        ([0.0, 1.5, 3.0, 4.5, 6.0, 7.5], [False, False, False, True, False, False]),  # a third too slow
        ([1.05 * n for n in range(20)], [False] * 20),  # drifting: late once in 20, the 21st
        ([0.0, 9.0, 10.0, 11.0], [False] * 4),  # a pause
        ([0.0, 0.1, 0.2, 1.2], [False] * 4),  # ahead, and on from there
        ([0.0, 3.0, 3.0, 3.0], [False, True, False, False]),  # one stall, and what waited comes at once
    ],
    ids=["in time", "jitter", "too slow", "drifting", "pause", "ahead", "stall"],
)
def test_a_clock_of_periods_tells_late_chunks_from_pauses(arrivals: list[float], behind: list[bool]) -> None:
    sequence = Sequence(FakeSink(), accumulator(), now=-0.2, period_seconds=1.0)
    assert [sequence.falls_behind(at) for at in arrivals] == behind
