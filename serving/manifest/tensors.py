"""The tensors that clients send and receive."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tenuto.serving.text import Cutter

from .part import Dim, Dtype, Name, Part
from .wire import WireCharacters, WireDtype, WireEncoding, WireWords


class Multiple(Part):
    """The model eats any positive multiple of that many samples along the time axis."""

    multiple: Annotated[int, Field(ge=1)]
    """samples that make one frame"""


class Exact(Part):
    """The model eats exactly that many samples a run."""

    exact: Annotated[int, Field(ge=1)]
    """samples a run, which are one frame"""


class _Tensor(Part):
    name: Name
    """as in the graph"""
    dtype: Dtype
    """as in the graph"""
    shape: tuple[Dim, ...]
    """a number is an axis of that length, a string names one that varies: batch and time"""
    batch_axis: int | None = 0
    """the axis of the rows; null: the graph has none, and takes one row"""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    def _check_axis(self, axis: int | None, word: str) -> None:
        if axis is not None and not 0 <= axis < len(self.shape):
            raise ValueError(f"{self.name}: {word} {axis} is no axis of {list(self.shape)}")

    def _row_shape(self, time_axis: int | None) -> tuple[int, ...]:
        fixed = [d for a, d in enumerate(self.shape) if a not in (self.batch_axis, time_axis)]
        if not all(isinstance(d, int) and d > 0 for d in fixed):
            raise ValueError(
                f"{self.name}: every axis but batch and time needs a positive length, got {list(self.shape)}"
            )
        return tuple(int(d) for d in fixed)


class Input(_Tensor):
    """A tensor that clients send, in any number of samples: what does not fill a frame waits for the next
    chunk."""

    time_axis: int | None = None
    """the axis along which a sequence goes on; null: one chunk is one step of the model"""
    chunk: Multiple | Exact | Literal["free"] = "free"
    """how many samples the model eats at once"""
    left_context: Annotated[int, Field(ge=0)] = 0
    """so many samples that were eaten before are put before each run"""
    left_context_value: float = 0.0
    """what they are when nothing was eaten yet"""
    lengths: Name | None = None
    """the int32 graph input that takes each row's length in samples; with it rows of different lengths share
    a batch"""
    range: tuple[int, int] | None = None
    """lowest and highest value, of an integer input; others are refused before the run"""
    finite: bool = True
    """whether NaN and Inf are refused"""
    wire: tuple[WireDtype | WireEncoding | WireWords | WireCharacters, ...] = ()
    """what else than `dtype` clients may send; at most one entry of text"""
    tail: Literal["drop", "pad"] = "drop"
    """what becomes at End of samples that fill no frame; `"pad"`: zeros are put behind them"""
    unit: str = ""
    """of the values, for people"""
    rate_hz: Annotated[float, Field(gt=0)] | None = None
    """samples a second, if the time axis is time"""
    columns: tuple[str, ...] = ()
    """names of the values of one sample, for people"""

    @model_validator(mode="after")
    def _check(self) -> Input:
        self._check_axis(self.batch_axis, "batch_axis")
        self._check_axis(self.time_axis, "time_axis")
        if self.time_axis is not None and self.time_axis == self.batch_axis:
            raise ValueError(f"{self.name}: time_axis and batch_axis are both {self.time_axis}")
        if self.time_axis is None and (self.left_context or self.lengths or self.chunk != "free"):
            raise ValueError(f"{self.name}: chunk, lengths and left_context need a time_axis")
        if self.range is not None and self.numpy_dtype.kind not in "iu":
            raise ValueError(f"{self.name}: range is for integer inputs, this one is {self.dtype}")
        encoded = any(isinstance(w, WireEncoding) for w in self.wire)
        if encoded and not (self.dtype == "uint8" or "uint8" in self.wire_dtypes):
            raise ValueError(f"{self.name}: png and jpeg need a uint8 entry in wire, to say how pixels scale")
        if encoded and len(self._row_shape(self.time_axis)) not in (2, 3):
            raise ValueError(
                f"{self.name}: png and jpeg need [height, width] and perhaps colours in the shape"
            )
        self._row_shape(self.time_axis)
        self._check_text()
        return self

    def _check_text(self) -> None:
        texts = [w for w in self.wire if isinstance(w, WireWords | WireCharacters)]
        if not texts:
            return
        if len(texts) > 1:
            raise ValueError(f"{self.name}: wire has {len(texts)} entries of utf8, of which one can hold")
        if self.dtype != "int64" or self.time_axis is None or self.sample_shape:
            raise ValueError(
                f"{self.name}: utf8 needs int64 [batch, time] with a time_axis, one id a sample; this is "
                f"{self.dtype} {list(self.shape)}"
            )
        last = texts[0].cutter.count - 1
        if self.range is not None and not self.range[0] <= 0 <= last <= self.range[1]:
            raise ValueError(f"{self.name}: utf8 gives ids from 0 to {last}, range is {list(self.range)}")

    @cached_property
    def text(self) -> Cutter | None:
        """How text that clients send becomes ids; None: they send none."""
        cutters = [w.cutter for w in self.wire if isinstance(w, WireWords | WireCharacters)]
        return cutters[0] if cutters else None

    @cached_property
    def multiple(self) -> int:
        """Samples along the time axis that make one frame; 1 for inputs without a time axis."""
        if isinstance(self.chunk, Multiple):
            return self.chunk.multiple
        return self.chunk.exact if isinstance(self.chunk, Exact) else 1

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """One sample along the time axis, without the batch axis."""
        return self._row_shape(self.time_axis)

    @cached_property
    def sample_bytes(self) -> int:
        return math.prod(self.sample_shape) * self.numpy_dtype.itemsize

    @cached_property
    def wire_dtypes(self) -> dict[str, WireDtype]:
        return {w.dtype: w for w in self.wire if isinstance(w, WireDtype)}

    @cached_property
    def wire_encodings(self) -> frozenset[str]:
        return frozenset(w.encoding for w in self.wire if isinstance(w, WireEncoding))


class Output(_Tensor):
    """A tensor that clients receive. What the graph declares of its shape is not looked at, since exporters
    leave it out or get it wrong; what each run gives is compared with `shape`."""

    time_axis: int | None = None
    """the axis of the frames; null: its value after the last frame of a chunk"""
    stride: Annotated[int, Field(ge=1)] = 1
    """samples of the first timed input that make one output frame"""
    lengths_output: Name | None = None
    """the int32 or int64 graph output that counts each row's frames, for graphs that give more or fewer than
    `stride` says"""
    labels: tuple[str, ...] = ()
    """what the numbers of a frame stand for, for people"""
    activation: Literal["", "softmax", "log_softmax", "sigmoid"] = ""
    """what was done to the numbers; `""`: nothing is said"""
    top_k: Annotated[int, Field(ge=0)] = 0
    """how many of the labels are worth showing, for people; 0: nothing is said"""
    unit: str = ""
    """of the values, for people"""
    columns: tuple[str, ...] = ()
    """names of the values of one frame, for people"""

    @model_validator(mode="after")
    def _check(self) -> Output:
        self._check_axis(self.batch_axis, "batch_axis")
        self._check_axis(self.time_axis, "time_axis")
        if self.time_axis is not None and self.time_axis == self.batch_axis:
            raise ValueError(f"{self.name}: time_axis and batch_axis are both {self.time_axis}")
        self._row_shape(self.time_axis)
        return self

    @cached_property
    def frame_shape(self) -> tuple[int, ...]:
        return self._row_shape(self.time_axis)

    @cached_property
    def frame_bytes(self) -> int:
        return math.prod(self.frame_shape) * self.numpy_dtype.itemsize
