"""Frames over a link: whole, in order, whatever their size, and whatever the other end takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving import link as link_module
from tenuto.serving.link import PACKET_BYTES, Kind, Link, packed, socket_pair, unpacked

from .links import HandLoop, settle

MESSAGE, FINISH = Kind.MESSAGE, Kind.FINISH
SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([*range(PACKET_BYTES - 13, PACKET_BYTES - 10), PACKET_BYTES, 3 * PACKET_BYTES]),
)


class End:
    """One end, and what it has taken."""

    def __init__(self, own: object) -> None:
        self.loop = HandLoop()
        self.taken: list[tuple[int, int, bytes]] = []
        self.lost = 0
        self.bug = 0  # the call whose frames meet one
        self.link = Link(own, self.loop, self._take, self._lose)  # type: ignore[arg-type]
        self.link.begin()

    def _take(self, kind: int, call: int, body: bytes) -> None:
        if call == self.bug != 0:
            raise ZeroDivisionError("a bug of who takes it")
        self.taken.append((kind, call, body))

    def _lose(self) -> None:
        self.lost += 1


@contextmanager
def linked() -> Iterator[tuple[End, End]]:
    one, other = (End(own) for own in socket_pair())
    try:
        yield one, other
    finally:
        settle(one.loop, other.loop)
        one.link.close()
        other.link.close()
        one.loop.close()
        other.loop.close()


@given(st.lists(st.tuples(st.integers(1, 3), SIZES), max_size=40))
def test_frames_come_whole_and_in_order(sent: list[tuple[int, int]]) -> None:
    with linked() as (one, other):
        frames = [(MESSAGE, call, bytes([i % 256]) * size) for i, (call, size) in enumerate(sent)]
        for frame in frames:
            one.link.put(*frame)
        settle(one.loop, other.loop)
        assert other.taken == frames


def test_frames_of_one_turn_share_packets() -> None:
    ours, theirs = socket_pair()
    one = End(ours)
    with theirs:
        for call in range(1, 65):
            one.link.put(MESSAGE, call, bytes(100))
        one.link.put(MESSAGE, 65, bytes(100_000))
        one.loop.turn()
        one.link.close()
        one.loop.close()
        sizes = list(iter(lambda: len(theirs.recv(2 * PACKET_BYTES)), 0))
    last = 100_000 - 3 * (PACKET_BYTES - 12) + 12
    assert sizes == [64 * 112, *[PACKET_BYTES] * 3, last]


def test_what_the_other_end_does_not_take_waits_and_holds_back_who_feeds_the_link() -> None:
    with linked() as (one, other):
        resumed: list[int] = []
        assert not one.link.wait(lambda: resumed.append(0))
        count = 0
        while not one.link.wait(lambda: resumed.append(1)):
            count += 1
            one.link.put(MESSAGE, count, bytes(PACKET_BYTES))
            one.loop.turn()  # the other end does not
        assert count * PACKET_BYTES > link_module._MOST_QUEUED
        one.link.wait(gone := lambda: resumed.append(2))
        one.link.forget(gone)
        assert not resumed
        settle(one.loop, other.loop)
        assert resumed == [1]
        assert [call for _, call, _ in other.taken] == list(range(1, count + 1))


def test_who_waits_is_woken_by_a_write_that_meets_no_resistance() -> None:
    with linked() as (one, other):
        settle(one.loop, other.loop)
        resumed: list[int] = []
        while not one.link.wait(lambda: resumed.append(1)):
            one.link.put(MESSAGE, 1, bytes(PACKET_BYTES))  # the loop does not turn: nothing was written yet
        settle(one.loop, other.loop)
        assert resumed == [1]


def test_each_end_learns_once_that_the_other_is_gone() -> None:
    with linked() as (one, other):
        one.link.put(FINISH, 1, b"what was said before arrives")
        one.loop.turn()
        one.link.close()
        one.link.close()
        settle(other.loop)
        assert (one.lost, other.lost) == (1, 1)
        assert other.taken == [(FINISH, 1, b"what was said before arrives")]
        other.link.put(MESSAGE, 1, b"for nobody")
        settle(other.loop)
        assert not other.link.wait(pytest.fail)


def test_who_waits_for_room_goes_on_when_the_other_end_is_gone() -> None:
    with linked() as (one, other):
        resumed: list[int] = []
        while not one.link.wait(lambda: resumed.append(1)):
            one.link.put(MESSAGE, 1, bytes(PACKET_BYTES))
            one.loop.turn()
        other.link.close()
        settle(one.loop)
        assert (resumed, one.lost) == ([1], 1)


def test_a_frame_that_meets_a_bug_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    with linked() as (one, other):
        other.bug = 2
        for call in (1, 2, 3):
            one.link.put(MESSAGE, call, b"")
        settle(one.loop, other.loop)
        assert [call for _, call, _ in other.taken] == [1, 3]
        assert "met a bug" in caplog.text


NAMES = st.text(st.characters(codec="latin-1"), max_size=20)


@given(st.lists(st.tuples(NAMES, st.one_of(st.text(max_size=20), st.binary(max_size=20)))))
def test_fields_come_as_they_were(fields: list[tuple[str, str | bytes]]) -> None:
    assert unpacked(packed(tuple(fields))) == tuple(fields)
