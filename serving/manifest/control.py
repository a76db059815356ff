"""What models that reset themselves are told."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from .part import Dim, Dtype, Name, Part

# What a sequence's number takes of an integer: no sign.
_ID_BITS = {"int32": 31, "uint32": 32, "int64": 63, "uint64": 63}


class Control(Part):
    """A graph input that tells the model where each row's sequence stands, for models that reset themselves.

    `"start"` is yes in a sequence's first run; `"end"` in the run of its last samples, if its client said
    with them that they are the last ones (`Chunk.last`), or in the run of what End itself brings, padding or
    the rest of a text; `"ready"` in every row that is no padding. `"sequence_id"` is a number above 0 that a
    sequence keeps, on other servers too: 63 bits, or as many as the dtype holds without a sign.
    """

    name: Name
    """as in the graph"""
    kind: Literal["start", "end", "ready", "sequence_id"]
    """what the model is told"""
    dtype: Dtype
    """as in the graph; of a sequence_id int32, uint32, int64 or uint64"""
    shape: tuple[Dim, ...] = ("batch",)
    """as in the graph: one number a row, so every other axis has length 1"""
    batch_axis: int | None = 0
    """the axis of the rows; null: none, in a graph of one row"""
    values: tuple[float, float] = (0.0, 1.0)
    """what stands for no and for yes"""

    @model_validator(mode="after")
    def _check(self) -> Control:
        others = [d for a, d in enumerate(self.shape) if a != self.batch_axis]
        if self.batch_axis is not None and not 0 <= self.batch_axis < len(self.shape):
            raise ValueError(f"{self.name}: batch_axis {self.batch_axis} is no axis of {list(self.shape)}")
        if any(d != 1 for d in others):
            raise ValueError(
                f"{self.name}: a control is one number a row, so every axis but batch has length 1, got "
                f"{list(self.shape)}"
            )
        if self.kind == "sequence_id" and self.dtype not in _ID_BITS:
            raise ValueError(
                f"{self.name}: a sequence_id is one of {', '.join(_ID_BITS)}, this one is {self.dtype}"
            )
        return self

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def id_bits(self) -> int:
        """Of a sequence_id."""
        return _ID_BITS[self.dtype]
