"""Predict without a server: what it counts, and what the wire holds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tenuto.serving import servicer as servicer_module
from tenuto.serving.catalogue import Catalogue, Served
from tenuto.serving.engine import Engine
from tenuto.serving.errors import DeadlinePassed, NotStateless, PoolFull, ServerDraining, TenutoError
from tenuto.serving.manifest import Manifest
from tenuto.serving.pending import PendingBytes
from tenuto.serving.reply import OutputWriter, write_timing
from tenuto.serving.sequence import Chunk, Output, Sequence
from tenuto.serving.servicer import Servicer
from tenuto.serving.tensor import Reader
from tenuto.v1 import tenuto_pb2 as pb

from .fakes import FAILS, Accumulator, Doubler, accumulator, doubler, f32

NOW = 5e6


class InlineEngine(Engine):
    """Answers a request in the call that brings it, unless it is stuck."""

    stuck = False

    def request(self, sequence: Sequence, chunk: Chunk) -> None:
        super().request(sequence, chunk)
        while not self.stuck and self.turn():
            pass


class FakeContext:
    """A caller whose deadline is now, or who is not in a hurry."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds

    def time_remaining(self) -> float:
        return self.seconds

    def add_callback(self, _: Callable[[], None]) -> bool:
        return True


class Bench:
    def __init__(self, manifest: Manifest | None = None, runner: Any = None) -> None:
        manifest = manifest or doubler()
        self.pending = PendingBytes(1000)
        self.draining = False
        self.engine = InlineEngine(
            manifest,
            runner or Doubler(),
            version=2,
            max_sequences=1,
            pending=self.pending,
            clock=lambda: NOW,
        )
        served = Served(
            self.engine,
            Reader(manifest, 1 << 20),
            OutputWriter(manifest),
            "CPUExecutionProvider",
            "hash",
            "print",
        )
        self.servicer = Servicer(
            Catalogue([served], []), self.pending, max_predicts=1, is_draining=lambda: self.draining
        )

    def predict(self, *values: float, seconds: float = 60.0) -> pb.PredictResponse:
        array = f32(values).reshape(-1, 2)
        tensor = pb.Tensor(dtype="float32", shape=array.shape, data=array.tobytes())
        request = pb.PredictRequest(model=self.engine.manifest.name, inputs=[tensor])
        return self.servicer.predict(request, FakeContext(seconds))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer_module, "time", SimpleNamespace(monotonic=lambda: NOW))


def test_an_answer_has_its_tensors_by_name_and_the_version() -> None:
    response = Bench().predict(1, 2, 3, 4)
    (y,) = response.outputs
    assert (y.name, y.dtype, list(y.shape), y.data) == ("y", "float32", [2, 2], f32([2, 4, 6, 8]).tobytes())
    assert response.version == 2
    assert response.timing.batch_size == 1


def test_the_time_to_the_first_output_counts_from_the_call() -> None:
    """Not from when the machine was started."""
    bench = Bench()
    bench.predict(1, 2)
    assert bench.engine.metrics.first_output.total == 0.0


def test_a_call_whose_deadline_passes_leaves_nothing_behind() -> None:
    bench = Bench()
    bench.engine.stuck = True
    with pytest.raises(DeadlinePassed, match="no answer from 'doubler' within 0.000 s"):
        bench.predict(1, 2, seconds=0.0)
    bench.engine.stuck = False
    while bench.engine.turn():
        pass
    assert bench.pending.bytes == 0
    assert bench.engine.metrics.chunks == {"dropped": 1}
    bench.predict(1, 2)  # its place is free again


@pytest.mark.parametrize("why", ["draining", "pending", "stateful", "failing"])
def test_a_refusal_leaves_nothing_behind(why: str) -> None:
    bench = Bench(accumulator(), Accumulator()) if why == "stateful" else Bench()
    bench.draining = why == "draining"
    held = 1001 if why == "pending" else 0
    bench.pending.add(held)
    expected = {"draining": ServerDraining, "pending": PoolFull, "stateful": NotStateless}
    with pytest.raises(expected.get(why, TenutoError)):
        bench.predict(FAILS, 1)
    assert bench.pending.bytes == held
    counted = {"draining": {"DRAINING": 1}, "pending": {"POOL_FULL": 1}}
    assert bench.engine.metrics.rejected_calls == counted.get(why, {})


def test_no_more_calls_wait_at_once_than_there_are_places() -> None:
    bench = Bench()
    assert bench.servicer._places.acquire(blocking=False)
    with pytest.raises(PoolFull, match="1 Predict calls wait already"):
        bench.predict(1, 2)
    assert bench.engine.metrics.rejected_calls == {"POOL_FULL": 1}


def test_a_chunk_that_waited_for_hours_can_still_be_answered() -> None:
    timing = pb.Timing()
    write_timing(timing, Output(1, 0, True, (), 1e5, 0.002, 3))
    assert (timing.queue_us, timing.compute_us, timing.batch_size) == (2**32 - 1, 2000, 3)
