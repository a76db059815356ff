"""What streams are promised, on both transports: bugs stay in their stream, what waits is bounded."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto.serving import server as server_module
from tenuto.serving.server import Server
from tenuto.serving.stream import StreamLimits
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys

from . import running
from .running import (
    Counting,
    Gate,
    assert_nothing_is_left,
    engine_of,
    serving,
    wait_for,
)
from .wire import (
    STREAM,
    Conversation,
    array,
    chunk,
    connect,
    ending,
    opening,
    refused,
    stub,
    tensor,
)

transport = running.every_transport
Code = grpc.StatusCode
Opener = Callable[[Any], Any]


@contextmanager
def opening_with(server: Server, wrap: Callable[[Opener], Opener]) -> Iterator[None]:
    """Streams that begin in here are opened by `wrap(the server's own opener)`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server._conversations, "open", wrap(server._conversations.open))
        yield


@pytest.fixture
def calls(server: Server) -> Iterator[list[Any]]:
    """The server's own call objects of the streams that begin during the test."""
    seen: list[Any] = []

    def wrap(own: Opener) -> Opener:
        def opener(call: Any) -> Any:
            seen.append(call)
            return own(call)

        return opener

    with opening_with(server, wrap):
        yield seen
    seen.clear()


def assert_serves(channel: grpc.Channel) -> None:
    """The server is alive and right."""
    with Conversation(channel) as conversation:
        conversation.send(opening("accumulator"), chunk(1, [1.0, 2.0]), chunk(2, [3.0]), ending())
        conversation.opened()
        assert conversation.values(1) == [1.0, 3.0]
        assert conversation.values(2) == [6.0]
        assert conversation.closed().reason == pb.END
    answer = stub(channel).Predict(
        pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2], [3, 4]])]), timeout=30
    )
    assert array(answer.outputs[0]).tolist() == [[2, 4], [6, 8]]


def start_of_sequences(count: int) -> list[pb.Event]:
    return [opening("accumulator", n) for n in range(count)]


# Replies that wait.


def test_replies_that_queue_for_a_slow_reader_arrive_all_and_in_order(
    conversation: Conversation, server: Server
) -> None:
    counting = Counting(server)
    sequences = 100
    conversation.send_apart(*start_of_sequences(sequences))
    for step in range(1, 5):  # as many as the window takes; nothing is read meanwhile
        conversation.send_apart(*(chunk(step, [n], sequence=n) for n in range(sequences)))
    answered = {"model": "accumulator", "outcome": "answered"}
    counting.wait_for_rise(4 * sequences, "tenuto_chunks_total", **answered)
    conversation.done_sending()

    replies = conversation.rest()

    of: dict[int, list[pb.Reply]] = {}
    for reply in replies:
        of.setdefault(reply.sequence, []).append(reply)
    assert sorted(of) == list(range(sequences))
    for n, own in of.items():
        assert own[0].WhichOneof("reply") == "opened"
        assert [r.output.step for r in own[1:-1]] == [1, 2, 3, 4]
        assert [array(r.output.outputs[0])[0] for r in own[1:-1]] == [n, 2 * n, 3 * n, 4 * n]
        assert own[-1].closed.reason == pb.STREAM_ENDED


# Bugs in a listener stay in its stream.


class _Raising:
    """A listener that passes everything on, but for one method, which raises."""

    def __init__(self, own: Any, method: str) -> None:
        self._own = own
        self._method = method

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            raise ZeroDivisionError(f"a bug in {name}")
        return getattr(self._own, name)


