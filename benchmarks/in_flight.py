"""What a second batch in flight gains an engine: messages a second with two, over those with one.

python -m benchmarks.in_flight [--rounds 3] [--seconds 0.7] [--streams 64 256 1024] [--max-batch 64 1024]
                               [--device-ms 0 0.3 1 3]

No network: each sequence of an engine sends its next chunk when the last one is answered, on the engine's
own thread. `device-ms` 0: the model runs on the CPU; else a stand-in for a device runs it, which takes so
long for a batch of any size, and no CPU. One and two in turn, each round; ratios within a round, medians with
the spread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto.serving.engine import Engine, Runner
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import ModelRunner
from tenuto.serving.pending import PendingBytes
from tenuto.serving.sequence import Chunk, Ending, Output, Reply, Sequence

from . import model
from .budgets import Spread
from .report import aligned, shown

PLENTY = 1 << 40
CHUNK = bytes(4 * model.INPUTS)
WARMUP_SECONDS = 0.2
HEADS = ("max_batch", "streams", "a run", "messages/s, one in flight", "two in flight", "two / one")

Array = NDArray[Any]


class Device:
    """A device that takes so long for a run, and no CPU. What a run gives is always the same."""

    def __init__(self, runner: ModelRunner, seconds: float) -> None:
        self._runner = runner
        self._seconds = seconds
        self._known: dict[tuple[tuple[int, ...], ...], list[Array]] = {}

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        shapes = tuple(value.shape for value in feeds.values())
        if shapes not in self._known:
            self._known[shapes] = self._runner.run(feeds)
        time.sleep(self._seconds)
        return self._known[shapes]

    def enter_thread(self) -> None: ...

    def probe(self) -> None: ...


class Callers:
    """They send their next chunk when the last one is answered."""

    full = False

    def __init__(self) -> None:
        self.share = PendingBytes(PLENTY)
        self.answered = 0
        self.engine: Engine

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        for sequence, reply in replies:
            if isinstance(reply, Output):
                self.answered += 1
                self.send(sequence, reply.step + 1)

    def send(self, sequence: Sequence, step: int) -> None:
        self.engine.accept(sequence, Chunk(step, (CHUNK,), time.monotonic(), len(CHUNK)))


def rate(runner: Runner, manifest: Manifest, streams: int, in_flight: int, seconds: float) -> float:
    """Messages a second."""
    callers = Callers()
    callers.engine = engine = Engine(
        manifest,
        runner,
        version=1,
        max_sequences=streams,
        pending=PendingBytes(PLENTY),
        in_flight=in_flight,
    )
    engine.start()
    try:
        sequences = [Sequence(callers, manifest, now=time.monotonic()) for _ in range(streams)]
        for sequence in sequences:
            engine.open(sequence)
        for sequence in sequences:
            callers.send(sequence, 1)
        time.sleep(WARMUP_SECONDS)
        before, began = callers.answered, time.perf_counter()
        time.sleep(seconds)
        return (callers.answered - before) / (time.perf_counter() - began)
    finally:
        engine.stop(Ending.DRAINING)


def row(file: Path, rows: int, streams: int, device_ms: float, options: argparse.Namespace) -> list[str]:
    manifest = Manifest.parse(json.dumps(model.manifest() | {"max_batch": rows}), model.NAME)
    plain = ModelRunner(file.read_bytes(), manifest, model.NAME, provider="CPUExecutionProvider", threads=1)
    runner: Runner = Device(plain, device_ms / 1e3) if device_ms else plain
    rounds = []
    for number in range(options.rounds):
        order = (1, 2) if number % 2 == 0 else (2, 1)
        found = {k: rate(runner, manifest, streams, k, options.seconds) for k in order}
        rounds.append((found[1], found[2]))
    one, two = np.median(rounds, axis=0)
    ratio = shown(Spread.of([second / first for first, second in rounds]))
    run = f"{device_ms:g} ms" if device_ms else "on the CPU"
    return [f"{rows:,}", f"{streams:,}", run, f"{one:,.0f}", f"{two:,.0f}", ratio]


def main(arguments: Items[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_flight", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement (0.7)")
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--max-batch", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--device-ms", type=float, nargs="+", default=[0.0, 0.3, 1.0, 3.0])
    options = parser.parse_args(arguments)
    lines: list[Items[str]] = [HEADS]
    with tempfile.TemporaryDirectory(prefix="tenuto-benchmarks-") as folder:
        file = model.write_repository(Path(folder) / "repository").lstm
        for rows in options.max_batch:
            for streams in options.streams:
                lines += [row(file, rows, streams, ms, options) for ms in options.device_ms]
    print(aligned(lines))


if __name__ == "__main__":
    main()
