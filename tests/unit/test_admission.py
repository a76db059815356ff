"""When newcomers are refused: busy and late, both, in the last full second, and not for longer."""

from __future__ import annotations

import pytest

from tenuto.serving.admission import Admission
from tenuto.serving.errors import Overloaded


class Turns:
    """An engine's turns on a clock of its own. It starts idle, at 100 s."""

    def __init__(self) -> None:
        self.now = 100.0
        self.paced = self.late = 0
        self.admission = Admission(self.now)

    def turn(self, seconds: float, *, paced: int = 0, late: int = 0) -> None:
        self.admission.begin(self.now)
        self.now += seconds
        self.paced, self.late = self.paced + paced, self.late + late
        self.admission.end(self.now, self.paced, self.late)

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def refuses(self) -> bool:
        """Asked as an engine does, in a turn."""
        self.admission.begin(self.now)
        try:
            self.admission.check(self.now, "toy/1")
        except Overloaded:
            return True
        finally:
            self.admission.end(self.now, self.paced, self.late)
        return False

    @property
    def busy_ratio(self) -> float:
        return self.admission.busy_ratio(self.now)


@pytest.mark.parametrize(
    "busy, late, refused",
    [(32, 2, True), (29, 2, True), (28, 2, False), (32, 1, False), (32, 40, True), (16, 40, False),
     (32, 0, False)],
    ids=["both", "just busy", "not busy", "not late", "all late", "late alone", "none late"],
)  # fmt: skip
def test_newcomers_are_refused_if_the_engine_is_busy_and_late(busy: int, late: int, refused: bool) -> None:
    """In 32 parts of a second: 29 are 0.91 of it. Two of 40 chunks are 0.05."""
    turns = Turns()
    turns.wait((32 - busy) / 32)
    turns.turn(busy / 32, paced=40, late=late)
    assert turns.busy_ratio == busy / 32
    assert turns.refuses() == refused


def test_nothing_is_refused_before_the_first_second_is_full() -> None:
    turns = Turns()
    turns.turn(0.75, paced=1, late=1)
    assert not turns.refuses()
    assert turns.busy_ratio == 0
    turns.turn(0.25)
    assert turns.refuses()


def test_each_second_is_judged_by_itself() -> None:
    turns = Turns()
    said = []
    for late in (1, 0, 1, 0):
        turns.turn(1.0, paced=1, late=late)
        said.append(turns.refuses())
    assert said == [True, False, True, False]


def test_a_busy_second_without_paced_chunks_refuses_nobody() -> None:
    turns = Turns()
    turns.turn(1.0, paced=1, late=1)
    turns.turn(1.0)
    assert not turns.refuses()


def test_a_turn_of_many_seconds_is_not_lost() -> None:
    turns = Turns()
    turns.turn(5.0, paced=1, late=1)
    assert turns.refuses()


def test_asking_in_a_turn_that_goes_on_counts_no_time_twice() -> None:
    turns = Turns()
    turns.wait(0.5)
    turns.admission.begin(turns.now)
    turns.wait(0.5)
    turns.admission.check(turns.now, "toy/1")
    assert turns.busy_ratio == 0.5
    turns.wait(0.25)
    turns.admission.end(turns.now, 0, 0)
    turns.wait(0.75)
    turns.turn(0.0)
    assert turns.busy_ratio == 0.25


@pytest.mark.parametrize("idle, refused", [(0.75, True), (1.0, False), (3600.0, False)])
def test_what_was_measured_before_an_idle_second_refuses_nobody(idle: float, refused: bool) -> None:
    turns = Turns()
    turns.turn(1.0, paced=1, late=1)
    turns.wait(idle)
    assert turns.refuses() == refused


def test_the_busy_ratio_of_an_idle_engine_sinks_to_zero_without_a_turn() -> None:
    turns = Turns()
    turns.turn(1.0)
    turns.turn(0.5)
    said = []
    for _ in range(4):
        said.append(turns.busy_ratio)
        turns.wait(0.5)
    assert said == [1.0, 0.5, pytest.approx(1 / 3), 0.0]


def test_the_busy_ratio_counts_a_turn_that_does_not_end() -> None:
    turns = Turns()
    turns.turn(1.0)
    turns.admission.begin(turns.now)
    turns.wait(60.0)
    assert turns.busy_ratio == 1.0


def test_the_text_says_what_was_measured_and_what_to_do() -> None:
    turns = Turns()
    turns.wait(0.0625)
    turns.turn(0.9375, paced=8, late=1)
    turns.admission.begin(turns.now)
    text = (
        "toy/1 was busy for 94% of the last second, and 12% of the chunks that have a period came or were "
        "answered later than that; retry, or go to another server"
    )
    with pytest.raises(Overloaded, match=text) as caught:
        turns.admission.check(turns.now, "toy/1")
    assert caught.value.retry_after_ms == 1000
