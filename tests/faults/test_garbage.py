"""Whatever bytes a client sends: one stream suffers at most, nothing is held afterwards, nobody else's answer
changes.

`corpus/` holds messages that are worth trying every time, one a file; one that is found to break something
belongs there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenuto.serving.stream import Stream
from tenuto.v1 import tenuto_pb2 as pb
from tests.integration.wire import array, checkpoint, chunk, ending, opening, tensor

from .core import Core, FakeCall

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.bin"))


def sums(core: Core, stream: Stream, call: FakeCall, step: int) -> list[float]:
    """The neighbour's next answer."""
    stream.received(message(chunk(step, [1.0], sequence=1)))
    core.settle()
    outputs = [r.output for r in call.replies if r.HasField("output")]
    return [float(v) for v in array(outputs[-1].outputs[0])]


def message(*events: pb.Event) -> bytes:
    return pb.StreamRequest(events=events).SerializeToString()


def survives(*messages: bytes) -> FakeCall:
    """Sends them all on one stream beside a neighbour."""
    core = Core()
    neighbour, heard = core.connect()
    neighbour.received(message(opening("accumulator", 1)))
    core.settle()
    victim, call = core.connect()
    for step, data in enumerate(messages, 1):
        if call.code is None:  # the transport hands nothing on after a status
            victim.received(data)
            core.settle()
        assert sums(core, neighbour, heard, step) == [float(step)]
    victim.terminated()
    neighbour.terminated()
    core.assert_nothing_is_left()
    return call


SENSIBLE = [
    message(opening("accumulator"), chunk(1, [1.0, 2.0]), checkpoint(), ending()),
    message(opening("accumulator", 3, checkpoint_every=1), chunk(1, [1.0] * 9, sequence=3)),
    message(chunk(2, [1.0], sequence=3), chunk(2, [1.0], sequence=3), chunk(9, [1.0], sequence=3)),
    message(opening("doubler", 2), chunk(1, tensor([[1.0, 2.0]]), sequence=2), ending(2)),
    message(opening("accumulator", 4, resume_token=bytes([1]) + bytes(80), period_ms=20, label="ü")),
    message(opening("accumulator", 5), *(chunk(n, [float(n)], sequence=5) for n in range(1, 8))),
]


def spoil(draw: st.DrawFn, whole: bytes, least: int = 0, untouched: int = 0) -> bytes:
    """What is sensible, with some of its bytes changed, cut, doubled or made up; not the first ones."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(least, 4))):
        at = draw(st.integers(untouched, len(data)))
        match draw(st.sampled_from(["flip", "cut", "double", "insert"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 20))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 60))]
            case _:
                data[at:at] = draw(st.binary(max_size=20))
    return bytes(data)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A message that is nearly sensible."""
    return spoil(draw, draw(st.sampled_from(SENSIBLE)))


@settings(deadline=None, max_examples=400)
@given(st.lists(broken() | st.binary(max_size=60), min_size=1, max_size=6))
def test_a_server_survives_what_is_nearly_a_message(messages: list[bytes]) -> None:
    survives(*messages)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_a_server_survives_its_corpus(path: Path) -> None:
    data = path.read_bytes()
    survives(data, data)
    survives(SENSIBLE[0], data, *SENSIBLE)


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 10


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_changed_token_opens_nothing(data: st.DataObject) -> None:
    """Forged by a bit, cut, or joined with another: TOKEN_INVALID; only the whole one goes on."""
    core = Core()
    stream, call = core.connect()
    stream.received(message(opening("accumulator", checkpoint_every=1), chunk(1, [5.0])))
    core.settle()
    token = call.replies[-1].checkpoint.resume_token
    at = data.draw(st.integers(0, len(token) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    forged = data.draw(
        st.sampled_from(
            [
                token[:at] + bytes([token[at] ^ bit]) + token[at + 1 :],
                token[:at],
                token[at + 1 :],
                token + token,
            ]
        )
    )
    stream.received(message(opening("accumulator", 1, resume_token=forged or b"\0")))
    assert call.replies[-1].failed.reason == "TOKEN_INVALID"
    stream.received(message(opening("accumulator", 2, resume_token=token), chunk(2, [1.0], sequence=2)))
    core.settle()
    outputs = [r.output for r in call.replies if r.sequence == 2 and r.HasField("output")]
    assert array(outputs[0].outputs[0]) == np.float32(6)
    stream.terminated()
    core.assert_nothing_is_left()


def test_a_token_of_another_model_opens_nothing() -> None:
    core = Core()
    stream, call = core.connect()
    stream.received(message(opening("accumulator", checkpoint_every=1), chunk(1, [5.0])))
    core.settle()
    token = call.replies[-1].checkpoint.resume_token
    stream.received(message(opening("doubler", 1, resume_token=token)))
    assert call.replies[-1].failed.reason == "WRONG_SETTING"
    assert "of model 'accumulator', Open names 'doubler'" in call.replies[-1].failed.message
    stream.terminated()
    core.assert_nothing_is_left()


def cases() -> Iterator[tuple[str, bytes]]:
    """What `corpus/` was begun with: `python -m tests.faults.test_garbage` writes it anew."""
    varint = b"\xff" * 10 + b"\x01"
    yield "empty", b""
    yield "no protobuf", b"GET / HTTP/1.1\r\n\r\n"
    yield "varint of eleven bytes", b"\x08" + varint
    yield "length beyond the end", b"\x0a\xff\xff\xff\xff\x07"
    yield "nested groups", b"\x0b" * 200
    yield "unknown fields", message(opening("accumulator", 9)) + b"\xfa\x3f\x03abc\xf8\x3f\x01"
    yield "too many events", message(*(ending(n % 7) for n in range(4097)))
    yield "label that is no UTF-8", b"\x0a\x07\x12\x05\x42\x03\xff\xfe\xfd"
    yield "name that is no UTF-8", b"\x0a\x05\x12\x03\x0a\x01\xff"
    huge = pb.Tensor(name="x", dtype="float32", shape=[2**32 - 1] * 4, data=b"1234")
    yield "shape beyond all memory", message(opening("accumulator"), chunk(1, huge))
    odd = pb.Tensor(name="x", dtype="float32", shape=[1], data=b"123")
    yield "three bytes of a float", message(opening("accumulator"), chunk(1, odd))
    yield "step beyond all counting", message(opening("accumulator"), chunk(2**64 - 1, [1.0]))
    yield "sequence number at its end", message(opening("accumulator", 2**32 - 1), ending(2**32 - 1))
    yield (
        "dtype with a colon",
        message(opening("accumulator"), chunk(1, pb.Tensor(dtype="f4:O", shape=[1], data=b"1234"))),
    )
    yield "thousand wishes", message(opening("accumulator"), chunk(1, [1.0]), *[checkpoint()] * 1000)
    yield "open twice and end twice", message(opening("doubler"), opening("doubler"), ending(), ending())
    yield "infinite patience", message(opening("accumulator", period_ms=2**32 - 1, idle_seconds=2**32 - 1))
    yield "nan constant", message(opening("accumulator", constants={"gain": float("nan")}))


if __name__ == "__main__":
    for name, data in cases():
        path = Path(__file__).parent / "corpus" / f"{name.replace(' ', '_')}.bin"
        path.write_bytes(data)
