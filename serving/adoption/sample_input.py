"""What a client might send to a model of that manifest: numbers drawn from what its inputs allow."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto.serving.manifest import Input, Manifest

Array = NDArray[Any]
Arrays = dict[str, Array]  # by input, in the shapes that clients send

_FLOATS = (-1.0, 1.0)
_BOUNDS = {"int16": (-8000, 8000), "uint8": (0, 255), "int8": (-100, 100)}  # sound and pictures; else 0 and 1


def drawn(manifest: Manifest, frames: int, seed: int) -> Arrays:
    """Frames of a sequence, or rows of a stateless model."""
    random = np.random.default_rng(seed)
    return {
        i.name: _client_shape(i, manifest, _values(i, frames * i.multiple, random)) for i in manifest.inputs
    }


def _values(spec: Input, count: int, random: np.random.Generator) -> Array:
    """Time, or rows, first."""
    shape, dtype = (count, *spec.sample_shape), spec.numpy_dtype
    if dtype.kind == "f":
        return random.uniform(*_FLOATS, shape).astype(dtype)
    low, high = spec.range or _BOUNDS.get(spec.dtype, (0, 1))
    return random.integers(low, high, shape, endpoint=True).astype(dtype)


def _client_shape(spec: Input, manifest: Manifest, values: Array) -> Array:
    axis = free_axis(spec, manifest)
    if axis is None:
        return np.asarray(values[0])
    return np.ascontiguousarray(np.moveaxis(values, 0, axis))


def free_axis(spec: Input, manifest: Manifest) -> int | None:
    """Where a client's tensor has its samples or rows; None: it is one step, or one row."""
    if not manifest.stateful:
        return spec.batch_axis
    if spec.time_axis is None:
        return None
    return spec.time_axis - (spec.batch_axis is not None and spec.batch_axis < spec.time_axis)


def cut(manifest: Manifest, whole: Arrays, ends: list[float]) -> list[Arrays]:
    """Pieces of it that end after so many frames. Where there is no axis to cut along, there is one piece."""
    pieces: list[Arrays] = []
    start = 0.0
    for end in ends:
        piece: Arrays = {}
        for spec in manifest.inputs:
            axis = free_axis(spec, manifest)
            if axis is None:
                return [whole]
            places = slice(round(start * spec.multiple), round(end * spec.multiple))
            piece[spec.name] = np.ascontiguousarray(whole[spec.name][(slice(None),) * axis + (places,)])
        pieces.append(piece)
        start = end
    return pieces
