"""Strokes: where they are does not matter, how they are padded neither, and each is varied in its own way."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")

from tenuto.training.datasets.magic_wand import Stroke  # noqa: E402
from tenuto.training.tasks import gestures  # noqa: E402
from tenuto.training.tasks.gestures import GestureNetwork, GesturesTask, collate, loops, vary  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network() -> Iterator[GestureNetwork]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield GestureNetwork().eval()


def _said(network: GestureNetwork, points: gestures.Points) -> Any:
    return network(torch.from_numpy(points)[None], network.initial_state(1))[0][0].numpy()


def test_where_a_stroke_is_does_not_matter(network: GestureNetwork) -> None:
    stroke = np.round(loops(1, 60) * 128) / 128  # so that sums are exact
    there = _said(network, (stroke + np.array([3.0, -2.0])).astype(np.float32))
    np.testing.assert_array_equal(there, _said(network, stroke.astype(np.float32)))
    bent = stroke.copy()
    bent[30:] += 0.25
    assert np.abs(_said(network, bent.astype(np.float32)) - there)[30:].max() > 1e-3


def test_point_by_point_is_what_the_whole_stroke_gives(network: GestureNetwork) -> None:
    stroke = torch.from_numpy(loops(2, 40))[None]
    state, said = network.initial_state(1), []
    for point in stroke.split(1, dim=1):
        y, state = network(point, state)
        said.append(y)
    whole, after = network(stroke, network.initial_state(1))
    torch.testing.assert_close(torch.cat(said, dim=1), whole)
    torch.testing.assert_close(state[0].last, stroke[:, -1])
    torch.testing.assert_close(state[0].first, after[0].first)


def test_padding_changes_neither_loss_nor_validation(network: GestureNetwork) -> None:
    task, (short, long) = GesturesTask(), (loops(3, 30), loops(4, 90))
    apart = [task.loss(network, collate([one], [digit])) for one, digit in ((short, 3), (long, 8))]
    together = task.loss(network, collate([short, long], [3, 8]))
    torch.testing.assert_close(together, sum(apart) / 2)
    last = [-_said(network, one)[-1, digit] for one, digit in ((short, 3), (long, 8))]
    task._held = [Stroke(3, 0, short), Stroke(8, 0, long)]
    assert task.validate(network) == pytest.approx(np.mean(last))


def test_the_end_of_a_stroke_weighs_most(network: GestureNetwork) -> None:
    task, stroke = GesturesTask(), loops(5, 50)
    points, lengths, digits = collate([stroke], [0])
    base = task.loss(network, (points, lengths, digits))
    changes = []
    for place in (2, 48):
        other = points.clone()
        other[0, place:] += 0.3
        changes.append(abs(float(task.loss(network, (other, lengths, digits)) - base)))
    assert min(changes) > 0
    nats = -_said(network, stroke)[:, 0]
    weights = (np.arange(1, 51) / 50) ** 4
    expected = ((nats * weights).sum() / weights.sum() + nats[-1]) / 2
    assert float(base) == pytest.approx(expected, rel=1e-5)


def test_each_variation_is_its_own_and_like_the_stroke() -> None:
    stroke, rng = loops(6, 80), np.random.default_rng(0)
    varied = [vary(stroke, rng) for _ in range(50)]
    again = vary(stroke, np.random.default_rng(0))
    np.testing.assert_array_equal(again, varied[0])
    lengths = {len(one) for one in varied}
    assert len(lengths) > 10
    assert min(lengths) >= 40
    assert max(lengths) <= 115
    assert all(one.dtype == np.float32 and np.isfinite(one).all() for one in varied)
    extents = [np.ptp(one, axis=0).max() / np.ptp(stroke, axis=0).max() for one in varied]
    assert 0.5 < min(extents) < 0.9
    assert 1.1 < max(extents) < 2
