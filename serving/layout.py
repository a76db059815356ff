"""Between rows of bytes and the graph's tensors: `stack` and `cut`, an inverse pair.

A row is one turn's samples, time first, C order. `stack` pads the rows to the longest, `cut` gives each row's
own frames back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import NotFinite, OutOfRangeValue, RunFailed, TenutoError
from .manifest import Control, Input, Manifest, Output

Array = NDArray[Any]


Tensors = tuple[tuple[tuple[int, ...], bytes], ...]  # per output: a client's shape, and the bytes


def is_finite(values: NDArray[Any]) -> bool:
    """Whether no value is NaN or Inf. In the bytes of the answers: half of what their `all` costs."""
    return b"\0" not in np.isfinite(values).tobytes()


class Layout:
    """All inputs and outputs of one model. `bucketed`: runs have few sizes, filled up with padding rows."""

    def __init__(self, manifest: Manifest, *, bucketed: bool = False) -> None:
        self._manifest = manifest
        self._bucketed = bucketed
        self._inputs = [InputLayout(spec, stateful=manifest.stateful) for spec in manifest.inputs]
        self._outputs = [OutputLayout(spec, manifest) for spec in manifest.outputs]
        self._constants: dict[tuple[tuple[str, float], ...], dict[str, Array]] = {}

    def batch_size(self, frames: list[int]) -> int:
        """Rows of the graph's tensors for turns of that many frames, padding rows included."""
        if self._manifest.fixed_batch is not None:
            return self._manifest.fixed_batch
        rows = len(frames) if self._manifest.stateful else sum(frames)
        if not self._bucketed:
            return rows
        return max(rows, min(bucket(rows), self._manifest.rows_per_batch))

    def stack(self, rows: list[list[bytes]], size: int) -> tuple[dict[str, Array], dict[int, TenutoError]]:
        """`rows[input][turn]` as feeds of `size` rows; and the turns whose values the manifest forbids."""
        feeds: dict[str, Array] = {}
        refused: dict[int, TenutoError] = {}
        for layout, column in zip(self._inputs, rows, strict=True):
            feeds[layout.name] = stacked = layout.stack(column, size)
            refused.update(layout.refused(stacked, column))
            if layout.lengths_name:
                lengths = layout.lengths(column)
                lengths += lengths[:1] * (size - len(lengths))
                feeds[layout.lengths_name] = np.array(lengths, np.int32)
        return feeds, refused

    def constants(self, chosen: tuple[tuple[str, float], ...]) -> dict[str, Array]:
        """The constants' feeds, with what a client chose."""
        feeds = self._constants.get(chosen)
        if feeds is None:
            values = {c.name: c.value for c in self._manifest.constants} | dict(chosen)
            feeds = self._constants[chosen] = {
                c.name: np.full(c.shape, values[c.name], c.dtype)
                if isinstance(values[c.name], float)
                else np.array(values[c.name], c.dtype).reshape(c.shape)
                for c in self._manifest.constants
            }
        return feeds

    def cut(self, results: list[Array], frames: list[int]) -> list[tuple[bytes, ...]]:
        """Per turn, its part of each output of a run, whose results stand in the order of `fetched`."""
        columns = [
            o.cut(r, frames)
            if o.counted_by is None
            else o.cut_counted(r, results[o.counted_by].ravel().tolist(), len(frames))
            for o, r in zip(self._outputs, results, strict=False)
        ]
        return list(zip(*columns, strict=True))

    def unfit(self, results: list[Array], frames: list[int], size: int) -> dict[int, TenutoError]:
        """The turns of a run of `size` rows of which an output is not what the manifest says, each with what
        is wrong. A shape that is wrong is so for all of them."""
        longest, unfit = max(frames), dict[int, TenutoError]()
        for layout, result in zip(self._outputs, results, strict=False):
            text = layout.misshapen(result, longest, size)
            if not text and layout.counted_by is not None:
                unfit.update(layout.miscounted(result, results[layout.counted_by], len(frames)))
            elif text:
                return dict.fromkeys(range(len(frames)), RunFailed(text))
        return unfit

    def join(self, parts: tuple[tuple[bytes, ...], ...]) -> Tensors:
        """One chunk's outputs from the parts of its turns."""
        if len(parts) == 1:
            if len(self._outputs) == 1:  # without a loop
                return (self._outputs[0].tensor(parts[0][0]),)
            return tuple([o.tensor(data) for o, data in zip(self._outputs, parts[0], strict=True)])
        tensors = []
        for i, layout in enumerate(self._outputs if parts else ()):
            data = b"".join(part[i] for part in parts) if layout.joins else parts[-1][i]
            tensors.append(layout.tensor(data))
        return tuple(tensors)


