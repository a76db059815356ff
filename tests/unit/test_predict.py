"""Predict without a server: what it counts and leaves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tenuto.serving import predict as predict_module
from tenuto.serving.call import Metadata
from tenuto.serving.catalogue import Catalogue, Served
from tenuto.serving.engine import Engine
from tenuto.serving.manifest import Manifest
from tenuto.serving.pending import PendingBytes
from tenuto.serving.predict import PredictCall, Predicts
from tenuto.serving.reply import OutputWriter, write_timing
from tenuto.serving.sequence import Chunk, Ending, Output, Sequence
from tenuto.serving.tensor import Reader
from tenuto.v1 import tenuto_pb2 as pb

from .fakes import FAILS, Accumulator, Doubler, accumulator, doubler, f32

NOW = 5e6
Code = grpc.StatusCode


class InlineEngine(Engine):
    """Answers a request in the call that brings it, unless it is stuck."""

    stuck = False

    def request(self, sequence: Sequence, chunk: Chunk) -> None:
        super().request(sequence, chunk)
        while not self.stuck and self.turn():
            pass


class FakeCall:
    """A call of our own server."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.metadata: Metadata = ()
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def send(self, message: bytes) -> None:
        assert self.code is None
        self.sent.append(message)

    def finish(self, code: grpc.StatusCode = Code.OK, details: str = "", metadata: Metadata = ()) -> None:
        assert self.code is None
        self.code, self.details = code, details


