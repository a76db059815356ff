"""What a run prints, and what it writes as JSON."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .budgets import Spread, Verdict, by_chunk, by_message, ratio
from .scenario import Case, Measurement, Round

PACKAGES = ("grpcio", "protobuf", "numpy", "onnxruntime-gpu", "onnxruntime", "uvloop")


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


def table(rounds: list[Round], name: str) -> str:
    """One row a case: medians over the rounds, costs and ratios with (lowest..highest)."""
    cases = [case for case in rounds[0] if case.table == name]
    packed = any(case.scenario.chunks_per_message > 1 for case in cases)
    cost = by_chunk if packed else by_message
    unit = "chunk" if packed else "message"
    head = [name, f"server CPU-µs/{unit}", f"/ {cases[0].row}"]
    head += ["messages/s", "p50 ms", "p99 ms", "client CPU-µs/message"]
    rows = [head, *(_row(rounds, case, cases[0], cost) for case in cases)]
    return _aligned(rows)


def _row(rounds: list[Round], case: Case, first: Case, cost: Callable[[Measurement], float]) -> list[str]:
    taken = [found[case] for found in rounds]

    def spread(figure: Callable[[Measurement], float]) -> Spread:
        return Spread.of([figure(measurement) for measurement in taken])

    return [
        case.row,
        _shown(spread(cost), 1),
        _shown(ratio(rounds, case, first, cost), 2),
        f"{spread(lambda m: m.messages_per_second).median:,.0f}",
        f"{spread(lambda m: m.p50_ms).median:.2f}",
        f"{spread(lambda m: m.p99_ms).median:.2f}",
        f"{spread(lambda m: m.client_us).median:.1f}",
    ]


def _shown(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}..{spread.high:.{digits}f})"


def _aligned(rows: list[list[str]]) -> str:
    """Markdown: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict_line(verdict: Verdict) -> str:
    word = "holds" if verdict.holds else "does not hold"
    return f"{verdict.text}: {_shown(verdict.ratio, 2)}, {verdict.bound}: {word}"


def as_json(rounds: list[Round], verdicts: list[Verdict], settings: dict[str, object]) -> dict[str, object]:
    measurements = [
        {"round": number, **asdict(case), **asdict(measurement)}
        for number, taken in enumerate(rounds, 1)
        for case, measurement in taken.items()
    ]
    return {
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "measurements": measurements,
    }
