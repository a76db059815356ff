"""Bad input gets a clear answer, and nothing else is lost by it."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2
from PIL import Image

from tenuto.serving.server import Server
from tenuto.serving.stream import MAX_EVENTS
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys

from .running import Counting, Gate, assert_nothing_is_left, engine_of, serving, wait_for
from .wire import (
    PREDICT,
    STREAM,
    Conversation,
    array,
    checkpoint,
    chunk,
    connect,
    ending,
    opening,
    refused,
    stub,
    tensor,
    text,
)

VICTIM, NEIGHBOUR = 1, 2
INDEXED = ("lookup", "unchecked", "speaker", "reader")
Code = grpc.StatusCode
NO_PROTOBUF = b"\xff\xff\xff\xff"


def code_of(failed: pb.Failed) -> str:
    return code_pb2.Code.Name(failed.code)


# What the victim sends as its step 2, and how it ends.
FAULTS: dict[str, tuple[str, pb.Event, str, str, tuple[str, ...]]] = {
    "wrong dtype": (
        "accumulator",
        chunk(2, tensor([1, 2], "float64")),
        "WRONG_DTYPE",
        "INVALID_ARGUMENT",
        ("'x' is float64", "accepted: float32", "in step 2"),
    ),
    "no dtype": (
        "accumulator",
        chunk(2, pb.Tensor(shape=[1], data=bytes(4))),
        "WRONG_DTYPE",
        "INVALID_ARGUMENT",
        ("without a dtype", "accepted: float32"),
    ),
    "encoding that the model does not take": (
        "accumulator",
        chunk(2, pb.Tensor(dtype="png", data=b"x")),
        "WRONG_DTYPE",
        "INVALID_ARGUMENT",
        ("'x' is png", "accepted: float32"),
    ),
    "wrong rank": (
        "accumulator",
        chunk(2, tensor([[1, 2]])),
        "WRONG_SHAPE",
        "INVALID_ARGUMENT",
        ("shape [1, 2]", "expected ['time']", "in step 2"),
    ),
    "wrong fixed axis": (
        "explosive",
        chunk(2, tensor([1, 1])),
        "WRONG_SHAPE",
        "INVALID_ARGUMENT",
        ("shape [2]", "expected [1]"),
    ),
    "too few bytes": (
        "accumulator",
        chunk(2, pb.Tensor(dtype="float32", shape=[3], data=bytes(8))),
        "WRONG_SHAPE",
        "INVALID_ARGUMENT",
        ("8 bytes", "expected 12"),
    ),
    "a shape that would overflow": (
        "accumulator",
        chunk(2, pb.Tensor(dtype="float32", shape=[2**32 - 1], data=b"")),
        "WRONG_SHAPE",
        "INVALID_ARGUMENT",
        ("0 bytes", str(4 * (2**32 - 1))),
    ),
    "unknown input": (
        "accumulator",
        chunk(2, tensor([1], name="wrong")),
        "WRONG_INPUT",
        "INVALID_ARGUMENT",
        ("'wrong' is not expected", "inputs are x"),
    ),
    "input sent twice": (
        "accumulator",
        chunk(2, tensor([1], name="x"), tensor([1], name="x")),
        "WRONG_INPUT",
        "INVALID_ARGUMENT",
        ("sent twice",),
    ),
    "no input": (
        "accumulator",
        chunk(2),
        "WRONG_INPUT",
        "INVALID_ARGUMENT",
        ("input x is missing",),
    ),
    "NaN": (
        "accumulator",
        chunk(2, [1.0, float("nan")]),
        "NOT_FINITE",
        "INVALID_ARGUMENT",
        ("'x' holds NaN or Inf", "in step 2"),
    ),
    "infinity": (
        "accumulator",
        chunk(2, [float("-inf")]),
        "NOT_FINITE",
        "INVALID_ARGUMENT",
        ("'x' holds NaN or Inf",),
    ),
    "index too high": (
        "lookup",
        chunk(2, tensor([0, 9], "int64")),
        "OUT_OF_RANGE_VALUE",
        "INVALID_ARGUMENT",
        ("from 0 to 9", "allowed are [0, 3]", "in step 2"),
    ),
    "index too low": (
        "lookup",
        chunk(2, tensor([-1], "int64")),
        "OUT_OF_RANGE_VALUE",
        "INVALID_ARGUMENT",
        ("from -1 to -1",),
    ),
    "a step skipped": (
        "accumulator",
        chunk(3, [1.0]),
        "STEP_GAP",
        "OUT_OF_RANGE",
        ("step 3 came", "expected 2"),
    ),
    "step 0": (
        "accumulator",
        chunk(0, [1.0]),
        "STEP_GAP",
        "OUT_OF_RANGE",
        ("step 0 came", "expected 2"),
    ),
    "text for a model of numbers": (
        "accumulator",
        chunk(2, text("one")),
        "WRONG_DTYPE",
        "INVALID_ARGUMENT",
        ("'x' is utf8", "accepted: float32"),
    ),
    "no UTF-8": (
        "speaker",
        chunk(2, text(b"ab\xff")),
        "WRONG_ENCODING",
        "INVALID_ARGUMENT",
        ("byte 2 (0xff)", "encode it as UTF-8", "in step 2"),
    ),
    "a character that the model has not": (
        "speaker",
        chunk(2, text("abd")),
        "OUT_OF_RANGE_VALUE",
        "INVALID_ARGUMENT",
        ("character 3 of the text is 'd' (U+0064)", "of the 8 of the model's alphabet", "in step 2"),
    ),
    "a text with a shape": (
        "speaker",
        chunk(2, pb.Tensor(dtype="utf8", shape=[2], data=b"ab")),
        "WRONG_SHAPE",
        "INVALID_ARGUMENT",
        ("a text has shape [2], expected []",),
    ),
    "a long text": (
        "reader",
        chunk(2, text("a" * 65_537)),
        "TOO_LARGE",
        "RESOURCE_EXHAUSTED",
        ("a text of 65537 bytes, the limit is 65536", "send several chunks"),
    ),
    "a wrong dtype for text": (
        "speaker",
        chunk(2, [1.0]),
        "WRONG_DTYPE",
        "INVALID_ARGUMENT",
        ("'id' is float32", "accepted: int64, utf8"),
    ),
    "too much at once": (
        "speaker",
        chunk(2, text("a"), generate=4097),
        "TOO_LARGE",
        "RESOURCE_EXHAUSTED",
        ("generate is 4097, the limit is 4096 (--max-generate)", "in step 2"),
    ),
    "nothing to run": (
        "speaker",
        chunk(2),
        "WRONG_INPUT",
        "INVALID_ARGUMENT",
        ("input id is missing",),
    ),
    "generate": (
        "accumulator",
        chunk(2, [1.0], generate=3),
        "NOT_SUPPORTED",
        "UNIMPLEMENTED",
        ("'accumulator' does not generate", "leave generate at 0"),
    ),
    "an event with nothing in it": (
        "accumulator",
        pb.Event(),
        "WRONG_MESSAGE",
        "INVALID_ARGUMENT",
        ("Event without open, chunk, checkpoint or end",),
    ),
    "open twice": (
        "accumulator",
        opening("accumulator"),
        "ALREADY_OPEN",
        "FAILED_PRECONDITION",
        ("sequence 1 is open", "end it first"),
    ),
}


def _input(model: str, *values: float) -> pb.Tensor:
    return tensor(values, "int64" if model in INDEXED else "float32")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_its_sequence_alone_and_its_number_can_be_opened_again(
    conversation: Conversation, server: Server, fault: str
) -> None:
    model, event, reason, code, fragments = FAULTS[fault]
    counting = Counting(server)
    bad = pb.Event.FromString(event.SerializeToString())
    bad.sequence = VICTIM
    conversation.send(opening(model, VICTIM), opening("accumulator", NEIGHBOUR))
    conversation.send(chunk(1, _input(model, 1), sequence=VICTIM), chunk(1, [5.0], sequence=NEIGHBOUR))
    conversation.send(bad, chunk(2, [6.0], sequence=NEIGHBOUR), ending(NEIGHBOUR))
    # What still comes for the victim's number is ignored until it is opened again.
    conversation.send(chunk(3, _input(model, 1), sequence=VICTIM), ending(VICTIM))

    replies = [conversation.read() for _ in range(7)]

    of = {n: [r for r in replies if r.sequence == n] for n in (VICTIM, NEIGHBOUR)}
    kinds = {n: [r.WhichOneof("reply") for r in own] for n, own in of.items()}
    assert kinds[VICTIM] == ["opened", "output", "failed"]
    assert kinds[NEIGHBOUR] == ["opened", "output", "output", "closed"]
    failed = of[VICTIM][-1].failed
    assert (failed.reason, code_of(failed)) == (reason, code)
    for fragment in fragments:
        assert fragment in failed.message
    assert failed.retry_after_ms == 0
    sums = [array(r.output.outputs[0]).tolist() for r in of[NEIGHBOUR][1:3]]
    assert sums == [[5.0], [11.0]]

    conversation.send(opening("accumulator", VICTIM), chunk(1, [7.0], sequence=VICTIM), ending(VICTIM))
    conversation.opened()
    assert conversation.values(1) == [7.0]
    assert conversation.closed().reason == pb.END
    assert counting.rise("tenuto_sequences_ended_total", model=model, reason="FAILED") == 1


OPENINGS: dict[str, tuple[pb.Event, str, str, tuple[str, ...]]] = {
    "unknown model": (
        opening("accumulato"),
        "UNKNOWN_MODEL",
        "NOT_FOUND",
        ("no model 'accumulato' here", "accumulator, "),
    ),
    "no model": (opening(""), "UNKNOWN_MODEL", "NOT_FOUND", ("no model ''",)),
    "unknown version": (
        opening("accumulator", version=7),
        "UNKNOWN_MODEL",
        "NOT_FOUND",
        ("no version 7", "it serves 1"),
    ),
    "resume token": (
        opening("accumulator", resume_token=b"token"),
        "TOKEN_INVALID",
        "FAILED_PRECONDITION",
        ("5 bytes are no resume token", "send it as it came"),
    ),
    "a resume token of another key": (
        opening("accumulator", resume_token=bytes([1]) + bytes(200)),
        "TOKEN_INVALID",
        "FAILED_PRECONDITION",
        ("changed on its way", "the same --token-key-file"),
    ),
    "sampling of a model that does not generate": (
        opening("accumulator", sampling=pb.Sampling(seed=1)),
        "WRONG_SETTING",
        "INVALID_ARGUMENT",
        ("'accumulator' does not generate", "leave sampling out"),
    ),
    "a temperature of less than nothing": (
        opening("speaker", sampling=pb.Sampling(temperature=-1)),
        "WRONG_SETTING",
        "INVALID_ARGUMENT",
        ("temperature is -1", "set top_k to 1"),
    ),
    "the best of what is drawn by itself": (
        opening("player", sampling=pb.Sampling(top_k=2)),
        "WRONG_SETTING",
        "INVALID_ARGUMENT",
        ("draws each number by itself", "leave top_k at 0"),
    ),
    "unknown constant": (
        opening("gain", constants={"volume": 1.0}),
        "WRONG_SETTING",
        "INVALID_ARGUMENT",
        ("'volume' cannot be chosen", "offers gain"),
    ),
    "constant of a model that has none": (
        opening("accumulator", constants={"gain": 1.0}),
        "WRONG_SETTING",
        "INVALID_ARGUMENT",
        ("offers none",),
    ),
    "constant value that is not allowed": (
        opening("gain", constants={"gain": 3.0}),
        "WRONG_SETTING",
        "INVALID_ARGUMENT",
        ("'gain' is 3", "allowed: 1, 2, 10"),
    ),
    "long label": (
        opening("accumulator", label="x" * 129),
        "WRONG_SETTING",
        "INVALID_ARGUMENT",
        ("129 bytes", "limit is 128"),
    ),
    "long period": (
        opening("accumulator", period_ms=3_600_001),
        "WRONG_SETTING",
        "INVALID_ARGUMENT",
        ("period_ms is 3600001", "limit is 3600000"),
    ),
    "a chunk before Open": (
        chunk(1, [1.0]),
        "NOT_OPEN",
        "FAILED_PRECONDITION",
        ("chunk for sequence 0", "not open", "send Open first"),
    ),
    "an End before Open": (ending(), "NOT_OPEN", "FAILED_PRECONDITION", ("end for sequence 0",)),
    "a Checkpoint before Open": (
        checkpoint(),
        "NOT_OPEN",
        "FAILED_PRECONDITION",
        ("checkpoint for sequence 0",),
    ),
    "an empty event before Open": (
        pb.Event(),
        "NOT_OPEN",
        "FAILED_PRECONDITION",
        ("an empty event for sequence 0",),
    ),
}


@pytest.mark.parametrize("fault", OPENINGS)
def test_what_cannot_be_opened_is_refused_once_and_the_stream_lives_on(
    conversation: Conversation, fault: str
) -> None:
    event, reason, code, fragments = OPENINGS[fault]
    conversation.send(event, chunk(1, [1.0]), chunk(2, [1.0]), ending())

    failed = conversation.failed(reason)

    assert code_of(failed) == code
    for fragment in fragments:
        assert fragment in failed.message
    # Nothing more came of the four events: the next reply is the new sequence's.
    conversation.send(opening("accumulator"), chunk(1, [2.0]), ending())
    assert conversation.opened().next_step == 1
    assert conversation.values(1) == [2.0]
    assert conversation.closed().reason == pb.END


def test_the_chunks_before_a_fault_are_answered_first(conversation: Conversation) -> None:
    conversation.send(opening("accumulator"), chunk(1, [1.0]), chunk(2, [2.0]), chunk(3, tensor([1], "int8")))
    conversation.opened()
    assert conversation.values(1) == [1.0]
    assert conversation.values(2) == [3.0]
    conversation.failed("WRONG_DTYPE")


def test_a_repeated_step_gets_the_same_reply_again_and_an_older_one_none(
    conversation: Conversation, server: Server
) -> None:
    counting = Counting(server)
    conversation.send(opening("accumulator"), chunk(1, [1.0]), chunk(2, [2.0]))
    conversation.opened()
    conversation.output(1)
    second = conversation.output(2)

    conversation.send(chunk(2, [2.0]))
    assert conversation.output(2) == second
    conversation.send(chunk(1, [1.0]), chunk(2, [99.0]), chunk(3, [3.0]))
    assert conversation.output(2) == second
    assert conversation.values(3) == [6.0]
    assert counting.rise("tenuto_steps_repeated_total", model="accumulator") == 3
    assert counting.rise("tenuto_chunks_total", model="accumulator", outcome="answered") == 3


def test_a_step_repeated_before_its_answer_is_answered_once(
    conversation: Conversation, server: Server
) -> None:
    counting = Counting(server)
    with Gate(engine_of(server, "accumulator")) as gate:
        conversation.send(opening("accumulator"), chunk(1, [1.0]), chunk(1, [1.0]), chunk(2, [2.0]))
        gate.wait_for_arrival()
        gate.open()
        conversation.opened()
        assert conversation.values(1) == [1.0]
        assert conversation.values(2) == [3.0]
    assert counting.rise("tenuto_steps_repeated_total", model="accumulator") == 1


def _in_one_batch(
    conversation: Conversation, server: Server, model: str, inputs: dict[int, pb.Tensor]
) -> dict[int, pb.Reply]:
    """Opens a sequence for each input and runs their first step in one batch."""
    engine = engine_of(server, model)
    pending = engine.metrics.pending_chunks
    with Gate(engine) as gate:
        # The batch of one before it keeps the engine until all are there.
        conversation.send(opening(model, 99), chunk(1, _input(model, 1), sequence=99))
        gate.wait_for_arrival()
        conversation.send(*(opening(model, n) for n in inputs))
        conversation.send(*(chunk(1, data, sequence=n) for n, data in inputs.items()))
        wait_for(lambda: len(engine._inbox) >= 2 * len(inputs), "the chunks to arrive")
        gate.open()
        replies = [conversation.read() for _ in range(2 + 2 * len(inputs))]
    assert engine.metrics.pending_chunks == pending
    answers = [r for r in replies if r.WhichOneof("reply") != "opened" and r.sequence != 99]
    return {r.sequence: r for r in answers}


def test_in_a_batch_that_fails_only_the_guilty_row_fails(conversation: Conversation, server: Server) -> None:
    counting = Counting(server)
    inputs = {n: tensor([n % 4, 3, 9 if n == 3 else 2], "int64") for n in range(5)}

    answers = _in_one_batch(conversation, server, "unchecked", inputs)

    failed = answers.pop(3).failed
    assert (failed.reason, code_of(failed)) == ("RUN_FAILED", "INTERNAL")
    assert "step 1" in failed.message
    assert "unchecked/1" in failed.message
    table = np.array([0, 1, 10, 100], np.float32)
    for n, reply in answers.items():
        expected = np.cumsum(table[np.frombuffer(inputs[n].data, "int64")], dtype="float32")
        assert reply.output.outputs[0].data == expected.tobytes()
        conversation.send(chunk(2, tensor([1], "int64"), sequence=n))
        assert conversation.values(2) == [expected[-1] + 1]
    assert counting.rise("tenuto_rows_rerun_total", model="unchecked") == 5


def test_a_state_that_is_not_finite_ends_its_sequence_alone(
    conversation: Conversation, server: Server
) -> None:
    counting = Counting(server)
    answers = _in_one_batch(conversation, server, "explosive", {n: tensor([1e30]) for n in range(4)})
    assert {r.output.timing.batch_size for r in answers.values()} == {4}
    # The second 1e30 is one too many; 0.5 is not.
    conversation.send(*(chunk(2, [1e30 if n == 2 else 0.5], sequence=n) for n in range(4)))
    replies = {r.sequence: r for r in (conversation.read() for _ in range(4))}

    failed = replies.pop(2).failed
    assert (failed.reason, code_of(failed)) == ("STATE_NOT_FINITE", "INTERNAL")
    assert "NaN or Inf in step 2" in failed.message
    for reply in replies.values():
        assert array(reply.output.outputs[0]).tolist() == [-0.5]
    ended = {"model": "explosive", "reason": "STATE_NOT_FINITE"}
    assert counting.rise("tenuto_sequences_ended_total", **ended) == 1
    # Its slot is clean for the next: 1e30 once is finite.
    conversation.send(opening("explosive", 2), chunk(1, [1e30], sequence=2))
    conversation.opened()
    conversation.output(1)


def test_a_value_refused_in_a_batch_leaves_its_neighbours_bit_identical(
    conversation: Conversation, server: Server
) -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((6, 5), "float32")
    values[4, 3] = np.nan

    answers = _in_one_batch(conversation, server, "accumulator", {n: tensor(v) for n, v in enumerate(values)})

    assert answers.pop(4).failed.reason == "NOT_FINITE"
    assert {r.output.timing.batch_size for r in answers.values()} == {5}
    for n, reply in answers.items():
        conversation.send(opening("accumulator", 50 + n), chunk(1, tensor(values[n]), sequence=50 + n))
        conversation.opened()
        alone = conversation.output(1)
        assert alone.timing.batch_size == 1
        assert reply.output.outputs[0].data == alone.outputs[0].data


def test_bytes_that_are_no_request_end_their_stream_alone(
    channel: grpc.Channel, conversation: Conversation, server: Server
) -> None:
    counting = Counting(server)
    conversation.send(opening("accumulator"), chunk(1, [1.0]))
    conversation.opened()
    conversation.output(1)
    with Conversation(channel) as other:
        other.send(opening("accumulator"))
        other.opened()
        other.send_bytes(NO_PROTOBUF)
        refusal = other.refused()
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "WRONG_MESSAGE")
    assert refusal.text == "4 bytes are no tenuto.v1.StreamRequest"
    assert counting.rise("tenuto_messages_refused_total") == 1
    conversation.send(chunk(2, [1.0]))
    assert conversation.values(2) == [2.0]


def test_more_events_than_a_message_may_hold_are_refused(conversation: Conversation) -> None:
    conversation.send(*[pb.Event()] * (MAX_EVENTS + 1))
    refusal = conversation.refused()
    assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_LARGE")
    assert f"{MAX_EVENTS + 1} events" in refusal.text


def test_as_many_events_as_a_message_may_hold_are_taken(conversation: Conversation) -> None:
    openings = [opening("accumulator", n) for n in range(MAX_EVENTS // 2)]
    conversation.send(*openings, *(ending(n) for n in range(MAX_EVENTS // 2)))
    replies = [conversation.read() for _ in range(MAX_EVENTS)]
    assert {r.WhichOneof("reply") for r in replies} == {"opened", "closed"}


def test_a_message_over_the_limit_ends_its_call_alone(toy_repository: Path, transport: str) -> None:
    with serving(toy_repository, transport=transport, max_message_bytes=4096) as server:
        with connect(server.port) as channel, Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            conversation.opened()
            with Conversation(channel) as other:
                other.send(opening("accumulator"), chunk(1, np.zeros(2000).tolist()))
                refusal = other.refused()
            assert refusal.code is Code.RESOURCE_EXHAUSTED
            assert "4096" in refusal.text
            request = pb.PredictRequest(model="doubler", inputs=[tensor(np.zeros((600, 2)))])
            refusal = refused(stub(channel).Predict, request)
            assert refusal.code is Code.RESOURCE_EXHAUSTED
            assert "4096" in refusal.text
            assert conversation.values(1) == [1.0]
        assert_nothing_is_left(server)


# Predict.


def picture(encoding: str = "png", size: tuple[int, int] = (4, 4), shade: int = 255) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, shade).save(buffer, encoding)
    return buffer.getvalue()


PREDICTS: dict[str, tuple[str, list[pb.Tensor], str, Code, tuple[str, ...]]] = {
    "unknown model": ("nothing", [], "UNKNOWN_MODEL", Code.NOT_FOUND, ("no model 'nothing'",)),
    "a model that holds state": (
        "accumulator",
        [tensor([1.0])],
        "NOT_STATELESS",
        Code.FAILED_PRECONDITION,
        ("'accumulator' holds state", "use Stream"),
    ),
    "wrong dtype": (
        "doubler",
        [tensor([[1, 2]], "int32")],
        "WRONG_DTYPE",
        Code.INVALID_ARGUMENT,
        ("'x' is int32", "accepted: float32"),
    ),
    "wrong rank": (
        "doubler",
        [tensor([1, 2])],
        "WRONG_SHAPE",
        Code.INVALID_ARGUMENT,
        ("shape [2]", "expected ['batch', 2]"),
    ),
    "wrong axis": (
        "doubler",
        [tensor([[1, 2, 3]])],
        "WRONG_SHAPE",
        Code.INVALID_ARGUMENT,
        ("shape [1, 3]", "expected ['batch', 2]"),
    ),
    "wrong length": (
        "doubler",
        [pb.Tensor(dtype="float32", shape=[1, 2], data=bytes(9))],
        "WRONG_SHAPE",
        Code.INVALID_ARGUMENT,
        ("9 bytes", "expected 8"),
    ),
    "unknown input": (
        "doubler",
        [tensor([[1, 2]], name="z")],
        "WRONG_INPUT",
        Code.INVALID_ARGUMENT,
        ("'z' is not expected",),
    ),
    "no input": ("doubler", [], "WRONG_INPUT", Code.INVALID_ARGUMENT, ("x is missing",)),
    "NaN": (
        "doubler",
        [tensor([[1, 2], [3, float("nan")]])],
        "NOT_FINITE",
        Code.INVALID_ARGUMENT,
        ("'x' holds NaN or Inf",),
    ),
    "no image": (
        "brightness",
        [pb.Tensor(dtype="png", data=b"no image")],
        "WRONG_ENCODING",
        Code.INVALID_ARGUMENT,
        ("'image': the bytes are no png image",),
    ),
    "half an image": (
        "brightness",
        [pb.Tensor(dtype="png", data=picture()[:50])],
        "WRONG_ENCODING",
        Code.INVALID_ARGUMENT,
        ("no png image",),
    ),
    "another encoding than it says": (
        "brightness",
        [pb.Tensor(dtype="jpeg", data=picture())],
        "WRONG_ENCODING",
        Code.INVALID_ARGUMENT,
        ("no jpeg image",),
    ),
    "an image of another size": (
        "brightness",
        [pb.Tensor(dtype="png", data=picture(size=(5, 4)))],
        "WRONG_SHAPE",
        Code.INVALID_ARGUMENT,
        ("5x4 pixels", "expected 4x4"),
    ),
    "fewer images than it says": (
        "brightness",
        [pb.Tensor(dtype="png", shape=[2], data=struct.pack("<I", 3) + b"abc")],
        "WRONG_ENCODING",
        Code.INVALID_ARGUMENT,
        ("expected 2 encoded images", "hold 1"),
    ),
    "an image longer than the message": (
        "brightness",
        [pb.Tensor(dtype="png", shape=[1], data=struct.pack("<I", 2**31) + b"abc")],
        "WRONG_ENCODING",
        Code.INVALID_ARGUMENT,
        ("expected 1 encoded images",),
    ),
}


@pytest.mark.parametrize("fault", PREDICTS)
def test_a_bad_predict_is_refused_with_its_reason(api: Any, fault: str) -> None:
    model, inputs, reason, code, fragments = PREDICTS[fault]
    refusal = refused(api.Predict, pb.PredictRequest(model=model, inputs=inputs))
    assert (refusal.code, refusal.reason) == (code, reason)
    for fragment in fragments:
        assert fragment in refusal.text
    good = api.Predict(pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])]))
    assert array(good.outputs[0]).tolist() == [[2.0, 4.0]]


def test_an_unknown_version_is_refused_by_predict(api: Any) -> None:
    request = pb.PredictRequest(model="doubler", version=9, inputs=[tensor([[1, 2]])])
    refusal = refused(api.Predict, request)
    assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "UNKNOWN_MODEL")
    assert "no version 9" in refusal.text


def test_bytes_that_are_no_request_are_an_invalid_argument_of_every_unary_method(
    channel: grpc.Channel,
) -> None:
    for method in ("Predict", "GetModel", "ListSequences", "EndSequence", "LoadModel", "UnloadModel"):
        call: Any = channel.unary_unary(PREDICT.replace("Predict", method))
        refusal = refused(call, NO_PROTOBUF)
        assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "WRONG_MESSAGE")
        assert refusal.text == "4 bytes are no request of this method"


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    refusal = refused(channel.unary_unary(STREAM.replace("Stream", "Streams")), b"")
    assert refusal.code is Code.UNIMPLEMENTED


def test_images_that_decode_to_more_than_a_message_may_hold_are_refused(
    tmp_path: Path, transport: str
) -> None:
    toys.write(tmp_path, "brightness", toys.brightness(side=64))
    with (
        serving(tmp_path, transport=transport, max_message_bytes=64 << 10) as server,
        connect(server.port) as channel,
    ):
        image = picture(size=(64, 64))
        packed = struct.pack("<I", len(image)) + image
        request = pb.PredictRequest(
            model="brightness", inputs=[pb.Tensor(dtype="png", shape=[5], data=packed * 5)]
        )
        refusal = refused(stub(channel).Predict, request)
        assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_LARGE")
        assert "5 images decode to 81920 bytes" in refusal.text
        assert "limit is 65536" in refusal.text


def test_an_unknown_model_is_refused_by_the_operators_calls(api: Any) -> None:
    for refusal in (
        refused(api.GetModel, pb.GetModelRequest(model="nothing")),
        refused(api.ListSequences, pb.ListSequencesRequest(model="nothing")),
    ):
        assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "UNKNOWN_MODEL")
        assert "'nothing'" in refusal.text
    refusal = refused(api.EndSequence, pb.EndSequenceRequest(sequence_id="abc"))
    assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "UNKNOWN_SEQUENCE")
    assert "'abc'" in refusal.text
