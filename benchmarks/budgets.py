"""The lines of the design's section 10, as ratios of what was measured in one round."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Self

from . import scenario
from .scenario import Case, Measurement, Round

NAIVE_AT_LEAST = {1: 4.0, 10: 2.5}  # frames a chunk -> ratio
BUSY = 64  # streams


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        return cls(median(values), min(values), max(values))


def by_message(measurement: Measurement) -> float:
    return measurement.server_us


def by_chunk(measurement: Measurement) -> float:
    return measurement.server_us_per_chunk


def ratio(
    rounds: list[Round],
    over: Case,
    under: Case,
    cost: Callable[[Measurement], float] = by_message,
) -> Spread:
    """over / under, each pair from one round."""
    return Spread.of([cost(taken[over]) / cost(taken[under]) for taken in rounds])


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a ratio, at its median, keeps its bound."""

    text: str
    ratio: Spread
    bound: str
    holds: bool


def at_least(text: str, found: Spread, bound: float) -> Verdict:
    return Verdict(text, found, f"at least {bound}", found.median >= bound)


def at_most(text: str, found: Spread, bound: float) -> Verdict:
    return Verdict(text, found, f"at most {bound}", found.median <= bound)


def verdicts(rounds: list[Round]) -> list[Verdict]:
    """One for every line, and every size, that was measured."""
    cases = list(rounds[0])
    ours = {case.table: case for case in cases if case.row == "tenuto"}
    return [
        *(_against(rounds, ours[case.table], case) for case in cases if _counts(case, ours)),
        *_live(rounds, {case.row: case for case in cases if case.table == scenario.LIVE}),
        *_packed(rounds, {case.row: case for case in cases if case.table == scenario.PACKED}),
    ]


def _counts(case: Case, ours: dict[str, Case]) -> bool:
    busy = case.table in ours and case.scenario.streams >= BUSY
    naive = case.row == "naive_aio" and case.scenario.frames in NAIVE_AT_LEAST
    return busy and (naive or case.row == "micro_batcher")


def _against(rounds: list[Round], ours: Case, other: Case) -> Verdict:
    text = f"{other.row} / tenuto, {other.table}"
    bound = NAIVE_AT_LEAST[other.scenario.frames] if other.row == "naive_aio" else 1.0
    return at_least(text, ratio(rounds, other, ours), bound)


def _live(rounds: list[Round], rows: dict[str, Case]) -> list[Verdict]:
    pairs = (
        (scenario.LIVE_IDLE, scenario.LIVE_64),
        (scenario.LIVE_TURNS, scenario.LIVE_64),
        (scenario.PACED_IDLE, scenario.PACED_64),
    )
    return [
        at_most(f"{many} / {few}", ratio(rounds, rows[many], rows[few]), 1.3)
        for many, few in pairs
        if many in rows
    ]


def _packed(rounds: list[Round], rows: dict[str, Case]) -> list[Verdict]:
    if not rows:
        return []
    ten = rows[scenario.TEN_EACH]
    return [
        at_least(f"{one} / {ten.row}, a chunk", ratio(rounds, rows[one], ten, by_chunk), 3.0)
        for one in (scenario.ONE_EACH, scenario.ALONE)
    ]
