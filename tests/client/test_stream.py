"""Sequences over the sync client: window, order, endings, errors, what is owed."""

import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from tenuto import (
    Client,
    InvalidInput,
    NotFound,
    OutputsUnread,
    Overloaded,
    ProtocolError,
    Refused,
    ReplyTimeout,
    SequenceEnded,
    SequenceFailed,
    Unavailable,
)
from tenuto.v1 import tenuto_pb2 as pb
from tests.client.fake_server import FakeServer

ONE = np.array([1], np.float32)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as one:
        yield one


def test_outputs_come_in_the_order_of_steps_and_stop_after_end(client: Client) -> None:
    with client.stream("accumulator") as stream:
        steps = [stream.send(np.array([step, 0.5], np.float32)) for step in range(1, 4)]
        stream.end()
        outputs = list(stream)
    assert steps == [1, 2, 3]
    assert [output.step for output in outputs] == [1, 2, 3]
    assert [output["total"].tolist() for output in outputs] == [[1, 1.5], [3.5, 4], [7, 7.5]]
    assert all(output.last and output.part == 0 for output in outputs)
    assert outputs[0].timing.compute_us == 8
    assert all(output.latency_seconds > 0 for output in outputs)


def test_one_thread_may_send_everything_before_it_reads(server: FakeServer, client: Client) -> None:
    server.window = 2
    with client.stream("accumulator") as stream:
        for _ in range(50):
            stream.send(ONE)
        stream.end()
        totals = [float(output["total"][-1]) for output in stream]
    assert totals == list(range(1, 51))


def test_no_more_chunks_than_the_window_are_unanswered(server: FakeServer, client: Client) -> None:
    server.window = 3
    server.gate = threading.Semaphore(0)
    with client.stream("accumulator") as stream:
        assert stream.window == 3
        sent: list[int] = []

        def send_all() -> None:
            for _ in range(6):
                sent.append(stream.send(ONE))  # noqa: PERF401 - each is to be seen at once

        sender = threading.Thread(target=send_all)
        sender.start()
        outputs = []
        for _ in range(6):
            server.gate.release()
            outputs.append(next(stream))
        sender.join()
    assert sent == [1, 2, 3, 4, 5, 6]
    assert [output.step for output in outputs] == sent
    assert server.unanswered_max <= 3


def test_send_waits_while_the_window_is_full(server: FakeServer) -> None:
    server.window = 2
    server.on_step = {1: None, 2: None}
    with (
        Client(server.target, reply_seconds=0.05, resume_seconds=0) as client,
        client.stream("accumulator") as stream,
    ):
        stream.send(ONE)
        stream.send(ONE)
        with pytest.raises(ReplyTimeout, match=r"no answer to step 1 within 0\.05 s"):
            stream.send(ONE)
    assert len(server.inputs) == 2


def test_an_output_that_does_not_come_is_a_reply_timeout(server: FakeServer) -> None:
    server.on_step = {1: None}
    with (
        Client(server.target, reply_seconds=0.05, resume_seconds=0) as client,
        client.stream("accumulator") as stream,
    ):
        stream.send(ONE)
        with pytest.raises(ReplyTimeout, match="reply_seconds") as caught:
            next(stream)
    assert isinstance(caught.value, TimeoutError)


def test_nothing_is_overdue_while_nothing_is_owed(server: FakeServer) -> None:
    """A thread may wait for outputs long before another sends."""
    with (
        Client(server.target, reply_seconds=0.05) as client,
        client.stream("accumulator") as stream,
    ):
        got: list[int] = []
        reader = threading.Thread(target=lambda: got.append(next(stream).step))
        reader.start()
        reader.join(timeout=0.15)  # more than reply_seconds
        assert reader.is_alive()
        stream.send(ONE)
        reader.join()
    assert got == [1]


def test_end_is_answered_with_what_is_left(server: FakeServer, client: Client) -> None:
    server.tail = True
    with client.stream("accumulator") as stream:
        stream.send(ONE)
        stream.end()
        outputs = list(stream)
        assert list(stream) == []
    assert [(output.step, output.part) for output in outputs] == [(1, 0), (1, 1)]
    assert server.left.wait(10)
    assert not server.cancelled


def test_end_half_closes(server: FakeServer, client: Client) -> None:
    with client.stream("accumulator") as stream:
        stream.end()
        assert server.half_closed.wait(10)


