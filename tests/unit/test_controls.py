"""What a batch tells models that reset themselves."""

from __future__ import annotations

from typing import Any

import pytest

from tenuto.serving.controls import Controls, number
from tenuto.serving.scheduler import Turn
from tenuto.serving.sequence import Chunk, Sequence
from tenuto.serving.snapshot import Snapshot
from tenuto.serving.text import Text

from .fakes import FakeSink, accumulator, f32

KINDS = ("start", "end", "ready")


def create_manifest(**x: Any) -> Any:
    controls = [{"name": kind, "kind": kind, "dtype": "float32"} for kind in KINDS]
    return accumulator(controls=[*controls, {"name": "id", "kind": "sequence_id", "dtype": "int64"}], x=x)


MANIFEST = create_manifest()


def turn(sequence: Sequence, samples: int, frames: int, **chunk: Any) -> Turn:
    """A turn of so many frames of a chunk that was begun."""
    made = Chunk(1, (f32([0] * samples).tobytes(),), 0.0, 0, **chunk)
    sequence.begin(made)
    return Turn(sequence, made, frames)


def told(controls: Controls, *turns: Turn, size: int = 0) -> dict[str, list[float]]:
    feeds = controls.feeds(list(turns), size or len(turns))
    return {name: feeds[name].tolist() for name in KINDS}


def test_the_first_run_and_the_last_samples() -> None:
    controls, fresh, old = Controls(MANIFEST), Sequence(FakeSink(), MANIFEST), Sequence(FakeSink(), MANIFEST)
    old.ran = True
    rows = turn(fresh, 2, 2), turn(old, 3, 3, last=True)
    assert told(controls, *rows, size=3) == {"start": [1, 0, 0], "end": [0, 1, 0], "ready": [1, 1, 0]}
    controls.ran(list(rows))
    assert told(controls, *rows)["start"] == [0, 0]


def test_the_end_is_in_the_last_turn_of_the_last_chunk() -> None:
    controls, sequence = Controls(MANIFEST), Sequence(FakeSink(), MANIFEST)
    cut = turn(sequence, 5, 4, last=True)
    assert told(controls, cut)["end"] == [0]
    sequence.feeds[0].eat(4)
    cut.chunk.frames, cut.frames = 1, 1
    assert told(controls, cut)["end"] == [1]


@pytest.mark.parametrize("tail, ends", [("drop", 1), ("pad", 0)])
def test_what_is_padded_at_end_comes_behind_the_last_chunk(tail: str, ends: int) -> None:
    """Three samples make one frame of two, and half of one more."""
    manifest = create_manifest(chunk={"multiple": 2}, tail=tail)
    rows = turn(Sequence(FakeSink(), manifest), 3, 1, last=True)
    assert told(Controls(manifest), rows)["end"] == [ends]


def test_a_sequence_has_one_number_wherever_it_is() -> None:
    """And no other has it, or 0, which padding has; within what the dtype holds."""
    one, other = Sequence(FakeSink(), MANIFEST), Sequence(FakeSink(), MANIFEST)
    for bits in (31, 32, 63):
        assert 0 < number(one, bits) < 2**bits
        assert number(one, bits) != number(other, bits)
    other.id = one.id
    assert number(one, 63) == number(other, 63)
    ids = Controls(MANIFEST).feeds([turn(one, 1, 1)], 2)["id"]
    assert ids.tolist() == [number(one, 63), 0]


def test_whether_it_ran_travels_in_the_token() -> None:
    """A token of a server that did not know of it is of a sequence that ran."""
    fresh = Snapshot("m", 1, "f", "s", "id", 1, (), (b"",), (b"",), ran=False)
    assert Snapshot.from_bytes(fresh.to_bytes()).ran is False
    ran = Snapshot("m", 1, "f", "s", "id", 1, (), (b"",), (b"",))
    assert Snapshot.from_bytes(ran.to_bytes()).ran is True
    assert len(ran.to_bytes()) < len(fresh.to_bytes())
    sequence = Sequence(FakeSink(), MANIFEST)
    sequence.restore(ran)
    assert sequence.ran


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("text", [b"hello big world", b"ab\xc3"], ids=["a word waits", "half a character"])
def test_text_that_waits_for_end_is_behind_the_last_chunk(text: bytes, tail: str) -> None:
    """What End brings of it is told; and what is spoiled is not looked at in a batch of others."""
    words = [{"encoding": "utf8", "tokens": "words", "buckets": 10}]
    manifest = create_manifest(dtype="int64", wire=words, tail=tail)
    sequence = Sequence(FakeSink(), manifest)
    chunk = Chunk(1, (Text(b"a b " + text),), 0.0, 0, last=True)
    sequence.begin(chunk)
    assert told(Controls(manifest), Turn(sequence, chunk, chunk.frames))["end"] == [0]
