"""The processes that receive: how they start, hang, and share a port with nobody else."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenuto.serving import front_ends
from tenuto.serving.call import GONE
from tenuto.serving.errors import ConfigInvalid, PlatformError
from tenuto.serving.front_end import FrontSettings
from tenuto.serving.front_ends import FrontEnds
from tenuto.serving.http2 import Http2Server
from tenuto.serving.http_call import Limits
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys

from .running import build, metrics_text, number, serving, wait_for
from .test_operations import probe
from .wire import array, connect, stub, tensor

SETTINGS = FrontSettings(count=1, services=("a",), max_message_bytes=1 << 20, max_pending_bytes=1 << 20)


def fronts(settings: FrontSettings = SETTINGS) -> FrontEnds:
    def nobody(_: object) -> object:
        return GONE

    return FrontEnds(settings, Http2Server(nobody, Limits(1 << 20)), nobody)  # type: ignore[arg-type]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    toys.write(tmp_path, "doubler", toys.doubler())
    return tmp_path


@pytest.fixture
def shared() -> Iterator[FrontEnds]:
    own = fronts()
    own.bind("127.0.0.1", 0)
    yield own
    own.stop(0.0).wait()


def port_of(own: FrontEnds) -> int:
    return int(own._reserved[0].getsockname()[1])


def test_a_port_is_kept_from_other_servers(shared: FrontEnds) -> None:
    """Even from those with front ends, which share it among themselves."""
    with pytest.raises(OSError, match="in use"):
        fronts().bind("127.0.0.1", port_of(shared))
    with pytest.raises(OSError, match="in use"):
        Http2Server(lambda _: GONE, Limits(1)).bind("127.0.0.1", port_of(shared))
    shared.start()
    with pytest.raises(OSError, match="in use"):
        fronts().bind("127.0.0.1", port_of(shared))


def test_one_that_does_not_start_is_said_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = fronts(FrontSettings(
        count=2, services=(), max_message_bytes=1, max_pending_bytes=1, tls=(f"{tmp_path}/none", "", "")
    ))  # fmt: skip
    own.bind("127.0.0.1", 0)
    with pytest.raises(PlatformError, match="did not start; its last words are in the log"):
        own.start()
    own.stop(0.0).wait()
    assert own.alive == 0
    assert f"{tmp_path}/none: cannot be read" in capfd.readouterr().err


def test_one_that_cannot_be_started_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/not/python")
    own = fronts()
    own.bind("127.0.0.1", 0)
    with pytest.raises(PlatformError, match="No such file"):
        own.start()
    own.stop(0.0).wait()


def test_a_server_whose_port_is_taken_leaves_nothing_behind(repository: Path) -> None:
    before = set(threading.enumerate())  # other tests' servers among them
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PlatformError, match=f"cannot listen on 127.0.0.1:{port}"):
            build(repository, front_ends=1, port=port)
    assert "front-ends" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_one_that_hangs_is_replaced(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(front_ends, "_LOOK_SECONDS", 0.05)
    with serving(repository, front_ends=2) as server:
        own = server._transport.front_ends
        assert own is not None
        hung = own._fronts[0].process
        os.kill(hung.pid, signal.SIGSTOP)
        wait_for(lambda: number(metrics_text(server), "tenuto_front_ends_lost_total") == 1, "its end")
        wait_for(lambda: own.alive == 2, "another one")
        assert hung.returncode == -signal.SIGKILL
        request = pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])])
        for _ in range(8):  # of connections, whichever takes them
            with connect(server.port) as channel:
                assert array(stub(channel).Predict(request).outputs[0]).tolist() == [[2, 4]]
    assert "does not answer" in caplog.text


def test_one_that_answers_before_we_look_again_is_left_in_peace(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However soon: the answer comes on another thread."""
    with serving(repository, front_ends=1) as server:
        own = server._transport.front_ends
        assert own is not None
        (front,) = own._fronts
        monkeypatch.setattr(front.relay, "put", lambda kind, *_: front._said(kind))
        for _ in range(20):
            front.look(time.monotonic())
        assert (own.lost, front._unanswered) == (0, 0)
        monkeypatch.undo()


def test_one_that_never_gets_ready_is_replaced(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(repository, front_ends=1) as server:
        own = server._transport.front_ends
        assert own is not None
        (front,) = own._fronts
        front.ready.clear()
        front.look(time.monotonic() + 59)
        assert front.process.poll() is None
        front.look(time.monotonic() + 61)
        wait_for(lambda: (own.lost, own.alive) == (1, 1), "another one")
    assert "does not get ready" in caplog.text


def test_nobody_is_ready_without_any(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_ends, "_FIRST_WAIT_SECONDS", 1e6)
    monkeypatch.setattr(front_ends, "_LONGEST_WAIT_SECONDS", 1e6)
    with serving(repository, front_ends=1) as server:
        own = server._transport.front_ends
        assert own is not None
        assert probe(server, "/readyz") == 200
        own._fronts[0].process.kill()
        wait_for(lambda: probe(server, "/readyz") == 503, "the server to say so")
        assert probe(server, "/livez") == 200


def test_front_ends_are_for_our_own_server(repository: Path) -> None:
    with pytest.raises(ConfigInvalid, match="--front-ends belong to our own server"):
        build(repository, front_ends=1, transport="threads")
