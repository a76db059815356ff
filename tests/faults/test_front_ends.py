"""Processes that receive for the engine process: each may die, and no sequence is lost with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from tenuto import Client
from tests import toys
from tests.integration.running import number, wait_for

from .crowd import Crowd
from .process import ServerProcess, server_process

FRONT_END = "tenuto.serving.front_end"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    toys.write(tmp_path / "models", "accumulator", toys.accumulator())
    toys.write(tmp_path / "models", "doubler", toys.doubler())
    return tmp_path / "models"


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(repository, tmp_path, front_ends=2, checkpoint_every=10) as server:
        yield server


def front_ends(pid: int) -> list[int]:
    """Those that this server has started and that run."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if FRONT_END in words and int(parent) == pid and state != "Z":
                found.append(int(folder.name))
    return found


def runs(pid: int) -> bool:
    with suppress(OSError):
        return (Path("/proc") / f"{pid}" / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def metric(server: ServerProcess, name: str) -> float:
    return number(server.metrics(), name)


def test_sequences_outlive_the_kill_of_a_front_end(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """They go on through the other one, and through the one that takes its place."""
    one, other = front_ends(server.pid)
    crowd = Crowd(
        f"127.0.0.1:{server.port}", 500, 30, at={0.5: lambda: os.kill(one, signal.SIGKILL)},
        timeout_seconds=40,
    )  # fmt: skip
    figures = crowd.run()
    with capsys.disabled():
        print(f"\n  kill -9 of a front end: {figures}")
    assert figures.whole == (0, 0, 0)
    assert figures.chunks == 15_000
    wait_for(lambda: metric(server, "tenuto_front_ends") == 2, "another front end")
    assert metric(server, "tenuto_front_ends_lost_total") == 1
    assert other in front_ends(server.pid)
    assert one not in front_ends(server.pid)
    wait_for(lambda: metric(server, "tenuto_open_streams") == 0, "the streams of the dead one to be over")
    assert metric(server, "tenuto_active_sequences") == 0
    assert "a front end died (-9)" in server.log


def test_all_front_ends_may_die_at_once(server: ServerProcess) -> None:
    with Client(f"127.0.0.1:{server.port}", timeout_seconds=40) as client, client.stream("accumulator") as s:
        total = 0.0
        for step in range(6):
            if step == 3:
                for pid in front_ends(server.pid):
                    os.kill(pid, signal.SIGKILL)
            s.send(np.array([1.0 + step], np.float32))
            total += 1.0 + step
            assert next(s)["y"][-1] == total
        assert s.resumes >= 1


def test_sequences_outlive_the_kill_of_the_engine_process(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them go on at another server, through its front ends."""
    keys = tmp_path / "keys"
    keys.write_text("5a" * 32)
    with ExitStack() as stack:
        servers = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            settings = {"front_ends": 2, "token_key_file": keys, "checkpoint_every": 10}
            servers.append(stack.enter_context(server_process(repository, tmp_path / name, **settings)))
        one, two = servers
        crowd = Crowd(
            f"127.0.0.1:{one.port},127.0.0.1:{two.port}", 300, 30,
            at={0.5: lambda: one.terminate(signal.SIGKILL)}, timeout_seconds=40,
        )  # fmt: skip
        figures = crowd.run()
    with capsys.disabled():
        print(f"\n  kill -9 of an engine process: {figures}")
    assert figures.whole == (0, 0, 0)
    assert figures.chunks == 9_000
    assert figures.resumes >= 100


def test_front_ends_end_with_the_engine_process(server: ServerProcess) -> None:
    """However it ends: nobody holds its port."""
    pids = front_ends(server.pid)
    server.terminate(signal.SIGKILL)
    server.exit_status()
    wait_for(lambda: not any(map(runs, pids)), "the front ends to end")


def test_a_server_with_front_ends_leaves_in_order(server: ServerProcess) -> None:
    pids = front_ends(server.pid)
    assert len(pids) == 2
    for pid in pids:  # as a terminal's Ctrl-C, or a supervisor's signal to a whole group
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    with Client(f"127.0.0.1:{server.port}") as client:
        assert client.predict("doubler", np.array([[1.0, 2.0]], np.float32))["y"].tolist() == [[2.0, 4.0]]
        server.terminate()
        assert server.exit_status() == 0
    assert not any(map(runs, pids))
    assert "Traceback" not in server.log
