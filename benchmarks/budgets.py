"""What is promised of the figures: the design's floor, and the goals above it.

A line is a figure of one round; a verdict goes by its median over the rounds. Its limit is what the same
round would give a server that costs no more than our transport without an engine and a bare
`session.run`: the best that can be had with this gRPC and this ONNX Runtime from Python.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Self

from . import suites
from .scenario import Case, Measurement, Taken
from .suites import AIO, BARE, BATCHER, NULL, OURS, THREADS

Rows = dict[tuple[str, str], Measurement]  # table, row
Cost = Callable[[Measurement], float]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Line:
    """A figure and its bounds; the floor is design §10's, where that has the line."""

    text: str
    figure: Callable[[Rows], float]
    goal: float
    at_least: bool
    floor: float | None = None
    limit: Callable[[Rows], float] | None = None

    def keeps(self, value: float, bound: float) -> bool:
        return value >= bound if self.at_least else value <= bound


@dataclass(frozen=True, slots=True)
class Verdict:
    text: str
    found: Spread
    goal: str
    reached: bool
    floor: str = ""  # empty: the line has none
    holds: bool = True
    limit: Spread | None = None


def by_message(measurement: Measurement) -> float:
    return measurement.server_us


def by_chunk(measurement: Measurement) -> float:
    return measurement.server_us_per_chunk


def p50(measurement: Measurement) -> float:
    return measurement.first.p50_ms


def rows_of(taken: Taken) -> Rows:
    return {(case.table, case.row): measurement for case, measurement in taken.items()}


def ratio(table: str, over: str, under: str, cost: Cost = by_message) -> Callable[[Rows], float]:
    return lambda rows: cost(rows[table, over]) / cost(rows[table, under])


def against_peers(streams: int, frames: int) -> list[Line]:
    table, bare = suites.peers_table(streams, frames), suites.bare_table(frames)

    row = suites.BARE_ROW if streams == 1 else suites.BARE_ROWS

    def least(rows: Rows) -> float:
        return rows[table, NULL].server_us + rows[bare, row].server_us

    def line(text: str, over: str, under: str, goal: float, floor: float | None = None) -> Line:
        def limit(rows: Rows) -> float:
            if over == OURS:
                return least(rows) / rows[table, under].server_us
            return rows[table, over].server_us / least(rows)

        return Line(f"{text}, {table}", ratio(table, over, under), goal, over != OURS, floor, limit)

    if streams == 1:
        lower = Line(f"tenuto / naive_aio, p50, {table}", ratio(table, OURS, AIO, p50), 1.0, at_least=False)
        return [line("tenuto / naive_aio", OURS, AIO, 0.7), lower]
    first = frames == 1
    lines = [line("naive_aio / tenuto", AIO, OURS, 6.0 if first else 4.0, 4.0 if first else 2.5)]
    if first:
        lines.append(line("naive_threads / tenuto", THREADS, OURS, 12.0))
    lines.append(line("tenuto / micro_batcher", OURS, BATCHER, 0.45 if first else 0.6, 1.0))

    def share(rows: Rows) -> float:
        return least(rows) / rows[table, OURS].server_us

    lines.append(Line(f"(null engine + bare session.run) / tenuto, {table}", share, 0.85, at_least=True))
    return lines


