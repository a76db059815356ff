"""Text goes as it is, a model goes on by itself, and `tenuto generate` prints or plays what it says."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto import Client, InvalidInput, Sampling, aio, midi
from tenuto.cli import main
from tenuto.v1 import tenuto_pb2 as pb
from tests.client.fake_server import FakeServer

SILENCE = np.zeros((1, 88), np.float32)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with FakeServer() as fake:
        monkeypatch.setenv("TENUTO_SERVER", fake.target)
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as one:
        yield one


# Text and chunks.


def test_a_text_travels_as_utf_8(server: FakeServer, client: Client) -> None:
    with client.stream("speaker") as stream:
        assert [o.part for o in stream.generate("a€", 1)] == [0, 1]
        assert len(list(stream.generate({"id": "b"}, 1))) == 2
    first, second = (chunk.inputs[0] for chunk in server.chunks)
    assert first == pb.Tensor(dtype="utf8", data=b"a\xe2\x82\xac")
    assert second == pb.Tensor(name="id", dtype="utf8", data=b"b")


def test_half_a_character_is_no_text(client: Client) -> None:
    with client.stream("speaker") as stream:
        with pytest.raises(InvalidInput, match="the input is no text that UTF-8 can hold") as caught:
            stream.send("a\ud83d", generate=1)
        assert caught.value.reason == "WRONG_ENCODING"
        assert stream.send("a", generate=1) == 1  # the step was not used up


def test_a_chunk_without_inputs_goes_on(server: FakeServer, client: Client) -> None:
    with client.stream("speaker") as stream:
        outputs = [*stream.generate("a", 2), *stream.generate(None, 3)]
    assert [(o.step, o.part, o.last) for o in outputs] == [
        (1, 0, False), (1, 1, False), (1, 2, True), (2, 0, False), (2, 1, False), (2, 2, False), (2, 3, True),
    ]  # fmt: skip
    assert [len(chunk.inputs) for chunk in server.chunks] == [1, 0]
    assert [int(o["id"][0]) for o in outputs if o.part] == [0, 1, 0, 1, 2]


def test_what_is_unread_comes_first(client: Client) -> None:
    with client.stream("speaker") as stream:
        stream.send("a", generate=1)
        assert [o.step for o in stream.generate("b", 1)] == [1, 1, 2, 2]


def test_the_asyncio_client_does_the_same(server: FakeServer) -> None:
    async def run() -> None:
        async with (
            aio.Client(server.target) as client,
            client.stream("speaker", sampling=Sampling(seed=3)) as stream,
        ):
            assert stream.sampling == Sampling(3, 1.0, None)
            parts = [o.part async for o in stream.generate("a", 2)]
            parts += [o.part async for o in stream.generate(None, 1)]
            assert parts == [0, 1, 2, 0, 1]

    asyncio.run(run(), debug=True)
    assert [chunk.generate for chunk in server.chunks] == [2, 1]


# Sampling.


def test_what_is_chosen_is_said_at_the_opening(server: FakeServer, client: Client) -> None:
    with client.stream("speaker", sampling=Sampling(seed=0, temperature=0.5, top_k=4)) as stream:
        assert stream.sampling == Sampling(0, 0.5, None)
    with client.stream("speaker", sampling=Sampling(top_k=4)):
        pass
    with client.stream("speaker") as stream:
        assert stream.sampling == Sampling(42, 1.0, None)
    with client.stream("accumulator") as stream:
        assert stream.sampling is None
    first, second, third, fourth = server.opens
    assert first.sampling == pb.Sampling(seed=0, temperature=0.5, top_k=4)
    assert first.sampling.HasField("seed")
    assert not second.sampling.HasField("seed")
    assert not third.HasField("sampling")
    assert not fourth.HasField("sampling")


@pytest.mark.parametrize(
    "sampling, text",
    [
        (Sampling(seed=-1), "sampling: .*seed=-1"),
        (Sampling(seed=2**64), "sampling: "),
        (Sampling(seed=0.5), "sampling: "),  # type: ignore[arg-type]
        (Sampling(temperature=0.0), "temperature is 0.0, expected more than 0"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(top_k=0), "top_k is 0, expected more than 0"),
        (Sampling(top_k=-3), "top_k is -3"),
    ],
)
def test_what_cannot_be_is_refused_before_it_travels(client: Client, sampling: Sampling, text: str) -> None:
    with pytest.raises(InvalidInput, match=text) as caught:
        client.stream("speaker", sampling=sampling)
    assert caught.value.reason == "WRONG_SETTING"


def test_a_sequence_that_begins_anew_elsewhere_has_the_seed_that_was_drawn(
    server: FakeServer, client: Client
) -> None:
    server.accidents = {2: [grpc.StatusCode.UNAVAILABLE]}
    with client.stream("speaker") as stream:
        outputs = [*stream.generate("a", 2), *stream.generate(None, 2)]
        assert stream.resumes == 1
    assert len(outputs) == 6
    assert not server.opens[0].HasField("sampling")
    assert server.opens[1].sampling == pb.Sampling(seed=42, temperature=1.0)


# tenuto generate.


def test_generate_prints_the_prompt_and_what_follows(server: FakeServer, capsys: Any) -> None:
    assert main(["generate", "speaker", "--prompt", "a€", "--count", "8"]) == 0
    told = capsys.readouterr()
    assert told.out == "a€" + "\n abc€\n " + "\n"
    assert told.err == "the same again: --seed 42\n"
    (chunk,) = server.chunks
    assert (chunk.inputs[0].data, chunk.generate) == ("a€".encode(), 8)


def test_generate_begins_with_a_new_line_and_says_five_hundred_characters(
    server: FakeServer, capsys: Any
) -> None:
    words = ["--seed", "7", "--temperature", "0.5", "--top-k", "3"]
    assert main(["generate", "speaker", *words]) == 0
    told = capsys.readouterr()
    assert len(told.out) == 1 + 500 + 1
    assert told.err == ""
    assert server.opens[0].sampling == pb.Sampling(seed=7, temperature=0.5, top_k=3)
    assert server.chunks[0].inputs[0].data == b"\n"


def test_a_long_text_is_asked_for_in_chunks(server: FakeServer, capsys: Any) -> None:
    assert main(["generate", "speaker", "--count", "2500"]) == 0
    assert len(capsys.readouterr().out) == 2502
    assert [(len(c.inputs), c.generate) for c in server.chunks] == [(1, 1024), (0, 1024), (0, 452)]


@pytest.mark.parametrize(
    "words, text",
    [
        (["accumulator"], "NOT_SUPPORTED: model 'accumulator' does not generate"),
        (["numbers"], "NOT_SUPPORTED: model 'numbers' generates ids that stand for no characters"),
        (["nobody"], "UNKNOWN_MODEL: no model 'nobody'"),
        (["piano", "--prompt", "a"], "WRONG_INPUT: model 'piano' takes no text"),
    ],
)
def test_what_cannot_be_generated_is_said_in_a_line(
    server: FakeServer, capsys: Any, words: list[str], text: str
) -> None:
    assert main(["generate", *words]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"tenuto generate: {text}")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--seed", "-1"], ["--seed", str(2**64)], ["--temperature", "0"], ["--top-k", "0"], ["--count", "0"],
     ["--tempo", "inf"]],
)  # fmt: skip
def test_a_wrong_option_is_wrong_usage(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "speaker", *words])
    assert "expected" in capsys.readouterr().err


def test_without_a_file_the_pitches_are_printed(server: FakeServer, capsys: Any) -> None:
    server.chords = [[0, 39], [], [87]]
    assert main(["generate", "piano", "--count", "4"]) == 0
    assert capsys.readouterr().out == "21 60\n\n108\n21 60\n"
    (chunk,) = server.chunks
    assert chunk.inputs[0].data == SILENCE.tobytes()
    assert list(chunk.inputs[0].shape) == [1, 88]


def test_a_missing_mido_is_named_before_anything_is_played(
    server: FakeServer, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mido", None)  # so that importing it fails
    assert main(["generate", "piano", "-o", "tune.mid"]) == 2
    assert "pip install 'tenuto[midi]'" in capsys.readouterr().err
    assert server.opens == []


# MIDI.


def notes(path: Path) -> list[tuple[int, float, float]]:
    """Pitch, begin and end of each note, in quarter notes."""
    mido = pytest.importorskip("mido")
    file = mido.MidiFile(path)
    sounding: dict[int, float] = {}
    found, now = [], 0.0
    for message in file.tracks[0]:
        now += message.time / file.ticks_per_beat
        if message.type == "note_on":
            assert message.note not in sounding, "struck while it sounds"
            sounding[message.note] = now
        elif message.type == "note_off":
            found.append((message.note, sounding.pop(message.note), now))
    assert not sounding, "a note without an end"
    return sorted(found, key=lambda note: (note[1], note[0]))


def steps_of(*chords: list[int]) -> Any:
    steps = np.zeros((len(chords), 88), np.float32)
    for step, keys in enumerate(chords):
        steps[step, keys] = 1
    return steps


def test_keys_that_are_held_are_one_note(tmp_path: Path) -> None:
    pytest.importorskip("mido")
    midi.write(tmp_path / "tune.mid", steps_of([0, 39], [39], [], [39, 87], [87]), 90)
    assert notes(tmp_path / "tune.mid") == [(21, 0, 1), (60, 0, 2), (60, 3, 4), (108, 3, 5)]


def test_the_file_has_the_tempo_and_all_of_its_time(tmp_path: Path) -> None:
    mido = pytest.importorskip("mido")
    midi.write(tmp_path / "tune.mid", steps_of([], [1], []), 120)
    file = mido.MidiFile(tmp_path / "tune.mid")
    assert [m.tempo for m in file.tracks[0] if m.type == "set_tempo"] == [500_000]
    assert file.length == pytest.approx(3 * 0.5)


def test_other_keys_than_a_piano_s_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("mido")
    with pytest.raises(ValueError, match=r"steps are \[2, 87\], expected \[steps, 88\]"):
        midi.write(tmp_path / "tune.mid", np.zeros((2, 87)), 90)


def test_generate_writes_a_midi_file(server: FakeServer, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("mido")
    server.chords = [[39, 43], [39, 46]]
    path = tmp_path / "tune.mid"
    assert main(["generate", "piano", "-o", str(path), "--count", "3", "--tempo", "60", "--seed", "1"]) == 0
    assert capsys.readouterr().out == f"{path}: 3 steps\n"
    assert notes(path) == [(60, 0, 3), (64, 0, 1), (67, 1, 2), (64, 2, 3)]