def test_leaving_without_end_cancels(server: FakeServer, client: Client) -> None:
    with client.stream("accumulator") as stream:
        stream.send(ONE)
        next(stream)
    assert server.left.wait(10)
    assert server.cancelled


def test_an_exception_inside_cancels_and_passes(server: FakeServer, client: Client) -> None:
    with pytest.raises(KeyError), client.stream("accumulator") as stream:
        stream.send(ONE)
        raise KeyError
    assert server.left.wait(10)
    assert server.cancelled


def test_run_sends_all_and_ends(client: Client) -> None:
    with client.stream("accumulator") as stream:
        totals = [float(output["total"][-1]) for output in stream.run([ONE] * 9)]
    assert totals == list(range(1, 10))


def test_open_carries_every_option(server: FakeServer, client: Client) -> None:
    with client.stream(
        "accumulator",
        version=3,
        period_ms=20,
        idle_seconds=60,
        constants={"gain": 2.0},
        label="kitchen",
        resume_token=b"token",
    ) as stream:
        assert (stream.sequence_id, stream.version) == ("s-1", 3)
    assert server.opens == [
        pb.Open(
            model="accumulator",
            version=3,
            period_ms=20,
            idle_seconds=60,
            constants={"gain": 2.0},
            label="kitchen",
            resume_token=b"token",
        )
    ]


def test_a_resumed_sequence_goes_on_at_its_own_step(server: FakeServer, client: Client) -> None:
    server.on_open = pb.Reply(opened=pb.Opened(next_step=8, window=1))
    with client.stream("accumulator", resume_token=b"token") as stream:
        assert stream.send(ONE) == 8
        assert next(stream).step == 8


def test_a_refused_open_is_raised_on_entering(server: FakeServer, client: Client) -> None:
    server.on_open = pb.Reply(
        failed=pb.Failed(code=8, reason="POOL_FULL", message="64 of 64 slots", retry_after_ms=250)
    )
    with pytest.raises(Overloaded, match="POOL_FULL: 64 of 64 slots") as caught:
        client.stream("accumulator").__enter__()
    assert caught.value.retry_after_seconds == 0.25
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert server.left.wait(10)


@pytest.mark.parametrize(
    "code,reason,kind",
    [
        (3, "WRONG_SHAPE", InvalidInput),
        (5, "UNKNOWN_MODEL", NotFound),
        (8, "TOO_LARGE", InvalidInput),
        (9, "NOT_OPEN", Refused),
        (11, "STEP_GAP", Refused),
        (13, "STATE_NOT_FINITE", SequenceFailed),
        (14, "DRAINING", Unavailable),
        (99, "NEWER", SequenceFailed),
    ],
)
def test_failed_maps_by_reason_and_code(
    server: FakeServer, client: Client, code: int, reason: str, kind: type[Exception]
) -> None:
    failed = pb.Failed(code=code, reason=reason, message="text", resume_token=b"token")
    server.on_step = {2: pb.Reply(failed=failed)}
    with client.stream("accumulator") as stream:
        stream.send(ONE)
        stream.send(ONE)
        assert next(stream).step == 1  # what came before the failure is not lost
        with pytest.raises(kind, match=f"^{reason}: text$") as caught:
            next(stream)
        assert vars(caught.value)["resume_token"] == b"token"
        with pytest.raises(kind):
            stream.send(ONE)


@pytest.mark.parametrize(
    "reason,resume_seconds",
    [
        ("IDLE_EXPIRED", 0),
        ("DRAINING", 0),
        ("WINDOW_EXCEEDED", 0),
        ("END", 0),
        ("WINDOW_EXCEEDED", 30),
        ("SUPERSEDED", 30),
        ("END", 30),
    ],
)
def test_an_ending_that_nobody_asked_for_is_raised(
    server: FakeServer, reason: str, resume_seconds: float
) -> None:
    closed = pb.Closed(reason=reason, last_step=1, resume_token=b"token")
    server.on_step = {2: pb.Reply(closed=closed)}
    with (
        Client(server.target, resume_seconds=resume_seconds) as client,
        client.stream("accumulator") as stream,
    ):
        stream.send(ONE)
        next(stream)
        stream.send(ONE)
        with pytest.raises(SequenceEnded, match=reason) as caught:
            next(stream)
    assert caught.value.reason == reason
    assert caught.value.last_step == 1
    assert caught.value.resume_token == b"token"


