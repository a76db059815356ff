"""What the tasks on MNIST share: whole batches once each, distortions that repeat, the count of errors."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")

from tenuto.training import handwriting  # noqa: E402
from tenuto.training.datasets import mnist  # noqa: E402
from tenuto.training.handwriting import Images, batches_of, distort, strokes, wrong_part  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_split_holds_out_what_it_does_not_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(60 * 28 * 28).reshape(60, 28, 28) // (28 * 28)
    monkeypatch.setattr(handwriting, "VALIDATION", 10)
    monkeypatch.setattr(mnist, "train", lambda: (pixels.astype(np.uint8), np.arange(60, dtype=np.uint8) % 10))
    train, held = handwriting.split()
    assert (len(train.digits), len(held.digits)) == (50, 10)
    found = torch.cat([train.pixels, held.pixels])[:, 0, 0] * 255
    assert sorted(found.round().int().tolist()) == list(range(60))
    assert (found.round().int() % 10 == torch.cat([train.digits, held.digits])).all()


def test_batches_are_whole_and_hold_each_image_once() -> None:
    images = Images(torch.arange(50.0)[:, None, None].expand(50, 28, 28), torch.arange(50))
    batches = list(batches_of(images, 16, np.random.default_rng(0)))
    assert [len(digits) for _, digits in batches] == [16, 16, 16]
    digits = torch.cat([digits for _, digits in batches])
    assert len(set(digits.tolist())) == 48
    assert digits.tolist() != sorted(digits.tolist())
    assert all((pixels[:, 0, 0] == digits).all() for pixels, digits in batches)


@pytest.mark.parametrize("elastic", [0.0, 0.5])
def test_distortion_repeats_with_its_generator_and_keeps_the_ink(elastic: float) -> None:
    images = torch.from_numpy(strokes(20, seed=1))
    first, second, other = (distort(images, np.random.default_rng(s), elastic) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    ink = first.sum((1, 2)) / images.sum((1, 2))
    assert 0.6 < float(ink.min()) < float(ink.max()) < 1.5
    assert len({round(float(one), 6) for one in ink}) == 20  # each its own


def test_elastic_bends_what_an_affine_map_keeps_straight() -> None:
    line = torch.zeros(30, 28, 28)
    line[:, :, 14] = 1

    def bend(elastic: float) -> float:
        moved = distort(line, np.random.default_rng(0), elastic)[:, 8:20]
        columns = (moved * torch.arange(28.0)).sum(2) / moved.sum(2)
        curvature = columns[:, 2:] - 2 * columns[:, 1:-1] + columns[:, :-2]
        return float(curvature.abs().mean())

    assert bend(0.5) > 2 * bend(0.0)
    assert bend(0.0) < 0.1


def test_wrong_part_counts_over_all_pieces() -> None:
    images = Images(torch.zeros(1200, 28, 28), torch.arange(1200) % 10)
    always_three = torch.log(torch.full((10,), 0.05))
    always_three[3] = math.log(0.55)
    assert wrong_part(lambda pixels: always_three.expand(len(pixels), 10), images) == pytest.approx(0.9)
