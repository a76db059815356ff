"""Streams and connections that are left standing: what they took comes back, round after round."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import toys
from tests.integration.running import number, wait_for
from tests.integration.wire import Conversation, chunk, connect, ending, opening

from .process import ROOT, ServerProcess, server_process

ROUNDS, STREAMS = 10, 3000
# Rounds until the allocator has what it keeps, and what it may still take after that.
_SETTLED = 4
_SLACK = 1.1
# A client's HTTP/2 greeting, and the empty SETTINGS behind it.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    toys.write(root, "accumulator", toys.accumulator())
    return root


def live(server: ServerProcess) -> float:
    return number(server.metrics(), "tenuto_active_sequences") + number(
        server.metrics(), "tenuto_open_streams"
    )


def assert_serves(server: ServerProcess) -> None:
    with connect(server.port) as channel, Conversation(channel) as conversation:
        conversation.send(opening("accumulator"), chunk(1, [2.0]), ending())
        conversation.opened()
        assert conversation.values(1) == [2.0]
        conversation.closed()


def test_thirty_thousand_abandoned_streams_leave_memory_and_descriptors_as_they_were(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client opens 3,000 streams with a live sequence each, and is killed; ten times."""
    command = [sys.executable, "-m", "tests.faults.abandoning_client"]
    resident, files = [], []
    with server_process(repository, tmp_path) as server:
        assert_serves(server)
        wait_for(lambda: live(server) == 0, "the first stream to be gone")
        before = server.open_files
        for _ in range(ROUNDS):
            words = [*command, str(server.port), str(STREAMS)]
            with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None
                assert client.stdout.readline() == "open\n"
                assert live(server) == 2 * STREAMS
                client.kill()
            wait_for(lambda: live(server) == 0, "all abandoned streams to be gone")
            wait_for(lambda: server.open_files <= before, "their descriptors to be closed")
            resident.append(server.resident_bytes)
            files.append(server.open_files)
        assert_serves(server)
        server.terminate()
        assert server.exit_status() == 0
        assert "Traceback" not in server.log
    with capsys.disabled():
        mib = [f"{n / 2**20:.0f}" for n in resident]
        print(f"\n  {ROUNDS} x {STREAMS} streams abandoned: MiB {' '.join(mib)}, files {max(files)}")
    assert max(resident[_SETTLED:]) <= _SLACK * max(resident[:_SETTLED])


def test_connections_that_never_become_calls_do_not_keep_others_out(repository: Path, tmp_path: Path) -> None:
    """Silent ones, half a greeting, a greeting alone, and garbage: the server serves, and all go away."""
    with server_process(repository, tmp_path) as server:
        assert_serves(server)
        wait_for(lambda: live(server) == 0, "the first stream to be gone")
        before = server.open_files
        with ExitStack() as stack:
            for n in range(200):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
                peer.sendall((b"", _PREFACE[:10], _PREFACE, b"GET / HTTP/1.1\r\n\r\n")[n % 4])
            assert_serves(server)
        wait_for(lambda: server.open_files <= before, "the descriptors to be closed")
        assert_serves(server)
