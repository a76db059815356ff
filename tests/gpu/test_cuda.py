"""On a GPU: the answers of a CPU within what each model's golden steps allow, and states that stay there.

`make test-gpu` runs these alone, and fails where there is no GPU. Each runs on the CPU as well, so that they
are known to run at all.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from tenuto.serving.engine import Engine
from tenuto.serving.errors import PlatformError
from tenuto.serving.golden import replay
from tenuto.serving.graph_pool import GraphRunner
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU, choose_provider
from tenuto.serving.pending import PendingBytes
from tenuto.serving.repository import ModelFolder
from tenuto.serving.runners import BufferKind, PoolKind, RunSettings, open_runner
from tenuto.serving.sequence import Chunk, Ending, Output, Reply, Sequence
from tests import toys
from tests.integration.running import serving
from tests.integration.wire import Conversation, array, chunk, connect, opening, tensor

NEEDED = os.environ.get("TEST_GPU") == "1"
MODELS = sorted(path.parent.name for path in Path("exported").glob("*/1"))
POOLS: tuple[PoolKind, ...] = ("numpy", "graph")
BUFFERS: tuple[BufferKind, ...] = ("fresh", "kept")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """The provider."""
    if request.param == "cpu":
        return CPU
    try:
        return choose_provider("cuda")
    except PlatformError as error:
        if NEEDED:
            raise
        pytest.skip(f"no GPU: {error}")


def folder(model: str) -> ModelFolder:
    return ModelFolder(model, 1, Path("exported") / model / "1")


def engine_on(
    device: str, model: str, pool: PoolKind, buffers: BufferKind = "fresh", **changes: Any
) -> Engine:
    files = folder(model).read()
    manifest = files.manifest or Manifest.parse((folder(model).path / "manifest.json").read_text(), model)
    changed = manifest.model_copy(update=changes)
    files = type(files)(**{**vars(files), "manifest": changed})
    runner = open_runner(files, RunSettings(device, 1, pool, buffers), max_sequences=4)
    return Engine(
        runner.manifest,
        runner,
        version=1,
        max_sequences=4,
        pool=runner.pool,
        bucketed=runner.kept,
        pending=PendingBytes(1 << 30),
    )


@pytest.mark.parametrize("buffers", BUFFERS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("model", MODELS)
def test_golden_steps_hold_on_the_device(
    model: str, pool: PoolKind, buffers: BufferKind, device: str, record_property: Any
) -> None:
    found = replay(engine_on(device, model, pool, buffers), folder(model).path / "golden.npz", model)
    record_property("largest difference", found.worst)
    print(f"{model}, {pool} pool, {buffers} buffers: off by {found.worst:.2g}")
    assert found.steps > 0


@pytest.mark.parametrize("precision", ["tf32", "float16"])
@pytest.mark.parametrize("model", MODELS)
def test_in_fewer_bits_the_answers_stay_near(model: str, precision: str, device: str) -> None:
    engine = engine_on(device, model, "graph", precision=precision)
    found = replay(engine, folder(model).path / "golden.npz", model, judged=False)
    print(f"{model}, {precision}: off by {found.worst:.2g}")
    assert found.worst < 0.5


def test_a_slot_is_read_written_and_reset_alone(device: str) -> None:
    files = folder("digits-rows").read()
    runner = open_runner(files, RunSettings(device, 1, "graph"), max_sequences=8)
    assert isinstance(runner, GraphRunner)
    pool = runner.pool
    slots = [pool.allocate(f"{n}") for n in range(8)]
    rng = np.random.default_rng(0)

    def drawn(values: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return tuple(rng.standard_normal(len(v) // 4).astype(np.float32).tobytes() for v in values)

    values = [drawn(pool.read(slot)) for slot in slots]
    for slot, value in zip(slots, values, strict=True):
        pool.write(slot, value)
    pool.flush()
    pool.expect(slots)
    assert [pool.read(slot) for slot in slots] == values
    pool.reset(slots[3])
    pool.flush()
    assert set(b"".join(pool.read(slots[3]))) == {0}
    assert [pool.read(slot) for slot in slots if slot != slots[3]] == values[:3] + values[4:]


@pytest.mark.parametrize("buffers", BUFFERS)
@pytest.mark.parametrize("pool", POOLS)
def test_alone_or_together_the_same_answer(
    pool: PoolKind, buffers: BufferKind, tmp_path: Path, device: str
) -> None:
    """Twenty sequences at once over one stream, and each of them alone: within 1e-4."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "spoken-digits").symlink_to(Path("exported/spoken-digits").resolve())
    sounds = (np.random.default_rng(1).standard_normal((20, 8, 320)) * 3000).astype(np.int16)
    where = "cpu" if device == CPU else "cuda"
    settings: dict[str, Any] = {"pool": pool, "buffers": buffers, "device": where, "window": 8}
    with serving(root, **settings) as server, connect(server.port) as channel:
        together = answers(channel, sounds)
        alone = np.concatenate([answers(channel, sounds[i : i + 1]) for i in range(len(sounds))])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)


