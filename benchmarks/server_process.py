"""The servers under test: each a process of its own on a free port, and what it has cost so far."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from select import select
from types import TracebackType
from typing import Self

from .model import Repository
from .suites import FRONTED, ONE_BY_ONE, PEERS, TORCHSERVE, TORCHSERVE_IMAGES

READY_SECONDS = 120
STOP_SECONDS = 15
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


# No setting is tuned for speed; one makes room, for 10,000 live sequences.
ROOM = ("--max-sequences", "16384")
# What makes gRPC's own servers cheapest. The naive ones go without: their authors would not know of it.
EXPERIMENTS, TUNED = "-event_engine_listener", ("tuned_aio", "micro_batcher")
# Ours with other settings, each to be compared with itself.
OTHERWISE = {FRONTED: ("--front-ends", "2"), ONE_BY_ONE: ("--in-flight", "1")}
SERVE = ("--port", "0", "--metrics-port", "0", "--log-level", "warning", *ROOM)


def command(name: str, repository: Repository) -> list[str]:
    """How to start the server of that name."""
    if name == "tenuto" or name in OTHERWISE:
        arguments = ["tenuto.cli", "serve", str(repository.folder), *SERVE, *OTHERWISE.get(name, ())]
    elif name == "null":
        arguments = ["benchmarks.null_engine"]
    elif name == TORCHSERVE:
        arguments = ["benchmarks.peers.torchserve", "lstm", str(repository.lstm)]
    elif name == TORCHSERVE_IMAGES:
        arguments = ["benchmarks.peers.torchserve", "digits", str(repository.images)]
    elif name in PEERS:
        arguments = [f"benchmarks.peers.{name}", str(repository.lstm), str(repository.images)]
    elif name == "tuned_aio":
        arguments = ["benchmarks.naive_aio", str(repository.lstm), "--tuned"]
    else:
        arguments = [f"benchmarks.{name}", str(repository.lstm)]
    return [sys.executable, "-m", *arguments]


class ServerProcess:
    """A server that is ready: `port` on 127.0.0.1. As a context manager it ends the process."""

    def __init__(self, name: str, repository: Repository) -> None:
        self.name = name
        words = command(name, repository)
        environment = dict(os.environ)
        if name in TUNED:
            environment.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment)
        try:
            self.port = self._ready()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def _ready(self) -> int:
        """Waits for the line that names the port."""
        assert self.process.stdout is not None
        readable, _, _ = select([self.process.stdout], [], [], READY_SECONDS)
        line = self.process.stdout.readline() if readable else ""
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise RuntimeError(f"{self.name} did not say where it serves; it said {line!r}")
        return int(found[1])

    def pause(self) -> None:
        """With its descendants, which run no more until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for member in family(self.pid, dict(_stats())):
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(member, number)

    def stop(self) -> None:
        self.resume()
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants, the waited-for ones included."""
    stats = dict(_stats())
    return sum(stats[member][1] for member in family(pid, stats) if member in stats) * TICK_SECONDS


def own_cpu_seconds(pid: int) -> float:
    """User and system time of a process alone."""
    return dict(_stats())[pid][1] * TICK_SECONDS


def family(pid: int, stats: Mapping[int, tuple[int, int]]) -> set[int]:
    """A process and its descendants."""
    members = {pid}
    while more := {child for child, (parent, _) in stats.items() if parent in members} - members:
        members |= more
    return members


def _stats() -> Iterable[tuple[int, tuple[int, int]]]:
    """(pid, (parent, ticks)) of every process."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line = (folder / "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            yield int(folder.name), parse_stat(line)


def parse_stat(line: str) -> tuple[int, int]:
    """(parent, ticks of user and system time) from /proc/PID/stat, see proc(5)."""
    fields = line.rpartition(")")[2].split()  # from the third on; the second may hold spaces
    return int(fields[1]), sum(map(int, fields[11:15]))
