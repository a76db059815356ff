"""A long run against one server: does its memory, or its number of open files, grow?

python -m benchmarks.soak [--minutes 30]

Some streams stay for the whole run. Others come and go, images flow, and every few seconds all of these
vanish in mid-stream and come anew; the pace is one that the server keeps up with. Prints a line a minute,
and at the end the last third against the middle one.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

from . import model, recording
from .load import Job
from .memory import resident_bytes
from .scenario import Measurement, Party
from .server_process import ServerProcess

VISIT_SECONDS = 15.0  # of one load process; the next one opens everything anew
SAMPLE_SECONDS = 5.0
PARTIES = (
    Party(128, 10, messages_per_second=2_000.0),
    Party(4, 1, visits=True, messages_per_second=100.0, channels=4),
    Party(8, 1, tracks="images", messages_per_second=200.0),
    Party(4, 1, tracks="images", unary=True, messages_per_second=40.0),
    Party(8, 5, tracks="ragged", sequences_per_group=8, chunks_per_message=8, messages_per_second=80.0),
    Party(4, 10, messages_per_second=400.0, reads=False),
)
STAYING = (Party(32, 1, messages_per_second=200.0),)


Load = subprocess.Popen[str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (30)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tenuto-soak-") as name:
        folder = Path(name)
        repository = model.write_repository(folder / "repository")
        for party in (*PARTIES, *STAYING):
            recording.record(party, repository, folder)
        with ServerProcess("tenuto", repository) as server:
            print(verdict(soak(server, folder, 60 * options.minutes)))


def soak(server: ServerProcess, folder: Path, seconds: float) -> list[tuple[float, int, int]]:
    """(seconds since the beginning, resident bytes, open files), one sample every few seconds."""
    samples: list[tuple[float, int, int]] = []
    messages = checked = 0
    began = time.monotonic()
    staying = start(server, folder, seconds, STAYING)
    for number in itertools.count():
        left = began + seconds - time.monotonic()
        if left <= 0:
            finish(staying)
            return samples
        load = start(server, folder, min(VISIT_SECONDS, left), PARTIES)
        while load.poll() is None:
            try:
                load.wait(SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                at = time.monotonic() - began
                samples.append((at, resident_bytes(server.pid), open_files(server.pid)))
        found = finish(load)
        messages += sum(seen.messages for seen in found.parties)
        checked += found.checked
        if samples and number % 4 == 0:
            at, nbytes, files = samples[-1]
            told = f"{at:6.0f} s: {nbytes / 2**20:.1f} MiB, {files} files, {messages:,} messages"
            print(f"{told}, {checked:,} compared", flush=True)
    raise AssertionError("unreachable")


def start(server: ServerProcess, folder: Path, seconds: float, parties: tuple[Party, ...]) -> Load:
    job = Job(server.pid, server.port, str(folder), True, 0.0, seconds, parties)
    words = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(job))]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def finish(load: Load) -> Measurement:
    output, _ = load.communicate()
    if load.returncode:
        raise SystemExit("a load ended with an error")
    return Measurement.parse(json.loads(output))


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def verdict(samples: list[tuple[float, int, int]]) -> str:
    """The last third against the middle one; the first is warming up."""
    third = len(samples) // 3
    if not third:
        raise SystemExit("too short: not a sample in each third")
    middle, last = samples[third : 2 * third], samples[2 * third :]
    was, now = (median(nbytes for _, nbytes, _ in part) / 2**20 for part in (middle, last))
    were, are = (max(files for _, _, files in part) for part in (middle, last))
    return (
        f"{len(samples)} samples over {samples[-1][0] / 60:.1f} minutes; resident memory {was:.1f} MiB "
        f"in the middle third, {now:.1f} in the last ({now / was - 1:+.1%}); "
        f"at most {were} open files, then {are}"
    )


if __name__ == "__main__":
    main()
