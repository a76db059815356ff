"""What is promised of the figures: the design's floor, and the goals above it.

A line is a figure of one round; a verdict goes by its median over the rounds. Its limit is the same figure
of the same round for `least_engine`, the least that batches on our transport: the best that can be had with
this gRPC and this ONNX Runtime from Python.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Self

from . import suites
from .scenario import Case, Measurement, Taken
from .suites import AIO, BARE, BATCHER, LEAST, NULL, OURS, THREADS

Rows = dict[tuple[str, str], Measurement]  # table, row
Cost = Callable[[Measurement], float]
Figure = Callable[[Rows, str], float]  # of that server


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
    figure: Figure
    goal: float
    at_least: bool
    floor: float | None = None
    limited: bool = False

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


def p99(measurement: Measurement) -> float:
    return measurement.first.p99_ms


def rows_of(taken: Taken) -> Rows:
    return {(case.table, case.row): measurement for case, measurement in taken.items()}


def ratio(table: str, over: str, under: str, cost: Cost = by_message) -> Figure:
    """Of two servers; where one of them is ours, the figure's server stands in its place."""

    def figure(rows: Rows, server: str) -> float:
        top, bottom = (server if row == OURS else row for row in (over, under))
        return cost(rows[table, top]) / cost(rows[table, bottom])

    return figure


def of_rows(table: str, over: str, under: str) -> Figure:
    """Of two rows of one server, by message."""

    def figure(rows: Rows, server: str) -> float:
        top, bottom = (rows[table, suites.row_of(row, server)] for row in (over, under))
        return top.server_us / bottom.server_us

    return figure


def against_peers(streams: int, frames: int) -> list[Line]:
    table, bare = suites.peers_table(streams, frames), suites.bare_table(frames)

    def share(rows: Rows, server: str) -> float:
        least = rows[table, NULL].server_us + rows[bare, suites.BARE_ROWS].server_us
        return least / rows[table, server].server_us

    def line(over: str, under: str, goal: float, floor: float | None = None) -> Line:
        return Line(
            f"{over} / {under}, {table}", ratio(table, over, under), goal, over != OURS, floor, limited=True
        )

    if streams == 1:
        lower = ratio(table, OURS, AIO, p50)
        text = f"tenuto / naive_aio, p50, {table}"
        return [line(OURS, AIO, 0.7), Line(text, lower, 1.0, at_least=False, limited=True)]
    first = frames == 1
    lines = [line(AIO, OURS, 6.0 if first else 4.0, 4.0 if first else 2.5)]
    if first:
        lines.append(line(THREADS, OURS, 12.0))
    lines.append(line(OURS, BATCHER, 0.45 if first else 0.6, 1.0))
    text = f"(null engine + bare session.run) / tenuto, {table}"
    return [*lines, Line(text, share, 0.85, at_least=True, limited=True)]


def others() -> list[Line]:
    def more_ms(rows: Rows, server: str) -> float:
        table = suites.ALONE_PACED
        return p50(rows[table, server]) - p50(rows[table, BARE])

    def newcomer(rows: Rows, server: str) -> float:
        residents, visitors = rows[suites.NEWCOMERS, server].parties
        return visitors.p99_ms / residents.p50_ms

    def evenness(rows: Rows, server: str) -> float:
        seen = rows[suites.FAIRNESS, server].first
        return seen.least / seen.most

    def tail(rows: Rows, server: str) -> float:
        seen = rows[suites.HALF, server].first
        return seen.p99_ms / seen.p50_ms

    def images(rows: Rows, server: str) -> float:
        """The least engine has no images: its place take the transport and ONNX Runtime alone."""
        names = [suites.IMAGE_STREAM] if server == OURS else [suites.IMAGE_NULL, suites.IMAGE_BARE]
        on_streams = sum(rows[suites.IMAGES, name].server_us for name in names)
        return on_streams / rows[suites.IMAGES, suites.IMAGE_UNARY].server_us

    def packing(one: str) -> Figure:
        def figure(rows: Rows, server: str) -> float:
            alone, ten = (rows[suites.PACKED, suites.row_of(r, server)] for r in (one, suites.TEN_EACH))
            return alone.server_us_per_chunk / ten.server_us_per_chunk

        return figure

    def lively(over: str, under: str) -> Line:
        figure = of_rows(suites.LIVE, over, under)
        return Line(f"{over} / {under}", figure, 1.15, at_least=False, floor=1.3, limited=True)

    def packed(one: str) -> Line:
        text = f"{one} / {suites.TEN_EACH}, a chunk"
        return Line(text, packing(one), 5.0, at_least=True, floor=3.0, limited=True)

    alone = f"p50 beyond a bare session.run in ms, {suites.ALONE_PACED}"
    return [
        lively(suites.LIVE_IDLE, suites.LIVE_64),
        lively(suites.LIVE_TURNS, suites.LIVE_64),
        lively(suites.PACED_IDLE, suites.PACED_64),
        packed(suites.ONE_EACH),
        packed(suites.ONE_ALONE),
        Line("first reply of a newcomer, p99 / the others' p50", newcomer, 2.0, at_least=False, limited=True),
        Line("least / most served of 256 streams", evenness, 0.9, at_least=True),
        Line(alone, more_ms, 0.1, at_least=False, limited=True),
        Line(f"p99 / p50, {suites.HALF}", tail, 4.0, at_least=False, limited=True),
        Line("images, streams / unary callers", images, 0.4, at_least=False, limited=True),
    ]


def verdicts(rounds: list[Taken]) -> list[Verdict]:
    """One for every line whose rows were measured."""
    sizes = {(c.parties[0].streams, c.parties[0].frames) for c in rounds[0] if _is_peer(c)}
    lines = [line for streams, frames in sorted(sizes) for line in against_peers(streams, frames)]
    return [found for line in [*lines, *others()] if (found := _verdict(line, rounds)) is not None]


def _is_peer(case: Case) -> bool:
    party = case.parties[0]
    return case.table == suites.peers_table(party.streams, party.frames)


def _verdict(line: Line, rounds: list[Taken]) -> Verdict | None:
    found = _spread(line, rounds, OURS)
    if found is None:
        return None
    word = "at least" if line.at_least else "at most"
    return Verdict(
        line.text,
        found,
        f"{word} {line.goal:g}",
        line.keeps(found.median, line.goal),
        "" if line.floor is None else f"{word} {line.floor:g}",
        line.floor is None or line.keeps(found.median, line.floor),
        _spread(line, rounds, LEAST) if line.limited else None,
    )


def _spread(line: Line, rounds: list[Taken], server: str) -> Spread | None:
    """Nothing if a row that it takes was not measured in this run."""
    try:
        return Spread.of([line.figure(rows_of(taken), server) for taken in rounds])
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
