"""A message that is taken without a parser is one that the parser would have read in the same way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.chunk_form import ChunkForm
from tenuto.serving.varint import varint
from tenuto.v1 import tenuto_pb2 as pb

STEPS = st.one_of(st.integers(1, 300), st.integers(16_000, 17_000), st.integers(1, 2**63))
SHAPES = st.lists(st.integers(0, 300), max_size=3)


def request(step: int, data: bytes, sequence: int = 7, **tensor: Any) -> pb.StreamRequest:
    fields = {"name": "x", "dtype": "float32", "shape": [2, 3]} | tensor
    chunk = pb.Chunk(step=step, inputs=[pb.Tensor(data=data, **fields)])
    return pb.StreamRequest(events=[pb.Event(sequence=sequence, chunk=chunk)])


def form_of(one: pb.StreamRequest) -> ChunkForm:
    """Of what follows that one."""
    form = ChunkForm.of(one.events[0])
    assert form.take(one.SerializeToString(), 0) == one.events[0].chunk.inputs[0].data
    return form


def taken(form: ChunkForm, message: bytes) -> bytes | None:
    """As a stream does: found by its head."""
    return form.take(message, 0) if message.startswith(form.head) else None


@given(
    step=STEPS,
    sequence=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["", "x", "a long name of an input"]),
    shape=SHAPES,
    size=st.sampled_from([0, 1, 2, 127, 128, 700]),
    byte=st.sampled_from([0x00, 0x08, 0x12, 0x22, 0xFF]),
)
def test_the_next_chunk_is_taken_as_the_parser_reads_it(
    step: int, sequence: int, name: str, shape: list[int], size: int, byte: int
) -> None:
    fields: dict[str, Any] = {"sequence": sequence, "name": name, "shape": shape}
    form = form_of(request(step, bytes([byte]) * size, **fields))
    for next_step in range(step + 1, step + 4):
        samples = bytes((byte + next_step + i) % 256 for i in range(size))
        assert form.step == next_step
        found = taken(form, request(next_step, samples, **fields).SerializeToString())
        if len(varint(next_step)) > len(varint(step)):
            assert found is None  # it is a byte longer, and so are all that hold it
            return
        assert found == samples


def test_from_the_first_step_to_the_ten_thousandth() -> None:
    """The form is learned anew where the step becomes longer: twice here."""
    data, learned = b"12345678", 0
    form = form_of(request(1, data))
    for step in range(2, 20_000):
        one = request(step, data)
        if taken(form, one.SerializeToString()) is None:
            learned += 1
            form = form_of(one)
    assert learned == 2  # 128 and 16,384


OTHERS = {
    "another step": request(10, b"1234"),
    "the same step": request(8, b"1234"),
    "another sequence": request(9, b"1234", sequence=8),
    "another name": request(9, b"1234", name="y"),
    "another dtype": request(9, b"1234", dtype="float16"),
    "another shape": request(9, b"1234", shape=[3, 2]),
    "more samples": request(9, b"12345"),
    "fewer samples": request(9, b"123"),
    "nothing": pb.StreamRequest(),
    "an end": pb.StreamRequest(events=[pb.Event(sequence=7, end=pb.End())]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_differs_is_left_to_the_parser(what: str) -> None:
    form = form_of(request(8, b"1234"))
    assert taken(form, OTHERS[what].SerializeToString()) is None
    assert form.take(request(9, b"abcd").SerializeToString(), 0) == b"abcd"


@given(st.data())
def test_a_spoiled_message_is_not_taken_or_reads_the_same(data: st.DataObject) -> None:
    whole = bytearray(request(9, b"12345678").SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    message = bytes(whole)
    samples = taken(form_of(request(8, b"12345678")), message)
    if samples is not None:
        assert pb.StreamRequest.FromString(message) == request(9, samples)


def test_it_is_found_where_it_stands_in_a_message() -> None:
    form = form_of(request(8, b"1234"))
    before, after = request(5, b"12345", sequence=1), request(9, b"abcd", sequence=2)
    message = before.SerializeToString() + request(9, b"wxyz").SerializeToString()
    at, whole = before.ByteSize(), message + after.SerializeToString()
    assert taken(form, whole) is None
    assert form.take(message[:-1], at) is None  # it is not whole
    assert form.take(whole, at) == b"wxyz"
    assert whole[at + form.size :] == after.SerializeToString()


def unusual() -> dict[str, bytes]:
    """The message that is expected, written in other ways."""
    body = request(300, b"1234").events[0].SerializeToString()
    behind = body + b"\x98\x06\x01"  # a field that we do not know
    return {
        "a long length": b"\x0a" + bytes((len(body) | 0x80, 0)) + body,
        "an unknown field": b"\x0a" + varint(len(behind)) + behind,
        "an unknown field before it": b"\x98\x06\x01\x0a" + varint(len(body)) + body,
    }


@pytest.mark.parametrize("what", unusual())
def test_what_is_written_in_another_way_is_left_to_the_parser(what: str) -> None:
    message = unusual()[what]
    chunk = pb.StreamRequest.FromString(message).events[0].chunk
    assert (chunk.step, chunk.inputs[0].data) == (300, b"1234")
    assert taken(form_of(request(299, b"1234")), message) is None


@given(st.integers(0, 2**64 - 1))
def test_a_number_is_written_as_protobuf_does(number: int) -> None:
    assert b"\x08" + varint(number) == (pb.Chunk(step=number).SerializeToString() or b"\x08\x00")
