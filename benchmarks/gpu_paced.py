"""How many live sequences of spoken-digits a server carries: each sends 20 ms of sound every 20 ms.

python -m benchmarks.gpu_paced [--device cuda] [--sequences 1000 5000 20000] [--each 50 1] [--processes 8]

One `tenuto serve` on exported/, and load generators that share the sequences. `each`: sequences of a stream,
which share its messages, as a gateway packs them; 1: a stream each. A latency counts from when a message was
due to when the answers to all its chunks were there; the percentiles are those of the generator that saw the
worst. A count holds if its p99 is below 20 ms and what was due was answered. --device cpu shows it runs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory

from . import measured
from .load import Job
from .measured import PERIOD_SECONDS, SAMPLES, SPOKEN, Pod
from .report import aligned
from .scenario import Measurement, Party

COUNTS, EACH = (1_000, 2_000, 5_000, 10_000, 20_000), (50, 1)
WARMUP_SECONDS = 2.0
CONNECTIONS = 16  # of a generator, at most
ANSWERED = 0.99  # of the chunks that were due
HEADS = (
    "sequences",
    "a stream",
    "chunks/s",
    "p50, ms",
    "p99, ms",
    "late",
    "server CPU, µs a chunk",
    "cores",
    "holds",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_paced", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where (cuda)")
    parser.add_argument("--pool", default="graph", help="as tenuto serve takes it (graph)")
    parser.add_argument("--buffers", default="kept", help="as tenuto serve takes it (kept)")
    parser.add_argument("--in-flight", default="2", help="as tenuto serve takes it (2)")
    parser.add_argument("--front-ends", default="0", help="as tenuto serve takes it (0)")
    parser.add_argument("--sequences", type=int, nargs="+", default=COUNTS, help="live at once")
    parser.add_argument("--each", type=int, nargs="+", default=EACH, help="sequences of a stream (50 1)")
    parser.add_argument("--processes", type=int, default=8, help="load generators (8)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (4)")
    options = parser.parse_args(arguments)
    most = max(options.sequences)
    room = ["--max-sequences", str(most + 64), "--max-streams", str(most + 64)]
    how = ["--device", options.device, "--pool", options.pool, "--buffers", options.buffers]
    how += ["--in-flight", options.in_flight, "--front-ends", options.front_ends]
    lines: list[tuple[str, ...]] = [HEADS]
    with TemporaryDirectory(prefix="tenuto-gpu-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "models").mkdir()
        (folder / "models" / SPOKEN).symlink_to(Path("exported", SPOKEN).resolve())
        measured.record_spoken(folder)
        pod = stack.enter_context(Pod(folder / "models", *how, *room))
        for each in options.each:
            for count in options.sequences:
                lines.append(row(count, each, loaded(pod, folder, count, each, options)))
                print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    print(aligned(lines))


def parties(sequences: int, each: int, processes: int) -> list[Party]:
    """What each generator does. Together they have so many sequences, and what fills the last stream."""
    streams = -(-sequences // each)
    shares = [streams // processes + (n < streams % processes) for n in range(processes)]
    return [
        Party(
            share,
            SAMPLES,
            tracks=SPOKEN,
            sequences_per_group=each,
            chunks_per_message=each,
            messages_per_second=share / PERIOD_SECONDS,
            channels=CONNECTIONS,
        )
        for share in shares
        if share
    ]


def loaded(
    pod: Pod, folder: Path, sequences: int, each: int, options: argparse.Namespace
) -> list[Measurement]:
    """What each generator saw. Raises: SystemExit if one failed."""
    generators = []
    for party in parties(sequences, each, options.processes):
        job = Job(pod.pid, pod.port, str(folder), False, WARMUP_SECONDS, options.seconds, (party,))
        words = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(job))]
        generators.append(Popen(words, stdout=PIPE, text=True))
    printed = [generator.communicate()[0] for generator in generators]
    if any(generator.returncode for generator in generators):
        raise SystemExit(f"a load generator failed with {sequences} sequences, {each} a stream")
    return [Measurement.parse(json.loads(text)) for text in printed]


def row(sequences: int, each: int, found: list[Measurement]) -> tuple[str, ...]:
    """The figures of one load, for people."""
    rate = sum(one.first.chunks / one.seconds for one in found)
    p50, p99 = (max(getattr(one.first, name) for one in found) for name in ("p50_ms", "p99_ms"))
    messages = sum(one.first.messages for one in found)
    late = sum(one.first.late for one in found) / max(1, messages)
    # Each generator read the server's clock around its own window; they overlap almost wholly.
    cores = sum(one.server_cpu_seconds / one.seconds for one in found) / len(found)
    holds = p99 < 1e3 * PERIOD_SECONDS and rate > ANSWERED * sequences / PERIOD_SECONDS
    return (
        f"{sequences:,}", f"{each}", f"{rate:,.0f}", f"{p50:.1f}", f"{p99:.1f}", f"{late:.1%}",
        f"{1e6 * cores / max(1.0, rate):.1f}", f"{cores:.2f}", "yes" if holds else "no",
    )  # fmt: skip


if __name__ == "__main__":
    main()
