"""Stand-ins: a sink that keeps, runners in numpy, and an engine that is turned by hand."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto.serving.engine import Engine
from tenuto.serving.errors import RunFailed, TenutoError
from tenuto.serving.manifest import Manifest
from tenuto.serving.pending import PendingBytes
from tenuto.serving.sequence import Chunk, Closed, Ending, Failed, Output, Reply, Sequence

Array = NDArray[Any]

# Samples that the fake runners take as orders.
FAILS = -1.0  # the whole run fails
BUG = -2.0  # the runner raises what it never should
EXPLODES = -3.0  # the row's state becomes Inf


def accumulator(*, ragged: bool = True, **changes: Any) -> Manifest:
    """x [batch, time] -> y [batch, time], the running sum of all that the sequence ever sent."""
    x: dict[str, Any] = {"name": "x", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
    x |= {"lengths": "lengths"} if ragged else {}
    whole: dict[str, Any] = {
        "name": "accumulator",
        "inputs": [x | changes.pop("x", {})],
        "states": [{"input": "total", "output": "total_next", "dtype": "float32", "shape": ["batch", 1]}],
        "outputs": [
            {"name": "y", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
            | changes.pop("y", {})
        ],
        "max_frames": 4,
        "max_batch": 4,
    }
    return Manifest.model_validate(whole | changes)


def doubler(**changes: Any) -> Manifest:
    """Stateless: x [batch, 2] -> y = 2 x."""
    tensor = {"dtype": "float32", "shape": ["batch", 2]}
    whole: dict[str, Any] = {
        "name": "doubler",
        "inputs": [{"name": "x"} | tensor],
        "outputs": [{"name": "y"} | tensor],
        "max_batch": 4,
    }
    return Manifest.model_validate(whole | changes)


class Accumulator:
    """Runs `accumulator`. Each row's state is its value at its own length, whatever padding holds."""

    def __init__(self) -> None:
        self.batches: list[int] = []  # rows of each run that was tried
        self.broken = False  # every run fails

    def enter_thread(self) -> None:
        pass

    def probe(self) -> None:
        if self.broken:
            raise RunFailed("the device is gone")

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        x, total = feeds["x"], feeds["total"]
        rows, longest = x.shape
        self.batches.append(rows)
        if self.broken or (x == FAILS).any():
            raise RunFailed("a row fails the run")
        if (x == BUG).any():
            raise TypeError("a bug in the runner")
        lengths = feeds.get("lengths", np.full(rows, longest, np.int32))
        y = (total + np.cumsum(x, axis=1)).astype(np.float32)
        new = y[np.arange(rows), lengths - 1][:, None]
        new[(x == EXPLODES).any(axis=1)] = np.inf
        return [y, new]


class Doubler:
    """Runs `doubler`."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def enter_thread(self) -> None:
        pass

    def probe(self) -> None:
        pass

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        self.batches.append(len(feeds["x"]))
        if (feeds["x"] == FAILS).any():
            raise RunFailed("a row fails the run")
        return [feeds["x"] * 2]


def f32(values: Any) -> NDArray[np.float32]:
    """An array of what clients mostly send."""
    return np.array(values, np.float32)


class FakeSink:
    """Keeps every reply, in order, with its sequence."""

    def __init__(self) -> None:
        self.replies: list[tuple[Sequence, Reply]] = []
        self.deliveries = 0
        self.full = False
        self.share = PendingBytes(1 << 30)

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        self.deliveries += 1
        self.replies += replies

    @property
    def settled(self) -> int:
        """Bytes; nothing is ever added to its share."""
        return -self.share.bytes


class Bench:
    """An engine without a thread, a clock that stands still, and one sink for all."""

    def __init__(
        self, manifest: Manifest | None = None, runner: Any = None, *, max_sequences: int = 4, **more: Any
    ) -> None:
        self.manifest = manifest or accumulator()
        self.runner = runner or Accumulator()
        self.now = 1000.0
        self.pending = PendingBytes(1 << 30)
        self.sink = FakeSink()
        self.engine = Engine(
            self.manifest,
            self.runner,
            version=3,
            max_sequences=max_sequences,
            pending=self.pending,
            clock=lambda: self.now,
            **more,
        )

    def open(self, **settings: Any) -> Sequence:
        sequence = Sequence(self.sink, self.manifest, now=self.now, **settings)
        self.engine.open(sequence)
        return sequence

    def chunk(self, step: int, *columns: Items[Any]) -> Chunk:
        """A chunk of float32 samples, one column an input, counted as pending."""
        data = tuple(np.asarray(c, np.float32).tobytes() for c in columns)
        nbytes = sum(map(len, data)) + 10
        self.pending.add(nbytes)
        return Chunk(step, data, self.now, nbytes)

    def send(self, sequence: Sequence, step: int, *columns: Items[Any]) -> None:
        self.engine.accept(sequence, self.chunk(step, *columns))

    def request(self, rows: Items[Items[float]]) -> Sequence:
        sequence = Sequence(self.sink, self.manifest, now=self.now)
        self.engine.request(sequence, self.chunk(1, rows))
        return sequence

    def settle(self) -> None:
        """Turns until there is nothing to do."""
        for _ in range(10_000):
            if not self.engine.turn():
                return
        raise AssertionError("the engine does not come to rest")

    def replies(self, sequence: Sequence) -> list[Reply]:
        return [reply for s, reply in self.sink.replies if s is sequence]

    def outputs(self, sequence: Sequence) -> list[list[float]]:
        """The first output's numbers, one list an Output."""
        found = [r for r in self.replies(sequence) if isinstance(r, Output)]
        return [np.frombuffer(o.tensors[0][1], np.float32).tolist() if o.tensors else [] for o in found]

    def ending(self, sequence: Sequence) -> Ending | TenutoError | None:
        """How it ended, after checking that this was the last word."""
        endings = [r for r in self.replies(sequence) if isinstance(r, Closed | Failed)]
        if not endings:
            return None
        assert self.replies(sequence)[-1] is endings[0]
        last = endings[0]
        return last.reason if isinstance(last, Closed) else last.error

    def check_at_rest(self) -> None:
        """Nothing is pending, counted twice, or lost."""
        self.engine.check()
        assert self.pending.bytes == 0
        assert self.engine.metrics.pending_chunks == 0


@dataclass(frozen=True)
class FakeTensor:
    """A tensor message's fields."""

    name: str = ""
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    data: bytes = b""

    @classmethod
    def of(cls, array: Array, name: str = "") -> FakeTensor:
        return cls(name, array.dtype.name, array.shape, array.tobytes())
