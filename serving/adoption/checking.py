"""`tenuto check`: whether a model keeps what it is served for, as a table. A child process runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tenuto.serving.errors import ModelInvalid
from tenuto.serving.repository import ModelFolder
from tenuto.serving.vetting import Limits

from .dialogue import Dialogue
from .trials import MODULE

TOLERANCE = 1e-4
_SEED = 20

# What is checked, in words, and the options that may mend it, in this order: where the first two fail, no
# other can be judged.
_LOADS = "it loads, and runs on zeros"
_CHECKS = {
    "shapes": ("runs give the shapes that are told", "--time-axis, --chunk, --length or --state"),
    "repeated": ("the same again gives the same", ""),
    "cut": (
        "a sequence cut into chunks gives what it gives whole",
        "--chunk, --left-context, --time-axis or --state",
    ),
    "batched": (
        "sequences beside each other get what they get alone",
        "--batch-axis, or --length for a fixed batch",
    ),
    "remembers": ("what came before matters", "--no-state"),
    "reset": ("a slot that was used begins like a new one", "--state"),
    "resumed": ("a snapshot goes on as the sequence itself", "--state"),
    "nan": ("NaN stays in its row", "--batch-axis"),
    "constants": ("all values that a client may choose run", "--constant"),
}
CHECKS = [_LOADS, *(words for words, _ in _CHECKS.values())]


@dataclass(frozen=True)
class Row:
    """One check. `held` is None where there was nothing to check."""

    check: str
    held: bool | None
    says: str
    may_mend: str = ""


@dataclass(frozen=True)
class Table:
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.held is False)


def check(
    folder: ModelFolder, limits: Limits, tolerance: float = TOLERANCE, golden: Path | None = None
) -> Table:
    """All checks of a folder that is laid out as in a repository. If all held, `golden` is written."""
    subject = {
        "folder": str(folder.path.absolute()), "model": folder.model, "version": folder.version,
        "seed": _SEED, "tolerance": tolerance,
    }  # fmt: skip
    rows: list[Row] = []
    with Dialogue(MODULE, subject, limits) as child:
        try:
            child.start()
        except ModelInvalid as error:
            return Table((Row(_LOADS, False, str(error), "--manifest, or the options of tenuto inspect"),))
        rows.append(Row(_LOADS, True, "in a process of its own"))
        for name, (words, may_mend) in _CHECKS.items():
            try:
                found = child.ask({"check": name})
            except ModelInvalid as error:
                found = {"held": False, "says": str(error)}
            rows.append(Row(words, found["held"], found["says"], may_mend))
            if found["held"] is False and (name == "shapes" or not child.lives):
                break  # no other can be judged
        if golden is not None and not Table(tuple(rows)).failed:
            child.ask({"golden": str(golden.absolute())})
    return Table(tuple(rows))
