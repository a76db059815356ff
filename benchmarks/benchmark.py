"""A run's servers, all at once, and what is measured on them."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from . import model, recording, suites
from .load import Job
from .scenario import Case, Measurement, Party, Taken
from .server_process import ServerProcess
from .suites import BARE, NULL, OURS, TORCHSERVE, TORCHSERVE_IMAGES

WARMUP_SECONDS = 0.3
BARE_SECONDS = 0.5
FAIRNESS_SECONDS = 3.0
PACED_SECONDS = 3.0  # 150 messages of the one stream
SLOW_SECONDS = 3.5  # those that never read are read no more after 1.4, when their outboxes are full
OVERLOADED_SECONDS = 3.0  # until a server forgets that it refused newcomers
TURNS_SECONDS = 4.0  # until each sequence had its first answers, with a resume token, and its form is known
# A message costs several times as much until Java has compiled what runs often. It is paused while others are
# measured, since it takes 0.08 of a core when idle, and then needs longer to be warm.
JAVA = (TORCHSERVE, TORCHSERVE_IMAGES)
JAVA_SECONDS, RESUMED_SECONDS = 30.0, 1.0
CALIBRATION = Party(256, 1)


class Benchmark:
    """The servers of a run and what is measured on them."""

    def __init__(self, seconds: float, folder: Path, stack: ExitStack) -> None:
        self.seconds = seconds
        self.folder = folder
        self.stack = stack
        self.repository = model.write_repository(folder / "repository")
        self.servers: dict[str, ServerProcess] = {}

    def rounds(self, tables: list[list[Case]], count: int) -> list[Taken]:
        """Goes through all tables that often, every other time backwards within each."""
        cases = [case for table in tables for case in table]
        for case in {case.server: case for case in cases}.values():
            if case.server != BARE:
                self.start(case.server)
            if case.server in JAVA:
                self.measure(case, JAVA_SECONDS)
        rounds = []
        for number in range(count):
            print(f"round {number + 1} of {count}", file=sys.stderr, flush=True)
            order = [case for table in tables for case in (table[::-1] if number % 2 else table)]
            taken: Taken = {}
            for case in order:
                taken[case] = self.measure(case)
                if case.table == suites.OVERLOAD:
                    time.sleep(OVERLOADED_SECONDS)
            rounds.append({case: taken[case] for table in tables for case in table})
        return rounds

    def start(self, name: str) -> ServerProcess:
        if name not in self.servers:
            self.servers[name] = self.stack.enter_context(ServerProcess(name, self.repository))
        return self.servers[name]

    def measure(self, case: Case, seconds: float | None = None) -> Measurement:
        if case.server == BARE:
            return self._bare(case.parties[0])
        for party in case.parties:
            recording.record(party, self.repository, self.folder)
        server = self.start(case.server)
        job = Job(
            pid=server.pid,
            port=server.port,
            tracks=str(self.folder),
            check=case.server != NULL,  # which computes nothing
            warmup_seconds=self._warmup_seconds(case),
            seconds=seconds or self._seconds(case),
            parties=case.parties,
        )
        words = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(job))]
        server.resume()
        # gRPC cancels some of 1,024 streams that open at once (docs/decisions.md): a baseline may try again.
        taken = _run(words, f"{case.table}, {case.row}", attempts=1 if case.server == OURS else 3)
        if case.server in JAVA:
            server.pause()
        return taken

    def _bare(self, party: Party) -> Measurement:
        paced = party.messages_per_second
        numbers = [party.streams, party.frames, PACED_SECONDS if paced else BARE_SECONDS]
        numbers.append(1 / paced if paced else 0.0)
        file = self.repository.images if party.tracks == "images" else self.repository.lstm
        words = [sys.executable, "-m", "benchmarks.bare_engine", str(file)]
        return _run([*words, *map(str, numbers)], "bare session.run")

    def _seconds(self, case: Case) -> float:
        if case.table == suites.FAIRNESS:
            return FAIRNESS_SECONDS
        if case.table == suites.ALONE_PACED:
            return PACED_SECONDS
        return self.seconds

    def _warmup_seconds(self, case: Case) -> float:
        if case.table == suites.SLOW:
            return SLOW_SECONDS
        if case.row == suites.LIVE_TURNS:
            return TURNS_SECONDS
        if case.server in JAVA:
            return RESUMED_SECONDS
        return WARMUP_SECONDS + case.parties[0].ramp_seconds

    def capacity(self) -> float:
        """Messages per second of 256 streams in a closed loop."""
        return self.measure(Case("capacity", OURS, OURS, (CALIBRATION,))).messages_per_second


@contextmanager
def running(seconds: float) -> Iterator[Benchmark]:
    """With a folder for what is served; servers run from when they are needed until the end."""
    with tempfile.TemporaryDirectory(prefix="tenuto-benchmarks-") as name, ExitStack() as stack:
        yield Benchmark(seconds, Path(name), stack)


def _run(words: list[str], what: str, attempts: int = 1) -> Measurement:
    for _ in range(attempts):
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        if not done.returncode:
            return Measurement.parse(json.loads(done.stdout))
        print(f"the measurement failed: {what}", file=sys.stderr, flush=True)
    raise SystemExit(1)