@pytest.mark.parametrize("method", ["received", "half_closed", "wait"])
def test_a_listener_that_raises_loses_its_stream_alone(
    channel: grpc.Channel,
    server: Server,
    conversation: Conversation,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    conversation.send(opening("accumulator"), chunk(1, [1.0]))
    conversation.opened()
    assert conversation.values(1) == [1.0]
    with (
        opening_with(server, lambda own: lambda call: _Raising(own(call), method)),
        Conversation(channel) as unlucky,
    ):
        unlucky.send(opening("accumulator"))
        unlucky.done_sending()
        assert unlucky.refused().code is Code.CANCELLED
    assert "a message met a bug; its stream is cancelled" in caplog.text
    assert "a bug in" in caplog.text
    conversation.send(chunk(2, [1.0]))
    assert conversation.values(2) == [2.0]
    assert_serves(channel)


def test_a_listener_that_raises_at_its_end_leaves_the_server_alive(
    channel: grpc.Channel, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        opening_with(server, lambda own: lambda call: _Raising(own(call), "terminated")),
        Conversation(channel) as unlucky,
    ):
        unlucky.send(opening("accumulator"), ending())
        unlucky.done_sending()
        unlucky.rest()
        wait_for(lambda: "a bug in terminated" in caplog.text, "the log to say so")
    assert_serves(channel)


def test_an_opener_that_raises_gives_its_place_back(channel: grpc.Channel, server: Server) -> None:
    def broken(_call: Any) -> Any:
        raise ZeroDivisionError("a bug in the opener")

    with opening_with(server, lambda _: broken), Conversation(channel) as unlucky:
        unlucky.send(opening("accumulator"))
        assert unlucky.refused().code is Code.UNKNOWN
    wait_for(lambda: server.metrics.open_streams() == 0, "its place to come back")
    assert_serves(channel)


# Endings.


def test_finishing_a_call_again_and_again_is_harmless(
    channel: grpc.Channel, calls: list[Any], conversation: Conversation
) -> None:
    conversation.send(opening("accumulator"))
    conversation.opened()
    (call,) = calls
    together = threading.Barrier(8)

    def finish(code: grpc.StatusCode) -> None:
        together.wait(30)
        for _ in range(20):
            call.finish(code, "the first one counts")
            call.send(b"")
            call.cancel()

    codes = [Code.ABORTED, Code.OK] * 4
    threads = [threading.Thread(target=finish, args=(code,)) for code in codes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with suppress(grpc.RpcError):  # or the end, if OK was the first
        conversation.rest()
    assert conversation.call.code() in (Code.OK, Code.ABORTED, Code.CANCELLED)
    call.finish(Code.INTERNAL, "too late")
    call.send(b"too late")
    call.cancel()
    assert_serves(channel)


def test_what_was_queued_before_the_end_arrives_before_it(
    calls: list[Any], conversation: Conversation
) -> None:
    conversation.send(opening("accumulator"))
    conversation.opened()
    (call,) = calls
    for n in range(500):
        reply = pb.Reply(sequence=n, output=pb.Output(step=n))
        call.send(pb.StreamResponse(replies=[reply]).SerializeToString())
    call.finish(Code.ABORTED, "five hundred first")
    call.send(b"not after the end")
    assert [conversation.read().output.step for _ in range(500)] == list(range(500))
    refusal = conversation.refused()
    assert (refusal.code, refusal.text) == (Code.ABORTED, "five hundred first")


def test_a_half_close_right_behind_the_end_loses_no_reply(channel: grpc.Channel) -> None:
    # The last reply and the end of the call are made on two threads.
    for _ in range(200):
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            conversation.opened()
            conversation.output(1)
            conversation.send(ending())
            conversation.done_sending()
            assert [r.closed.reason for r in conversation.rest()] == [pb.END]


@pytest.mark.parametrize("how", ["end", "half-close", "cancel", "abort"])
def test_a_stream_that_is_over_is_freed_without_the_collector(
    channel: grpc.Channel, server: Server, transport: str, how: str
) -> None:
    if (transport, how) == ("threads", "cancel"):
        pytest.skip("gRPC's own request iterator keeps its exception in a cycle")
    alive: list[weakref.ref[Any]] = []

    def wrap(own: Opener) -> Opener:
        def opener(call: Any) -> Any:
            listener = own(call)
            alive.extend((weakref.ref(call), weakref.ref(listener)))
            return listener

        return opener

    gc.collect()
    gc.disable()
    try:
        with opening_with(server, wrap), Conversation(channel) as conversation:
            conversation.send(opening("accumulator"))
            conversation.opened()
            for step in range(1, 5):  # alike, so that the last ones are expected
                conversation.send(chunk(step, [1.0]))
                conversation.output(step)
            if how == "end":
                conversation.send(ending())
                assert conversation.closed().reason == pb.END
            if how == "abort":
                conversation.send_bytes(b"\xff")
                conversation.refused()
            elif how != "cancel":
                conversation.done_sending()
                conversation.rest()
        wait_for(lambda: not any(ref() for ref in alive), "the stream to be freed")
    finally:
        gc.enable()
    assert len(alive) == 2


# Admission.


def test_one_stream_more_than_allowed_is_refused_at_once_and_places_come_back(
    toy_repository: Path, transport: str
) -> None:
    with (
        serving(toy_repository, transport=transport, max_streams=3) as server,
        connect(server.port) as channel,
    ):
        counting = Counting(server)
        streams = [Conversation(channel) for _ in range(3)]
        for one in streams:
            one.send(opening("accumulator"))
            one.opened()
        for _ in range(5):
            with Conversation(channel) as one_more:
                one_more.send(opening("accumulator"))
                refusal = one_more.refused()
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "POOL_FULL")
            assert "3 streams are open" in refusal.text
            assert "--max-streams" in refusal.text
            assert refusal.retry_after_ms > 0
        assert counting.rise("tenuto_streams_refused_total") == 5
        assert counting.rise("tenuto_open_streams") == 3
        with streams.pop():
            pass
        wait_for(lambda: server.metrics.open_streams() == 2, "the place to come back")
        assert_serves(channel)
        for one in streams:
            one.send(chunk(1, [4.0]))
            assert one.values(1) == [4.0]
            with one:
                pass
        assert_nothing_is_left(server)


# One stream, many sequences.


def test_one_stream_with_many_sequences_fills_batches_though_each_message_holds_one_event(
    conversation: Conversation, server: Server
) -> None:
    engine, sequences = engine_of(server, "accumulator"), 200
    counting = Counting(server)
    conversation.send_apart(*start_of_sequences(sequences))
    for _ in range(sequences):
        conversation.opened()
    with Gate(engine) as gate:
        conversation.send_apart(*(chunk(1, [n, 1.0], sequence=n) for n in range(sequences)))
        gate.wait_for_arrival()
        # All others are read although none is answered yet.
        wait_for(
            lambda: engine.metrics.pending_chunks + len(engine._inbox) == sequences,
            "all chunks to be read",
        )
        gate.open()
        replies = [conversation.read() for _ in range(sequences)]
    for reply in replies:
        assert array(reply.output.outputs[0]).tolist() == [reply.sequence, reply.sequence + 1]
    assert max(r.output.timing.batch_size for r in replies) == engine.manifest.max_batch
    count = counting.rise("tenuto_batch_size_count", model="accumulator")
    assert counting.rise("tenuto_batch_size_sum", model="accumulator") == sequences
    assert count <= 6  # 64 rows at most, and one batch or two before the gate


# Calls that go away.


def test_streams_cancelled_in_mid_flight_leave_nothing_behind(channel: grpc.Channel, server: Server) -> None:
    counting, streams = Counting(server), 300
    for n in range(streams):
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, np.ones(50).tolist()))
            conversation.send(chunk(2, np.ones(50).tolist()))
            for _ in range(n % 4):  # some at once, some after their first replies
                conversation.read()
    assert_nothing_is_left(server)
    started = counting.rise("tenuto_sequences_started_total", model="accumulator")
    ended = counting.rise("tenuto_sequences_ended_total", model="accumulator", reason="CANCELLED")
    # Some calls were gone before the server saw them.
    assert 0 < started == ended <= streams
    assert_serves(channel)


