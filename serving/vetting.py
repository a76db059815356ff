"""Checks models in a child process before they are loaded here: some valid files crash ONNX Runtime.

`python -m tenuto.serving.vetting` is the child: it reads one job a line, and says of each
how it went. It loads the model, makes one run on zeros, and replays `golden.npz`. The parent watches its
time and memory, and starts another child after one that died.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from .engine import Engine
from .errors import ModelInvalid, RunFailed, TenutoError
from .golden import Replayed, replay
from .pending import PendingBytes
from .repository import ModelFolder
from .runners import RunSettings, open_runner, reduced

log = logging.getLogger("tenuto.vetting")

_POLL_SECONDS = 0.2
_STOPPING = "the server stops"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Verdict:
    """What the child found: the fingerprint of the files that it checked, or why they were refused."""

    fingerprint: str = ""
    why: str = ""
    golden_steps: int = 0
    golden_worst: float = 0.0  # the largest difference of any number in them


@dataclass(frozen=True)
class Limits:
    """What one model may take in the child."""

    seconds: float
    memory_bytes: int


def vet(
    folders: list[ModelFolder],
    how: RunSettings,
    limits: Limits,
    stopping: threading.Event | None = None,
) -> dict[ModelFolder, Verdict]:
    """A verdict for each folder, whatever the files do to the process that reads them. Once `stopping` is
    set, the child ends and none passes."""
    stopping = stopping or threading.Event()
    verdicts: dict[ModelFolder, Verdict] = {}
    while rest := [f for f in folders if f not in verdicts]:
        # at least one: where it died
        verdicts.update(_one_child(rest, how, limits, stopping))
    return verdicts


def _one_child(
    folders: list[ModelFolder],
    how: RunSettings,
    limits: Limits,
    stopping: threading.Event,
) -> dict[ModelFolder, Verdict]:
    """Verdicts until all are there or the child is gone; the folder that it was at has one then."""
    command = [sys.executable, "-m", "tenuto.serving.vetting", json.dumps(asdict(how)), str(os.getpid())]
    if stopping.is_set():
        return {folder: Verdict(why=_STOPPING) for folder in folders}
    # By exec, never fork: this process may have gRPC and ONNX Runtime threads.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    verdicts: dict[ModelFolder, Verdict] = {}
    try:
        jobs = "".join(json.dumps([f.model, f.version, str(f.path)]) + "\n" for f in folders)
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(jobs.encode())
            child.stdin.close()
        lines = _Lines(child.stdout)
        for folder in folders:
            why = _watch(child, lines, folder, limits, stopping, verdicts)
            if why:
                verdicts[folder] = Verdict(why=why)
                break
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        child.stdout.close()
    return verdicts


def _watch(
    child: subprocess.Popen[bytes],
    lines: _Lines,
    folder: ModelFolder,
    limits: Limits,
    stopping: threading.Event,
    verdicts: dict[ModelFolder, Verdict],
) -> str:
    """Waits for the folder's verdict. Why there is none, or nothing."""
    deadline = time.monotonic() + limits.seconds
    while True:
        line = lines.next(_POLL_SECONDS)
        if line is not None and line:
            verdicts[folder] = Verdict(**json.loads(line))
            return ""
        if line == b"":
            code = child.wait()
            died = f"signal {-code}" if code < 0 else f"exit status {code}"
            return f"loading it ends the process that checks it ({died})"
        if stopping.is_set():
            return _STOPPING
        if time.monotonic() > deadline:
            return f"its check took more than {limits.seconds:g} s"
        if _resident_bytes(child.pid) > limits.memory_bytes:
            return f"its check took more than {limits.memory_bytes >> 20} MiB of memory"


class _Lines:
    """Lines of a pipe, with a timeout."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def next(self, timeout_seconds: float) -> bytes | None:
        """A line; b"" at the end of the pipe; None if none came in time."""
        while b"\n" not in self._buffer:
            if not self._selector.select(timeout_seconds):
                return None
            read = os.read(self._pipe.fileno(), 65536)
            if not read:
                return b""
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line


def _resident_bytes(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:  # gone, or no /proc here: then time alone is watched
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def check(folder: ModelFolder, how: RunSettings) -> Verdict:
    """The child's work on one model."""
    try:
        files = folder.read()
        runner = open_runner(files, how, max_sequences=1)
        if runner.manifest.name != folder.model:
            raise ModelInvalid(
                f"{folder.where}: the manifest is named {runner.manifest.name!r}; they must agree"
            )
        runner.enter_thread()
        runner.run(runner.zero_feeds())
        golden, found = folder.path / "golden.npz", Replayed(0, 0.0)
        if golden.is_file():
            engine = Engine(
                runner.manifest,
                runner,
                version=folder.version,
                max_sequences=1,
                pool=runner.pool,
                pending=PendingBytes(1 << 40),
            )
            found = replay(engine, golden, folder.where, judged=not reduced(runner.manifest, how))
    except RunFailed as error:
        return Verdict(why=f"its run on zeros failed: {error}")
    except TenutoError as error:
        return Verdict(why=str(error))
    return Verdict(files.fingerprint, golden_steps=found.steps, golden_worst=found.worst)


def _end_with_parent(parent: int) -> None:
    """A server that is killed leaves no child behind; on Linux. Nor does one that was before we said so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(0)


def main(arguments: list[str]) -> None:
    _end_with_parent(int(arguments[1]))
    how = RunSettings(**json.loads(arguments[0]))
    with contextlib.suppress(OSError):  # if memory runs out, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    # What libraries print must not end up among the verdicts.
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        model, version, path = json.loads(line)
        verdict = check(ModelFolder(model, version, Path(path)), how)
        print(json.dumps(asdict(verdict)), file=verdicts, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
