"""Values that the server feeds, the same in every run."""

from __future__ import annotations

import math

from pydantic import model_validator

from .part import Dtype, Name, Part


class Constant(Part):
    """A graph input that the server feeds. Sequences with different choices do not share a batch."""

    name: Name
    """as in the graph"""
    dtype: Dtype
    """as in the graph"""
    value: float | tuple[float, ...]
    """a number for every element, or the elements in a row"""
    shape: tuple[int, ...] = ()
    """as in the graph"""
    allowed: tuple[float, ...] = ()
    """what a client may choose at Open"""

    @model_validator(mode="after")
    def _check(self) -> Constant:
        if isinstance(self.value, tuple) and len(self.value) != math.prod(self.shape):
            raise ValueError(
                f"{self.name}: value holds {len(self.value)} numbers, the shape {math.prod(self.shape)}"
            )
        return self
