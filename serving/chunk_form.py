"""What a stream's next message looks like if nothing but the step and the samples change.

A client that streams sends the same bytes around its samples again and again: the sequence's number, the
tensor's name, dtype and shape. A message that is, byte for byte, what the last one leads us to expect needs
no parser and no second look at its shape; that is a third of what reading it costs (docs/decisions.md).
"""

from __future__ import annotations

from typing import Self

from tenuto.v1 import tenuto_pb2 as pb

from .varint import LAST, MORE, varint


class ChunkForm:
    """Expects one sequence's next chunk: the step that follows, and as many samples of one tensor again."""

    __slots__ = ("_after", "_begin", "_first", "_head", "_size", "_tail", "step")

    def __init__(self, head: bytes, step: int, after: bytes, samples: int) -> None:
        """`head` goes before the step in a message, `after` behind it, then so many bytes of samples."""
        self.step = step  # that the next message brings
        self._head = head
        self._after = after
        self._first = LAST if step < 128 else MORE
        self._tail = varint(step)[1:] + after
        self._size = len(head) + 1 + len(self._tail) + samples
        self._begin = head + self._first[step & 0x7F] + self._tail

    @classmethod
    def of(cls, message: bytes, event: pb.Event) -> Self | None:
        """From a message with that one event, a chunk of one tensor.

        None where it is not written as protobuf's own writers do, with the samples at the end.
        """
        chunk = event.chunk
        tensor = chunk.inputs[0]
        usual = pb.Tensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, data=tensor.data)
        one = pb.Chunk(step=chunk.step, inputs=[usual])
        request = pb.StreamRequest(events=[pb.Event(sequence=event.sequence, chunk=one)])
        if not chunk.step or request.SerializeToString() != message:
            return None
        at = len(message) - one.ByteSize() + 1  # the chunk comes last, and its step first in it
        after = message[at + len(varint(chunk.step)) : len(message) - len(tensor.data)]
        return cls(message[:at], chunk.step + 1, after, len(tensor.data))

    def take(self, message: bytes) -> bytes | None:
        """The samples, if this is the message that is expected; then the one behind it is."""
        begin = self._begin
        if len(message) != self._size or not message.startswith(begin):
            return None
        self.step = step = self.step + 1
        if step & 0x7F:
            self._begin = self._head + self._first[step & 0x7F] + self._tail
        else:
            self._carry()
        return message[len(begin) :]

    def _carry(self) -> None:
        """The step's upper bits change. Where it becomes a byte longer lengths do too, and nothing fits."""
        upper = varint(self.step)[1:]
        if len(upper) + len(self._after) != len(self._tail):
            self._size = -1
        self._tail = upper + self._after
        self._begin = self._head + self._first[0] + self._tail
