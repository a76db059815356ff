"""What the wire gets: the same bytes as a message made afresh, and joined up to a limit."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from benchmarks.memory import resident_bytes
from tenuto.serving import reply as wire
from tenuto.serving.errors import PoolFull
from tenuto.serving.reply import OutputWriter
from tenuto.serving.sequence import Closed, Ending, Failed, Opened, Output
from tenuto.v1 import tenuto_pb2 as pb

from .fakes import accumulator


def output(step: int, values: list[float]) -> Output:
    data = np.array(values, np.float32).tobytes()
    tensors = (((len(values),), data),) if values else ()
    return Output(step, step % 2, True, tensors, 0.5, 0.25, 7)


def afresh(key: int, output: Output) -> pb.StreamResponse:
    timing = pb.Timing(queue_us=500_000, compute_us=250_000, batch_size=7)
    tensors = [pb.Tensor(name="y", dtype="float32", shape=shape, data=data) for shape, data in output.tensors]
    message = pb.Output(step=output.step, part=output.part, last=True, outputs=tensors, timing=timing)
    return pb.StreamResponse(replies=[pb.Reply(sequence=key, output=message)])


def test_a_message_filled_again_is_as_if_made_afresh() -> None:
    """Nothing of the one before stays: shapes that shrink, keys and parts that go back to zero, no frames."""
    writer = OutputWriter(accumulator())
    cases = [
        (5, output(9, [1, 2, 3])),
        (0, output(1, [4])),
        (3, output(2, [])),
        (0, output(3, [5, 6])),
    ]
    for key, one in [*cases, *cases[::-1]]:
        assert pb.StreamResponse.FromString(writer.write(key, one)) == afresh(key, one)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_writer_does_not_keep_what_it_wrote() -> None:
    """A protobuf message keeps all that was ever assigned to it: 256 MiB here, but for the renewals."""
    writer = OutputWriter(accumulator())
    large = output(1, [1.0] * 65_536)  # 256 KiB
    for _ in range(8):
        writer.write(0, large)
    before = resident_bytes(os.getpid())
    for _ in range(1_024):
        writer.write(0, large)
    assert resident_bytes(os.getpid()) - before < 32 << 20


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
    replies = [writer.write(i, output(i + 1, [1.0] * size)) for i, size in enumerate(sizes)]
    monkeypatch.setattr(wire, "_LARGEST_JOINED", 400)
    messages = wire.joined(replies)
    assert b"".join(messages) == b"".join(replies)
    assert [m for m in messages if len(m) > 400] == [replies[2]]
    read = [r.sequence for m in messages for r in pb.StreamResponse.FromString(m).replies]
    assert read == list(range(len(sizes)))
    assert len(messages) < len(replies)
    assert wire.joined(replies[:1]) == replies[:1]
