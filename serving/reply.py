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

_MOST_US = 2**32 - 1
# A sixteenth of what a gRPC client accepts unless told otherwise.
_LARGEST_JOINED = 256 << 10
_RENEWED_BYTES = 1 << 20


class OutputWriter:
    """Writes the Outputs of one model version. For its engine thread alone: one message is filled again and
    again, at a quarter of the cost of a new one.

    A message never gives memory back before it goes: what was assigned to it stays in its arena. So there
    is a new one after every `_RENEWED_BYTES`.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._input = manifest.inputs[0]  # of what is fed back
        self._renew()

    def _renew(self) -> None:
        outputs = self._manifest.outputs
        self._left = _RENEWED_BYTES
        self._same: tuple[int, int, bool] = (0, 0, False)  # as a new message has it
        self._response = pb.StreamResponse()
        self._reply = self._response.replies.add()
        self._output = self._reply.output
        self._tensors = [self._output.outputs.add(name=o.name, dtype=o.dtype) for o in outputs]
        self._timing = self._output.timing
        self._shapes: list[tuple[int, ...]] = [() for _ in outputs]

    def write(self, key: int, output: Output) -> bytes:
        """A StreamResponse of that one reply."""
        if not output.tensors or output.drawn:  # the chunk completed no frame, or went on by itself
            response = pb.StreamResponse()
            message = response.replies.add(sequence=key).output
            message.step, message.part, message.last = output.step, output.part, output.last
            for shape, data in output.tensors:
                message.outputs.add(name=self._input.name, dtype=self._input.dtype, shape=shape, data=data)
            write_timing(message.timing, output)
            return response.SerializeToString()
        message = self._output
        message.step = output.step
        same = (key, output.part, output.last)
        if same != self._same:  # it is dearer to set a field than to see that it is set
            self._same = same
            self._reply.sequence, message.part, message.last = same
        for i, (shape, data) in enumerate(output.tensors):
            tensor = self._tensors[i]
            tensor.data = data
            if shape != self._shapes[i]:
                tensor.shape[:] = shape
                self._shapes[i] = shape
        write_timing(self._timing, output)
        written = self._response.SerializeToString()
        self._left -= len(written)
        if self._left < 0:
            self._renew()
        return written


def write_tensors(tensors: Any, output: Output, manifest: Manifest) -> None:
    """Adds the output's tensors to a repeated field."""
    for spec, (shape, data) in zip(manifest.outputs, output.tensors, strict=False):
        tensors.add(name=spec.name, dtype=spec.dtype, shape=shape, data=data)


def write_timing(timing: pb.Timing, output: Output) -> None:
    """Fills the timing; 71 minutes is the most it can say."""
    queue_us, compute_us = int(output.queue_seconds * 1e6), int(output.compute_seconds * 1e6)
    timing.queue_us = queue_us if queue_us < _MOST_US else _MOST_US  # min() costs five times that
    timing.compute_us = compute_us if compute_us < _MOST_US else _MOST_US
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
