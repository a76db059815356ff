"""What the wire gets: what protobuf itself would write, and joined up to a limit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving import reply as wire
from tenuto.serving.errors import PoolFull
from tenuto.serving.reply import OutputWriter
from tenuto.serving.sequence import Closed, Ending, Failed, Opened, Output
from tenuto.v1 import tenuto_pb2 as pb

from .fakes import accumulator

SHAPES = st.lists(st.integers(0, 200), max_size=3)
SECONDS = st.sampled_from([0.0, 1e-7, 1e-6, 127e-6, 128e-6, 0.0161, 0.5, 4_294.9, 1e5])


@st.composite
def outputs(draw: st.DrawFn, tensors: int) -> Output:
    shapes = draw(st.lists(SHAPES, min_size=tensors, max_size=tensors)) if draw(st.integers(0, 9)) else []
    return Output(
        draw(st.integers(1, 300) | st.integers(1, 2**63)),
        draw(st.sampled_from([0, 0, 0, 1, 200])),
        draw(st.sampled_from([True, True, True, False])),
        tuple((tuple(shape), bytes([len(shape)]) * min(4 * math.prod(shape), 3_000)) for shape in shapes),
        draw(SECONDS),
        draw(SECONDS),
        draw(st.integers(0, 300)),
    )


def by_protobuf(key: int, output: Output, names: list[str]) -> pb.StreamResponse:
    queue, compute = (min(int(s * 1e6), 2**32 - 1) for s in (output.queue_seconds, output.compute_seconds))
    timing = pb.Timing(queue_us=queue, compute_us=compute, batch_size=output.batch_size)
    tensors = [
        pb.Tensor(name=name, dtype="float32", shape=shape, data=data)
        for name, (shape, data) in zip(names, output.tensors, strict=False)
    ]
    message = pb.Output(step=output.step, part=output.part, last=output.last, outputs=tensors, timing=timing)
    return pb.StreamResponse(replies=[pb.Reply(sequence=key, output=message)])


@pytest.mark.parametrize("names", [["y"], ["y", "z"]])
@given(data=st.data())
def test_a_reply_is_as_protobuf_would_write_it(names: list[str], data: st.DataObject) -> None:
    """And nothing of the one before stays."""
    tensor = {"dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
    writer = OutputWriter(accumulator(outputs=[{"name": name} | tensor for name in names]))
    for _ in range(data.draw(st.integers(1, 4))):
        key, output = data.draw(st.sampled_from([0, 1, 300])), data.draw(outputs(len(names)))
        assert pb.StreamResponse.FromString(writer.write(key, output)) == by_protobuf(key, output, names)


def test_a_sample_that_was_drawn_is_named_like_the_input() -> None:
    drawn = Output(3, 2, False, (((), b"abcd"),), 0.0, 0.0, 1, drawn=True)
    reply = pb.StreamResponse.FromString(OutputWriter(accumulator()).write(5, drawn)).replies[0]
    tensor = pb.Tensor(name="x", dtype="float32", data=b"abcd")
    output = pb.Output(step=3, part=2, outputs=[tensor], timing=pb.Timing(batch_size=1))
    assert reply == pb.Reply(sequence=5, output=output)


def test_an_output_of_another_size_spoils_no_other() -> None:
    """Nothing checks what a graph gives for an axis that the manifest fixes."""
    writer = OutputWriter(accumulator())
    for size in (4, 8, 4):
        message = writer.write(0, Output(1, 0, True, (((2,), bytes(size)),), 0.0, 0.0, 1))
        assert pb.StreamResponse.FromString(message).replies[0].output.outputs[0].data == bytes(size)


def test_a_writer_remembers_a_bounded_number_of_shapes() -> None:
    writer = OutputWriter(accumulator())
    for frames in range(1_000):
        data = bytes(4 * frames)
        message = writer.write(0, Output(1, 0, True, (((frames,), data),), 0.0, 0.0, 1))
        assert pb.StreamResponse.FromString(message).replies[0].output.outputs[0].data == data
    assert len(writer._heads[0]) <= 256


def test_the_other_replies() -> None:
    opened, closed, failed = (
        pb.StreamResponse.FromString(message).replies[0]
        for message in (
            wire.opened(1, Opened("id", 2, 3, 4)),
            wire.closed(2, Closed(Ending.STREAM_ENDED, 8)),
            wire.failed(3, Failed(PoolFull("full", 250))),
        )
    )
    assert opened == pb.Reply(
        sequence=1, opened=pb.Opened(sequence_id="id", version=2, next_step=3, window=4)
    )
    assert closed == pb.Reply(sequence=2, closed=pb.Closed(reason=pb.STREAM_ENDED, last_step=8))
    failure = pb.Failed(code=8, reason="POOL_FULL", message="full", retry_after_ms=250)
    assert failed == pb.Reply(sequence=3, failed=failure)


def test_joined_replies_are_one_message_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply larger than it goes alone; none is lost and the order stays."""
    writer = OutputWriter(accumulator())
    sizes = [1, 1, 500, 1, 30, 30, 30, 1]
    outputs = [Output(1, 0, True, (((size,), bytes(4 * size)),), 0.5, 0.25, 7) for size in sizes]
    replies = [writer.write(key, output) for key, output in enumerate(outputs)]
    monkeypatch.setattr(wire, "_LARGEST_JOINED", 400)
    messages = wire.joined(replies)
    assert b"".join(messages) == b"".join(replies)
    assert [m for m in messages if len(m) > 400] == [replies[2]]
    read = [r.sequence for m in messages for r in pb.StreamResponse.FromString(m).replies]
    assert read == list(range(len(sizes)))
    assert len(messages) < len(replies)
    assert wire.joined(replies[:1]) == replies[:1]
