"""Durations are monotonic: a clock that is set must not end, expire or delay anything."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What needs the wall's clock: a token's expiry goes from machine to machine, and a span says when it was.
WALL = {"serving/resume_token.py", "serving/tracing.py"}
SOURCES = sorted(p for folder in ("serving", "tenuto") for p in (ROOT / folder).glob("*.py"))
NAMES = {
    ("time", "time"),
    ("time", "time_ns"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("date", "today"),
}


def wall_clocks(source: str) -> list[str]:
    """Where a source asks for the time of day."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if (owner, node.attr) in NAMES:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [f"time.{a.name}" for a in node.names if ("time", a.name) in NAMES]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_module_asks_for_the_time_of_day(path: Path) -> None:
    where = f"{path.parent.name}/{path.name}"
    assert bool(wall_clocks(path.read_text())) == (where in WALL)


def test_the_check_sees_them() -> None:
    source = "import time\nfrom time import time\nx = time.time()\ny = datetime.datetime.now()\n"
    assert wall_clocks(source) == ["time.time", "time.time", "datetime.now"]