def bucket(rows: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... that holds so many: less than a third of it is padding."""
    power = 1 << (rows - 1).bit_length()
    between = power - power // 4
    return between if power > 2 and rows <= between else power


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
        self._stateless = not stateful and spec.batch_axis is not None  # rows come in batches
        self._context_bytes = spec.left_context * spec.sample_bytes
        # Padding is zero, unless that is no value that the model may see.
        low, high = spec.range or (0, 0)
        value = 0 if low <= 0 <= high else low
        self._pad = np.full(spec.sample_shape, value, spec.numpy_dtype).tobytes()
        self._check_finite = spec.finite and self._dtype.kind == "f"
        # Where the axes of the stacked array, (batch, time, …), go in the graph's tensor.
        axes = [a for a in (spec.batch_axis, spec.time_axis) if a is not None]
        self._move = (tuple(range(len(axes))), tuple(axes)) if axes != list(range(len(axes))) else None

    def lengths(self, rows: list[bytes]) -> list[int]:
        """Samples of each row, the left context included."""
        return [len(row) // self._sample_bytes for row in rows]

    def stack(self, rows: list[bytes], batch: int) -> Array:
        """All rows in one tensor of `batch` rows (those beyond `rows` are padding), padded along time."""
        longest = max(map(len, rows))
        if self._stateless:
            whole = b"".join(rows)
            whole += self._padding(batch * self._sample_bytes - len(whole))
            shape: tuple[int, ...] = (batch, *self._shape)
        elif self._spec.batch_axis is None:
            whole = rows[0]
            shape = (len(rows[0]) // self._sample_bytes, *self._shape) if self._timed else self._shape
        else:
            padded = rows
            if min(map(len, rows)) < longest:
                padded = [row + self._padding(longest - len(row)) for row in rows]
            if len(rows) < batch:
                padded = padded + [self._padding(longest)] * (batch - len(rows))
            whole = padded[0] if batch == 1 else b"".join(padded)
            shape = (
                (batch, longest // self._sample_bytes, *self._shape) if self._timed else (batch, *self._shape)
            )
        stacked = np.frombuffer(whole, self._dtype).reshape(shape)
        return stacked if self._move is None else np.ascontiguousarray(np.moveaxis(stacked, *self._move))

    def _padding(self, nbytes: int) -> bytes:
        return self._pad * (nbytes // self._sample_bytes)

    def refused(self, stacked: Array, rows: list[bytes]) -> dict[int, TenutoError]:
        """The rows whose values the manifest forbids, each with what is wrong.

        One pass over the whole batch: rows are looked at one by one only where that finds something.
        """
        bounds = self._spec.range
        if self._check_finite and not is_finite(stacked):
            bad = [i for i, row in enumerate(rows) if not np.isfinite(self._values(row)).all()]
            return {
                i: NotFinite(f"input {self.name!r} holds NaN or Inf; the model takes numbers only")
                for i in bad
            }
        if bounds is not None and (stacked.min() < bounds[0] or stacked.max() > bounds[1]):
            ends = {i: (v.min(), v.max()) for i, row in enumerate(rows) if (v := self._values(row)).size}
            return {
                i: OutOfRangeValue(
                    f"input {self.name!r} holds values from {low} to {high}, allowed are {list(bounds)}"
                )
                for i, (low, high) in ends.items()
                if low < bounds[0] or high > bounds[1]
            }
        return {}

    def _values(self, row: bytes) -> Array:
        """What the client sent: the left context was looked at before, or is the manifest's own value."""
        return np.frombuffer(row, self._dtype, offset=self._context_bytes)


class OutputLayout:
    """One output tensor of the graph -> each row's bytes."""

    def __init__(self, spec: Output, manifest: Manifest) -> None:
        self.name = spec.name
        self.frame_shape = spec.frame_shape
        self.timed = spec.time_axis is not None
        self._frame_bytes = spec.frame_bytes
        self._alone = manifest.alone or spec.batch_axis is None
        self._stateless = not manifest.stateful and not self._alone
        self.joins = self.timed or self._stateless  # whether the parts of a chunk's turns are put together
        # Which of the run's results holds the frames of each row; None: they follow from those that went in.
        counts = spec.lengths_output
        self.counted_by = manifest.fetched.index(counts) if counts else None
        # What a run's result has along each axis: a number, None for time, and the rows' place.
        self._axes = [None if a == spec.time_axis else d for a, d in enumerate(spec.shape)]
        self._rows_axis = spec.batch_axis
        self._checked: tuple[int, int, tuple[int, ...]] = (-1, 0, ())  # the last that was found right
        axes = [a for a in (spec.batch_axis, spec.time_axis) if a is not None]
        self._move = (tuple(axes), tuple(range(len(axes)))) if axes != list(range(len(axes))) else None
        # Where a client's tensor has its free axis: time for a sequence, else the batch.
        self._free = (spec.batch_axis or 0) if spec.time_axis is None else spec.time_axis
        if spec.time_axis is not None and spec.batch_axis is not None:
            self._free -= spec.batch_axis < spec.time_axis
        # Output frames that one of the model's chunks completes.
        first = manifest.timed[0].multiple if manifest.timed else 1
        self._per_frame = first // spec.stride if self.timed else 0
        self._dtype = spec.numpy_dtype
        self._last_bytes, self._last_shape = -1, self.frame_shape  # of the tensor before: the next is like it

    def misshapen(self, tensor: Array, longest: int, size: int) -> str:
        """What is wrong with the shape of so many rows, the longest of so many frames; empty: nothing."""
        if self._checked == (size, longest, tensor.shape):
            return ""
        expected = [size if a == self._rows_axis else d for a, d in enumerate(self._axes)]
        agrees = tensor.ndim == len(expected)
        agrees = agrees and all(d in (None, n) for d, n in zip(expected, tensor.shape, strict=True))
        least = 0 if self._alone or self.counted_by is not None else longest * self._per_frame
        if agrees and None in expected:
            agrees = tensor.shape[expected.index(None)] >= least
        if not agrees:
            told = ", ".join(f"{least} or more" if d is None else str(d) for d in expected)
            return (
                f"output {self.name!r} came as {list(tensor.shape)} from a run of {size} rows, expected "
                f"[{told}]; mend the manifest, or the model"
            )
        self._checked = size, longest, tensor.shape
        return ""

    def miscounted(self, tensor: Array, counts: Array, rows: int) -> dict[int, TenutoError]:
        """The rows of which the graph counts frames that the tensor does not hold."""
        held, told = tensor.shape[self._axes.index(None)], counts.ravel().tolist()
        told += [-1] * (rows - len(told))
        text = f"output {self.name!r} has {held} frames, and the graph counts "
        return {i: RunFailed(f"{text}{told[i]}") for i in range(rows) if not 0 <= told[i] <= held}

    def cut_counted(self, tensor: Array, counts: list[int], rows: int) -> list[bytes]:
        """Each row's part, whose frames the graph counts itself."""
        whole = tensor.astype(self._dtype, copy=False)
        if self._move is not None:
            whole = np.moveaxis(whole, *self._move)
        if self._alone:
            whole = whole[np.newaxis]
        return [whole[i, : max(n, 0)].tobytes() for i, n in enumerate(counts[:rows])]

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

    def tensor(self, data: bytes) -> tuple[tuple[int, ...], bytes]:
        """A client's tensor: the manifest's axes in their order, without the batch axis for a sequence."""
        if not self.joins:
            return self.frame_shape, data
        if len(data) == self._last_bytes:
            return self._last_shape, data
        count = len(data) // self._frame_bytes
        if not self._free:
            self._last_bytes, self._last_shape = len(data), (count, *self.frame_shape)
            return self._last_shape, data
        array = np.frombuffer(data, self._dtype).reshape(count, *self.frame_shape)
        array = np.moveaxis(array, 0, self._free)
        return array.shape, array.tobytes()


def one_a_row(control: Control, values: list[float], size: int) -> Array:
    """A control's values, and no for each row of padding up to `size`, as the graph's input."""
    nothing = 0 if control.kind == "sequence_id" else control.values[0]
    rows = np.array([*values, *[nothing] * (size - len(values))], control.numpy_dtype)
    return rows.reshape([size if a == control.batch_axis else 1 for a in range(len(control.shape))])
