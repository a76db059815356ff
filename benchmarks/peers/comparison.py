"""A run beside other people's servers, as docs/oip.md shows it: two tables and a chart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from benchmarks import suites
from benchmarks.budgets import Cost, Rows, Spread, by_message, p50, p99, rows_of
from benchmarks.report import aligned, shown
from benchmarks.scenario import Taken
from benchmarks.suites import BATCHER, LEAST, MLSERVER, OIP_ROW, OURS, TORCHSERVE, TRITON, stream, unary

MARKS = (
    "<!-- written by python -m benchmarks.peers: begin -->",
    "<!-- written by python -m benchmarks.peers: end -->",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One table: a line for each of the suite's tables, and a column for each of their rows."""

    title: str
    columns: Mapping[str, str]  # row -> title
    ratios: Mapping[str, tuple[str, str]]  # title -> over, under
    latencies: Mapping[str, str]  # row -> title


SEQUENCES = Comparison(
    "frames a message, streams",
    {
        OURS: "Tenuto, own protocol",
        OIP_ROW: "Tenuto, OIP",
        TRITON: "Triton",
        TORCHSERVE: "TorchServe",
        MLSERVER: "MLServer",
        BATCHER: "batcher",
        LEAST: "least engine",
    },
    {"OIP / Triton": (OIP_ROW, TRITON), "least / Triton": (LEAST, TRITON)},
    {OIP_ROW: "OIP", TRITON: "Triton"},
)
IMAGES = Comparison(
    "images at a time",
    {
        stream(OURS): "Tenuto, stream",
        stream(OIP_ROW): "Tenuto, OIP stream",
        unary(OURS): "Tenuto, unary",
        unary(OIP_ROW): "Tenuto, OIP unary",
        unary(TRITON): "Triton",
        unary(TORCHSERVE): "TorchServe",
        unary(MLSERVER): "MLServer",
    },
    {
        "OIP unary / Triton": (unary(OIP_ROW), unary(TRITON)),
        "OIP stream / Triton": (stream(OIP_ROW), unary(TRITON)),
    },
    {unary(OIP_ROW): "OIP unary", unary(TRITON): "Triton"},
)


def text(rounds: list[Taken]) -> str:
    found = [table(rounds, SEQUENCES, sequences(rounds)), table(rounds, IMAGES, images(rounds))]
    checked = sum(taken.checked for each in rounds for taken in each.values())
    found.append(f"{checked:,} replies were compared with the sequence alone, bit for bit: no difference.")
    return "\n\n".join(found)


def sequences(rounds: list[Taken]) -> dict[str, str]:
    """What a line is called -> the suite's table."""
    parties = {case.table: case.parties[0] for case in rounds[0]}
    return {
        f"{party.frames}, {party.streams}": name
        for name, party in parties.items()
        if name == suites.oip_table(party.streams, party.frames)
    }


def images(rounds: list[Taken]) -> dict[str, str]:
    parties = {case.table: case.parties[0] for case in rounds[0]}
    return {
        f"{party.streams}": name
        for name, party in parties.items()
        if name == suites.oip_images_table(party.streams)
    }


def table(rounds: list[Taken], comparison: Comparison, lines: Mapping[str, str]) -> str:
    rows = [rows_of(taken) for taken in rounds]
    columns = measured(rows, comparison, lines)
    ratios = {title: pair for title, pair in comparison.ratios.items() if columns.keys() >= set(pair)}
    timed = {row: title for row, title in comparison.latencies.items() if row in columns}
    titles = [comparison.title, *columns.values(), *ratios]
    titles += [f"{figure} ms: {', '.join(timed.values())}" for figure in ("p50", "p99")]
    cells = [titles]
    for line, name in lines.items():
        costs = [shown(spread(rows, name, row), 0) for row in columns]
        compared = [f"{_ratio(rows, name, *pair):.2f}" for pair in ratios.values()]
        cells.append([line, *costs, *compared, *(_latencies(rows, name, timed, f) for f in (p50, p99))])
    return aligned(cells)


def spread(rows: list[Rows], name: str, row: str) -> Spread:
    """Server CPU-µs a message."""
    return Spread.of([by_message(each[name, row]) for each in rows])


def measured(rows: list[Rows], comparison: Comparison, lines: Mapping[str, str]) -> dict[str, str]:
    """The columns whose servers took part."""
    names = lines.values()
    return {
        row: title
        for row, title in comparison.columns.items()
        if all((name, row) in rows[0] for name in names)
    }


def _ratio(rows: list[Rows], name: str, over: str, under: str) -> float:
    return median(by_message(each[name, over]) / by_message(each[name, under]) for each in rows)


def _latencies(rows: list[Rows], name: str, timed: Iterable[str], figure: Cost) -> str:
    found = [median(figure(each[name, row]) for each in rows) for row in timed]
    return ", ".join(f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" for ms in found)
