"""The end in two stages: refuse new sequences, let the live ones end, leave; or leave at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tenuto.serving.errors import RunFailed
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys
from tests.integration.running import ALL_TRANSPORTS, Gate, build, engine_of, serving, wait_for
from tests.integration.wire import (
    PATIENCE_SECONDS,
    Conversation,
    array,
    chunk,
    connect,
    opening,
    refused,
    stub,
    tensor,
)

from .process import ROOT, server_process

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
DOUBLING = pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    toys.write(root, "accumulator", toys.accumulator())
    toys.write(root, "doubler", toys.doubler())
    toys.write(root, "spinner", toys.spinner())
    return root


def health_of(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call,unused-ignore]


def check(channel: grpc.Channel, service: str) -> int:
    return int(health_of(channel).Check(health_pb2.HealthCheckRequest(service=service)).status)


def watch(channel: grpc.Channel, service: str) -> Any:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_of(channel).Watch(request, timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_without_live_sequences_the_server_leaves_at_the_first_signal(
    repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    # A day of grace: it is not what ends it.
    with server_process(repository, tmp_path, drain_seconds=86_400) as server:
        with connect(server.port) as channel:
            answer = stub(channel).Predict(DOUBLING, timeout=PATIENCE_SECONDS)
            assert array(answer.outputs[0]).tolist() == [[2, 4]]
        server.terminate(number)
        assert server.exit_status() == 0
        assert "0 live sequences" in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_a_draining_server_refuses_the_new_answers_the_accepted_and_sends_the_live_away(
    repository: Path, transport: str
) -> None:
    with serving(repository, transport=transport) as server, connect(server.port) as channel:
        readiness = watch(channel, "readiness")
        assert next(readiness).status == SERVING
        engine = engine_of(server, "accumulator")
        with Gate(engine) as gate, Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            conversation.opened()
            gate.wait_for_arrival()
            conversation.send(chunk(2, [1.0]))
            wait_for(lambda: len(engine._inbox) == 1, "the second chunk to arrive")
            stopping = threading.Thread(target=server.stop, args=(30.0,))
            stopping.start()
            assert next(readiness).status == NOT_SERVING
            for service, status in (
                ("liveness", SERVING),
                ("readiness", NOT_SERVING),
                ("", NOT_SERVING),
                ("tenuto.v1.Tenuto", NOT_SERVING),
            ):
                assert check(channel, service) == status
            wait_for(lambda: len(engine._inbox) == 2, "the drain to arrive")
            conversation.send(opening("doubler", 2))
            failed = conversation.failed("DRAINING")
            assert failed.code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert "leaving" in failed.message
            refusal = refused(stub(channel).Predict, DOUBLING)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            gate.open()
            assert [conversation.values(step) for step in (1, 2)] == [[1.0], [2.0]]
            closed = conversation.closed()
            assert (closed.reason, closed.last_step) == (pb.DRAINING, 2)
            assert closed.resume_token
        stopping.join(PATIENCE_SECONDS)


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_a_server_that_has_sent_all_away_does_not_wait_for_its_grace(
    repository: Path, tmp_path: Path, transport: str
) -> None:
    settings = {"drain_seconds": 86_400, "transport": transport, "checkpoint_every": 0}
    with (
        server_process(repository, tmp_path, **settings) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        conversation.send(*(opening("accumulator", n) for n in range(20)))
        conversation.send(*(chunk(1, [1.0], sequence=n) for n in range(20)))
        for _ in range(40):
            conversation.read()
        server.terminate()
        closed = [conversation.read() for _ in range(20)]
        assert {r.closed.reason for r in closed} == {pb.DRAINING}
        assert {r.closed.last_step for r in closed} == {1}
        assert {r.sequence for r in closed} == set(range(20))
        assert all(r.closed.resume_token for r in closed)
        assert server.exit_status() == 0
        assert "20 live sequences" in server.log


def test_a_second_signal_ends_the_server_at_once(repository: Path, tmp_path: Path) -> None:
    with (
        server_process(repository, tmp_path, drain_seconds=86_400) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        readiness = watch(channel, "readiness")
        assert next(readiness).status == SERVING
        # A chunk that was accepted is answered first, and this one takes hours.
        conversation.send(opening("spinner"), chunk(1, tensor([10**12], "int64")))
        conversation.opened()
        server.terminate()
        assert next(readiness).status == NOT_SERVING
        server.terminate()
        assert server.exit_status() == 128 + signal.SIGTERM
        assert conversation.refused().code is grpc.StatusCode.UNAVAILABLE


def test_a_run_that_goes_on_beyond_the_grace_does_not_spoil_the_exit_status(
    repository: Path, tmp_path: Path
) -> None:
    """Its thread would come back to an interpreter that ends, which aborts the process."""
    with (
        server_process(repository, tmp_path, drain_seconds=0.2) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        conversation.send(opening("spinner"), chunk(1, tensor([10**12], "int64")))
        conversation.opened()
        server.terminate()
        assert server.exit_status() == 0
        assert "stopped" in server.log


def test_a_run_that_does_not_return_ends_the_server_with_status_70(repository: Path, tmp_path: Path) -> None:
    with (
        server_process(repository, tmp_path, run_seconds=0.5) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        # The client decides how often this model loops: for hours.
        conversation.send(opening("spinner"), chunk(1, tensor([10**12], "int64")))
        conversation.opened()
        assert conversation.refused().code is grpc.StatusCode.UNAVAILABLE
        assert server.exit_status() == 70
        assert "a run of spinner/1 takes more than 0.5 s; leaving with status 70" in server.log


def test_liveness_is_off_before_a_hung_server_leaves(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = threading.Event()
    statuses: list[int] = []

    def leave(status: int) -> None:
        statuses.append(status)
        left.set()  # and returns, so the watchdog comes again

    monkeypatch.setattr("tenuto.serving.server.os._exit", leave)
    with serving(repository, run_seconds=0.2) as server, connect(server.port) as channel:
        engine = engine_of(server, "accumulator")
        with Gate(engine) as gate, Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            gate.wait_for_arrival()
            assert left.wait(PATIENCE_SECONDS)
            assert set(statuses) == {70}
            assert check(channel, "liveness") == NOT_SERVING


def test_readiness_is_off_before_anything_is_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(repository) as server:
        told: list[tuple[str, bool]] = []
        monkeypatch.setattr(
            server.health, "set", lambda name, _status: told.append((name, server.metrics.draining))
        )
        server.stop(0.0)
        assert told[0] == ("readiness", False)
        assert not any(draining for _, draining in told)


def test_a_key_file_that_does_not_answer_does_not_hold_the_watchdog_up(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, asked, never = threading.Event(), threading.Event(), threading.Event()

    def hang(_: object) -> None:
        asked.set()
        never.wait()

    monkeypatch.setattr("tenuto.serving.resume_token.TokenSealer.reload", hang)
    monkeypatch.setattr("tenuto.serving.server.os._exit", lambda _status: left.set())
    with serving(repository) as server:
        assert asked.wait(PATIENCE_SECONDS)
        engine_of(server, "accumulator").broken = "the device is gone"
        assert left.wait(PATIENCE_SECONDS)
        never.set()


def test_a_broken_engine_ends_the_server_with_status_71(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = threading.Event()
    statuses: list[int] = []

    def leave(status: int) -> None:
        statuses.append(status)
        left.set()

    def broken(*_: object) -> None:
        raise RunFailed("the device is gone")

    monkeypatch.setattr("tenuto.serving.server.os._exit", leave)
    with serving(repository) as server, connect(server.port) as channel:
        runner = engine_of(server, "accumulator")._runner
        monkeypatch.setattr(runner, "run", broken)
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            conversation.opened()
            assert left.wait(PATIENCE_SECONDS)
        assert set(statuses) == {71}
        assert check(channel, "liveness") == NOT_SERVING
    assert (
        "accumulator/1 is broken: a run failed, and so does a run of zeros: the device is gone" in caplog.text
    )


def test_predict_calls_that_were_accepted_are_answered_before_the_server_leaves(
    repository: Path,
) -> None:
    server = build(repository)
    server.start()
    with connect(server.port) as channel:
        api, engine = stub(channel), engine_of(server, "doubler")
        with Gate(engine) as gate:
            waiting = [api.Predict.future(DOUBLING, timeout=30)]
            gate.wait_for_arrival()
            big = pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]] * 20)])
            waiting += [api.Predict.future(big, timeout=30) for _ in range(3)]
            wait_for(lambda: len(engine._inbox) == 3, "the calls to arrive")
            stopping = threading.Thread(target=server.stop, args=(0.0,))
            stopping.start()
            wait_for(lambda: len(engine._inbox) == 5, "the stop to arrive")
            gate.open()
            answers = [future.result() for future in waiting]
        stopping.join(PATIENCE_SECONDS)
    assert array(answers[0].outputs[0]).tolist() == [[2, 4]]
    for answer in answers[1:]:
        assert array(answer.outputs[0]).tolist() == [[2, 4]] * 20


def test_stopping_is_counted_as_draining(repository: Path) -> None:
    with serving(repository) as server, connect(server.port) as channel:
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator"))
            conversation.opened()
            server.stop(0.0)
            assert conversation.closed().reason == pb.DRAINING
        assert engine_of(server, "accumulator").metrics.ended["DRAINING"] == 1


def test_wrong_settings_end_the_command_with_status_2_and_name_the_flag(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tenuto.serving.cli", str(tmp_path), "--max-streams=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "--max-streams (TENUTO_MAX_STREAMS) is 'none'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_repository_without_models_ends_the_command_with_status_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tenuto.serving.cli", str(tmp_path), "--device=cpu"]
    command += ["--port=0", "--metrics-port=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "holds no <model>/<version>/ folder" in done.stderr
    assert "Traceback" not in done.stderr
