"""CONTRIBUTING.md: nothing that checks is forgotten because `.ci/run` does not run it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# They write something, or are for whoever sits there.
CHECK_NOTHING = {
    "help",
    "python",
    "format",
    "stubs",
    "models",
    "networks",
    "capacity",
    "dashboard",
    "vocabulary",
    "locks",
    "bom",
    "manifests",
    "clean",
    "bench-gpu",
}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def targets() -> set[str]:
    lines = re.findall(r"^\.PHONY: (.+)", text("Makefile"), flags=re.MULTILINE)
    return {target for line in lines for target in line.split()}


def before_a_release() -> set[str]:
    """What each point of that section begins with; what it speaks of later is for another case."""
    (section,) = re.findall(
        r"^## Before a release\n(.*?)^## ", text("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL
    )
    points = re.findall(r"^- ([^:]+):", section, flags=re.MULTILINE)
    return {target for point in points for target in re.findall(r"`make ([\w-]+)`", point)}


def test_what_checks_is_run_for_every_change_or_before_a_release() -> None:
    always = set(re.findall(r"^make ([\w-]+)", text(".ci/run"), flags=re.MULTILINE))
    assert always
    assert not always & before_a_release()
    assert always | before_a_release() == targets() - CHECK_NOTHING
