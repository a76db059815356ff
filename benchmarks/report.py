"""What a run prints and what it writes: tables, verdicts, a chart, JSON."""

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import suites
from .budgets import Cost, Spread, Verdict, by_chunk, by_message
from .scenario import Case, Measurement, Seen, Taken

PACKAGES = ("grpcio", "protobuf", "numpy", "onnxruntime-gpu", "onnxruntime", "uvloop")
BEGIN, END = "<!-- written by make bench: begin -->", "<!-- written by make bench: end -->"

Figure = Callable[[Measurement], float]


def machine() -> dict[str, object]:
    """Enough to tell one kind of machine from another, and nothing that names this one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def head(rounds: int, seconds: float) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in {**machine(), **versions()}.items() if value)
    return f"{date.today()}: {facts}; {rounds} rounds of {seconds:g} s; medians (lowest..highest)"


def table(rounds: list[Taken], name: str) -> str:
    """One row a case: medians over the rounds, costs and ratios with (lowest..highest)."""
    cases = [case for case in rounds[0] if case.table == name]
    packed = any(case.parties[0].chunks_per_message > 1 for case in cases)
    cost, unit = (by_chunk, "chunk") if packed else (by_message, "message")
    extra = _extra(name)
    titles = [name, f"server CPU-µs/{unit}", f"/ {cases[0].row}", "messages/s", "p50 ms", "p99 ms"]
    titles += [*(title for title, _ in extra), "client CPU-µs/message"]
    rows = [titles]
    for case in cases:
        more = [_median(rounds, case, figure) for _, figure in extra if _has(rounds, case, figure)]
        more += ["-"] * (len(extra) - len(more))
        cells = _row(rounds, case, cases[0], cost)
        rows.append([*cells[:-1], *more, cells[-1]])
    return aligned(rows)


def _extra(name: str) -> list[tuple[str, Figure]]:
    """Columns that only some tables have."""

    def second(figure: Callable[[Seen], float]) -> Figure:
        return lambda m: figure(m.parties[1])

    if name == suites.NEWCOMERS:
        return [
            ("first reply p50 ms", second(lambda s: s.p50_ms)),
            ("first reply p99 ms", second(lambda s: s.p99_ms)),
        ]
    if name == suites.FAIRNESS:
        return [("least / most served", lambda m: m.first.least / m.first.most)]
    if name == suites.FRONT_ENDS:
        return [("engine process's CPU-µs", lambda m: m.engine_us)]
    if name == suites.MIXED:
        return [("images/s", lambda m: m.parties[1].messages / m.seconds)]
    if name == suites.OVERLOAD:
        return [
            ("admitted", lambda m: m.first.opened),
            ("refused", lambda m: m.first.refused),
            ("late share", lambda m: m.first.late / max(1, m.first.messages)),
        ]
    return []


def _has(rounds: list[Taken], case: Case, figure: Figure) -> bool:
    try:
        figure(rounds[0][case])
    except IndexError:  # a row without a second party
        return False
    return True


def _median(rounds: list[Taken], case: Case, figure: Figure) -> str:
    found = Spread.of([figure(taken[case]) for taken in rounds]).median
    return f"{found:,.0f}" if found >= 100 else f"{found:.2f}"


def _row(rounds: list[Taken], case: Case, first: Case, cost: Cost) -> list[str]:
    def spread(figure: Figure) -> Spread:
        return Spread.of([figure(taken[case]) for taken in rounds])

    ratios = Spread.of([cost(taken[case]) / cost(taken[first]) for taken in rounds])
    return [
        case.row,
        shown(spread(cost), 1),
        shown(ratios, 2),
        f"{spread(lambda m: m.messages_per_second).median:,.0f}",
        f"{spread(lambda m: m.first.p50_ms).median:.2f}",
        f"{spread(lambda m: m.first.p99_ms).median:.2f}",
        f"{spread(lambda m: m.client_us).median:.1f}",
    ]


def shown(spread: Spread, digits: int = 2) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}..{spread.high:.{digits}f})"


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    rows = [["", "found", "goal", "reached", "limit here", "design §10", "holds"]]
    for v in verdicts:
        limit = f"{v.limit.median:.2f}" if v.limit else ""
        floor = [v.floor, "yes" if v.holds else "no"] if v.floor else ["", ""]
        reached = ("yes" if v.reached else "no") if v.goal else ""
        rows.append([v.text, shown(v.found), v.goal, reached, limit, *floor])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Markdown: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(rounds: list[Taken], verdicts: list[Verdict], first_line: str, last: str = "") -> str:
    """All of a run. `last`: tables that come behind the others."""
    names = dict.fromkeys(case.table for case in rounds[0])
    checked = sum(taken.checked for found in rounds for taken in found.values())
    parts = [first_line, verdict_table(verdicts), *(table(rounds, name) for name in names)]
    if last:
        parts.append(last)
    parts.append(f"{checked:,} replies were compared with the sequence alone, bit for bit: no difference.")
    return "\n\n".join(parts)


def write(page: Path, body: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Puts `body` between the two marks of the page."""
    check(page, marks)
    begin, end = marks
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}")


def check(page: Path, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Ends the program if the page is not there, or has no place for figures."""
    begin, end = marks
    if not page.exists() or end not in page.read_text().partition(begin)[2]:
        raise SystemExit(f"{page} is not there, or has no {begin!r} … {end!r}")


def as_json(rounds: list[Taken], verdicts: list[Verdict], settings: dict[str, object]) -> dict[str, object]:
    measurements = [
        {"round": number, **asdict(case), **asdict(measurement)}
        for number, taken in enumerate(rounds, 1)
        for case, measurement in taken.items()
    ]
    return {
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "measurements": measurements,
    }
