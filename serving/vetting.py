"""Checks models in a child process before they are loaded here: some valid files crash ONNX Runtime.

`python -m tenuto.serving.vetting` is the child: it reads one job a line, and says of each how it went. It
loads the model, proves what its manifest says of its runs, and replays `golden.npz`. The parent watches its
time and memory, and starts another child after one that died.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .child import Child, confine
from .engine import Engine
from .errors import ManifestInvalid, ModelInvalid, RunFailed, TenutoError
from .golden import Replayed, replay
from .manifest import Manifest
from .model_runner import CPU, CUDA, ModelRunner, choose_provider
from .pending import PendingBytes
from .proof import prove
from .repository import ModelFolder
from .runners import RunSettings, open_runner, reduced

if TYPE_CHECKING:
    from .runners import AnyRunner

log = logging.getLogger("tenuto.vetting")

_POLL_SECONDS = 0.1
_STOPPING = "the server stops"
_WHAT_TO_DO = (
    "export model.onnx anew, by another opset or exporter, or with less in it; nothing else here is touched"
)


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
    if stopping.is_set():
        return {folder: Verdict(why=_STOPPING) for folder in folders}
    asked = limits.memory_bytes if how.provider == CPU else 0
    command = [sys.executable, "-m", "tenuto.serving.vetting", json.dumps(asdict(how)), str(os.getpid())]
    jobs = "".join(json.dumps([f.model, f.version, str(f.path)]) + "\n" for f in folders)
    child = Child([*command, str(asked)], jobs)
    verdicts: dict[ModelFolder, Verdict] = {}
    try:
        for folder in folders:
            why = _watch(child, folder, limits, stopping, verdicts)
            if why:
                verdicts[folder] = Verdict(why=why)
                break
    finally:
        child.end()
    return verdicts


def _watch(
    child: Child,
    folder: ModelFolder,
    limits: Limits,
    stopping: threading.Event,
    verdicts: dict[ModelFolder, Verdict],
) -> str:
    """Waits for the folder's verdict. Why there is none, or nothing."""
    deadline = time.monotonic() + limits.seconds
    while True:
        line = child.lines.next(_POLL_SECONDS)
        if line == b"":
            return f"loading it ends the process that checks it ({child.fate()}): {_WHAT_TO_DO}"
        if line is not None:
            try:
                verdicts[folder] = Verdict(**json.loads(line))
            except (ValueError, TypeError):
                return f"the process that checks it said {line[:80]!r}, which is no verdict: {_WHAT_TO_DO}"
            return ""
        if stopping.is_set():
            return _STOPPING
        if time.monotonic() > deadline:
            return f"its check took more than {limits.seconds:g} s (--vet-seconds)"
        if child.resident_bytes() > limits.memory_bytes:
            return f"its check took more than {limits.memory_bytes >> 20} MiB of memory (--vet-memory-bytes)"


def check(folder: ModelFolder, how: RunSettings) -> Verdict:
    """The child's work on one model."""
    try:
        return _checked(folder, how)
    except RunFailed as error:
        return Verdict(why=f"its run on zeros failed: {error}")
    except TenutoError as error:
        return Verdict(why=str(error))


def _checked(folder: ModelFolder, how: RunSettings) -> Verdict:
    """Raises: TenutoError, with why it is refused."""
    try:
        files = folder.read()
        runner: AnyRunner = open_runner(files, replace(how, pool="numpy", buffers="fresh"), max_sequences=1)
        assert isinstance(runner, ModelRunner)
        if runner.manifest.name != folder.model:
            raise ModelInvalid(
                f"{folder.where}: the manifest is named {runner.manifest.name!r}; they must agree"
            )
        _check_text(runner.manifest, folder.where)
        runner.enter_thread()
        prove(runner, files.model)
        if (how.pool, how.buffers) != ("numpy", "fresh"):
            runner = open_runner(files, how, max_sequences=1)
            runner.run(runner.zero_feeds())
        found = _replayed(folder, runner, how)
    except TenutoError:
        raise
    except Exception as error:  # what no file should be able to raise here, and one may
        words = (str(error).splitlines() or [""])[0]
        raise ModelInvalid(f"{folder.where}: its check failed: {type(error).__name__}: {words}") from error
    return Verdict(files.fingerprint, golden_steps=found.steps, golden_worst=found.worst)


def _check_text(manifest: Manifest, where: str) -> None:
    """Its texts are sent to clients, as UTF-8, which JSON's are not always.

    Raises: ManifestInvalid.
    """
    try:
        json.dumps(manifest.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        part = error.object[max(0, error.start - 20) : error.start]
        raise ManifestInvalid(
            f"{where}: the manifest holds half a surrogate pair (behind {part!r}), which is no text"
        ) from error


def _replayed(folder: ModelFolder, runner: AnyRunner, how: RunSettings) -> Replayed:
    """What its golden file said, if it has one."""
    golden = folder.path / "golden.npz"
    if not os.path.lexists(golden):
        return Replayed(0, 0.0)
    engine = Engine(
        runner.manifest,
        runner,
        version=folder.version,
        max_sequences=1,
        pool=runner.pool,
        bucketed=runner.kept,
        pending=PendingBytes(1 << 40),
    )
    return replay(engine, golden, folder.where, judged=not reduced(runner.manifest, how))


def main(arguments: list[str]) -> None:
    how, parent, memory_bytes, answers = arguments
    confine(int(parent), int(memory_bytes))
    settings = RunSettings(**json.loads(how))
    if settings.provider == CUDA:
        choose_provider("cuda")  # loads CUDA's libraries, where this process has to find them
    with os.fdopen(int(answers), "w") as verdicts:
        for line in sys.stdin:
            model, version, path = json.loads(line)
            verdict = check(ModelFolder(model, version, Path(path)), settings)
            print(json.dumps(asdict(verdict)), file=verdicts, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
