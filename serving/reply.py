"""The core's replies -> the wire's.

A StreamResponse holds nothing but replies, so the bytes of several, one behind the other, are one message
with all of their replies.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

from tenuto.v1 import tenuto_pb2 as pb

from .errors import TenutoError
from .manifest import Manifest
from .sequence import Checkpoint, Closed, Failed, Opened, Output
from .status import code_of
from .varint import LAST, MORE, varint

_MOST_US = 2**32 - 1
# A sixteenth of what a gRPC client accepts unless told otherwise.
_LARGEST_JOINED = 256 << 10
_MOST_HEADS = 256  # shapes of one output that are remembered
# Fields of the wire, each as its tag, which is its number << 3 | its kind.
_REPLY = b"\x0a"  # StreamResponse.replies
_SEQUENCE, _OUTPUT = b"\x08", b"\x1a"  # of a Reply
_STEP, _IS_LAST, _TENSOR, _TIMING = b"\x08", b"\x18\x01", b"\x22", b"\x2a"  # of an Output
_DATA = b"\x22"  # of a Tensor
_QUEUE, _COMPUTE, _ROWS = b"\x08", b"\x10", b"\x18"  # of a Timing


class OutputWriter:
    """Writes the Outputs of one model version, for its engine thread alone.

    By hand, in protobuf's encoding: from one reply of a batch to the next nothing differs but two numbers and
    the tensors' bytes, and to fill a message and have it serialized costs 1.6 times as much.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        # By shape and bytes: an output may come with another size than it is said to have.
        self._heads: list[dict[tuple[tuple[int, ...], int], bytes]] = [{} for _ in manifest.outputs]
        self._key = -1  # of the reply before
        self._key_fields = b""
        self._compute_seconds, self._rows = -1.0, 0  # of the batch that it was of
        self._batch_fields = b""

    def write(self, key: int, output: Output) -> bytes:
        """A StreamResponse of that one reply."""
        tensors = output.tensors
        if output.drawn or output.part or not output.last or not tensors:
            return self._write_rare(key, output)
        if key != self._key:
            self._key, self._key_fields = key, _SEQUENCE + varint(key) + _OUTPUT
        if output.compute_seconds != self._compute_seconds or output.batch_size != self._rows:
            self._see_batch(output)
        if len(tensors) == 1:  # without a loop
            shape, data = tensors[0]
            told = (self._heads[0].get((shape, len(data))) or self._head(0, shape, data)) + data
        else:
            told = b"".join([self._head(i, shape, data) + data for i, (shape, data) in enumerate(tensors)])
        step, queue = output.step, int(output.queue_seconds * 1e6)
        # Written out where two bytes do: two calls less, a tenth of all this.
        told_step = MORE[step & 0x7F] + LAST[step >> 7] if 0x80 <= step < 0x4000 else varint(step)
        told_queue = MORE[queue & 0x7F] + LAST[queue >> 7] if 0x80 <= queue < 0x4000 else varint(_us(queue))
        batch = self._batch_fields
        timing = LAST[len(_QUEUE) + len(told_queue) + len(batch)]
        fields = b"".join((_STEP, told_step, _IS_LAST, told, _TIMING, timing, _QUEUE, told_queue, batch))
        size = varint(len(fields))
        whole = varint(len(self._key_fields) + len(size) + len(fields))
        return b"".join((_REPLY, whole, self._key_fields, size, fields))

    def _head(self, index: int, shape: tuple[int, ...], data: bytes) -> bytes:
        """A tensor as an Output's field, up to its bytes."""
        heads = self._heads[index]
        head = heads.get((shape, len(data)))
        if head is None:
            if len(heads) >= _MOST_HEADS:
                heads.clear()
            spec = self._manifest.outputs[index]
            fields = pb.Tensor(name=spec.name, dtype=spec.dtype, shape=shape).SerializeToString()
            fields += _DATA + varint(len(data))
            head = heads[shape, len(data)] = _TENSOR + varint(len(fields) + len(data)) + fields
        return head

    def _see_batch(self, output: Output) -> None:
        self._compute_seconds, self._rows = output.compute_seconds, output.batch_size
        compute = varint(_us(int(output.compute_seconds * 1e6)))
        self._batch_fields = _COMPUTE + compute + _ROWS + varint(output.batch_size)

    def _write_rare(self, key: int, output: Output) -> bytes:
        """One of several parts, or without tensors: the chunk completed no frame."""
        message = pb.Output(step=output.step, part=output.part, last=output.last)
        if output.drawn:  # it went on by itself
            spec = self._manifest.inputs[0]
            ((shape, data),) = output.tensors
            message.outputs.add(name=spec.name, dtype=spec.dtype, shape=shape, data=data)
        else:
            write_tensors(message.outputs, output, self._manifest)
        write_timing(message.timing, output)
        return _response(pb.Reply(sequence=key, output=message))


def _us(us: int) -> int:
    """71 minutes is the most that a Timing can say."""
    return us if us < _MOST_US else _MOST_US  # min() costs five times that


def write_tensors(tensors: Any, output: Output, manifest: Manifest) -> None:
    """Adds the output's tensors to a repeated field."""
    for spec, (shape, data) in zip(manifest.outputs, output.tensors, strict=False):
        tensors.add(name=spec.name, dtype=spec.dtype, shape=shape, data=data)


def write_timing(timing: pb.Timing, output: Output) -> None:
    """Fills it in, in microseconds."""
    timing.queue_us = _us(int(output.queue_seconds * 1e6))
    timing.compute_us = _us(int(output.compute_seconds * 1e6))
    timing.batch_size = output.batch_size


def opened(key: int, reply: Opened) -> bytes:
    message = pb.Opened(
        sequence_id=reply.id, version=reply.version, next_step=reply.next_step, window=reply.window
    )
    if reply.sampling is not None:
        s = reply.sampling
        message.sampling.CopyFrom(pb.Sampling(seed=s.seed, temperature=s.temperature, top_k=s.top_k))
    return _response(pb.Reply(sequence=key, opened=message))


def checkpoint(key: int, reply: Checkpoint) -> bytes:
    message = pb.Checkpoint(step=reply.step, resume_token=reply.token)
    return _response(pb.Reply(sequence=key, checkpoint=message))


def closed(key: int, reply: Closed) -> bytes:
    reason = pb.Ending.Name(reply.reason.value)
    message = pb.Closed(reason=reason, last_step=reply.last_step, resume_token=reply.token)
    return _response(pb.Reply(sequence=key, closed=message))


def failed(key: int, reply: Failed) -> bytes:
    return _response(pb.Reply(sequence=key, failed=_failure(reply.error, reply.token)))


def _failure(error: TenutoError, token: bytes) -> pb.Failed:
    return pb.Failed(
        code=code_of(error).value[0],
        reason=error.reason,
        message=str(error),
        retry_after_ms=error.retry_after_ms,
        resume_token=token,
    )


def _response(*replies: pb.Reply) -> bytes:
    return pb.StreamResponse(replies=replies).SerializeToString()


def joined(responses: Items[bytes]) -> list[bytes]:
    """As few messages as hold the replies of all, in order.

    Several replies together are no larger than `_LARGEST_JOINED`: whether a client's limit is kept must not
    depend on which of its sequences shared a batch.
    """
    if len(responses) == 1:
        return [responses[0]]
    messages: list[bytes] = []
    group: list[bytes] = []
    size = 0
    for response in responses:
        if group and size + len(response) > _LARGEST_JOINED:
            messages.append(b"".join(group))
            group, size = [], 0
        group.append(response)
        size += len(response)
    return [*messages, b"".join(group)]
