"""`shakespeare`, `chorales`, `sentiment` and `oil-temperature`, on made-up data: what is theirs alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")

import torch
from torch import nn

from tenuto.training import checks, dlinear, sentiment_graph
from tenuto.training.datasets import etth1
from tenuto.training.sentiment import UNIT, Lexicon, SentimentNetwork, pair_ids
from tenuto.training.stepper import load, replay
from tenuto.training.task import Task
from tenuto.training.tasks import chorales, oil_temperature, sentiment, shakespeare
from tenuto.training.trainer import Trainer

WORDS = ["a", "the", "film", "plot", "cast", "was", "is", "not", "good", "bad", "dull", "bright", ",", "."]


def _shakespeare() -> Task:
    task = shakespeare.ShakespeareTask()
    task.take(shakespeare.babble(12_000, seed=3))
    return task


def _chorales() -> Task:
    task = chorales.ChoralesTask()
    rolls = [chorales.chords(steps, seed=steps).astype(np.uint8) for steps in range(5, 25)]
    task.take(rolls[:16], rolls[16:])
    return task


def _reviews(n: int, seed: int) -> sentiment.Reviews:
    rng = np.random.default_rng(seed)
    text = [" ".join(rng.choice(WORDS, rng.integers(1, 20))) for _ in range(n)]
    good = np.array(["good" in one or "bright" in one for one in text])
    return sentiment.Reviews([sentiment.CUTTER.ids(one) for one in text], good)


def _sentiment() -> Task:
    task = sentiment.SentimentTask()
    task.take(_reviews(120, seed=3), _reviews(40, seed=4))
    return task


def _oil_temperature() -> Task:
    task = oil_temperature.OilTemperatureTask()
    task.take(oil_temperature.seasons(seed=3, hours=700), oil_temperature.seasons(seed=4, hours=460))
    return task


TASKS = {"shakespeare": _shakespeare, "chorales": _chorales, "sentiment": _sentiment, "oil": _oil_temperature}


def _trained(task: Task, folder: Path) -> nn.Module:
    return Trainer(task, dataclasses.replace(task.recipe, epochs=1), 5, folder).run().network


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_same_seed_gives_the_same_bytes(
    make: Callable[[], Task], one_thread: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oil_temperature, "STEPS", 3)
    first, second = (make().candidate(_trained(make(), tmp_path / run), seed=5) for run in ("one", "two"))
    assert first.model == second.model
    session, manifest = load(first.model)
    assert manifest == first.manifest
    assert checks.parity(first, session) <= first.tolerance
    assert checks.invariance(session, manifest, first.probe, trials=5) == 0.0


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_an_epoch_has_as_many_steps_as_it_says(make: Callable[[], Task]) -> None:
    task = make()
    one, two = (list(task.batches(np.random.default_rng(seed))) for seed in (1, 2))
    assert len(one) == len(two) == task.steps()
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


class TestShakespeare:
    def test_an_epoch_reads_the_text_once_and_not_what_is_held_out(self) -> None:
        task = shakespeare.ShakespeareTask()
        task.take(np.arange(40_000))
        read = [batch[0] for batch in task.batches(np.random.default_rng(0))]
        seen = torch.cat([piece for pieces in read for piece in pieces])
        assert len(seen.unique()) == len(seen) == task.steps() * shakespeare.PIECES * shakespeare.PIECE
        assert not ((seen >= 18_000) & (seen < 20_000)).any()

    def test_what_follows_is_a_character_further(self) -> None:
        for read, follow in _shakespeare().batches(np.random.default_rng(0)):
            assert torch.equal(read[:, 1:], follow[:, :-1])

    def test_text_on_the_wire_is_what_it_was_trained_on(self) -> None:
        cutter = shakespeare.manifest().inputs[0].text
        assert cutter is not None
        text = "ROMEO:\nO, she doth teach!\n"
        assert (cutter.ids(text) == shakespeare.CUTTER.ids(text)).all()


class TestChorales:
    def test_what_is_heard_is_one_step_behind(self) -> None:
        roll = chorales.chords(7, seed=1).astype(np.uint8)
        heard, truth, weights = chorales.collate([roll, roll[:3]])
        assert not heard[:, 0].any()
        assert torch.equal(heard[0, 1:], truth[0, :-1])
        assert truth[0].numpy().astype(np.uint8).tolist() == roll.tolist()
        assert weights.sum(1).tolist() == [7, 3]
        assert not truth[1, 3:].any()

    def test_loss_does_not_see_padding_and_is_what_the_test_measures(self) -> None:
        task = _chorales()
        network = task.network().eval()
        rolls = [chorales.chords(steps, seed=steps).astype(np.uint8) for steps in (3, 30)]
        batch = chorales.collate(rolls)
        with torch.no_grad():
            together = float(task.loss(network, batch))
        session, manifest = load(task.candidate(network, 0).model)
        nats = []
        for row, roll in enumerate(rolls):
            heard, truth = (part[row, : len(roll)].numpy() for part in batch[:2])
            likely = replay(session, manifest, [heard])[0]["probabilities"].astype(np.float64)
            nats.append(chorales.surprise(likely, truth))
        assert together == pytest.approx(np.concatenate(nats).mean(), rel=1e-5)

    def test_transposing_keeps_the_intervals(self) -> None:
        roll = chorales.chords(7, seed=1).astype(np.uint8)
        low, high = chorales.TRANSPOSITIONS
        rng = np.random.default_rng(0)
        moved = [chorales.transpose(roll, rng) for _ in range(200)]
        shifts = {int(np.flatnonzero(one[0])[0] - np.flatnonzero(roll[0])[0]) for one in moved}
        assert shifts == set(range(low, high + 1))
        assert all((np.roll(one, -s, 1) == roll).all(1).all() for one in moved for s in [_shift(one, roll)])

    def test_surprise_is_the_logarithm_of_the_chords_probability(self) -> None:
        likely, truth = np.full((1, 88), 0.5), np.zeros((1, 88), np.float32)
        assert chorales.surprise(likely, truth) == pytest.approx([88 * np.log(2)])
        likely[0, 3], truth[0, 3] = 0.9, 1
        assert chorales.surprise(likely, truth) == pytest.approx([87 * np.log(2) - np.log(0.9)])


def _shift(one: Any, roll: Any) -> int:
    return int(np.flatnonzero(one[0])[0] - np.flatnonzero(roll[0])[0])


class TestSentiment:
    def test_lexicon_counts_sentences_not_words(self) -> None:
        good, bad, film = 1, 2, 3
        sentences = [np.array(ids) for ids in ([good, good, film], [good], [bad, film])]
        favourable = np.array([True, True, False])
        lexicon = Lexicon.count(sentences, favourable, buckets=10, pairs=1000, least=2)
        # Plus one in each of ten buckets: 13 in favourable sentences, 12 in the others.
        for word, (for_, against) in {good: (3, 1), bad: (1, 2), film: (2, 2), 9: (1, 1)}.items():
            assert lexicon.single[word] == pytest.approx(np.log((for_ / 13) / (against / 12)), abs=UNIT)
        assert (lexicon.single / UNIT % 1 == 0).all()
        assert lexicon.rows.tolist() == [0, 1, 0, 2, 0, 0, 0, 0, 0, 0]  # bad was seen once
        assert lexicon.vectors == 3

    def test_pairs_have_an_order_and_a_beginning(self) -> None:
        one, other = pair_ids(np.array([5, 7]), 2**20), pair_ids(np.array([7, 5]), 2**20)
        assert len({*one.tolist(), *other.tolist()}) == 4
        assert pair_ids(np.array([0, 5]), 2**20)[0] == 0  # nothing, then word 0
        assert pair_ids(np.array([0, 0]), 2**20)[1] == 1_000_003

    def test_the_answer_is_the_mean_of_both_opinions(self) -> None:
        task = _sentiment()
        network = task.network().eval()
        assert isinstance(network, SentimentNetwork)
        words = _reviews(1, seed=9).words[0]
        batch, length = torch.from_numpy(words)[None], torch.tensor([len(words)])
        with torch.no_grad():
            said, _ = network(batch, network.initial_state(1))
            heard = network.opinion(batch, length)[0]
        pairs = pair_ids(words, len(network.pair))
        votes = float(network.single[words].double().sum() + network.pair[pairs].double().sum())
        odds = float(said[0, -1, 1] - said[0, -1, 0])
        assert odds == pytest.approx((float(heard[1] - heard[0]) + votes) / 2, abs=1e-5)

    def test_text_on_the_wire_is_cut_as_for_training(self) -> None:
        cutter = sentiment_graph.manifest(sentiment.BUCKETS, sentiment.HIDDEN).inputs[0].text
        assert cutter is not None
        text = "It's NOT a good film."
        assert (cutter.ids(text) == sentiment.CUTTER.ids(text)).all()
        assert (cutter.ids(text) == cutter.ids(text.lower())).all()

    def test_folds_share_nothing_and_leave_nothing_out(self, reachable: Callable[..., Any]) -> None:
        folds = [reachable(lambda fold=fold: sentiment.Reviews.read([fold])) for fold in range(10)]
        assert sum(len(fold.words) for fold in folds) == 10662
        assert {len(fold.words) for fold in folds} == {1066, 1067}
        assert sum(int(fold.favourable.sum()) for fold in folds) == 5331


class TestOilTemperature:
    def test_baselines_repeat_what_they_saw(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pure day: repeating it is right, repeating its last hour is not, and DLinear learns it."""
        hours = np.arange(17420)[:, None]
        values = (np.sin(2 * np.pi * hours / 24) * np.arange(1, 8) + 5).astype(np.float32)
        made_up = etth1.EtthSeries(values, etth1.COLUMNS, np.zeros(len(values), "datetime64[h]"))
        monkeypatch.setattr(etth1, "series", lambda: made_up)
        monkeypatch.setattr(etth1, "TRAIN", (7000, 8640))
        whole = dlinear.forecaster
        monkeypatch.setattr(
            dlinear, "forecaster", lambda *given: whole(given[0], given[1], given[2], given[3], epochs=5)
        )
        found = oil_temperature.OilTemperatureTask().baselines()
        assert found["the last day, repeated"]["value"] == pytest.approx(0, abs=1e-9)
        assert found["the last hour, repeated"]["value"] > 0.5
        assert found["DLinear, 336 hours"]["value"] < 0.01
        assert {one["n"] for one in found.values()} == {2785}

    def test_dlinear_forgets_the_epochs_that_were_worse(self) -> None:
        """Validation hours without any order: the more was learnt, the worse, so the first epoch is kept."""
        train = oil_temperature.seasons(seed=1, hours=600)
        held = np.random.default_rng(0).standard_normal((500, 7)).astype(np.float32)
        one, three = (
            dlinear.forecaster(train - train.mean(0), held, 48, 24, epochs=epochs) for epochs in (1, 3)
        )
        for kept, first in zip(three.parameters(), one.parameters(), strict=True):
            assert torch.equal(kept, first)