def test_unary_calls_that_give_up_leave_nothing_behind(channel: grpc.Channel, server: Server) -> None:
    api = stub(channel)
    request = pb.PredictRequest(model="doubler", inputs=[tensor(np.ones((3, 2)))])
    for n in range(200):
        future = api.Predict.future(request, timeout=0.0002)
        if n % 2:
            future.cancel()
        with suppress(grpc.FutureCancelledError, grpc.RpcError):
            assert array(future.result().outputs[0]).tolist() == [[2, 2]] * 3
        assert future.code() in (Code.OK, Code.DEADLINE_EXCEEDED, Code.CANCELLED)
    assert_nothing_is_left(server)
    assert_serves(channel)


def test_empty_streams_end_well(channel: grpc.Channel) -> None:
    for _ in range(20):
        with Conversation(channel) as conversation:
            conversation.done_sending()
            assert conversation.rest() == []


# Callers that do not read, and more than the process may hold.


def big_accumulator(root: Path) -> Path:
    toys.write(root, "accumulator", toys.accumulator(max_frames=65536))
    toys.write(root, "doubler", toys.doubler())
    return root


class Unread:
    """A client that sends until its stream is read no more, and takes no reply meanwhile."""

    def __init__(self, server: Server, channel: grpc.Channel) -> None:
        self._counting = Counting(server)
        self.samples = np.ones(16384, np.float32)
        self.sequences = 0
        self.chunks_sent = 0
        self.calls: list[Any] = []
        with opening_with(server, self._wrap):
            self.conversation = Conversation(channel)
            wait_for(lambda: bool(self.calls), "the stream to open")

    def _wrap(self, own: Opener) -> Opener:
        def opener(call: Any) -> Any:
            self.calls.append(call)
            return own(call)

        return opener

    @property
    def answered(self) -> float:
        return self._counting.rise("tenuto_chunks_total", model="accumulator", outcome="answered")

    @property
    def held(self) -> bool:
        return bool(self.calls[0]._held)

    def send_sequence(self) -> None:
        """Four chunks, as many as the window takes, each in a message of its own."""
        self.conversation.send(opening("accumulator", self.sequences))
        for step in range(1, 5):
            self.conversation.send(chunk(step, tensor(self.samples), sequence=self.sequences))
        self.conversation.send(ending(self.sequences))
        self.sequences += 1
        self.chunks_sent += 4

    def send_until_held(self) -> None:
        for _ in range(200):
            self.send_sequence()
            wait_for(lambda: self.held or self.answered == self.chunks_sent, "answers, or a pause")
            if self.held:
                return
        raise AssertionError("200 sequences were read though no reply was taken")


