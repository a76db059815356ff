"""What a model believes, in words: its outputs read by its manifest's labels, activation, columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .tensor import Array

Manifest = Mapping[str, Any]
_MOST_VALUES = 8  # of an output without labels, in one line


@dataclass(frozen=True, slots=True)
class Guess:
    """One label and how much speaks for it: a probability, or a bare score."""

    label: str
    value: float
    is_probability: bool

    def __str__(self) -> str:
        if self.is_probability:
            return f"{self.label} {100 * self.value:.1f} %"
        return f"{self.label} {self.value:.4g}"


def guesses(output: Mapping[str, Any], scores: Array, count: int) -> list[Guess]:
    """Return the `count` strongest labels of one row.

    `output` is the manifest's entry, with labels; `scores` is [labels], after the entry's activation.
    """
    labels = output["labels"]
    activation = output.get("activation", "")
    values = np.exp(scores) if activation == "log_softmax" else scores
    strongest = np.argsort(-values, kind="stable")[:count]
    return [Guess(str(labels[i]), float(values[i]), bool(activation)) for i in strongest]


def last_frame(output: Mapping[str, Any], array: Array) -> Array | None:
    """Return an output's newest value; None if the chunk completed no frame.

    `array` is one sequence's, without the batch axis: [frames, …] where the manifest's entry has a
    time axis, else the value itself.
    """
    axis = output.get("time_axis")
    if axis is None:
        return array
    batch_axis = output.get("batch_axis", 0)
    axis -= batch_axis is not None and batch_axis < axis
    return array.take(-1, axis) if array.shape[axis] else None


def describe(output: Mapping[str, Any], value: Array, count: int = 1) -> str:
    """Return one row or frame of an output in one line: its strongest labels, or its first values."""
    name = output["name"]
    if output.get("labels"):
        return f"{name} {', '.join(map(str, guesses(output, value.reshape(-1), count)))}"
    row = value
    while row.ndim > 1:
        row = row[0]
    row = row.reshape(-1)
    columns = output.get("columns", ())
    if len(columns) == len(row):
        parts = [f"{column} {number:.4g}" for column, number in zip(columns, row, strict=True)]
    else:
        parts = [f"{number:.4g}" for number in row]
    more = " …" if value.size > min(len(row), _MOST_VALUES) else ""
    shape = f"{list(value.shape)}" if value.size > 1 else ""
    return f"{name}{shape} {' '.join(parts[:_MOST_VALUES])}{more}"