def test_the_end_of_the_stream_is_not_the_end_of_the_sequence(server: FakeServer) -> None:
    server.hang_up = 2
    with (
        Client(server.target, resume_seconds=0) as client,
        client.stream("accumulator") as stream,
    ):
        stream.send(ONE)
        stream.send(ONE)
        assert next(stream).step == 1
        with pytest.raises(Unavailable, match="after step 1"):
            next(stream)


def test_a_server_that_dies_is_unavailable(server: FakeServer) -> None:
    server.gate = threading.Semaphore(0)
    with (
        Client(server.target, resume_seconds=0) as client,
        client.stream("accumulator") as stream,
    ):
        stream.send(ONE)
        stop = threading.Thread(target=server.stop)
        stop.start()
        with pytest.raises(Unavailable):
            next(stream)
    server.gate.release()
    stop.join()


@pytest.mark.parametrize(
    "reply,text",
    [
        (pb.Reply(), "a kind that this client does not know"),
        (pb.Reply(sequence=4, output=pb.Output(step=1)), "for sequence 4"),
        (pb.Reply(output=pb.Output(step=7)), r"for step 7; unanswered are \[1\]"),
        (
            pb.Reply(output=pb.Output(step=1, outputs=[pb.Tensor(name="y", dtype="float32", shape=[2])])),
            r"'y' has 0 bytes, expected float32 \[2\]",
        ),
        (
            pb.Reply(output=pb.Output(step=1, outputs=[pb.Tensor(name="y", dtype="bfloat16")])),
            "'bfloat16'",
        ),
    ],
    ids=["unknown", "other_sequence", "other_step", "short", "dtype"],
)
def test_a_reply_that_makes_no_sense_is_a_protocol_error(
    server: FakeServer, client: Client, reply: pb.Reply, text: str
) -> None:
    server.on_step = {1: reply}
    with client.stream("accumulator") as stream:
        stream.send(ONE)
        with pytest.raises(ProtocolError, match=text):
            next(stream)
    assert server.left.wait(10)


def test_unread_outputs_are_bounded(server: FakeServer) -> None:
    server.window = 1
    with (
        Client(server.target, buffer_bytes=3000) as client,
        client.stream("accumulator") as stream,
    ):
        with pytest.raises(OutputsUnread, match="the limit is 3000"):
            for _ in range(100):
                stream.send(ONE)
        sent = len(server.inputs)
        assert sent < 10
        assert next(stream).step == 1
        assert stream.send(ONE) == sent + 1  # reading makes room again


def test_an_input_that_cannot_travel_uses_up_no_step(client: Client) -> None:
    with client.stream("accumulator") as stream:
        with pytest.raises(InvalidInput, match="object"):
            stream.send(np.array([None]))
        assert stream.send(ONE) == 1


def test_nothing_is_sent_after_end_or_before_entering(client: Client) -> None:
    stream = client.stream("accumulator")
    with pytest.raises(Refused, match="NOT_OPEN"):
        stream.send(ONE)
    with stream:
        stream.end()
        stream.end()
        with pytest.raises(Refused, match="NOT_OPEN"):
            stream.send(ONE)
    with pytest.raises(InvalidInput, match="once"):
        stream.__enter__()


def test_a_server_that_does_not_open_is_a_reply_timeout(server: FakeServer) -> None:
    server.hang = True
    with (
        Client(server.target, timeout_seconds=0.05) as client,
        pytest.raises(ReplyTimeout, match=r"did not open the sequence within 0\.05 s"),
    ):
        client.stream("accumulator").__enter__()


def test_no_thread_is_left(server: FakeServer, client: Client) -> None:
    server.accidents = {1: [grpc.StatusCode.UNAVAILABLE]}
    with client.stream("accumulator") as stream:
        list(stream.run([ONE]))
    with client.stream("accumulator") as stream:
        stream.send(ONE)
    assert not [t for t in threading.enumerate() if t.name == "tenuto-stream"]
    for thread in threading.enumerate():
        if thread.name.endswith("(_run)"):  # gRPC's: one a call, one a channel in use
            thread.join(10)
            assert not thread.is_alive()


def test_a_call_that_cannot_be_made_is_an_error(server: FakeServer) -> None:
    with (
        Client(server.target, credentials="none") as client,  # type: ignore[arg-type]
        pytest.raises(ProtocolError, match="the stream stopped working: .*This is a bug"),
    ):
        client.stream("accumulator").__enter__()
