"""What the server carries from run to run."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from .part import Dim, Dtype, Name, Part


class Value(Part):
    """Every element starts at that value."""

    value: float
    """in the state's dtype"""


class State(Part):
    """A graph output that is fed again in the sequence's next run."""

    input: Name
    """the graph input that takes it"""
    output: Name
    """the graph output that gives the next one"""
    dtype: Dtype
    """as in the graph"""
    shape: tuple[Dim, ...]
    """that of the input"""
    batch_axis: int | None = 0
    """the axis of the rows; null: none, in a graph of one row"""
    init: Literal["zeros", "given"] | Value | tuple[float, ...] = "zeros"
    """where a sequence begins: a list holds the elements of one row; `"given"`: its client says so at Open
    (`Open.initial`), in this dtype and shape, without the batch axis"""
    finite: bool = True
    """whether a sequence ends, alone, when it becomes NaN or Inf; false where they are legal"""

    @model_validator(mode="after")
    def _check(self) -> State:
        if self.batch_axis is not None and not 0 <= self.batch_axis < len(self.shape):
            raise ValueError(f"{self.input}: batch_axis {self.batch_axis} is no axis of {list(self.shape)}")
        if not all(isinstance(d, int) and d > 0 for d in self._fixed):
            raise ValueError(
                f"{self.input}: every axis but batch needs a positive length, got {list(self.shape)}"
            )
        if isinstance(self.init, tuple) and len(self.init) != math.prod(self.slot_shape):
            raise ValueError(
                f"{self.input}: init holds {len(self.init)} values, one slot {math.prod(self.slot_shape)}"
            )
        return self

    @property
    def _fixed(self) -> list[Dim]:
        return [d for a, d in enumerate(self.shape) if a != self.batch_axis]

    @cached_property
    def slot_shape(self) -> tuple[int, ...]:
        """One sequence's part, without the batch axis."""
        return tuple(int(d) for d in self._fixed)

    @cached_property
    def slot_bytes(self) -> int:
        return math.prod(self.slot_shape) * np.dtype(self.dtype).itemsize


def initial(state: State) -> np.ndarray[Any, np.dtype[Any]]:
    """What a slot of it begins with, unless a client says so."""
    if isinstance(state.init, tuple):
        return np.array(state.init, state.dtype).reshape(state.slot_shape)
    value = state.init.value if isinstance(state.init, Value) else 0
    return np.full(state.slot_shape, value, state.dtype)
