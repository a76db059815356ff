"""What the tasks on MNIST share: the split, distortion and synthetic images."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .datasets import mnist
from .task import Batch

SPLIT = "official: 60,000 to train on, of which 5,000 are held out for validation; 10,000 to test"
DATA = {"name": "MNIST", "licence": mnist.LICENCE, "sha256": mnist.CHECKSUMS, "split": SPLIT}
VALIDATION = 5000  # images of the training set held out, drawn with seed 1
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of MNIST's training images in [0, 1]


@dataclass(frozen=True, eq=False)
class Images:
    """`pixels` float32 [n, 28, 28] in [0, 1], 1 is ink; `digits` int64 [n]."""

    pixels: Tensor
    digits: Tensor

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], digits: NDArray[np.uint8]) -> "Images":
        """Return MNIST's own bytes as tensors."""
        scaled = torch.from_numpy(pixels).float() / 255
        return cls(scaled, torch.from_numpy(digits.astype(np.int64)))


def split() -> tuple[Images, Images]:
    """Return MNIST's training images without the held-out ones, and those."""
    pixels, digits = mnist.train()
    order = np.random.default_rng(1).permutation(len(pixels))
    held, used = order[:VALIDATION], order[VALIDATION:]
    return Images.of(pixels[used], digits[used]), Images.of(pixels[held], digits[held])


def batches_of(images: Images, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Yield whole batches of pixels [size, 28, 28] and digits [size], in a random order, each image once."""
    order = torch.from_numpy(rng.permutation(len(images.digits)))
    for chosen in order[: len(order) // size * size].split(size):
        yield images.pixels[chosen], images.digits[chosen]


def distort(images: Tensor, rng: np.random.Generator, elastic: float = 0.0) -> Tensor:
    """Rotate, scale, shear and shift each image [batch, 28, 28] by its own random amount.

    With `elastic`, 7 x 7 points of the paper are also moved by that many pixels (standard deviation), and
    what is between them with them, smoothly (Simard 2003 smooths noise of every pixel instead).
    """

    def spread(width: float) -> Tensor:
        return torch.from_numpy(rng.uniform(-width, width, len(images)).astype(np.float32))

    angle, shear, scale = spread(math.radians(12)), spread(0.1), 1 + spread(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack(
        [
            torch.stack([cos, -sin + shear, spread(4 / 28)], 1),  # 4/28 of half a side: 2 pixels
            torch.stack([sin, cos, spread(4 / 28)], 1),
        ],
        1,
    )
    grid = F.affine_grid(rows, [len(images), 1, 28, 28], align_corners=False)
    if elastic:
        moved = torch.from_numpy(rng.standard_normal((len(images), 2, 7, 7), np.float32)) * (elastic * 2 / 28)
        moved = F.interpolate(moved, size=(28, 28), mode="bicubic", align_corners=True)
        grid = grid + moved.permute(0, 2, 3, 1)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def wrong_part(network: Callable[[Tensor], Tensor], images: Images) -> float:
    """Return the part of the images whose most probable answer, of [batch, 10], is wrong."""
    pairs = zip(images.pixels.split(500), images.digits.split(500), strict=True)
    wrong = sum(int((network(pixels).argmax(1) != digits).sum()) for pixels, digits in pairs)
    return wrong / len(images.digits)


def strokes(n: int, seed: int) -> NDArray[np.float32]:
    """Return n synthetic images float32 [n, 28, 28] in [0, 1]: blurred random lines, and noise."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"), -1)
    images = rng.random((n, 28, 28)) * 0.1
    for image in images:
        for start, stop in rng.uniform(5, 23, (3, 2, 2)):
            points = start + (stop - start) * np.linspace(0, 1, 20)[:, None]
            distance = np.linalg.norm(grid[:, :, None] - points, axis=-1).min(-1)
            np.maximum(image, np.exp(-((distance / 1.5) ** 2)), out=image)
    return images.astype(np.float32)
