"""NVIDIA's own load generator, perf_analyzer, at this server and at Triton: what its users would see.

PERF_ANALYZER names a folder made so; the binary needs Debian's libb64-0d as well:

    pip install --no-deps --target FOLDER tritonclient==2.51.0 nvidia-cuda-runtime-cu12==12.9.79

It takes most of a core, and compares no answers. Both servers count what they served by ModelStatistics.
"""

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks import model
from benchmarks.budgets import Spread
from benchmarks.report import aligned, shown
from benchmarks.server_process import ServerProcess, cpu_seconds
from tenuto.oip import inference_pb2 as oip
from tenuto.oip import inference_pb2_grpc

# Windows as long as asked for, three of them, however unstable. Its random floats have any bits, NaN's too.
WINDOWS = ["--max-trials", "3", "-s", "999", "--input-data", "zero"]
SEQUENCES = ["-m", model.NAME, "--async", "--streaming", "--sequence-length", "1000"]


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    model: str
    words: tuple[str, ...]


def loads(streams: Iterable[int], frames: Iterable[int], callers: Iterable[int]) -> list[Load]:
    found = []
    for each in frames:
        shape = ("--shape", f"x:{each},{model.INPUTS}")
        for count in streams:
            words = (*SEQUENCES, *shape, "--concurrency-range", str(count))
            found.append(Load(f"{each}, {count}", model.NAME, words))
    for count in callers:
        words = ("-m", model.IMAGES, "--async", "--concurrency-range", str(count))
        found.append(Load(f"images, {count}", model.IMAGES, words))
    return found


@dataclass(frozen=True, slots=True)
class Found:
    server_us: float  # CPU a message
    per_second: float
    p50_ms: float
    p99_ms: float


def measure(load: Load, server: ServerProcess, seconds: float) -> Found:
    folder, address = Path(os.environ["PERF_ANALYZER"]), f"127.0.0.1:{server.port}"
    words = [str(folder / "bin" / "perf_analyzer"), "-i", "grpc", "-u", address]
    words += [*load.words, *WINDOWS, "-p", str(round(1e3 * seconds))]
    libraries = ":".join(str(found.parent) for found in folder.rglob("libcudart.so.12"))
    served, cpu = _served(address, load.model), cpu_seconds(server.pid)
    done = subprocess.run(
        words, env=os.environ | {"LD_LIBRARY_PATH": libraries}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"perf_analyzer ended with {done.returncode}: {done.stdout}{done.stderr}")
    cpu, served = cpu_seconds(server.pid) - cpu, _served(address, load.model) - served
    return parse(done.stdout, 1e6 * cpu / served)


def parse(said: str, server_us: float) -> Found:
    def number(pattern: str) -> float:
        found = re.search(pattern, said)
        if found is None:
            raise RuntimeError(f"perf_analyzer did not say {pattern!r}: {said}")
        return float(found[1])

    return Found(
        server_us,
        number(r"Throughput: ([\d.]+) infer/sec"),
        number(r"p50 latency: (\d+) usec") / 1e3,
        number(r"p99 latency: (\d+) usec") / 1e3,
    )


def _served(address: str, name: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        statistics = stub.ModelStatistics(oip.ModelStatisticsRequest(name=name)).model_stats
        return sum(one.inference_count for one in statistics)


def table(rounds: list[dict[tuple[str, str], Found]]) -> str:
    """Of (load, server) in each round."""
    titles = [
        "frames, streams; or images",
        "server",
        "server CPU-µs/message",
        "messages/s",
        "p50 ms",
        "p99 ms",
    ]
    rows = [titles]
    for load, server in rounds[0]:
        found = [each[load, server] for each in rounds]
        figures = ([f.per_second for f in found], [f.p50_ms for f in found], [f.p99_ms for f in found])
        rows.append(
            [
                load,
                server,
                shown(Spread.of([f.server_us for f in found]), 0),
                *(f"{Spread.of(values).median:,.2f}" for values in figures),
            ]
        )
    return aligned(rows)