def answers(channel: grpc.Channel, sounds: NDArray[np.int16]) -> NDArray[Any]:
    """The running answer after each of the steps of some sequences, [sequences, steps, frames, 10]."""
    sequences, steps = sounds.shape[:2]
    found: dict[tuple[int, int], NDArray[Any]] = {}
    with Conversation(channel) as stream:
        stream.send(*(opening("spoken-digits", n) for n in range(sequences)))
        for step in range(steps):
            inputs = [tensor(sounds[n, step], "int16", "pcm") for n in range(sequences)]
            stream.send(*(chunk(step + 1, inputs[n], sequence=n) for n in range(sequences)))
        while len(found) < sequences * steps:
            reply = stream.read()
            if reply.HasField("output"):
                tensors = {t.name: array(t) for t in reply.output.outputs}
                found[reply.sequence, reply.output.step] = tensors["answer"]
    return np.stack([[found[n, s + 1] for s in range(steps)] for n in range(sequences)])


class Sums:
    """Sequences of an accumulator that send their next chunk when the last one is answered."""

    full = False
    CHUNKS = 30

    def __init__(self) -> None:
        self.share = PendingBytes(1 << 30)
        self.engine: Engine
        self.heard: dict[Sequence, list[float]] = {}
        self.left = 0
        self.done = threading.Event()

    def begin(self, count: int, engine: Engine) -> None:
        self.engine, self.left = engine, count
        for _ in range(count):
            sequence = Sequence(self, engine.manifest, now=time.monotonic())
            self.heard[sequence] = []
            engine.open(sequence)
            self._send(sequence, 1)

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        for sequence, reply in replies:
            if isinstance(reply, Output):
                self.heard[sequence] += np.frombuffer(reply.tensors[0][1], np.float32).tolist()
                if reply.step < self.CHUNKS:
                    self._send(sequence, reply.step + 1)
                else:
                    self.left -= 1
                    if not self.left:
                        self.done.set()

    def _send(self, sequence: Sequence, step: int) -> None:
        samples = np.full(1 + (step + sequence.number) % 3, sequence.number % 7, np.float32)
        self.engine.accept(sequence, Chunk(step, (samples.tobytes(),), time.monotonic(), samples.nbytes))


@pytest.mark.parametrize("buffers", BUFFERS)
@pytest.mark.parametrize("pool", POOLS)
def test_batches_that_overlap_answer_as_each_sequence_alone(
    pool: PoolKind, buffers: BufferKind, device: str, tmp_path: Path
) -> None:
    toys.write(tmp_path, "accumulator", toys.accumulator(max_batch=2))
    files = ModelFolder("accumulator", 1, tmp_path / "accumulator" / "1").read()
    runner = open_runner(files, RunSettings(device, 1, pool, buffers), max_sequences=12)
    threads: set[str] = set()
    run = runner.run

    def recorded(feeds: Any) -> Any:
        threads.add(threading.current_thread().name)
        return run(feeds)

    runner.run = recorded  # type: ignore[method-assign]
    engine = Engine(
        runner.manifest,
        runner,
        version=1,
        max_sequences=12,
        pool=runner.pool,
        bucketed=runner.kept,
        in_flight=2,
        pending=PendingBytes(1 << 30),
    )
    sums = Sums()
    engine.start()
    try:
        sums.begin(12, engine)
        assert sums.done.wait(60), "the sequences do not come to an end"
    finally:
        engine.stop(Ending.DRAINING)
    for sequence, heard in sums.heard.items():
        samples = sum(1 + (step + sequence.number) % 3 for step in range(1, Sums.CHUNKS + 1))
        assert heard == [float((n + 1) * (sequence.number % 7)) for n in range(samples)]
    assert any(name.startswith("engine-run-") for name in threads), "no batch ran while another was gathered"
    engine.check()
