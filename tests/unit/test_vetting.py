"""A model that takes its process down takes no other model with it, and is named."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tenuto.serving import child, model_runner, vetting
from tenuto.serving.model_runner import CPU
from tenuto.serving.repository import ModelFolder
from tenuto.serving.runners import RunSettings
from tenuto.serving.vetting import Limits, Verdict, check, vet
from tests import toys

from .fakes import f32

ONE_THREAD = RunSettings(CPU, 1)


@pytest.fixture(autouse=True)
def thread_as_it_was() -> Iterator[None]:
    """`check` makes the child's main thread flush denormals; here that is the thread of all other tests."""
    with model_runner._environment_kept():
        yield


# Stands in for the child: what it does is the model's name.
CHILD = f"""#!{sys.executable} -IS
import os, signal, sys
answers = os.fdopen(int(sys.argv[-1]), "w")
for line in sys.stdin:
    model, _, path = line.strip('[]\\n').replace('"', "").split(", ")
    with open(os.environ["VETTING_LOG"], "a") as log:
        log.write(model + "\\n")
    if model.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if model.startswith("exit"):
        sys.exit(3)
    if model.startswith("hang"):
        signal.pause()
    if model.startswith("stubborn"):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for _ in range(256):
            os.write(1, b"x" * 4096)  # more than a pipe holds
        with open(os.environ["VETTING_LOG"], "a") as log:
            log.write("printed\\n")
        signal.pause()
    if model.startswith("forged"):  # as a library's print would, on both
        print('{{"fingerprint": "forged"}}', flush=True)
        print('{{"fingerprint": "forged"}}', file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if model.startswith("babble"):
        answers.write('{{"fingerprints": 1}}\\n')
        answers.flush()
        signal.pause()
    if model.startswith("endless"):
        while True:
            answers.write("no end")
    if model.startswith("mute"):
        answers.close()
        signal.pause()
    if model.startswith("parent"):
        grandchild = os.fork()
        if not grandchild:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with open(os.environ["VETTING_LOG"], "a") as log:
                log.write(str(os.getpid()) + "\\n")
            taken = b"x" * (256 << 20)
        signal.pause()
    why = "it is bad" if model.startswith("bad") else ""
    answers.write('{{"fingerprint": "of ' + model + '", "why": "' + why + '", "golden_steps": 2}}\\n')
    answers.flush()
    if model.startswith("last"):  # its end takes for ever
        signal.pause()
"""
NEVER = Limits(seconds=1e9, memory_bytes=1 << 50)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the fake child in place; the file's lines are the models that it began with."""
    program = tmp_path / "child"
    program.write_text(CHILD)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(vetting, "sys", SimpleNamespace(executable=str(program)))
    monkeypatch.setattr(vetting, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("VETTING_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def folders(*models: str) -> list[ModelFolder]:
    return [ModelFolder(model, 1, Path("/nowhere")) for model in models]


def verdicts(*models: str, limits: Limits = NEVER) -> dict[str, Verdict]:
    found = vet(folders(*models), ONE_THREAD, limits)
    return {folder.model: verdict for folder, verdict in found.items()}


def test_one_child_checks_all_models_that_do_it_no_harm(log: Path) -> None:
    found = verdicts("a", "bad", "c")
    assert found == {
        "a": Verdict("of a", golden_steps=2),
        "bad": Verdict("of bad", "it is bad", 2),
        "c": Verdict("of c", golden_steps=2),
    }
    assert log.read_text().split() == ["a", "bad", "c"]


@pytest.mark.parametrize("guilty, died", [("crash", "signal 11, SIGSEGV"), ("exit", "exit status 3")])
def test_a_model_that_ends_the_child_is_named_and_the_others_are_checked(
    guilty: str, died: str, log: Path
) -> None:
    found = verdicts("a", guilty, "c", "d")
    begins = f"loading it ends the process that checks it ({died}): export model.onnx anew"
    assert found[guilty].why.startswith(begins)
    assert found[guilty].fingerprint == ""
    assert [found[m].why for m in "acd"] == ["", "", ""]
    assert log.read_text().split() == ["a", guilty, "c", "d"]  # nothing is checked twice


def test_every_model_may_be_guilty(log: Path) -> None:
    found = verdicts("crash1", "crash2", "exit3")
    assert all("ends the process" in v.why for v in found.values())


def clock_until(log: Path, word: str) -> Callable[[], float]:
    """It stands still until the log has the word; then its next two looks are an hour apart."""
    now, later = 0.0, [3600.0, 7200.0]

    def clock() -> float:
        nonlocal now
        if later and log.exists() and word in log.read_text():
            now = later.pop(0)
        return now

    return clock


def test_a_model_that_takes_too_long_is_named_and_the_others_are_checked(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vetting, "time", SimpleNamespace(monotonic=clock_until(log, "hang")))
    found = verdicts("a", "hang", "c", limits=Limits(60, 1 << 50))
    assert found["hang"].why == "its check took more than 60 s (--vet-seconds)"
    assert (found["a"].why, found["c"].why) == ("", "")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_model_that_takes_too_much_memory_is_named(log: Path) -> None:
    found = verdicts("hang", limits=Limits(1e9, 1 << 20))
    assert found["hang"].why == "its check took more than 1 MiB of memory (--vet-memory-bytes)"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_what_a_check_starts_counts_and_ends_with_it(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a session of its own, which heeds no signal that it can ignore."""
    monkeypatch.setattr(child, "_KIN_SECONDS", 0.0)
    found = verdicts("parent", limits=Limits(1e9, 128 << 20))
    assert found["parent"].why == "its check took more than 128 MiB of memory (--vet-memory-bytes)"
    pid = int(log.read_text().split()[1])
    for _ in range(3000):  # init, or whoever takes its place, may have to take its status first
        if not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text():
            break
    else:
        pytest.fail(f"{pid} still runs")


def test_a_child_that_heeds_no_signal_and_prints_a_lot_is_ended(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vetting, "time", SimpleNamespace(monotonic=clock_until(log, "printed")))
    found = verdicts("stubborn", "b", limits=Limits(60, 1 << 50))
    assert found["stubborn"].why == "its check took more than 60 s (--vet-seconds)"
    assert found["b"].fingerprint == "of b"


def test_what_is_printed_is_no_verdict_and_the_end_of_it_is_told(log: Path) -> None:
    why = verdicts("forged")["forged"].why
    assert why.startswith("loading it ends the process that checks it (signal 6, SIGABRT; its last words: ")
    assert '{"fingerprint": "forged"}' in why


@pytest.mark.parametrize("guilty", ["babble", "endless"])
def test_an_answer_that_is_no_verdict_is_refused_and_the_others_are_checked(guilty: str, log: Path) -> None:
    found = verdicts(guilty, "b")
    assert "which is no verdict" in found[guilty].why
    assert len(found[guilty].why) < 500
    assert (found[guilty].fingerprint, found["b"].fingerprint) == ("", "of b")


def test_a_child_that_says_no_more_and_stays_is_ended(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_END_SECONDS", 0.1)
    assert "it closed its pipe, and stayed" in verdicts("mute")["mute"].why


def test_a_child_whose_end_takes_for_ever_holds_nobody_up(log: Path) -> None:
    assert verdicts("a", "last")["last"].fingerprint == "of last"


def test_no_child_is_left_behind(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def spy(*arguments: object, **keywords: object) -> subprocess.Popen[bytes]:
        children.append(start(*arguments, **keywords))  # type: ignore[call-overload]
        return children[-1]

    monkeypatch.setattr(child, "subprocess", SimpleNamespace(Popen=spy, PIPE=subprocess.PIPE))
    verdicts("hang", limits=Limits(1e9, 1))
    verdicts("a")
    assert len(children) == 2
    assert all(process.returncode is not None for process in children)


def test_a_server_that_stops_ends_the_child_and_starts_no_other(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[bytes]] = []
    start, stopping = subprocess.Popen, threading.Event()

    def spy(*arguments: object, **keywords: object) -> subprocess.Popen[bytes]:
        children.append(start(*arguments, **keywords))  # type: ignore[call-overload]
        stopping.set()
        return children[-1]

    monkeypatch.setattr(child, "subprocess", SimpleNamespace(Popen=spy, PIPE=subprocess.PIPE))
    found = vet(folders("hang", "b"), ONE_THREAD, NEVER, stopping)
    assert {v.why for v in found.values()} == {"the server stops"}
    assert [process.returncode for process in children] == [-signal.SIGKILL]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parents")
def test_a_server_that_is_killed_leaves_no_child() -> None:
    """The child of a child: it tells its process id, and waits for a job that never comes."""
    parent = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE)\n"
        "child.wait()\n"
    )
    orphan = (
        "import os, signal, sys\n"
        "from tenuto.serving import child\n"
        "child.end_with_parent(os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-c", parent, orphan]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
        try:
            # Standard output, which it shares with its parent, ends only with the last of them.
            assert process.communicate(timeout=30)[0] == ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_nothing_to_check_starts_no_child(log: Path) -> None:
    assert verdicts() == {}
    assert not log.exists()


def test_lines_are_put_together_from_what_the_pipe_gives() -> None:
    (answers, answering), (printed, printing) = os.pipe(), os.pipe()
    lines = child.Lines(answers, printed)
    assert lines.next(0) is None
    os.write(answering, b"on")
    os.write(printing, b"first\nse")
    assert lines.next(0) is None
    os.write(answering, b"e\ntwo\nthr")
    assert (lines.next(0), lines.next(0), lines.next(0)) == (b"one", b"two", None)
    os.write(printing, b"cond\n\n")
    os.close(printing)
    os.close(answering)
    assert lines.next(0) == b""
    assert lines.last_printed() == "second"
    lines.close()


# What the child does with one model.


def create_folder(root: Path, made: tuple[bytes, toys.Manifest], model: str | None = None) -> ModelFolder:
    path = toys.write(root, made[1]["name"], made)
    return ModelFolder(model or made[1]["name"], 1, path)


def test_a_good_model_gets_the_fingerprint_of_the_files_that_were_checked(tmp_path: Path) -> None:
    folder = create_folder(tmp_path, toys.accumulator())
    assert check(folder, ONE_THREAD) == Verdict(folder.read().fingerprint)


def test_its_golden_file_is_replayed(tmp_path: Path) -> None:
    folder = create_folder(tmp_path, toys.accumulator())
    golden = {"1.in.x": f32([1, 2]), "1.out.y": f32([1, 3])}
    np.savez(folder.path / "golden.npz", **golden)  # type: ignore[arg-type]
    assert check(folder, ONE_THREAD).golden_steps == 1
    np.savez(folder.path / "golden.npz", **golden | {"1.out.y": f32([1, 4])})  # type: ignore[arg-type]
    assert "output 'y' is off by 1" in check(folder, ONE_THREAD).why


def test_a_manifest_of_another_name_is_refused(tmp_path: Path) -> None:
    folder = create_folder(tmp_path, toys.doubler())
    moved = tmp_path / "other" / "1"
    shutil.copytree(folder.path, moved)
    why = check(ModelFolder("other", 1, moved), ONE_THREAD).why
    assert why == "other/1: the manifest is named 'doubler'; they must agree"


def test_a_model_that_fails_on_zeros_is_refused(tmp_path: Path) -> None:
    made = toys.lookup(checked=False)
    made[1]["inputs"][0]["range"] = [9, 9]  # the nearest to zero that the manifest allows, and no row there
    why = check(create_folder(tmp_path, made), ONE_THREAD).why
    assert why.startswith("its run on zeros failed: lookup/1: ")


def test_bytes_that_are_no_model_are_refused(tmp_path: Path) -> None:
    folder = create_folder(tmp_path, (b"no model", toys.doubler()[1]))
    verdict = check(folder, ONE_THREAD)
    assert "ONNX Runtime does not load it" in verdict.why
    assert verdict.fingerprint == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parents")
def test_a_child_whose_parent_left_before_it_could_say_so_leaves() -> None:
    own = "from tenuto.serving import child; child.end_with_parent(1); print('stays')"
    done = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (0, "")


CONFINED = (
    "import os, resource\n"
    "from tenuto.serving import child\n"
    "child.confine(os.getppid(), {})\n"
    "print(*resource.getrlimit(resource.RLIMIT_CORE), *resource.getrlimit(resource.RLIMIT_DATA))\n"
)


@pytest.mark.parametrize("memory_bytes, data", [(1 << 20, (2 << 20) + (1 << 30)), (0, -1)])
def test_a_child_dumps_no_core_and_asks_for_no_more_than_a_bound(memory_bytes: int, data: int) -> None:
    """Where the provider is CUDA, which asks for more than it takes, it is 0: no bound."""
    own = CONFINED.format(memory_bytes)
    done = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, timeout=50)
    assert done.stdout.split() == ["0", "0", str(data), str(data)], done.stderr


@pytest.mark.parametrize("provider, asked", [(CPU, 1 << 20), (model_runner.CUDA, 0)])
def test_the_bound_is_for_the_cpu_alone(
    provider: str, asked: int, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Spy(child.Child):
        def __init__(self, command: list[str], text: str) -> None:
            commands.append(command)
            super().__init__(command, text)

    monkeypatch.setattr(vetting, "Child", Spy)
    vet(folders("a"), RunSettings(provider, 1), Limits(1e9, 1 << 20))
    assert commands[0][-1] == str(asked)
