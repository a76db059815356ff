"""The floor of the engine: `session.run` in a loop, without server, scheduler or state pool.

python -m benchmarks.bare_engine MODEL ROWS FRAMES SECONDS PERIOD_SECONDS

Prints a `Measurement` as a line of JSON: a "message" is one row of a batch. With a period, a run of
one row every so often, as a server with one paced stream has it: its thread sleeps and its caches are
cold in between.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tenuto.serving.model_runner import flush_denormals

from . import model
from .scenario import Measurement, Seen


def feeds_of(first: str, rows: int, frames: int) -> dict[str, model.Floats]:
    """Of the model whose first input has that name: the LSTM's x, or the CNN's image."""
    rng = np.random.default_rng(model.SEED)
    if first == "image":
        return {first: rng.random((rows, *model.IMAGE), np.float32)}
    x = rng.standard_normal((rows, frames, model.INPUTS), np.float32)
    return {"x": x, "lengths": np.full(rows, frames, np.int32), **model.zero_state(rows)}


def measure(path: Path, rows: int, frames: int, seconds: float, period: float) -> Measurement:
    runner = model.session(path)
    flush_denormals()
    feeds = feeds_of(runner.get_inputs()[0].name, rows, frames)
    for _ in range(20):
        runner.run(None, feeds)
    latencies: list[float] = []
    began, cpu = time.perf_counter(), time.process_time()
    due = began
    while due < began + seconds:
        due = due + period if period else time.perf_counter()
        time.sleep(max(0.0, due - time.perf_counter()))
        since = time.perf_counter()
        runner.run(None, feeds)
        latencies.append(time.perf_counter() - since)
    cpu, ended = time.process_time() - cpu, time.perf_counter()
    latencies.sort()
    p50, p99 = (1e3 * latencies[len(latencies) * part // 100] for part in (50, 99))
    count = rows * len(latencies)
    seen = Seen(count, count, p50, p99, least=count, most=count)
    return Measurement(ended - began, cpu, 0.0, 0, (seen,))


if __name__ == "__main__":
    file, *numbers = sys.argv[1:]
    rows, frames = int(numbers[0]), int(numbers[1])
    found = measure(Path(file), rows, frames, float(numbers[2]), float(numbers[3]))
    print(json.dumps(asdict(found)))