class Later(Executor):
    """Threads that work when they are told to."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], object]] = []

    over = False

    def submit(self, work: Any, /, *args: Any, **named: Any) -> Future[Any]:
        if self.over:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self.waiting.append(lambda: work(*args, **named))
        return Future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        assert cancel_futures
        assert not wait
        self.over = True

    def work(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Bench:
    def __init__(self, manifest: Manifest | None = None, runner: Any = None) -> None:
        manifest = manifest or doubler()
        self.pending = PendingBytes(1 << 20)
        self.draining = False
        self.engine = InlineEngine(
            manifest,
            runner or Doubler(),
            version=2,
            max_sequences=1,
            pending=self.pending,
            clock=lambda: NOW,
        )
        reader, writer = Reader(manifest, 1 << 20), OutputWriter(manifest)
        served = Served(self.engine, reader, writer, "CPUExecutionProvider", "hash", "print")
        catalogue = Catalogue([served], [])
        self.readers = Later()
        self.predicts = Predicts(
            catalogue, self.pending, most=1, is_draining=lambda: self.draining, readers=self.readers
        )

    def request(self, *values: float) -> pb.PredictRequest:
        array = f32(values).reshape(-1, 2)
        tensor = pb.Tensor(dtype="float32", shape=array.shape, data=array.tobytes())
        return pb.PredictRequest(model=self.engine.manifest.name, inputs=[tensor])

    def call(self, request: pb.PredictRequest) -> tuple[FakeCall, PredictCall]:
        """One that is called back; so far it has sent its request."""
        call = FakeCall()
        listener = self.predicts.open(call)
        assert isinstance(listener, PredictCall)
        listener.received(request.SerializeToString())
        listener.half_closed()
        return call, listener

    def predict(self, *values: float) -> tuple[grpc.StatusCode, str, Any]:
        """Code, text and response."""
        request = self.request(*values)
        call, listener = self.call(request)
        listener.terminated()  # as the transport says behind every ending
        assert call.code is not None
        return call.code, call.details, pb.PredictResponse.FromString(call.sent[0]) if call.sent else None

    def settle(self) -> None:
        self.engine.stuck = False
        while self.engine.turn():
            pass

    def assert_nothing_is_left(self, held: int = 0) -> None:
        self.settle()
        assert self.pending.bytes == held
        assert self.engine.metrics.pending_chunks == 0
        assert self.predicts.waiting == 0  # its place is free again, and was given back once


@pytest.fixture(autouse=True)
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_module, "time", SimpleNamespace(monotonic=lambda: NOW))


def test_an_answer_has_its_tensors_by_name_and_the_version() -> None:
    bench = Bench()
    code, _, response = bench.predict(1, 2, 3, 4)
    assert code is Code.OK
    (y,) = response.outputs
    assert (y.name, y.dtype, list(y.shape), y.data) == ("y", "float32", [2, 2], f32([2, 4, 6, 8]).tobytes())
    assert response.version == 2
    assert response.timing.batch_size == 1
    bench.assert_nothing_is_left()


def test_the_time_to_the_first_output_counts_from_the_call() -> None:
    """Not from when the machine was started."""
    bench = Bench()
    bench.predict(1, 2)
    assert bench.engine.metrics.first_output.total == 0.0


@pytest.mark.parametrize("when", ["waiting", "being read", "answered"])
def test_a_caller_who_leaves_is_not_answered_and_leaves_nothing_behind(when: str) -> None:
    bench = Bench()
    bench.engine.stuck = when == "waiting"
    request = bench.request(*[1.0] * (20_000 if when == "being read" else 2))
    call, listener = bench.call(request)
    listener.terminated()
    bench.readers.work()
    bench.assert_nothing_is_left()
    assert bool(call.sent) == (when == "answered")
    expected = {"waiting": {"dropped": 1}, "being read": {}, "answered": {"answered": 1}}
    assert bench.engine.metrics.chunks == expected[when]


def test_a_large_request_is_read_by_other_threads_and_pending_until_then() -> None:
    bench = Bench()
    request = bench.request(*[1.0] * 20_000)
    call, _ = bench.call(request)
    assert not call.sent
    assert bench.pending.bytes == request.ByteSize()
    bench.readers.work()
    assert call.code is Code.OK
    assert pb.PredictResponse.FromString(call.sent[0]).outputs[0].data == f32([2.0] * 20_000).tobytes()
    bench.assert_nothing_is_left()


def test_so_are_many_small_tensors() -> None:
    """It is the message that takes long to parse."""
    bench = Bench()
    call, _ = bench.call(pb.PredictRequest(model="doubler", inputs=[pb.Tensor()] * 40_000))
    assert bench.readers.waiting
    bench.readers.work()
    assert call.code is Code.INVALID_ARGUMENT


def test_what_waits_to_be_read_is_bounded_by_its_bytes() -> None:
    bench = Bench()
    calls = [bench.call(bench.request(*[1.0] * 200_000))[0] for _ in range(3)]
    assert [call.code for call in calls] == [None, None, Code.RESOURCE_EXHAUSTED]
    assert len(bench.readers.waiting) == 2
    bench.readers.work()
    bench.assert_nothing_is_left()


def test_requests_that_were_left_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    listeners = [bench.call(bench.request(*[1.0] * 20_000))[1] for _ in range(5)]
    for listener in listeners:
        listener.terminated()
    monkeypatch.setattr(pb.PredictRequest, "FromString", None)
    bench.readers.work()
    bench.assert_nothing_is_left()


def test_pictures_are_decoded_by_other_threads() -> None:
    wire = [{"dtype": "uint8", "scale": 1.0}, {"encoding": "png"}]
    image = {"name": "x", "dtype": "float32", "shape": ["batch", 2, 2]}
    bench = Bench(doubler(inputs=[image | {"wire": wire}], outputs=[image | {"name": "y"}]))
    call, listener = bench.call(
        pb.PredictRequest(model="doubler", inputs=[pb.Tensor(dtype="png", data=b"no picture")])
    )
    assert bench.readers.waiting
    assert bench.pending.bytes > 0
    bench.readers.work()
    assert call.code is Code.INVALID_ARGUMENT
    listener.terminated()
    bench.assert_nothing_is_left()


def test_nothing_is_read_once_the_server_has_left() -> None:
    bench = Bench()
    bench.predicts.close()
    call, _ = bench.call(bench.request(*[1.0] * 20_000))
    assert (call.code, call.details) == (Code.UNAVAILABLE, "the server is leaving; call another one")
    bench.assert_nothing_is_left()


def test_an_answer_that_cannot_be_written_is_no_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()

    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(predict_module, "write_tensors", broken)
    call, _ = bench.call(bench.request(1, 2))
    assert call.code is Code.INTERNAL
    assert "an answer could not be written" in caplog.text
    bench.assert_nothing_is_left()


@pytest.mark.parametrize("values", [(1, 2), (FAILS, 1)])
def test_a_call_that_is_over_is_kept_alive_by_nothing(values: tuple[float, float]) -> None:
    bench = Bench()
    _, listener = bench.call(bench.request(*values))
    prediction = weakref.ref(listener._prediction)
    gc.disable()
    try:
        listener.terminated()
        assert prediction() is None
    finally:
        gc.enable()


def test_a_server_that_leaves_says_so_to_those_who_wait() -> None:
    bench = Bench()
    bench.engine.stuck = True
    call, listener = bench.call(bench.request(1, 2))
    (sequence,) = [command[1] for command in bench.engine._inbox._commands]
    bench.engine.close(sequence, Ending.DRAINING)
    bench.settle()
    assert (call.code, call.details[:12]) == (Code.UNAVAILABLE, "this version")
    listener.terminated()
    bench.assert_nothing_is_left()


@pytest.mark.parametrize("why", ["draining", "pending", "stateful", "failing", "shape"])
def test_a_refusal_leaves_nothing_behind(why: str) -> None:
    bench = Bench(accumulator(), Accumulator()) if why == "stateful" else Bench()
    bench.draining = why == "draining"
    held = (1 << 20) + 1 if why == "pending" else 0
    bench.pending.add(held)
    if why == "shape":
        bench.request = lambda *_: pb.PredictRequest(model="doubler")  # type: ignore[method-assign]
    code, text, _ = bench.predict(FAILS, 1)
    expected = {
        "draining": (Code.UNAVAILABLE, "the server is leaving"),
        "pending": (Code.RESOURCE_EXHAUSTED, "more than 1048576 bytes are pending"),
        "stateful": (Code.FAILED_PRECONDITION, "model 'accumulator' holds state"),
        "failing": (Code.INTERNAL, "step 1: "),
        "shape": (Code.INVALID_ARGUMENT, "input x is missing"),
    }
    assert (code, text[: len(expected[why][1])]) == expected[why]
    bench.assert_nothing_is_left(held)
    counted = {"draining": {"DRAINING": 1}, "pending": {"POOL_FULL": 1}}
    assert bench.engine.metrics.rejected_calls == counted.get(why, {})


def test_no_more_calls_wait_at_once_than_there_are_places() -> None:
    bench = Bench()
    bench.engine.stuck = True
    first, _ = bench.call(bench.request(1, 2))
    code, text, _ = bench.predict(1, 2)
    assert (code, text[:29]) == (Code.RESOURCE_EXHAUSTED, "1 Predict calls wait already;")
    assert bench.engine.metrics.rejected_calls == {"POOL_FULL": 1}
    bench.settle()
    assert first.code is Code.OK
    assert bench.predict(1, 2)[0] is Code.OK


def test_bytes_that_are_no_request_are_refused_and_a_second_message_is_nothing() -> None:
    bench = Bench()
    call = FakeCall()
    listener = bench.predicts.open(call)
    listener.received(b"\xff")
    assert (call.code, call.details) == (Code.INVALID_ARGUMENT, "1 bytes are no request of this method")
    call, listener = bench.call(bench.request(1, 2))
    listener.received(bench.request(3, 4).SerializeToString())
    assert len(call.sent) == 1
    bench.assert_nothing_is_left()


def test_a_call_without_a_request_is_finished() -> None:
    call = FakeCall()
    Bench().predicts.open(call).half_closed()
    assert (call.code, call.details) == (Code.UNIMPLEMENTED, "the call brought no request")


def test_a_bug_is_no_silence(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever waits is told, and the place is free."""
    bench = Bench()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Reader, "read", broken)
    assert bench.predict(1, 2)[0] is Code.INTERNAL
    assert "a call met a bug" in caplog.text
    bench.assert_nothing_is_left()


@pytest.mark.parametrize("values", [2, 20_000])
def test_a_bug_before_the_engine_is_no_silence_on_any_thread(
    values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Predicts, "admit", broken)
    call, _ = bench.call(bench.request(*[1.0] * values))
    bench.readers.work()
    assert call.code is Code.INTERNAL
    bench.assert_nothing_is_left()


def test_a_chunk_that_waited_for_hours_can_still_be_answered() -> None:
    timing = pb.Timing()
    write_timing(timing, Output(1, 0, True, (), 1e5, 0.002, 3))
    assert (timing.queue_us, timing.compute_us, timing.batch_size) == (2**32 - 1, 2000, 3)