def test_a_client_that_never_reads_is_not_read_on_and_in_the_end_cancelled(
    tmp_path: Path, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with (
        serving(big_accumulator(tmp_path), transport=transport, idle_seconds=1.0) as server,
        connect(server.port) as channel,
        connect(server.port) as other_channel,
    ):
        deaf = Unread(server, channel)
        with deaf.conversation:
            # It never ends, so that it is idle one day.
            deaf.conversation.send(opening("accumulator", 999))
            deaf.send_until_held()
            outbox = deaf.calls[0]._outbox
            # What the engine held when reading stopped is on top: at most one sequence's chunks.
            assert outbox.bytes <= outbox.limit_bytes + 4 * (deaf.samples.nbytes + 100)
            for _ in range(100):
                deaf.send_sequence()
            assert_serves(other_channel)
            assert outbox.bytes <= outbox.limit_bytes + 4 * (deaf.samples.nbytes + 100)
            assert deaf.answered < deaf.chunks_sent - 300
            # Silent for too long, it ends; and since it takes nothing, its stream is cancelled.
            wait_for(lambda: "leaves its replies untaken" in caplog.text, "the stream's end")
            assert_nothing_is_left(server)
            assert deaf.conversation.refused().code is Code.CANCELLED
        ended = server.metrics.models[0].ended
        assert ended["IDLE_EXPIRED"] >= 1
        assert_serves(other_channel)
        deaf.calls.clear()


def test_a_slow_reader_is_read_on_once_it_takes_its_replies(tmp_path: Path, transport: str) -> None:
    with (
        serving(big_accumulator(tmp_path), transport=transport) as server,
        connect(server.port) as channel,
    ):
        slow = Unread(server, channel)
        with slow.conversation:
            slow.send_until_held()
            for _ in range(5):
                slow.send_sequence()
            slow.conversation.done_sending()
            replies = slow.conversation.rest()
        outputs = [r for r in replies if r.WhichOneof("reply") == "output"]
        assert len(outputs) == slow.chunks_sent
        for reply in outputs:
            last = array(reply.output.outputs[0])[-1]
            assert last == reply.output.step * len(slow.samples)
        closed = [r.closed for r in replies if r.WhichOneof("reply") == "closed"]
        assert [c.reason for c in closed] == [pb.END] * slow.sequences
        assert_nothing_is_left(server)
        slow.calls.clear()


def test_above_the_pending_limit_no_stream_is_read_and_then_all_is_answered(
    toy_repository: Path, transport: str
) -> None:
    limit = 64 << 10
    samples = np.ones(5000, np.float32)
    with (
        serving(toy_repository, transport=transport, max_pending_bytes=limit) as server,
        connect(server.port) as channel,
        Conversation(channel) as first,
        Conversation(channel) as second,
    ):
        engine = engine_of(server, "accumulator")
        second.send(opening("accumulator"))
        second.opened()
        first.send(opening("accumulator"))
        first.opened()
        with Gate(engine) as gate:
            for step in range(1, 5):
                first.send(chunk(step, tensor(samples)))
            first.send(opening("accumulator", 7), chunk(1, [5.0], sequence=7), ending(7))
            wait_for(lambda: len(server._pending._waiting) == 1, "the first stream to be paused")
            gate.wait_for_arrival()
            # This message was asked for before; the one after it is not.
            second.send(chunk(1, [1.0]))
            wait_for(lambda: len(server._pending._waiting) == 2, "the second stream to be paused")
            second.send(chunk(2, [1.0]), ending())
            assert limit < server.metrics.pending_bytes() < limit + 2 * samples.nbytes
            answer = refused(
                stub(channel).Predict,
                pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])]),
            )
            assert (answer.code, answer.reason) == (Code.RESOURCE_EXHAUSTED, "POOL_FULL")
            assert "bytes are pending" in answer.text
            assert answer.retry_after_ms > 0
            assert engine.metrics.pending_chunks + len(engine._inbox) == 5
            gate.open()
            replies = [first.read() for _ in range(7)]
            sums = [(r.output.step, array(r.output.outputs[0])[-1]) for r in replies
                    if r.sequence == 0]  # fmt: skip
            assert sums == [(step, step * len(samples)) for step in range(1, 5)]
            opened, output, closed = (r for r in replies if r.sequence == 7)
            assert opened.opened.next_step == 1
            assert array(output.output.outputs[0]).tolist() == [5.0]
            assert closed.closed.reason == pb.END
            assert second.values(1) == [1.0]
            assert second.values(2) == [2.0]
            assert second.closed().reason == pb.END
    assert_nothing_is_left(server)