def others() -> list[Line]:
    def more_ms(rows: Rows) -> float:
        table = suites.ALONE_PACED
        return p50(rows[table, OURS]) - p50(rows[table, BARE])

    def newcomer(rows: Rows) -> float:
        residents, visitors = rows[suites.NEWCOMERS, OURS].parties
        return visitors.p99_ms / residents.p50_ms

    def evenness(rows: Rows) -> float:
        seen = rows[suites.FAIRNESS, OURS].first
        return seen.least / seen.most

    def tail(rows: Rows) -> float:
        seen = rows[suites.HALF, OURS].first
        return seen.p99_ms / seen.p50_ms

    def packed_limit(rows: Rows, one: str) -> float:
        bare = rows[suites.bare_table(1), suites.BARE_ROWS].server_us
        least = rows[suites.PACKED, suites.TEN_NULL].server_us_per_chunk + bare
        return rows[suites.PACKED, one].server_us_per_chunk / least

    def paced_limit(rows: Rows) -> float:
        return p50(rows[suites.ALONE_PACED, NULL])

    live, packed = suites.LIVE, suites.PACKED
    return [
        Line(f"{suites.LIVE_IDLE} / {suites.LIVE_64}",
             ratio(live, suites.LIVE_IDLE, suites.LIVE_64), 1.15, at_least=False, floor=1.3),
        Line(f"{suites.LIVE_TURNS} / {suites.LIVE_64}",
             ratio(live, suites.LIVE_TURNS, suites.LIVE_64), 1.15, at_least=False, floor=1.3),
        Line(f"{suites.PACED_IDLE} / {suites.PACED_64}",
             ratio(live, suites.PACED_IDLE, suites.PACED_64), 1.15, at_least=False, floor=1.3),
        Line(f"{suites.ONE_EACH} / {suites.TEN_EACH}, a chunk",
             ratio(packed, suites.ONE_EACH, suites.TEN_EACH, by_chunk), 5.0, at_least=True, floor=3.0,
             limit=lambda rows: packed_limit(rows, suites.ONE_EACH)),
        Line(f"{suites.ONE_ALONE} / {suites.TEN_EACH}, a chunk",
             ratio(packed, suites.ONE_ALONE, suites.TEN_EACH, by_chunk), 5.0, at_least=True, floor=3.0,
             limit=lambda rows: packed_limit(rows, suites.ONE_ALONE)),
        Line("first reply of a newcomer, p99 / the others' p50", newcomer, 2.0, at_least=False),
        Line("least / most served of 256 streams", evenness, 0.9, at_least=True),
        Line(f"p50 beyond a bare session.run in ms, {suites.ALONE_PACED}", more_ms, 0.1, at_least=False,
             limit=paced_limit),
        Line(f"p99 / p50, {suites.HALF}", tail, 4.0, at_least=False),
        Line("images, streams / unary callers",
             ratio(suites.IMAGES, suites.IMAGE_STREAM, suites.IMAGE_UNARY), 0.4, at_least=False),
    ]  # fmt: skip


def verdicts(rounds: list[Taken]) -> list[Verdict]:
    """One for every line whose rows were measured."""
    sizes = {(c.parties[0].streams, c.parties[0].frames) for c in rounds[0] if _is_peer(c)}
    lines = [line for streams, frames in sorted(sizes) for line in against_peers(streams, frames)]
    return [found for line in [*lines, *others()] if (found := _verdict(line, rounds)) is not None]


def _is_peer(case: Case) -> bool:
    party = case.parties[0]
    return case.table == suites.peers_table(party.streams, party.frames)


def _verdict(line: Line, rounds: list[Taken]) -> Verdict | None:
    try:
        found = Spread.of([line.figure(rows_of(taken)) for taken in rounds])
    except KeyError:  # not measured in this run
        return None
    word = "at least" if line.at_least else "at most"
    return Verdict(
        line.text,
        found,
        f"{word} {line.goal:g}",
        line.keeps(found.median, line.goal),
        "" if line.floor is None else f"{word} {line.floor:g}",
        line.floor is None or line.keeps(found.median, line.floor),
        _limit(line, rounds),
    )


def _limit(line: Line, rounds: list[Taken]) -> Spread | None:
    if line.limit is None:
        return None
    try:
        return Spread.of([line.limit(rows_of(taken)) for taken in rounds])
    except KeyError:
        return None


MEMORY_GOALS = {"sequence on a shared stream": 2.0, "sequence alone on a stream, beyond an empty one": 10.0}


def of_memory(bytes_each: dict[str, float]) -> list[Verdict]:
    """`bytes_each`: what `memory.measure` found."""
    found = []
    for name, nbytes in bytes_each.items():
        kib = nbytes / 1024
        goal = MEMORY_GOALS.get(name)
        bound = "" if goal is None else f"at most {goal:g}"
        reached = goal is None or kib <= goal
        found.append(Verdict(f"KiB, {name}", Spread(kib, kib, kib), bound, reached))
    return found
