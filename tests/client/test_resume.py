"""A lost stream goes on by itself, over the sync client: the caller gets each output once, in order."""

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto import (
    Client,
    NotFound,
    OutputsUnread,
    Overloaded,
    PoisonedChunk,
    Refused,
    ReplyTimeout,
    SequenceFailed,
    Unavailable,
)
from tenuto.servers import first_turn  # before the tests' own one is in its place
from tenuto.stream import Stream
from tenuto.v1 import tenuto_pb2 as pb
from tests.client.fake_server import FakeServer, closed, token

ONE = np.array([1], np.float32)
DEATH = grpc.StatusCode.UNAVAILABLE
FULL = pb.Failed(code=8, reason="POOL_FULL", message="full", retry_after_ms=1)


@pytest.fixture
def first() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def second() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def pair(first: FakeServer, second: FakeServer) -> Iterator[Client]:
    with Client(f"{first.target}, {second.target}") as client:
        yield client


def totals(stream: Stream, chunks: int) -> list[float]:
    """Send that many ones and end; each output's total is the number of the chunk if all is well."""
    outputs = list(stream.run([ONE] * chunks))
    assert [output.step for output in outputs] == list(range(1, chunks + 1))
    return [float(output["total"][-1]) for output in outputs]


@pytest.mark.parametrize("checkpoint_every", [0, 1, 3])
@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "CANCELLED"])
def test_a_lost_stream_goes_on_at_the_next_server(
    first: FakeServer, second: FakeServer, pair: Client, code: str, checkpoint_every: int
) -> None:
    first.checkpoint_every = checkpoint_every
    first.accidents = {7: [grpc.StatusCode[code]]}
    with pair.stream("accumulator") as stream:
        assert totals(stream, 20) == list(range(1, 21))
        assert stream.resumes == 1
    newest = 6 - 6 % checkpoint_every if checkpoint_every else 0
    assert [o.resume_token for o in first.opens + second.opens] == [
        b"",
        token(newest, newest) if newest else b"",
    ]
    assert second.opens[0].version == (0 if newest else 3)
    assert pair.resumes == 1


def test_the_caller_sees_a_line_in_the_log(
    first: FakeServer, pair: Client, caplog: pytest.LogCaptureFixture
) -> None:
    first.accidents = {2: [DEATH]}
    with caplog.at_level(logging.INFO, "tenuto.client"), pair.stream("accumulator") as stream:
        totals(stream, 3)
    lost, resumed = caplog.records
    assert lost.levelname == "WARNING"
    assert lost.getMessage().startswith(
        f"sequence s-1 is opened again for step 2: UNAVAILABLE: {first.target}"
    )
    assert (resumed.levelname, resumed.getMessage()) == ("INFO", "sequence s-1 goes on at step 1 as s-1")


def test_a_server_that_is_gone_is_survived(first: FakeServer, second: FakeServer, pair: Client) -> None:
    first.gate = threading.Semaphore(1)
    with pair.stream("accumulator") as stream:
        stream.send(ONE)
        assert next(stream).step == 1
        stream.send(ONE)
        stop = threading.Thread(target=first.stop)
        stop.start()
        assert next(stream)["total"].tolist() == [2]
    first.gate.release()
    stop.join()
    assert len(second.opens) == 1


def test_a_drained_sequence_goes_on_elsewhere(first: FakeServer, second: FakeServer, pair: Client) -> None:
    first.accidents = {5: [closed("DRAINING", 4, 4)]}
    with pair.stream("accumulator") as stream:
        assert totals(stream, 10) == list(range(1, 11))
    assert second.opens[0].resume_token == token(4, 4)
    assert len(second.inputs) == 6


def test_one_server_alone_is_opened_again(first: FakeServer) -> None:
    first.accidents = {step: [DEATH] for step in (2, 4, 6)}
    with Client(first.target) as client, client.stream("accumulator") as stream:
        assert totals(stream, 8) == list(range(1, 9))
    assert len(first.opens) == 4


def test_a_caller_that_pauses_is_opened_again_by_its_next_send(
    first: FakeServer, second: FakeServer, pair: Client
) -> None:
    second.tail = True
    with pair.stream("accumulator") as stream:
        stream.send(ONE)
        next(stream)
        first.stop()
        with stream._changed:
            while stream._conversation.on_call:
                stream._changed.wait()
        assert second.opens == []
        assert stream.send(ONE) == 2
        assert next(stream)["total"].tolist() == [2]
        stream.end()
        assert [(output.step, output.part) for output in stream] == [(2, 1)]
    assert stream.resumes == 1


def test_a_sequence_that_idled_goes_on_with_end(first: FakeServer, second: FakeServer, pair: Client) -> None:
    first.checkpoint_every = 1
    second.tail = True
    with pair.stream("accumulator") as stream:
        stream.send(ONE)
        next(stream)
        with stream._changed:
            while not stream.resume_token:  # it comes behind the output
                stream._changed.wait()
        first.stop()
        stream.end()
        assert [(output.step, output.part) for output in stream] == [(1, 1)]
    assert second.inputs == []  # the token said it all


