"""What a sequence's next chunk looks like in a message if nothing but its step and its samples change.

A client that streams sends the same bytes around its samples again and again: the sequence's number, the
tensor's name, dtype and shape. What is, byte for byte, what the last chunk leads us to expect needs no parser
and no second look at its shape; that is half of what reading it costs (docs/decisions.md).
"""

from __future__ import annotations

from typing import Self

from tenuto.v1 import tenuto_pb2 as pb

from .varint import varint

# Fields of the wire, each as its tag, which is its number << 3 | its kind.
_EVENT = b"\x0a"  # StreamRequest.events
_SEQUENCE, _CHUNK = b"\x08", b"\x1a"  # of an Event
_STEP, _TENSOR = b"\x08", b"\x12"  # of a Chunk
_DATA = b"\x22"  # of a Tensor
_MORE = 0x80  # in a varint's byte: another one follows


class ChunkForm:
    """Expects one sequence's next chunk: the step that follows, and as many samples of one tensor again.

    In a message it stands as `head`, the step, what is behind it, and the samples.
    """

    __slots__ = ("_first", "_more", "_samples", "_tail", "head", "size", "step")

    def __init__(self, head: bytes, step: int, after: bytes, samples: int) -> None:
        """`after` goes behind the step, and then so many bytes of samples."""
        told = varint(step)
        self.head = head
        self.step = step  # that is expected
        self.size = len(head) + len(told) + len(after) + samples  # of the chunk, in a message
        # The step's first byte changes with each chunk; what is behind it, every 128 of them.
        self._first = told[0]
        self._more = _MORE if len(told) > 1 else 0
        self._tail = told[1:] + after
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
        """The samples, if what is expected stands there in the message. Then the step behind it is.

        `head` is not looked at: whoever finds the form by it has seen that it is there.
        """
        at += len(self.head)
        tail = self._tail
        if not message.startswith(tail, at + 1) or message[at] != self._first:
            return None
        at += 1 + len(tail)
        samples = message[at : at + self._samples]
        if len(samples) != self._samples:
            return None
        self.step = step = self.step + 1
        if step & 0x7F:
            self._first = step & 0x7F | self._more
        else:
            self._carry()
        return samples

    def _carry(self) -> None:
        """All of the step's bytes change. If there is one more, all lengths do, and nothing fits."""
        before, told = varint(self.step - 1), varint(self.step)
        self._first, self._tail = told[0], told[1:] + self._tail[len(before) - 1 :]
        if len(told) > len(before):
            self._samples = -1


def event_bytes(event: pb.Event) -> int:
    """How many bytes of a message it is, as protobuf's own writers write it."""
    nbytes = event.ByteSize()
    return len(_EVENT) + len(varint(nbytes)) + nbytes
