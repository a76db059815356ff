"""What a sequence's next chunk looks like in a message if nothing but its step and its samples change.

A client that streams sends the same bytes around its samples again and again: the sequence's number, the
tensor's name, dtype and shape. What is, byte for byte, what the last chunk leads us to expect needs no parser
and no second look at its shape; that is half of what reading it costs (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Self, TypeVar

from tenuto.v1 import tenuto_pb2 as pb

from .varint import varint

# Fields of the wire, each as its tag, which is its number << 3 | its kind.
_EVENT = b"\x0a"  # StreamRequest.events
_SEQUENCE, _CHUNK = b"\x08", b"\x1a"  # of an Event
_STEP, _TENSOR = b"\x08", b"\x12"  # of a Chunk
_DATA = b"\x22"  # of a Tensor
_MORE = 0x80  # in a varint's byte: another one follows
# Forms of a sequence that are made without being of use; then its chunks are all parsed.
_TRIES = 8
_MOST_STEPS = 2**63  # beyond them a step may be the last that there is

Whose = TypeVar("Whose")


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
    def behind(cls, event: pb.Event, message: bytes, at: int) -> Self | None:
        """What comes behind this one, a chunk of one tensor that stands there in the message. None if its
        client does not write as protobuf's own writers do."""
        form = cls.of(event)
        fits = message.startswith(form.head, at) and form.take(message, at) is not None
        return form if fits else None

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


class Habit:
    """What one sequence's chunks were like, and the form of its next one, if they were alike."""

    __slots__ = ("_learnt_step", "_nbytes", "_tries", "form")

    def __init__(self) -> None:
        self.form: ChunkForm | None = None
        self._nbytes = -1  # of the last chunk's samples, if it may have a form
        self._learnt_step = 0  # that the form expected at first
        self._tries = _TRIES

    def is_kept(self, chunk: pb.Chunk, takes_as_it_is: Callable[[pb.Tensor], bool]) -> bool:
        """Whether this chunk, which was parsed, is as long as the last one and may have a form.

        `takes_as_it_is`: whether another tensor of the same name, dtype, shape and length is as good as this.
        """
        if self.form is not None and self.form.step > self._learnt_step:  # it was of use
            self._tries = _TRIES
        before, self._nbytes = self._nbytes, -1
        if len(chunk.inputs) != 1 or chunk.generate or chunk.last:
            return False
        if chunk.step >= _MOST_STEPS or self._tries <= 0:
            return False
        tensor = chunk.inputs[0]
        if takes_as_it_is(tensor):
            self._nbytes = len(tensor.data)
        return self._nbytes == before >= 0

    def expect(self, form: ChunkForm | None) -> None:
        """From here on the next chunk looks so."""
        self._tries -= 1
        self.form = form
        self._learnt_step = form.step if form is not None else 0


class ChunkForms(Generic[Whose]):
    """The forms of one stream, found by how a message begins. Its lock is held while one comes or goes."""

    __slots__ = ("_by_head", "lengths")

    def __init__(self) -> None:
        self._by_head: dict[bytes, tuple[ChunkForm, Whose]] = {}
        self.lengths: tuple[int, ...] = ()  # of heads: 13 at most, since lengths and a key are in them

    def __len__(self) -> int:
        return len(self._by_head)

    def find(self, message: bytes, at: int) -> tuple[ChunkForm, Whose] | None:
        """The form that a chunk there may have, and whose chunk it is."""
        for size in self.lengths:
            found = self._by_head.get(message[at : at + size])
            if found is not None:
                return found
        return None

    def put(self, form: ChunkForm, whose: Whose) -> None:
        size = len(form.head)
        self._by_head[form.head] = form, whose
        if size not in self.lengths:
            self.lengths = (*self.lengths, size)

    def drop(self, form: ChunkForm | None) -> None:
        if form is not None:
            self._by_head.pop(form.head, None)

    def clear(self) -> None:
        self._by_head.clear()


def event_bytes(event: pb.Event) -> int:
    """How many bytes of a message it is, as protobuf's own writers write it."""
    nbytes = event.ByteSize()
    return len(_EVENT) + len(varint(nbytes)) + nbytes
