"""The ordinary life of sequences on a stream, on both transports."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tenuto.serving.engine import Engine
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys

from . import running
from .running import (
    Counting,
    Gate,
    assert_nothing_is_left,
    build,
    engine_of,
    metrics_text,
    number,
    serving,
    wait_for,
)
from .wire import Conversation, array, chunk, connect, ending, opening, stub, tensor

transport = running.every_transport
Code = grpc.StatusCode


def _held(engine: Engine) -> int:
    """Chunks of a stopped engine: taken, or still in its inbox with nothing else."""
    return engine.metrics.pending_chunks + len(engine._inbox)


def kinds(replies: list[pb.Reply]) -> list[str | None]:
    return [r.WhichOneof("reply") for r in replies]


def test_a_sequence_opens_answers_its_steps_and_ends(conversation: Conversation) -> None:
    conversation.send(opening("accumulator", label="first"))
    opened = conversation.opened()
    assert (opened.version, opened.next_step, opened.window) == (1, 1, 4)
    assert len(opened.sequence_id) >= 8

    conversation.send(chunk(1, [1.0, 2.0, 3.0]))
    output = conversation.output(1)
    assert (output.part, output.last) == (0, True)
    (y,) = output.outputs
    assert (y.name, y.dtype, list(y.shape)) == ("y", "float32", [3])
    assert array(y).tolist() == [1.0, 3.0, 6.0]
    assert output.timing.batch_size == 1

    conversation.send(chunk(2, [4.0]), ending())
    assert conversation.values(2) == [10.0]
    closed = conversation.closed()
    assert (closed.reason, closed.last_step, closed.resume_token) == (pb.END, 2, b"")
    conversation.done_sending()
    assert conversation.rest() == []
    assert conversation.call.code() is Code.OK


def test_events_behind_an_open_need_not_wait_for_opened(conversation: Conversation) -> None:
    conversation.send(opening("accumulator"), chunk(1, [1.0]), chunk(2, [2.0]), ending())
    conversation.done_sending()
    assert kinds(conversation.rest()) == ["opened", "output", "output", "closed"]


def test_the_names_of_inputs_may_be_left_out_or_given(conversation: Conversation) -> None:
    conversation.send(opening("accumulator"), chunk(1, tensor([1.0], name="x")), chunk(2, [1.0]))
    conversation.opened()
    assert conversation.values(1) == [1.0]
    assert conversation.values(2) == [2.0]


def test_many_sequences_and_events_in_one_message(conversation: Conversation) -> None:
    events = []
    for n in range(50):
        events += [opening("accumulator", n), chunk(1, [n], sequence=n)]
    for n in range(50):
        events += [chunk(2, [1.0, 1.0], sequence=n), ending(n)]
    conversation.send(*events)
    conversation.done_sending()
    of: dict[int, list[pb.Reply]] = {n: [] for n in range(50)}
    for reply in conversation.rest():
        of[reply.sequence].append(reply)
    for n, own in of.items():
        assert kinds(own) == ["opened", "output", "output", "closed"]
        assert array(own[1].output.outputs[0]).tolist() == [n]
        assert array(own[2].output.outputs[0]).tolist() == [n + 1, n + 2]


def test_sequences_of_several_models_share_a_stream(conversation: Conversation) -> None:
    conversation.send(
        opening("accumulator", 1), opening("lookup", 2), opening("gain", 3, constants={"gain": 10})
    )
    conversation.send(
        chunk(1, [3.0], sequence=1),
        chunk(1, tensor([3, 2], "int64"), sequence=2),
        chunk(1, [3.0], sequence=3),
    )
    replies = [conversation.read() for _ in range(6)]
    values = {
        r.sequence: array(r.output.outputs[0]).tolist() for r in replies if r.WhichOneof("reply") == "output"
    }
    assert values == {1: [3.0], 2: [100.0, 110.0], 3: [30.0]}


def test_constants_chosen_at_open_hold_for_their_sequence_alone(
    conversation: Conversation,
) -> None:
    gains = {0: {}, 1: {"gain": 1.0}, 2: {"gain": 2.0}, 3: {"gain": 10.0}}
    conversation.send(*(opening("gain", n, constants=chosen) for n, chosen in gains.items()))
    for _ in gains:
        conversation.opened()
    for step in (1, 2):
        conversation.send(*(chunk(step, [1.0], sequence=n) for n in gains))
        replies = [conversation.read() for _ in gains]
        values = {r.sequence: array(r.output.outputs[0])[0] for r in replies}
        assert values == {0: step, 1: step, 2: 2 * step, 3: 10 * step}


def test_chunks_of_any_length_none_included_are_answered(conversation: Conversation) -> None:
    conversation.send(opening("accumulator"))
    conversation.opened()
    total = 0.0
    for step, length in enumerate([0, 1, 7, 8, 9, 0, 100, 1000, 3], start=1):
        conversation.send(chunk(step, np.ones(length).tolist()))
        output = conversation.output(step)
        got = [float(v) for out in output.outputs for v in array(out)]
        assert got == [total + i for i in range(1, length + 1)]
        total += length


def test_a_chunk_that_completes_no_frame_waits_and_what_is_left_is_padded_at_the_end(
    conversation: Conversation,
) -> None:
    # The model eats four at once, and its manifest says to pad.
    conversation.send(opening("fours"), chunk(1, [1.0, 1.0, 1.0]))
    conversation.opened()
    assert list(conversation.output(1).outputs) == []
    conversation.send(chunk(2, [1.0, 1.0, 1.0]))
    assert conversation.values(2) == [1.0, 2.0, 3.0, 4.0]
    conversation.send(ending())
    tail = conversation.output(2)
    assert (tail.part, tail.last) == (1, True)
    assert array(tail.outputs[0]).tolist() == [5.0, 6.0, 6.0, 6.0]
    closed = conversation.closed()
    assert (closed.reason, closed.last_step) == (pb.END, 2)


@pytest.mark.parametrize("model", ["accumulator", "grouped"])
def test_ragged_turns_of_many_sequences_do_not_mix(
    conversation: Conversation, server: Server, model: str
) -> None:
    rng = random.Random(5)
    numbers = range(40)
    totals = dict.fromkeys(numbers, 0.0)
    counting = Counting(server)
    conversation.send(*(opening(model, n) for n in numbers))
    for _ in numbers:
        conversation.opened()
    for step in range(1, 6):
        lengths = {n: rng.randint(1, 20) for n in numbers}
        with Gate(engine_of(server, model)) as gate:
            conversation.send(*(chunk(step, [n] * lengths[n], sequence=n) for n in numbers))
            gate.wait_for_arrival()
            gate.open()
            replies = [conversation.read() for _ in numbers]
        for reply in replies:
            n = reply.sequence
            expected = [totals[n] + n * i for i in range(1, lengths[n] + 1)]
            assert array(reply.output.outputs[0]).tolist() == expected
            totals[n] = expected[-1]
    rows = counting.rise("tenuto_batch_size_sum", model=model)
    assert rows > counting.rise("tenuto_batches_total", model=model) > 0


def test_a_stateless_model_on_a_stream_answers_each_chunk_as_a_batch(
    conversation: Conversation,
) -> None:
    conversation.send(opening("doubler"))
    assert conversation.opened().next_step == 1
    for step, rows in enumerate([1, 3, 20, 0, 8], start=1):
        batch = np.arange(2 * rows, dtype="float32").reshape(rows, 2)
        conversation.send(chunk(step, tensor(batch)))
        output = conversation.output(step)
        got = array(output.outputs[0]) if output.outputs else np.zeros((0, 2), "float32")
        assert got.tolist() == (2 * batch).tolist()
    conversation.send(ending())
    assert conversation.closed().reason == pb.END


# Endings.


def test_a_half_close_answers_what_was_accepted_and_then_ends_the_stream(
    conversation: Conversation, server: Server
) -> None:
    counting = Counting(server)
    with Gate(engine_of(server, "accumulator")) as gate:
        conversation.send(opening("accumulator", 1), opening("accumulator", 2))
        conversation.send(*(chunk(s, [1.0], sequence=n) for n in (1, 2) for s in (1, 2, 3)))
        conversation.send(ending(2))
        conversation.done_sending()
        gate.wait_for_arrival()
        gate.open()
        replies = conversation.rest()
    for n, reason in ((1, pb.STREAM_ENDED), (2, pb.END)):
        own = [r for r in replies if r.sequence == n]
        assert kinds(own) == ["opened", "output", "output", "output", "closed"]
        assert (own[-1].closed.reason, own[-1].closed.last_step) == (reason, 3)
    assert conversation.call.code() is Code.OK
    ended = {"name": "tenuto_sequences_ended_total", "model": "accumulator"}
    assert counting.rise(reason="STREAM_ENDED", **ended) == 1
    assert counting.rise(reason="END", **ended) == 1


def test_a_cancelled_stream_drops_its_work_and_is_counted_cancelled(
    channel: grpc.Channel, server: Server
) -> None:
    counting, engine = Counting(server), engine_of(server, "accumulator")
    with Gate(engine) as gate:
        with Conversation(channel) as conversation:
            conversation.send(*(opening("accumulator", n) for n in range(3)))
            for _ in range(3):
                conversation.opened()
            conversation.send(*(chunk(s, [1.0], sequence=n) for n in range(3) for s in (1, 2)))
            gate.wait_for_arrival()
            wait_for(lambda: _held(engine) == 6, "all chunks to arrive")
            queued = len(engine._inbox)
        wait_for(lambda: len(engine._inbox) == queued + 3, "the cancellation to arrive")
        gate.open()
        ended = {"model": "accumulator", "reason": "CANCELLED"}
        counting.wait_for_rise(3, "tenuto_sequences_ended_total", **ended)
    chunks = {"name": "tenuto_chunks_total", "model": "accumulator"}
    dropped = counting.rise(outcome="dropped", **chunks)
    assert dropped >= 3  # the second steps never run
    assert dropped + counting.rise(outcome="answered", **chunks) == 6


def test_a_stream_whose_deadline_passes_is_cancelled(channel: grpc.Channel, server: Server) -> None:
    counting = Counting(server)
    with Conversation(channel, timeout=0.5) as conversation:
        conversation.send(opening("accumulator"))
        conversation.opened()
        assert conversation.refused().code is Code.DEADLINE_EXCEEDED
    ended = {"model": "accumulator", "reason": "CANCELLED"}
    counting.wait_for_rise(1, "tenuto_sequences_ended_total", **ended)


def test_a_number_can_be_opened_again_after_its_end_and_starts_afresh(
    conversation: Conversation,
) -> None:
    ids = set()
    for _ in range(5):
        conversation.send(opening("accumulator", 7), chunk(1, [3.0], sequence=7), ending(7))
        ids.add(conversation.opened().sequence_id)
        assert conversation.values(1) == [3.0]
        assert conversation.closed().reason == pb.END
    assert len(ids) == 5


def test_more_unanswered_chunks_than_the_window_end_the_sequence_and_leave_its_neighbours(
    conversation: Conversation, server: Server
) -> None:
    counting, engine = Counting(server), engine_of(server, "accumulator")
    with Gate(engine) as gate:
        conversation.send(opening("accumulator", 1), opening("accumulator", 2))
        conversation.send(chunk(1, [1.0], sequence=2))
        gate.wait_for_arrival()
        conversation.send(*(chunk(s, [1.0], sequence=1) for s in range(1, 7)))
        conversation.send(chunk(2, [1.0], sequence=2), ending(1))
        wait_for(lambda: len(engine._inbox) >= 7, "the chunks to arrive")
        gate.open()
        replies = [conversation.read() for _ in range(2 + 5 + 2)]
    own = [r for r in replies if r.sequence == 1]
    assert kinds(own) == ["opened", *["output"] * 4, "closed"]
    closed = own[-1].closed
    assert (closed.reason, closed.last_step) == (pb.WINDOW_EXCEEDED, 4)
    others = [r for r in replies if r.sequence == 2]
    assert [array(r.output.outputs[0])[0] for r in others[1:]] == [1.0, 2.0]
    ended = {"model": "accumulator", "reason": "WINDOW_EXCEEDED"}
    assert counting.rise("tenuto_sequences_ended_total", **ended) == 1
    dropped = {"model": "accumulator", "outcome": "dropped"}
    assert counting.rise("tenuto_chunks_total", **dropped) == 2


def test_a_silent_sequence_expires_and_a_busy_one_does_not(toy_repository: Path, transport: str) -> None:
    with (
        serving(toy_repository, transport=transport, idle_seconds=0.6) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        counting = Counting(server)
        conversation.send(opening("accumulator", 1), opening("accumulator", 2))
        conversation.send(chunk(1, [1.0], sequence=1))
        step, closed = 0, None
        while closed is None:  # 2 is never silent: it sends as soon as it is answered
            reply = conversation.read()
            if reply.sequence == 2:
                if reply.WhichOneof("reply") == "checkpoint":
                    continue
                assert reply.WhichOneof("reply") in ("opened", "output")
                step += 1
                conversation.send(chunk(step, [1.0], sequence=2))
            elif reply.WhichOneof("reply") == "closed":
                closed = reply.closed
        assert (closed.reason, closed.last_step) == (pb.IDLE_EXPIRED, 1)
        # What comes late for it is ignored; the stream lives on, and so does its number.
        conversation.send(chunk(2, [1.0], sequence=1), opening("doubler", 1), ending(1), ending(2))
        rest = [conversation.read() for _ in range(4)]
        assert [r.sequence for r in rest if r.WhichOneof("reply") == "opened"] == [1]
        ended = {"model": "accumulator", "reason": "IDLE_EXPIRED"}
        assert counting.rise("tenuto_sequences_ended_total", **ended) == 1
        conversation.done_sending()
        assert conversation.rest() == []
        assert_nothing_is_left(server)


def test_a_stream_that_carries_nothing_is_ended_and_one_that_does_is_not(
    toy_repository: Path, transport: str
) -> None:
    with (
        serving(toy_repository, transport=transport, idle_seconds=2.0) as server,
        connect(server.port) as channel,
        Conversation(channel) as silent,
        Conversation(channel) as emptied,
        Conversation(channel) as busy,
    ):
        emptied.send(opening("accumulator"), ending())
        emptied.opened()
        emptied.closed()
        busy.send(opening("accumulator"), chunk(1, [1.0]))
        busy.opened()
        busy.output(1)
        step = 1
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(one.refused) for one in (silent, emptied)]
            while not all(future.done() for future in waiting):
                step += 1
                busy.send(chunk(step, [1.0]))
                assert busy.values(step) == [float(step)]
        ended = [future.result() for future in waiting]
        assert {(r.code, r.reason) for r in ended} == {(grpc.StatusCode.UNAVAILABLE, "STREAM_IDLE")}
        assert "no sequence for 2 s" in ended[0].text
        busy.send(ending())
        busy.closed()
        busy.done_sending()
        assert busy.rest() == []
        assert_nothing_is_left(server)


def test_a_client_may_ask_for_a_shorter_idle_time(conversation: Conversation) -> None:
    conversation.send(opening("accumulator", idle_seconds=1))
    conversation.opened()
    closed = conversation.closed()
    assert (closed.reason, closed.last_step) == (pb.IDLE_EXPIRED, 0)


def test_a_full_pool_refuses_at_once_and_takes_again_what_was_freed(tmp_path: Path, transport: str) -> None:
    toys.write(tmp_path, "accumulator", toys.accumulator())
    toys.write(tmp_path, "doubler", toys.doubler())
    with (
        serving(tmp_path, transport=transport, max_sequences=3) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        counting = Counting(server)
        for model in ("accumulator", "doubler"):
            conversation.send(*(opening(model, n) for n in range(4)))
            for _ in range(3):
                conversation.opened()
            failed = conversation.failed("POOL_FULL")
            assert failed.code == Code.RESOURCE_EXHAUSTED.value[0]
            assert "3 sequence" in failed.message
            assert failed.retry_after_ms > 0
            rejected = {"model": model, "reason": "POOL_FULL"}
            assert counting.rise("tenuto_admission_rejections_total", **rejected) == 1
            conversation.send(ending(1))
            assert conversation.closed().reason == pb.END
            conversation.send(opening(model, 3))
            conversation.opened()
            conversation.send(ending(0), ending(2), ending(3))
            for _ in range(3):
                conversation.closed()
        conversation.done_sending()
        assert conversation.rest() == []
        assert_nothing_is_left(server)


def test_a_slot_that_is_handed_on_is_clean(tmp_path: Path, transport: str) -> None:
    toys.write(tmp_path, "accumulator", toys.accumulator())
    with (
        serving(tmp_path, transport=transport, max_sequences=2) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        for _ in range(10):
            conversation.send(opening("accumulator"), chunk(1, [1e6]), ending())
            conversation.opened()
            assert conversation.values(1) == [1e6]
            conversation.closed()


def test_declared_periods_are_held_against_the_answers(conversation: Conversation, server: Server) -> None:
    counting, engine = Counting(server), engine_of(server, "accumulator")
    with Gate(engine) as gate:
        conversation.send(opening("accumulator", period_ms=1), chunk(1, [1.0]))
        gate.wait_for_arrival()
        late = engine._clock() + 0.002
        wait_for(lambda: engine._clock() > late, "the period to pass")
        gate.open()
        conversation.opened()
        conversation.output(1)
    assert counting.rise("tenuto_deadline_misses_total", model="accumulator") == 1
    assert counting.rise("tenuto_chunk_lag_seconds_count", model="accumulator") == 1


def test_a_server_that_answers_too_late_refuses_newcomers_alone(tmp_path: Path, transport: str) -> None:
    """On a clock that the test moves: while a run stands before the gate, 50 s pass for the engine."""
    toys.write(tmp_path, "accumulator", toys.accumulator())
    toys.write(tmp_path, "doubler", toys.doubler())
    with (
        serving(tmp_path, transport=transport, idle_seconds=0) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        counting, engine = Counting(server), engine_of(server, "accumulator")
        now = time.monotonic() + 100.0
        engine._clock = engine._population._clock = lambda: now
        conversation.send(opening("accumulator", 1, period_ms=100))
        conversation.opened()
        with Gate(engine) as gate:
            conversation.send(chunk(1, [1.0], sequence=1))
            gate.wait_for_arrival()
            now += 50.0
            gate.open()
            assert conversation.values(1) == [1.0]
            conversation.send(opening("accumulator", 2))
            failed = conversation.failed("OVERLOADED")
            assert failed.code == Code.RESOURCE_EXHAUSTED.value[0]
            assert "accumulator/1 was busy for 100% of the last second" in failed.message
            assert failed.retry_after_ms == 1000
            conversation.send(opening("doubler", 3))
            conversation.opened()  # another model, another engine
        rejected = {"model": "accumulator", "reason": "OVERLOADED"}
        assert counting.rise("tenuto_admission_rejections_total", **rejected) == 1
        assert number(metrics_text(server), "tenuto_engine_busy_ratio", model="accumulator") == 1.0
        conversation.send(chunk(2, [1.0], sequence=1))
        assert conversation.values(2) == [2.0]
        wait_for(lambda: not engine._admission._turn, "the end of the turn")
        now += 50.0
        conversation.send(opening("accumulator", 2))
        conversation.opened()
        conversation.send(ending(1), ending(2), ending(3))
        assert [conversation.closed().reason for _ in range(3)] == [pb.END] * 3
        conversation.done_sending()
        assert conversation.rest() == []
        assert_nothing_is_left(server)


# Operators.


def test_operators_see_the_live_sequences_and_may_end_one(
    channel: grpc.Channel, conversation: Conversation
) -> None:
    api: Any = stub(channel)
    conversation.send(
        opening("accumulator", 1, label="kitchen"), opening("gain", 2), chunk(1, [1.0], sequence=1)
    )
    ids: dict[int, str] = {}
    for _ in range(3):
        reply = conversation.read()
        if reply.WhichOneof("reply") == "opened":
            ids[reply.sequence] = reply.opened.sequence_id
    listed = list(api.ListSequences(pb.ListSequencesRequest()).sequences)
    assert sorted(s.sequence_id for s in listed) == sorted(ids.values())
    (kitchen,) = api.ListSequences(pb.ListSequencesRequest(model="accumulator")).sequences
    assert (kitchen.sequence_id, kitchen.label) == (ids[1], "kitchen")
    assert (kitchen.model, kitchen.version, kitchen.last_step) == ("accumulator", 1, 1)
    assert kitchen.age_seconds >= kitchen.idle_seconds >= 0

    api.EndSequence(pb.EndSequenceRequest(sequence_id=ids[1]))
    reply = conversation.read()
    assert (reply.sequence, reply.closed.reason) == (1, pb.EVICTED)
    assert reply.closed.last_step == 1
    (left,) = api.ListSequences(pb.ListSequencesRequest()).sequences
    assert left.model == "gain"


def test_a_server_may_tell_of_its_leaving_before_it_refuses_anybody(toy_repository: Path) -> None:
    """Not ready, and taking new sequences: whoever looks at its health now and then has the time to."""
    server = build(toy_repository, drain_notice_seconds=3600.0)
    server.start()
    stopping = threading.Thread(target=server.stop, args=(0.0,))
    with connect(server.port) as channel:
        stopping.start()
        health: Any = health_pb2_grpc.HealthStub(channel)
        ready = health_pb2.HealthCheckRequest(service="readiness")
        wait_for(
            lambda: health.Check(ready, timeout=30).status == health_pb2.HealthCheckResponse.NOT_SERVING,
            "readiness to be off",
        )
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            conversation.opened()
            assert conversation.values(1) == [1.0]
        assert not server.metrics.draining
        server._stopped.set()  # the notice is over
        stopping.join(30)
    assert server.metrics.draining
