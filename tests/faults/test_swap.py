"""Swapping versions in a server of its own process: what it leaves in memory, and an end in the middle."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from tenuto.v1 import tenuto_pb2 as pb
from tests import toys
from tests.integration.running import number, wait_for
from tests.integration.wire import Conversation, chunk, connect, ending, opening, stub, tensor

from .process import ServerProcess, server_process

MIB = 1 << 20
WEIGHTS_BYTES, STATE_BYTES = 100 * MIB, MIB // 4
SEQUENCES, SWAPS = 64, 10  # 16 MiB of state in use
# What the allocator may keep. A version that stayed would take 116 MiB, ten states 160.
SLACK_BYTES = 64 * MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and processes are read from /proc")


def resident_bytes(server: ServerProcess) -> float:
    return number(server.metrics(), "process_resident_memory_bytes")


def publish(repository: Path, model: str, made: tuple[bytes, Any], version: int) -> None:
    """The folder appears whole."""
    staging = toys.write(repository / ".staging", model, made, version)
    (repository / model).mkdir(exist_ok=True)
    staging.rename(repository / model / str(version))


def wait_for_version(api: Any, model: str, version: int) -> None:
    """It serves, and no other is there any more."""

    def alone() -> bool:
        models = api.ListModels(pb.ListModelsRequest()).models
        return [(m.version, m.state) for m in models if m.name == model] == [(version, pb.Model.READY)]

    wait_for(alone, f"{model}/{version} to serve alone")


def use(channel: grpc.Channel) -> None:
    """Every slot's state is written."""
    with Conversation(channel) as conversation:
        for n in range(SEQUENCES):
            conversation.send(opening("heavy", n), chunk(1, tensor([7], "int64"), sequence=n), ending(n))
        replies = [conversation.read() for _ in range(3 * SEQUENCES)]
        assert {r.closed.reason for r in replies if r.WhichOneof("reply") == "closed"} == {pb.END}


@pytest.mark.timeout(240)  # eleven times 100 MiB are written, checked and loaded
def test_ten_swaps_of_a_large_model_leave_no_memory_behind(tmp_path: Path) -> None:
    repository, made = tmp_path / "models", toys.heavy(WEIGHTS_BYTES, STATE_BYTES)
    publish(repository, "heavy", made, 1)
    settings = {"poll_seconds": 0.05, "max_sequences": SEQUENCES, "resume_reserve": 0, "checkpoint_every": 0}
    with server_process(repository, tmp_path, **settings) as server, connect(server.port) as channel:
        use(channel)
        sizes = [resident_bytes(server)]
        for version in range(2, SWAPS + 2):
            publish(repository, "heavy", made, version)
            wait_for_version(stub(channel), "heavy", version)
            shutil.rmtree(repository / "heavy" / str(version - 1))
            use(channel)
            limit = sizes[0] + SLACK_BYTES
            wait_for(lambda: resident_bytes(server) < limit, f"less than {limit:.0f} bytes")  # noqa: B023
            sizes.append(resident_bytes(server))
        assert sizes[0] > WEIGHTS_BYTES + SEQUENCES * STATE_BYTES  # what is swapped is as large as it says


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it ended
                continue
            if int(fields[1]) == pid:
                found.append(int(folder.name))
    return found


def test_a_signal_in_the_middle_of_a_check_ends_server_and_child(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    publish(repository, "accumulator", toys.accumulator(), 1)
    with server_process(repository, tmp_path, poll_seconds=0.02, drain_seconds=0) as server:
        publish(repository, "endless", toys.endless(), 1)
        wait_for(lambda: len(children_of(server.pid)) == 1, "the check to begin")
        (child,) = children_of(server.pid)
        server.terminate()
        assert server.exit_status() == 0
        with pytest.raises(ProcessLookupError):  # ended, and its status was taken
            os.kill(child, 0)
        assert "Traceback" not in server.log


def test_a_check_that_takes_too_long_is_ended_and_the_server_goes_on(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    publish(repository, "accumulator", toys.accumulator(), 1)
    with (
        server_process(repository, tmp_path, poll_seconds=0.02, vet_seconds=3) as server,
        connect(server.port) as channel,
    ):
        publish(repository, "accumulator", toys.endless(), 2)
        wait_for(lambda: "accumulator/2 is not served" in server.log, "the check to fail")
        assert "took more than 3 s" in server.log
        assert number(server.metrics(), "tenuto_model_loads_total", result="failed") == 1
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]), ending())
            assert conversation.opened().version == 1
            assert conversation.values(1) == [1.0]
            assert conversation.closed().reason == pb.END
        assert children_of(server.pid) == []
