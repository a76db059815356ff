"""Callers on a running server: who is let in, what each sees, and how much each may have."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import tenuto
from tenuto import aio
from tenuto.serving import pooled_method
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb

from .running import ALL_TRANSPORTS, assert_nothing_is_left, metrics_text, number, serving, wait_for
from .wire import PATIENCE_SECONDS, Conversation, Refusal, chunk, connect, ending, opening, stub, tensor

ALICE, BOB, CAROL = "alice-" * 4, "bob---" * 4, "carol-" * 4
NEW = "alice*" * 4  # hers, too, where it is in the file
FILE = f"""
[alice]
tokens = ["{ALICE}"]
max_sequences = 2

[bob]
tokens = ["{BOB}"]

[carol]
tokens = ["{CAROL}"]
operator = true
"""


@contextmanager
def guarded(repository: Path, folder: Path, text: str = FILE, **settings: Any) -> Iterator[Server]:
    file = folder / "callers.toml"
    file.write_text(text)
    with serving(repository, callers=file, **settings) as server:
        yield server
        assert_nothing_is_left(server)


@pytest.fixture(params=ALL_TRANSPORTS)
def server(request: pytest.FixtureRequest, toy_repository: Path, tmp_path: Path) -> Iterator[Server]:
    with guarded(toy_repository, tmp_path, transport=request.param, checkpoint_every=1) as server:
        yield server


def client(server: Server, token: str = "") -> tenuto.Client:
    return tenuto.Client(f"127.0.0.1:{server.port}", token=token, resume_seconds=0, reply_seconds=None)


def step(stream: tenuto.Stream, value: float) -> list[float]:
    stream.send(np.array([value], np.float32))
    sums: list[float] = next(stream).outputs["y"].tolist()
    return sums


METHODS: dict[str, Any] = {
    "Predict": pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])]),
    "ListModels": pb.ListModelsRequest(),
    "GetModel": pb.GetModelRequest(model="doubler"),
    "ListSequences": pb.ListSequencesRequest(),
    "EndSequence": pb.EndSequenceRequest(sequence_id="x"),
    "LoadModel": pb.LoadModelRequest(model="doubler"),
    "UnloadModel": pb.UnloadModelRequest(model="doubler"),
    "ReloadModel": pb.ReloadModelRequest(model="doubler"),
}


@pytest.mark.parametrize("method", METHODS)
def test_no_method_answers_a_stranger(server: Server, method: str) -> None:
    with connect(server.port) as channel:
        for metadata in ((), (("authorization", "Bearer " + "z" * 24),)):
            with pytest.raises(grpc.RpcError) as refused:
                getattr(stub(channel), method)(METHODS[method], timeout=PATIENCE_SECONDS, metadata=metadata)
            refusal = Refusal(refused.value)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert number(metrics_text(server), "tenuto_calls_unauthenticated_total") == 2


def test_a_stream_of_a_stranger_is_refused(server: Server) -> None:
    with connect(server.port) as channel, Conversation(channel) as conversation:
        conversation.send(opening("accumulator"))
        with pytest.raises(grpc.RpcError) as refused:
            conversation.read()
        assert Refusal(refused.value).reason == "UNAUTHENTICATED"


def test_health_is_told_to_everybody(server: Server) -> None:
    """Probes have no token."""
    with connect(server.port) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=PATIENCE_SECONDS)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_each_sees_and_ends_its_own_and_an_operator_all(server: Server) -> None:
    with (
        client(server, ALICE) as alice,
        client(server, BOB) as bob,
        client(server, CAROL) as carol,
        alice.stream("accumulator", label="a") as a,
        bob.stream("accumulator", label="b") as b,
    ):
        assert step(a, 1.0) == step(b, 1.0) == [1.0]
        assert [s.label for s in alice.sequences()] == ["a"]
        assert [s.label for s in bob.sequences()] == ["b"]
        assert sorted(s.label for s in carol.sequences()) == ["a", "b"]
        (own,) = alice.sequences()
        with pytest.raises(tenuto.NotFound):
            bob.end_sequence(own.id)
        carol.end_sequence(own.id)
        wait_for(lambda: not alice.sequences(), "the end of alice's sequence")


def test_a_resume_token_in_other_hands_is_worthless(server: Server) -> None:
    with client(server, ALICE) as alice, client(server, BOB) as bob:
        with alice.stream("accumulator") as a:
            step(a, 5.0)
            wait_for(lambda: bool(a.resume_token), "a token")
            token = a.resume_token
        with (
            pytest.raises(tenuto.Refused, match="another caller's"),
            bob.stream("accumulator", resume_token=token) as b,
        ):
            step(b, 1.0)
        with alice.stream("accumulator", resume_token=token) as a:
            assert step(a, 1.0) == [6.0]


def test_one_caller_cannot_take_all_the_places(server: Server) -> None:
    with client(server, ALICE) as alice, client(server, BOB) as bob:
        with alice.stream("accumulator") as one, alice.stream("accumulator") as two:
            step(one, 1.0)
            step(two, 1.0)
            with (
                pytest.raises(tenuto.Overloaded, match="caller 'alice' has 2 live sequences here"),
                alice.stream("accumulator") as three,
            ):
                step(three, 1.0)
            with bob.stream("accumulator") as other:
                step(other, 1.0)
        wait_for(lambda: not alice.sequences(), "their ends")
        with alice.stream("accumulator") as again:
            step(again, 1.0)


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_who_is_taken_from_the_file_is_cut_off_and_nobody_else(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    """A token that is added while a stream is there cuts nobody off."""
    with (
        guarded(toy_repository, tmp_path, transport=transport) as server,
        client(server, ALICE) as alice,
        client(server, BOB) as bob,
        alice.stream("accumulator") as a,
        bob.stream("accumulator") as b,
    ):
        assert step(a, 1.0) == step(b, 1.0) == [1.0]
        (tmp_path / "callers.toml").write_text(f'[alice]\ntokens = ["{ALICE}", "{NEW}"]')
        with pytest.raises((tenuto.Refused, tenuto.SequenceEnded)):
            for _ in range(10_000):
                step(b, 1.0)
        assert step(a, 2.0) == [3.0]
        assert alice.models()
        with pytest.raises(tenuto.Refused):
            bob.models()
        with client(server, NEW) as renewed:
            assert renewed.models()


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_a_leaked_token_is_taken_out_with_all_that_it_opened_and_the_caller_goes_on(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    """Its stream ends although its client says nothing; that of the caller's other token goes on."""
    two = FILE.replace(f'"{ALICE}"', f'"{ALICE}", "{NEW}"')
    with (
        guarded(toy_repository, tmp_path, two, transport=transport) as server,
        connect(server.port) as channel,
        Conversation(channel, token=ALICE) as thief,
        Conversation(channel, token=NEW) as alice,
    ):
        for conversation in (thief, alice):
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            conversation.opened()
            assert conversation.values(1) == [1.0]
        (tmp_path / "callers.toml").write_text(FILE.replace(ALICE, NEW))
        refusal = thief.refused()
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert "the token that opened this stream is not known here any more" in refusal.text
        alice.send(chunk(2, [2.0]), ending())
        assert alice.values(2) == [3.0]
        assert alice.closed().reason == pb.END


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_a_caller_that_is_too_fast_is_read_later_and_loses_nothing(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    """At 50 a second, the 60 behind the first 50 take a second at least, by the server's own clock."""
    text = f'[alice]\ntokens = ["{ALICE}"]\nchunks_per_second = 50\n[bob]\ntokens = ["{BOB}"]'
    with guarded(toy_repository, tmp_path, text, transport=transport, window=200) as server:
        with connect(server.port) as channel, Conversation(channel, token=ALICE) as conversation:
            conversation.send(opening("accumulator"))
            conversation.opened()
            conversation.send_apart(*(chunk(step, [1.0]) for step in range(1, 111)), ending())
            arrived = [conversation.values(step)[-1] for step in range(1, 111)]
            assert arrived == [float(step) for step in range(1, 111)]
            assert conversation.closed().reason == pb.END
        with client(server, ALICE) as alice:
            with pytest.raises(tenuto.Overloaded) as refused:
                for _ in range(1_000):
                    alice.predict("doubler", np.ones((1, 2), np.float32))
            assert refused.value.reason == "RATE_EXCEEDED"
            assert refused.value.retry_after_seconds


def test_a_stranger_takes_nothing_that_callers_need(
    toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watchers of health, and refused streams, more of each than there may be."""
    monkeypatch.setattr(pooled_method, "_MOST_WATCHES", 3)
    with (
        guarded(toy_repository, tmp_path, transport="http2", max_streams=8) as server,
        connect(server.port) as stranger,
        connect(server.port) as friend,
    ):
        health: Any = health_pb2_grpc.HealthStub(stranger)
        request = health_pb2.HealthCheckRequest()
        watches = [health.Watch(request, timeout=PATIENCE_SECONDS) for _ in range(3)]
        assert all(next(watch).status for watch in watches)
        with pytest.raises(grpc.RpcError) as one_more:
            next(health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS))
        assert one_more.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        for _ in range(20):
            with Conversation(stranger) as conversation, pytest.raises(grpc.RpcError):
                conversation.send(opening("accumulator"))
                conversation.read()
        assert server._streams.open_streams == 0
        own: Any = health_pb2_grpc.HealthStub(friend)
        assert own.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS).status
        with client(server, ALICE) as alice, alice.stream("accumulator") as a:
            assert alice.models()
            assert step(a, 1.0) == [1.0]
        for watch in watches:
            watch.cancel()


def test_a_stranger_s_message_is_not_waited_for(toy_repository: Path, tmp_path: Path) -> None:
    """A call without a token is refused when its headers are there, with all of its bytes still to come."""
    with guarded(toy_repository, tmp_path, transport="http2") as server, connect(server.port) as channel:
        method: Any = channel.stream_unary("/tenuto.v1.Tenuto/ListModels")
        never = threading.Event()
        with pytest.raises(grpc.RpcError) as refused:
            method(iter(lambda: never.wait(PATIENCE_SECONDS) and b"", None), timeout=PATIENCE_SECONDS)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        never.set()


def test_who_is_at_her_limit_can_resume_beside_a_connection_that_is_lost_unnoticed(server: Server) -> None:
    with (
        connect(server.port) as lost,
        connect(server.port) as channel,
        Conversation(lost, token=ALICE) as old,
    ):
        old.send(opening("accumulator", 0), opening("accumulator", 1), chunk(1, [5.0], sequence=0))
        token = b""
        while not token:
            reply = old.read()
            token = reply.checkpoint.resume_token if reply.HasField("checkpoint") else b""
        with Conversation(channel, token=ALICE) as new:
            new.send(opening("accumulator", resume_token=token))
            assert new.opened().next_step == 2
            new.send(chunk(2, [1.0]))
            assert new.values(2) == [6.0]


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_a_stream_for_each_message_does_not_dodge_the_rate(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    text = f'[alice]\ntokens = ["{ALICE}"]\nchunks_per_second = 10'
    with (
        guarded(toy_repository, tmp_path, text, transport=transport, window=200) as server,
        connect(server.port) as channel,
    ):
        with Conversation(channel, token=ALICE) as first:
            first.send(opening("accumulator"), *(chunk(n, [1.0]) for n in range(1, 121)))
            first.opened()
            assert [first.values(n)[-1] for n in range(1, 121)][-1] == 120.0
        with Conversation(channel, token=ALICE) as second:
            second.send(opening("accumulator"), chunk(1, [1.0]))
            with pytest.raises(grpc.RpcError) as refused:
                second.read()
        refusal = Refusal(refused.value)
        assert refusal.reason == "RATE_EXCEEDED"
        assert refusal.retry_after_ms > 5_000


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_calls_that_end_while_they_open_keep_no_place(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    text = f'[alice]\ntokens = ["{ALICE}"]\nmax_sequences = 100000'
    with (
        guarded(toy_repository, tmp_path, text, transport=transport) as server,
        connect(server.port) as channel,
    ):
        for _ in range(10):
            with Conversation(channel, token=ALICE) as conversation:
                conversation.send(*(opening("accumulator", n) for n in range(500)))
                conversation.read()
        (alice,) = server._callers._by_name.values()
        wait_for(lambda: alice.live == 0, "all places to be free")


def test_an_asyncio_client_brings_its_token(server: Server) -> None:
    """And asks for it anew at every call."""
    asked: list[str] = []

    def token() -> str:
        asked.append(ALICE)
        return ALICE

    async def run() -> None:
        async with aio.Client(f"127.0.0.1:{server.port}", token=token) as alice:
            assert await alice.models()
            async with alice.stream("accumulator") as a:
                await a.send(np.ones(1, np.float32))
                assert (await anext(a)).outputs["y"].tolist() == [1.0]

    asyncio.run(run())
    assert len(asked) == 2


def test_the_commands_bring_it_too(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenuto.cli import main

    file = tmp_path / "token"
    file.write_text(ALICE + "\n")
    where = ["--server", f"127.0.0.1:{server.port}"]
    assert main(["models", *where]) == 1
    assert "the call brings no token" in capsys.readouterr().err
    assert main(["models", *where, "--token-file", str(file)]) == 0
    monkeypatch.setenv("TENUTO_TOKEN_FILE", str(file))
    assert main(["models", *where]) == 0
    assert main(["models", *where, "--token-file", str(tmp_path / "nowhere")]) == 1
    assert "nowhere cannot be read" in capsys.readouterr().err
