"""The models that listen: their ear, the voices they train on, the streams that they are tested on."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tenuto.training import checks
from tenuto.training.datasets import fsdd
from tenuto.training.datasets.fsdd import RATE_HZ, Recording
from tenuto.training.graph import Graph, add_rnn
from tenuto.training.stepper import load, replay

torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")


def _recordings(takes: range) -> list[Recording]:
    from tenuto.training.sound import tones

    return [
        Recording(f"{digit}_a_{take}.wav", digit, "a", take, tones(100 * take + digit, seconds=0.3))
        for take in takes
        for digit in range(10)
    ]


def _task(name: str) -> Any:
    from tenuto.training import tasks

    return tasks.find(name).use(_recordings(range(10, 13)), _recordings(range(5, 7)))  # type: ignore[attr-defined]


SPEECH = ["spoken-digits", "spoken-digits-rnn", "digit-strings"]


@pytest.mark.parametrize("name", SPEECH)
def test_same_seed_gives_the_same_bytes(
    name: str, one_thread: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenuto.training.recipe import Recipe
    from tenuto.training.tasks import digit_strings
    from tenuto.training.trainer import Trainer

    monkeypatch.setattr(digit_strings, "SEGMENTS", 2)
    monkeypatch.setattr(digit_strings, "STREAMS", 3)

    def trained(folder: str) -> Any:
        task = _task(name)
        fitted = Trainer(task, Recipe(epochs=2, learning_rate=1e-3), 5, tmp_path / folder).run()
        return task.candidate(fitted.network, 5)

    first, second = trained("first"), trained("second")
    assert first.model == second.model
    session, manifest = load(first.model)
    assert manifest == first.manifest
    assert checks.parity(first, session) <= first.tolerance
    assert checks.invariance(session, manifest, first.probe, trials=5) == 0.0


def test_a_plain_rnn_is_torchs_and_the_same_alone_as_in_a_batch(one_thread: Any) -> None:
    torch.manual_seed(0)
    rnn = torch.nn.RNN(5, 16)
    graph = Graph("toy")
    graph.input("x", "float32", ["time", "batch", 5])
    graph.input("lengths", "int32", ["batch"])
    graph.input("h", "float32", [1, "batch", 16])
    weights = {name: value.numpy() for name, value in rnn.state_dict().items()}
    y = add_rnn(graph, "rnn", weights, "x", "lengths", "h", "h_next")
    graph.output(y, "float32", ["time", "batch", 16])
    graph.output("h_next", "float32", [1, "batch", 16])
    session = onnxruntime.InferenceSession(graph.model({"a": "b"}), providers=["CPUExecutionProvider"])

    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 3, 5)).astype(np.float32)
    h = rng.standard_normal((1, 3, 16)).astype(np.float32)
    lengths = np.array([6, 1, 4], np.int32)
    got = session.run(None, {"x": x, "lengths": lengths, "h": h})
    for row, length in enumerate(lengths):
        mine = {"x": x[:length, row : row + 1], "lengths": lengths[row : row + 1], "h": h[:, row : row + 1]}
        alone = session.run(None, mine)
        np.testing.assert_array_equal(got[0][:length, row], alone[0][:, 0])
        np.testing.assert_array_equal(got[1][:, row], alone[1][:, 0])
        with torch.no_grad():
            y_torch, h_torch = rnn(torch.from_numpy(mine["x"]), torch.from_numpy(mine["h"]))
        np.testing.assert_allclose(alone[0], y_torch.numpy(), atol=1e-6)
        np.testing.assert_allclose(alone[1], h_torch.numpy(), atol=1e-6)


def _sine(hertz: float, seconds: float = 0.4) -> Any:
    time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return torch.from_numpy((0.1 * np.sin(2 * np.pi * hertz * time)).astype(np.float32))[None]


def test_a_longer_vocal_tract_moves_resonances() -> None:
    from tenuto.training.sound import Ear, mel_bands

    ear = Ear()
    np.testing.assert_array_equal(mel_bands(1.0), ear.mel.numpy())
    for warp in (0.87, 1.15):
        moved = (ear.power(_sine(1000)) @ torch.from_numpy(mel_bands(warp))).mean((0, 1)).argmax()
        expected = (ear.power(_sine(1000 * warp)) @ ear.mel).mean((0, 1)).argmax()
        assert moved == expected != (ear.power(_sine(1000)) @ ear.mel).mean((0, 1)).argmax()


def test_an_echo_comes_after_its_sound() -> None:
    from tenuto.training import voices

    power = torch.zeros(64, 30, 4)
    power[:, 10] = 1
    mixed = voices.echo(power, voices.STRANGERS, np.random.default_rng(0)).numpy()
    assert not mixed[:, :10].any()
    np.testing.assert_array_equal(mixed[:, 10], 1)
    echoed = mixed[:, 11].max(axis=1) > 0
    assert 10 < echoed.sum() < 34  # a third of the rows
    assert (np.diff(mixed[echoed, 11:], axis=1) < 0).all()
    assert mixed[:, 11:, 0].sum(axis=1).max() <= 10 ** (voices.STRANGERS.echo_db[1] / 10)


def test_voices_differ_by_generator_alone() -> None:
    from tenuto.training import voices
    from tenuto.training.sound import Ear, tones

    sound = torch.from_numpy(np.stack([tones(n)[: 120 + 160 * 40] for n in (1, 2)]) / np.float32(32768))
    ear, word = Ear(), _recordings(range(10, 11))[0]
    first, again, other = (
        voices.heard(ear, sound, voices.STRANGERS, np.random.default_rng(n)).numpy() for n in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert first.shape == ear(sound).shape
    assert np.abs(first - other).max() > 0.1
    levels, (low, high) = [], voices.STRANGERS.level_db
    for n in range(50):
        said = voices.say(word, voices.STRANGERS, np.random.default_rng(n))
        levels.append(20 * np.log10(np.sqrt(np.mean(said**2))))
        assert 0.6 * len(word.pcm) < len(said) < 1.2 * len(word.pcm)
    assert low - 1 <= min(levels) < max(levels) <= high + 1


def test_an_answer_counts_more_the_more_of_its_word_was_heard() -> None:
    from tenuto.training import voices
    from tenuto.training.spoken import vary

    first, second = _recordings(range(10, 11))[3:5]
    example = vary([first, second], voices.STRANGERS, np.random.default_rng(4))
    assert len(example.sound) == 160 * len(example.targets)
    change = int(np.flatnonzero(np.diff(example.targets) == 1)[0]) + 1
    assert set(example.targets[change:]) == {4}
    assert example.weights[change - 1] > 0.9 > 0.1 > example.weights[change]
    assert example.weights[-1] > 0.8


def test_no_word_crosses_the_end_of_a_segment() -> None:
    from tenuto.training.strings import SETTLE, segment

    quiet = 0
    for n in range(60):
        drawn = segment(_recordings(range(10, 12)), 4 * RATE_HZ, np.random.default_rng(n))
        sound, digits = drawn.sound, drawn.digits
        assert sound.shape == (4 * RATE_HZ,)
        assert sound.dtype == np.float32
        words, end = np.abs(sound[:-SETTLE]).max(), np.abs(sound[-SETTLE:]).max()
        assert end < 0.05  # noise at most
        quiet += not digits
        assert bool(digits) == (words > end * 1.5)
        now, heard = drawn.frames()
        assert [d for d, _, _ in drawn.spans] == [int(now[stop // 160 - 1]) for _, _, stop in drawn.spans]
        assert bool(digits) == (heard.max() == 1)
        assert (heard.sum() == 0) == (not digits)
    assert 0 < quiet < 20


def test_a_stream_is_the_same_however_it_is_cut() -> None:
    from tenuto.training.strings import Stream

    drawn = Stream.draw(_recordings(range(2)), 12, np.random.default_rng(1))
    silent = Stream(drawn.words, noise=0.0)
    whole = silent.between(0, 12 * RATE_HZ, np.random.default_rng(0))
    cuts = [0, 1, 5120, 5121, 40000, 12 * RATE_HZ]
    parts = [silent.between(a, b, np.random.default_rng(0)) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert all(b.start >= a.stop for a, b in pairwise(drawn.words))
    assert drawn.words[-1].start < 12 * RATE_HZ <= drawn.words[-1].stop + 2 * RATE_HZ


@pytest.mark.parametrize(
    "expected, got, distance",
    [([], [], 0), ([1, 2, 3], [1, 2, 3], 0), ([1, 2, 3], [1, 3], 1), ([1], [4, 1, 1], 2), ([1, 2], [], 2),
     ([1, 2, 3, 4], [2, 3, 4, 5], 2), ([7, 7], [7], 1)],
)  # fmt: skip
def test_edit_distance(expected: list[int], got: list[int], distance: int) -> None:
    from tenuto.training.strings import edit_distance

    assert edit_distance(expected, got) == edit_distance(got, expected) == distance


def test_a_digit_is_written_once(one_thread: Any) -> None:
    from tenuto.training.tasks.digit_strings import emitted

    labels = np.array([0, 4, 4, 0, 4, 5, 5, 0])
    np.testing.assert_array_equal(emitted(labels), [-1, 3, -1, -1, 3, 4, -1, -1])
    assert emitted(np.array([4, 0]), last=4).tolist() == [-1, -1]
    assert emitted(np.array([4, 0]), last=5).tolist() == [3, -1]


def test_the_written_digits_are_those_of_the_labels_in_any_chunks(one_thread: Any) -> None:
    from tenuto.training.tasks.digit_strings import emitted

    task = _task("digit-strings")
    torch.manual_seed(3)
    network = task.network().eval()
    with torch.no_grad():
        network.head.weight *= 40  # so that labels change often
    candidate = task.candidate(network, seed=1)
    session, manifest = load(candidate.model)
    sound = candidate.probe[: 160 * 90]
    whole = replay(session, manifest, [sound])[0]
    expected = emitted(whole["log_probabilities"].argmax(-1))
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(whole["digit"], expected)
    parts = replay(session, manifest, np.split(sound, [160, 480, 481, 2000, 7000]))
    np.testing.assert_array_equal(np.concatenate([one["digit"] for one in parts if one]), expected)


def test_streams_are_measured_by_their_age(one_thread: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that writes all words at their ends but one in a window is wrong there by one."""
    from tenuto.training.tasks import digit_strings

    def listen(session: Any, manifest: Any, streams: Any, samples: int, rng: Any) -> Any:
        skipped = {min(w.start for w in s.words if w.start >= 20 * RATE_HZ) for s in streams}
        return [[(w.stop, w.digit) for w in s.words if w.start not in skipped] for s in streams]

    monkeypatch.setattr(digit_strings, "_listen", listen)
    monkeypatch.setattr(fsdd, "recordings", lambda split: _recordings(range(5)))
    session: Any = None
    found = digit_strings.measure(session, session, 5, {"early": (5, 15), "late": (20, 30)})
    assert found["ages"]["early"]["wrong"] == 0
    assert found["ages"]["late"]["wrong"] == 5
    assert found["ages"]["late"]["digits"] > 50
    assert found["milliseconds_after_its_end"] == {"median": 0.0, "90_percent": 0.0}
    assert found["milliseconds_after_its_beginning"]["median"] == 300.0


