"""Between rows of bytes and the graph's tensors: `InputLayout.stack` and `OutputLayout.cut`, an inverse pair.

A row is one turn's samples, time first, C order. `stack` pads the rows to the longest, `cut` gives each row's
own frames back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import Input, Manifest, Output

Array = NDArray[Any]


class InputLayout:
    """Rows of one input -> the tensor that the graph eats."""

    def __init__(self, spec: Input, *, stateful: bool) -> None:
        self.name = spec.name
        self.lengths_name = spec.lengths
        self._spec = spec
        self._dtype = spec.numpy_dtype
        self._shape = spec.sample_shape
        self._sample_bytes = spec.sample_bytes
        self._timed = spec.time_axis is not None
        self._stateless = not stateful
        self._check_finite = spec.finite and self._dtype.kind == "f"
        # Where the axes of the stacked array, (batch, time, …), go in the graph's tensor.
        axes = [a for a in (spec.batch_axis, spec.time_axis) if a is not None]
        self._move = (tuple(range(len(axes))), tuple(axes)) if axes != list(range(len(axes))) else None

    def lengths(self, rows: list[bytes]) -> list[int]:
        """Samples of each row, the left context included."""
        return [len(row) // self._sample_bytes for row in rows]

    def stack(self, rows: list[bytes], batch: int) -> Array:
        """All rows in one tensor of `batch` rows (those beyond `rows` are zero), padded along time."""
        longest = max(len(row) for row in rows)
        if self._stateless:
            whole = b"".join(rows)
            shape: tuple[int, ...] = (-1, *self._shape)
        elif self._spec.batch_axis is None:
            whole = rows[0]
            shape = (len(rows[0]) // self._sample_bytes, *self._shape) if self._timed else self._shape
        else:
            padded = [row if len(row) == longest else row.ljust(longest, b"\0") for row in rows]
            padded += [bytes(longest)] * (batch - len(rows))
            whole = padded[0] if batch == 1 else b"".join(padded)
            shape = (batch, longest // self._sample_bytes, *self._shape) if self._timed else (batch, *self._shape)
        stacked = np.frombuffer(whole, self._dtype).reshape(shape)
        if self._stateless and len(stacked) < batch:
            pad = np.zeros((batch - len(stacked), *self._shape), self._dtype)
            stacked = np.concatenate([stacked, pad])
        return stacked if self._move is None else np.ascontiguousarray(np.moveaxis(stacked, *self._move))

    def refused(self, stacked: Array, rows: list[bytes]) -> dict[int, str]:
        """The rows whose values the manifest forbids, each with what is wrong.

        One pass over the whole batch: rows are looked at one by one only where that finds something.
        """
        bounds = self._spec.range
        if self._check_finite and not np.isfinite(stacked).all():
            return self._each(rows, lambda r: not np.isfinite(r).all(), "holds NaN or Inf")
        if bounds is not None and (stacked.min() < bounds[0] or stacked.max() > bounds[1]):
            low, high = bounds
            text = f"holds a value outside [{low}, {high}]"
            return self._each(rows, lambda r: bool(r.size and (r.min() < low or r.max() > high)), text)
        return {}

    def _each(self, rows: list[bytes], bad: Any, text: str) -> dict[int, str]:
        found = (i for i, row in enumerate(rows) if bad(np.frombuffer(row, self._dtype)))
        return {i: f"input {self.name!r} {text}" for i in found}


class OutputLayout:
    """One output tensor of the graph -> each row's bytes."""

    def __init__(self, spec: Output, manifest: Manifest) -> None:
        self.name = spec.name
        self.frame_shape = spec.frame_shape
        self.timed = spec.time_axis is not None
        self._frame_bytes = spec.frame_bytes
        self._stateless = not manifest.stateful
        self._alone = manifest.alone
        axes = [a for a in (spec.batch_axis, spec.time_axis) if a is not None]
        self._move = (tuple(axes), tuple(range(len(axes)))) if axes != list(range(len(axes))) else None
        # Output frames that one of the model's chunks completes.
        first = manifest.timed[0].multiple if manifest.timed else 1
        self._per_frame = first // spec.stride if self.timed else 0
        self._dtype = spec.numpy_dtype

    def cut(self, tensor: Array, frames: list[int]) -> list[bytes]:
        """Each row's part: `frames[i]` frames of a timed output, else the row's value."""
        if tensor.dtype != self._dtype or (self._move is None and not tensor.flags.c_contiguous):
            tensor = np.ascontiguousarray(tensor, self._dtype)
        whole = (tensor if self._move is None else np.moveaxis(tensor, *self._move)).tobytes()
        if self._alone:
            return [whole]
        size = self._frame_bytes
        if self._stateless:
            ends = np.cumsum(frames).tolist()
            return [whole[(end - n) * size : end * size] for end, n in zip(ends, frames, strict=True)]
        if not self.timed:
            return [whole[i * size : (i + 1) * size] for i in range(len(frames))]
        row = len(whole) // tensor.shape[self._move[0][0] if self._move else 0]
        per = self._per_frame * size
        return [whole[i * row : i * row + n * per] for i, n in enumerate(frames)]

    def shape(self, data: bytes) -> tuple[int, ...]:
        """The shape of a client's tensor: without the batch axis, or with it for a stateless model."""
        if not (self.timed or self._stateless):
            return self.frame_shape
        return (len(data) // self._frame_bytes if self._frame_bytes else 0, *self.frame_shape)