def test_a_full_replay_waits_for_a_token(first: FakeServer) -> None:
    big = np.zeros(1000, np.float32)
    with (
        Client(first.target, replay_bytes=10_000) as client,
        client.stream("accumulator") as stream,
    ):
        for _ in range(20):
            stream.send(big)
            assert stream._conversation._replay.nbytes < 15_000
        assert first.tokens_asked >= 6
        assert stream.resume_token == token(stream._conversation._token_step, 0)
        stream.end()
        assert len(list(stream)) == 20


def test_a_refused_resume_is_tried_again(first: FakeServer, second: FakeServer, pair: Client) -> None:
    first.accidents = {2: [DEATH]}
    second.refusals = [FULL, pb.Failed(code=14, reason="DRAINING", message="leaving")]
    with pair.stream("accumulator") as stream:
        first.refusals = [grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert totals(stream, 3) == [1, 2, 3]
    assert (len(first.opens), len(second.opens)) == (3, 2)


def test_after_resume_seconds_the_last_error_is_raised(first: FakeServer) -> None:
    first.accidents = {2: [DEATH]}
    with (
        Client(first.target, resume_seconds=0.1) as client,
        client.stream("accumulator") as stream,
    ):
        first.refusals = [FULL] * 99
        with pytest.raises(Overloaded, match=r"^POOL_FULL: step 2 could not be resumed within 0\.1 s: full$"):
            totals(stream, 3)
    assert 1 < len(first.opens) < 10


@pytest.mark.parametrize(
    "code,reason,kind",
    [(9, "TOKEN_INVALID", Refused), (5, "UNKNOWN_MODEL", NotFound), (13, "STATE_NOT_FINITE", SequenceFailed)],
)
def test_where_resuming_is_impossible_the_error_says_why(
    first: FakeServer, code: int, reason: str, kind: type[Exception]
) -> None:
    failed = pb.Failed(code=code, reason=reason, message="because")
    if reason == "STATE_NOT_FINITE":
        first.accidents = {2: [pb.Reply(failed=failed)]}
    else:
        first.accidents = {2: [DEATH]}
    with Client(first.target) as client, client.stream("accumulator") as stream:
        first.refusals = [failed]
        with pytest.raises(kind, match=f"^{reason}: .*because$"):
            totals(stream, 3)


def test_a_poisoned_chunk_does_not_walk_through_the_servers(first: FakeServer, second: FakeServer) -> None:
    with FakeServer() as third:
        servers = [first, second, third]
        for server in servers:
            server.accidents = {3: [DEATH] * 9}
        with (
            Client(",".join(server.target for server in servers)) as client,
            client.stream("accumulator") as stream,
        ):
            with pytest.raises(PoisonedChunk, match="2 streams were lost at step 3") as caught:
                totals(stream, 5)
            assert caught.value.step == 3
        opens = [len(server.opens) for server in servers]
        assert (opens[0], sorted(opens)) == (1, [0, 1, 1])


def test_a_frozen_server_is_left_for_the_next(first: FakeServer, second: FakeServer) -> None:
    first.on_step = {2: None, 3: None, 4: None, 5: None}
    with (
        Client(f"{first.target},{second.target}", reply_seconds=0.05) as client,
        client.stream("accumulator") as stream,
    ):
        stream.send(ONE)
        stream.send(ONE)
        assert [next(stream).step, next(stream).step] == [1, 2]
    assert len(second.opens) == 1


def test_an_output_that_no_server_gives_is_a_reply_timeout(first: FakeServer) -> None:
    first.on_step = {1: None}
    with (
        Client(first.target, reply_seconds=0.05, resume_seconds=0.05, poison_losses=99) as client,
        client.stream("accumulator") as stream,
    ):
        stream.send(ONE)
        with pytest.raises(ReplyTimeout, match=r"no answer to step 1 within 0\.1 s"):
            next(stream)


def test_leaving_during_a_resume_is_prompt(first: FakeServer) -> None:
    first.accidents = {2: [DEATH]}
    with Client(first.target) as client:
        with client.stream("accumulator") as stream:
            first.refusals = [FULL] * 99
            stream.send(ONE)
            next(stream)
            stream.send(ONE)
            with stream._changed:
                while len(first.opens) < 3:  # at least one resume was refused
                    stream._changed.wait()
        assert len(first.opens) < 20
        with pytest.raises(Unavailable, match="its caller has left the sequence"):
            stream.send(ONE)
    assert not [t for t in threading.enumerate() if t.name == "tenuto-stream"]


def test_leaving_while_a_resume_hangs_is_prompt(first: FakeServer) -> None:
    first.accidents = {2: [DEATH]}
    with Client(first.target, timeout_seconds=1000) as client, client.stream("accumulator") as stream:
        first.called.clear()
        first.hang = True
        stream.send(ONE)
        next(stream)
        stream.send(ONE)
        assert first.called.wait(10)


def test_a_closed_client_resumes_nothing(first: FakeServer) -> None:
    first.gate = threading.Semaphore(0)
    client = Client(first.target)
    with client.stream("accumulator") as stream:
        stream.send(ONE)
        client.close()
        with pytest.raises(Unavailable, match="CLIENT_CLOSED"):
            next(stream)


def test_one_thread_sends_and_another_iterates_through_losses(
    first: FakeServer, second: FakeServer, pair: Client
) -> None:
    for server, began in ((first, 7), (second, 13)):
        server.checkpoint_every = 5
        server.accidents = {step: [DEATH] for step in range(began, 200, 12)}
    with pair.stream("accumulator") as stream:

        def send_all() -> None:
            for _ in range(200):
                stream.send(ONE)
            stream.end()

        sender = threading.Thread(target=send_all)
        sender.start()
        assert [float(output["total"][-1]) for output in stream] == list(range(1, 201))
        sender.join()
        assert stream.resumes >= 15


def test_what_waits_unread_stays_bounded_through_a_loss(first: FakeServer) -> None:
    first.accidents = {3: [DEATH]}
    with (
        Client(first.target, buffer_bytes=1500) as client,
        client.stream("accumulator") as stream,
    ):
        sent: list[int] = []
        with pytest.raises(OutputsUnread):
            while True:
                sent.append(stream.send(ONE))
        stream.end()
        assert [output.step for output in stream] == sent


# -- which server ----------------------------------------------------------------------------------


def test_streams_begin_at_the_servers_in_turn(first: FakeServer, second: FakeServer, pair: Client) -> None:
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(pair.stream("accumulator"))
        assert (len(first.opens), len(second.opens)) == (2, 2)


def test_each_client_begins_at_any_of_its_servers(
    first: FakeServer, second: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenuto.servers.first_turn", first_turn)
    monkeypatch.setattr("random.randrange", lambda count: count - 1)
    with Client(f"{first.target},{second.target}") as client:
        for _ in range(3):
            with client.stream("accumulator"):
                pass
    assert (len(first.opens), len(second.opens)) == (1, 2)


def test_a_name_with_several_addresses_is_several_servers(first: FakeServer, second: FakeServer) -> None:
    with (
        Client(f"ipv4:{first.target},{second.target}") as client,
        client.stream("accumulator") as stream,
    ):
        stream.send(ONE)
        next(stream)
        chosen, other = (first, second) if first.opens else (second, first)
        assert other.opens == []
        chosen.stop()
        stream.send(ONE)
        assert next(stream)["total"].tolist() == [2]
        assert len(other.opens) == 1


def test_what_one_address_of_a_name_refuses_is_not_tried_at_the_others(
    first: FakeServer, second: FakeServer
) -> None:
    """As the README says: a list of targets is better."""
    for server in (first, second):
        server.refusals = [FULL]
    with (
        Client(f"ipv4:{first.target},{second.target}") as client,
        pytest.raises(Overloaded, match="^POOL_FULL: full$"),
    ):
        client.stream("accumulator").__enter__()
    assert len(first.opens + second.opens) == 1


@pytest.mark.parametrize("how", [DEATH, grpc.StatusCode.RESOURCE_EXHAUSTED, FULL], ids=["14", "8", "full"])
def test_a_stream_opens_where_there_is_room(
    first: FakeServer, second: FakeServer, pair: Client, how: Any
) -> None:
    first.refusals = [how]
    with pair.stream("accumulator") as stream:
        assert totals(stream, 2) == [1, 2]
        assert stream.resumes == 0
    second.refusals = [FULL]
    first.refusals = [FULL]
    with pytest.raises(Overloaded, match="^POOL_FULL: full$"):
        pair.stream("accumulator").__enter__()


def test_a_stream_opens_although_one_server_hangs(first: FakeServer, second: FakeServer) -> None:
    first.hang = True
    with (
        Client(f"{first.target},{second.target}", timeout_seconds=0.2) as client,
        client.stream("accumulator") as stream,
    ):
        assert totals(stream, 2) == [1, 2]


def test_unary_calls_go_to_the_next_server_once_round(
    first: FakeServer, second: FakeServer, pair: Client
) -> None:
    first.stop()
    for _ in range(3):
        assert pair.models()
    second.stop()
    with pytest.raises(Unavailable, match=rf"{first.target}|{second.target}"):
        pair.models()


def test_a_sequence_is_ended_on_whichever_server_it_is(
    first: FakeServer, second: FakeServer, pair: Client
) -> None:
    assert pair._servers.stub(first.target) is pair._servers.stub(first.target)  # a channel each, no more
    first.sequences = [pb.Sequence(sequence_id="a", label="kitchen")]
    second.sequences = [pb.Sequence(sequence_id="b", age_seconds=2.5)]
    assert [one.id for one in pair.sequences()] == ["a"]
    for name in ("a", "b"):  # each time the other one is asked first
        pair.end_sequence(name)
    assert first.sequences == second.sequences == []
    with pytest.raises(NotFound, match="UNKNOWN_SEQUENCE"):
        pair.end_sequence("a")