def test_the_stream_method_is_found_under_its_full_name(channel: grpc.Channel) -> None:
    call: Any = channel.stream_stream(STREAM)
    assert list(call(iter([]), timeout=30)) == []


def test_one_stream_is_read_on_only_while_little_of_it_is_unanswered(
    toy_repository: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many sequences, none over its window: the rest waits at the client, and everything is answered."""
    limit, sequences = 100_000, 40
    monkeypatch.setattr(
        server_module,
        "StreamLimits",
        lambda *of, **more: replace(StreamLimits(*of, **more), unanswered_bytes=limit),
    )
    samples = np.ones(2_000, np.float32)
    with (
        serving(toy_repository, transport=transport) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
        Conversation(channel) as neighbour,
    ):
        engine = engine_of(server, "accumulator")
        conversation.send(*start_of_sequences(sequences))
        for n in range(sequences):
            assert conversation.opened().next_step == 1, n
        with Gate(engine) as gate:
            for step in (1, 2):
                conversation.send_apart(*(chunk(step, tensor(samples), sequence=n) for n in range(sequences)))
            gate.wait_for_arrival()
            wait_for(lambda: server.metrics.pending_bytes() > limit, "the stream to be full")
            neighbour.send(opening("doubler"), chunk(1, tensor([[1, 2]])), ending())
            neighbour.opened()
            assert array(neighbour.output(1).outputs[0]).tolist() == [[2, 4]]
            assert server.metrics.pending_bytes() < 2 * limit
            gate.open()
            sums: dict[tuple[int, int], float] = {}
            for _ in range(2 * sequences):
                reply = conversation.read()
                sums[reply.sequence, reply.output.step] = array(reply.output.outputs[0])[-1]
        assert sums == {(n, step): step * 2_000 for n in range(sequences) for step in (1, 2)}
    assert_nothing_is_left(server)


def test_a_request_over_its_texts_still_gets_its_reason(api: Any) -> None:
    """What a client sent is quoted up to a length that gRPC's metadata can hold."""
    answer = refused(api.Predict, pb.PredictRequest(model="m" * 100_000))
    assert (answer.code, answer.reason) == (Code.NOT_FOUND, "UNKNOWN_MODEL")
    assert answer.text.startswith("no model 'mmmm")
    assert len(answer.text) < 1_100