def test_a_speaker_left_out_is_not_trained_on(reachable: Callable[[Callable[[], Any]], Any]) -> None:
    from tenuto.training import voices
    from tenuto.training.tasks.spoken_digits import SpokenDigitsTask

    whole = SpokenDigitsTask()
    variants = whole.variants()
    assert len(variants) == 6
    task: Any = variants["without-theo"]
    assert (whole.variety, task.variety) == (voices.FAMILIAR, voices.STRANGERS)
    reachable(task.load)
    speakers = {one.speaker for one in [*task._train, *task._held]}
    assert len(speakers) == 5
    assert "theo" not in speakers
    assert len(task._train) == 2000


EXPORTED = Path(__file__).resolve().parents[2] / "exported"


def test_spoken_digits_were_measured_with_three_seeds_and_six_voices_left_out() -> None:
    from tenuto.training.spoken import SPEAKERS

    metrics = json.loads((EXPORTED / "spoken-digits/1/metrics.json").read_bytes())
    assert metrics["seeds"]["mean"] >= 0.99
    assert len(metrics["seeds"]["values"]) == 3
    variants = metrics["variants"]
    assert variants.keys() == {f"without-{speaker}" for speaker in SPEAKERS} | {"mean"}
    assert all(variants[f"without-{speaker}"]["n"] == 500 for speaker in SPEAKERS)


def test_old_streams_of_digits_are_written_as_well_as_young_ones() -> None:
    metrics = json.loads((EXPORTED / "digit-strings/1/metrics.json").read_bytes())
    ages = metrics["test"]["ages"]
    young, old = ages["10 s"], ages["10 min"]
    noise = np.hypot(young["standard_error"], old["standard_error"])
    assert abs(old["digit_error_rate"] - young["digit_error_rate"]) <= 2.5 * noise
    assert min(one["digits"] for one in ages.values()) > 1000
