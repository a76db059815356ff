"""What a stream's next message looks like if nothing but the step and the samples change.

A client that streams sends the same bytes around its samples again and again: the sequence's number, the
tensor's name, dtype and shape. A message that is, byte for byte, what the last one leads us to expect needs
no parser and no second look at its shape; that is half of what reading it costs (docs/decisions.md).
"""

from __future__ import annotations

from typing import Self

from tenuto.v1 import tenuto_pb2 as pb

from .varint import LAST, MORE, varint

# Fields of the wire, each as its tag, which is its number << 3 | its kind.
_EVENT = b"\x0a"  # StreamRequest.events
_SEQUENCE, _CHUNK = b"\x08", b"\x1a"  # of an Event
_STEP, _TENSOR = b"\x08", b"\x12"  # of a Chunk
_DATA = b"\x22"  # of a Tensor


class ChunkForm:
    """Expects one sequence's next chunk: the step that follows, and as many samples of one tensor again."""

    __slots__ = ("_after", "_begin", "_first", "_head", "_samples", "_tail", "size", "step")

    def __init__(self, head: bytes, step: int, after: bytes, samples: int) -> None:
        """`head` goes before the step in a message, `after` behind it, then so many bytes of samples."""
        told = varint(step)
        self.step = step  # that is expected
        self.size = len(head) + len(told) + len(after) + samples  # of the chunk, in a message
        self._begin = head + told + after
        self._head = head
        # The step's first byte changes with each chunk; what is behind it, every 128 of them.
        self._first = LAST if len(told) == 1 else MORE
        self._tail = told[1:] + after
        self._after = after
        self._samples = samples

    @classmethod
    def of(cls, event: pb.Event) -> Self:
        """The form of this one, a chunk of one tensor, as protobuf's own writers write it."""
        chunk = event.chunk
        tensor = chunk.inputs[0]
        samples = len(tensor.data)
        said = pb.Tensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape).SerializeToString()
        if samples:  # what is empty is not written
            said += _DATA + varint(samples)
        after = _TENSOR + varint(len(said) + samples) + said
        key = _SEQUENCE + varint(event.sequence) if event.sequence else b""
        nbytes = len(_STEP) + len(varint(chunk.step)) + len(after) + samples
        said_chunk = key + _CHUNK + varint(nbytes)
        head = _EVENT + varint(len(said_chunk) + nbytes) + said_chunk + _STEP
        return cls(head, chunk.step, after, samples)

    def take(self, message: bytes, at: int) -> bytes | None:
        """The samples, if what is expected stands there in the message. Then the step behind it is."""
        begin = self._begin
        if not message.startswith(begin, at):
            return None
        samples = message[at + len(begin) : at + self.size]
        if len(samples) != self._samples:
            return None
        self.step = step = self.step + 1
        if step & 0x7F:
            self._begin = self._head + self._first[step & 0x7F] + self._tail
        else:
            self._carry()
        return samples

    def _carry(self) -> None:
        """All of the step's bytes change. If there is one more, all lengths do, and nothing fits."""
        told = varint(self.step)
        if len(told) + len(self._after) > 1 + len(self._tail):
            self._samples = -1
        self._tail = told[1:] + self._after
        self._begin = self._head + told + self._after
