"""A model's self test: `golden.npz` beside it, replayed chunk by chunk through the engine itself.

Keys are `{step}.in.{input}` and `{step}.out.{output}`, steps 1, 2, 3…; arrays have the shapes that clients
send and receive, in the graph's dtype. `tolerance` (float64) bounds the absolute difference: another CPU may
round otherwise. A step that completes no frame has no `out`.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Engine
from .errors import ModelInvalid
from .regular_file import read
from .sequence import Chunk, Failed, Output, Reply, Sequence
from .tensor import Reader

_MAX_BYTES = 64 << 20  # of one step
_MOST_BYTES = 256 << 20  # of all arrays, and of the file
_MOST_NAMES = 5  # that an error tells


@dataclass(frozen=True)
class _Tensor:
    """A tensor message's fields."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class _Collector:
    def __init__(self) -> None:
        self.replies: list[Reply] = []

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        self.replies += [reply for _, reply in replies]

    full = False
    share = None


@dataclass(frozen=True)
class Replayed:
    """How many steps were compared, and the largest difference of any number in them."""

    steps: int
    worst: float


def replay(engine: Engine, path: Path, where: str, judged: bool = True) -> Replayed:
    """Runs every step and compares. The engine has no thread. Not `judged`, any finite difference passes.

    Raises: ModelInvalid where an output differs, or the file is no golden file.
    """
    sink = _Collector()
    sequence = Sequence(sink, engine.manifest)
    reader = Reader(engine.manifest, _MAX_BYTES)
    if engine.manifest.stateful:
        engine.open(sequence)
    tolerance, golden = _read(path, where)
    allowed, worst = tolerance if judged else math.inf, 0.0
    for step, (inputs, expected) in enumerate(golden, 1):
        tensors = [
            _Tensor(n, a.dtype.name, a.shape, np.ascontiguousarray(a).tobytes()) for n, a in inputs.items()
        ]
        data = reader.read(tensors)
        chunk = Chunk(step, data, time.monotonic(), 0)
        (engine.accept if engine.manifest.stateful else engine.request)(sequence, chunk)
        while engine.turn():
            pass
        off = _compare(engine, sink.replies[-1], expected, allowed, f"{where}: golden step {step}")
        worst = max(worst, off)
    return Replayed(len(golden), worst)


_Arrays = dict[str, NDArray[Any]]


def _read(path: Path, where: str) -> tuple[float, list[tuple[_Arrays, _Arrays]]]:
    """The tolerance, and (inputs, outputs) of each step."""
    packed = read(path, _MOST_BYTES, where)
    try:
        _check_size(packed)
        with np.load(io.BytesIO(packed), allow_pickle=False) as file:
            arrays = {key: _array(key, file[key]) for key in file.files}
        tolerance = float(arrays.pop("tolerance", np.float64(1e-4)))
    except Exception as error:  # zipfile, zlib and numpy each have classes of their own
        raise ModelInvalid(f"{where}: golden.npz cannot be read: {error}") from error
    steps: list[tuple[_Arrays, _Arrays]] = []
    while inputs := _take(arrays, f"{len(steps) + 1}.in."):
        steps.append((inputs, _take(arrays, f"{len(steps) + 1}.out.")))
    if not steps:
        raise ModelInvalid(f"{where}: golden.npz holds no step 1")
    if arrays:
        names = ", ".join(repr(name[:64]) for name in sorted(arrays)[:_MOST_NAMES])
        more = f" and {len(arrays) - _MOST_NAMES} more" if len(arrays) > _MOST_NAMES else ""
        raise ModelInvalid(f"{where}: golden.npz holds {names}{more}, no part of its steps 1 to {len(steps)}")
    return tolerance, steps


def _check_size(packed: bytes) -> None:
    """A few kilobytes may hold gigabytes. No more of a member is unpacked than it says here.

    Raises: ValueError.
    """
    with zipfile.ZipFile(io.BytesIO(packed)) as file:
        unpacked = sum(member.file_size for member in file.infolist())
    if unpacked > _MOST_BYTES:
        raise ValueError(
            f"its arrays have {unpacked} bytes, at most {_MOST_BYTES} are read; keep fewer steps"
        )


def _array(name: str, value: object) -> NDArray[Any]:
    """Raises: ValueError for a member that is none."""
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name[:64]!r} is no array (.npy)")
    return value


def _take(arrays: _Arrays, prefix: str) -> _Arrays:
    """Moves the arrays of one step out of the file's, by the names of their tensors."""
    keys = [key for key in arrays if key.startswith(prefix)]
    return {key.removeprefix(prefix): arrays.pop(key) for key in keys}


def _compare(
    engine: Engine, reply: Reply, expected: dict[str, NDArray[Any]], tolerance: float, where: str
) -> float:
    """The largest difference."""
    if isinstance(reply, Failed):
        raise ModelInvalid(f"{where} failed: {reply.error}")
    if not isinstance(reply, Output):
        raise ModelInvalid(f"{where} was not answered")
    got = {s.name: (s, t) for s, t in zip(engine.manifest.outputs, reply.tensors, strict=False)}
    worst = 0.0
    for name, array in expected.items():
        if name not in got:
            raise ModelInvalid(f"{where}: output {name!r} is expected and did not come")
        spec, (shape, data) = got[name]
        value = np.frombuffer(data, spec.numpy_dtype).reshape(shape)
        if value.shape != array.shape:
            raise ModelInvalid(f"{where}: output {name!r} has shape {value.shape}, expected {array.shape}")
        off = _difference(value, array)
        if not (off <= tolerance and off < math.inf):
            raise ModelInvalid(f"{where}: output {name!r} is off by {off:.3g}, allowed {tolerance:.3g}")
        worst = max(worst, off)
    return worst


def _difference(value: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest one; NaN where one is not finite, and the other is not the same."""
    with np.errstate(invalid="ignore"):  # Inf less Inf
        gaps = np.abs(value.astype(np.float64) - expected)
    same = (value == expected) | ((value != value) & (expected != expected))
    return float(np.max(gaps[~same], initial=0.0))
