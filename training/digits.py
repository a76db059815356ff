"""A CNN that reads handwritten digits: `tenuto train digits` (about 10 CPU minutes).

Five 3x3 convolutions with batch normalisation, trained on MNIST with a random affine distortion of
every image, Adam with decoupled weight decay and one cycle of the learning rate (Smith 2018).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from . import digits_graph
from .candidate import AnyArray, Candidate, Tensors
from .datasets import mnist
from .progress import progress
from .weights import count, exported

NAME = "digits"
EPOCHS = 20
THREADS = 1
BATCH = 128
LEARNING_RATE = 4e-3
VALIDATION = 5000  # images of the training set held out, drawn with seed 1
SPLIT = "official: 60,000 to train on, of which 5,000 are held out for validation; 10,000 to test"
DATA = {"name": "MNIST", "licence": mnist.LICENCE, "sha256": mnist.CHECKSUMS, "split": SPLIT}

CARD = """
Reads one handwritten digit: 28 x 28 pixels, light ink on dark paper, the digit centred and about 20
pixels high, as in MNIST. For demonstrations and tests of image batches. It answers with a digit for
any image, one of a cat included, and with more confidence than it deserves there. Dark ink on light
paper must be inverted first. Trained on digits by American writers around 1990; elsewhere people
write 1 and 7 in other ways.
"""

PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of MNIST's training images in [0, 1]


class Block(nn.Module):
    """Convolution, then pooling if asked, then normalisation and rectification.

    Pooling first makes the other two four times cheaper.
    """

    def __init__(self, inputs: int, outputs: int, pool: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.normalisation = nn.BatchNorm2d(outputs)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 [batch, inputs, side, side] to [batch, outputs, side or side // 2, same]."""
        x = self.convolution(x)
        if self.pool:
            x = F.max_pool2d(x, 2)
        return F.relu(self.normalisation(x))


class DigitNetwork(nn.Module):
    """Images float32 [batch, 28, 28] in [0, 1] to log-probabilities [batch, 10]."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN))
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD))
        self.blocks = nn.Sequential(
            Block(1, 32, pool=True),
            Block(32, 32, pool=False),
            Block(32, 64, pool=True),
            Block(64, 64, pool=False),
            Block(64, 96, pool=True),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(96 * 3 * 3, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities float32 [batch, 10]."""
        x = (images[:, None] - self.pixel_mean) / self.pixel_std
        features = self.blocks(x.to(memory_format=torch.channels_last))
        return F.log_softmax(self.head(self.dropout(features.flatten(1))), dim=1)


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift each image [batch, 28, 28] by its own random amount."""

    def spread(width: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * width

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
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def fit(images: NDArray[np.uint8], labels: NDArray[np.uint8], seed: int, epochs: int) -> DigitNetwork:
    """Train on images uint8 [n, 28, 28] and labels uint8 [n]; return the network in eval mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitNetwork()
    for block in network.blocks.children():
        # Channels last, like the images: less than half the time of a step on a CPU.
        kernel = block.get_parameter("convolution.weight")
        kernel.data = kernel.data.to(memory_format=torch.channels_last)
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with progress("digits: training", steps) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
                answer = network(distort(pixels[batch].float() / 255, generator))
                loss = F.nll_loss(answer, targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    network.eval()
    return network


def candidate(network: DigitNetwork, seed: int) -> Candidate:
    """Build the ONNX file, and synthetic images to check it with."""
    described = digits_graph.manifest()
    blocks = [block for block in network.blocks if isinstance(block, Block)]

    def reference(batches: Sequence[AnyArray]) -> list[Tensors]:
        with torch.no_grad():
            answers = [network(torch.from_numpy(batch)).numpy() for batch in batches]
        return [{"log_probabilities": answer} for answer in answers]

    return Candidate(
        manifest=described,
        model=digits_graph.build(exported(network), [block.pool for block in blocks], described),
        reference=reference,
        golden=[strokes(8, seed)],
        probe=strokes(200, seed + 1),
        tolerance=1e-4,
        golden_tolerance=1e-3,
        parameters=count(network),
        card=CARD,
    )


def train(seed: int, epochs: int) -> Candidate:
    """Run the recipe on MNIST; 5,000 of its training images are held out for validation."""
    images, labels = mnist.train()
    order = np.random.default_rng(1).permutation(len(images))
    held, used = order[:VALIDATION], order[VALIDATION:]
    network = fit(images[used], labels[used], seed, epochs)
    with torch.no_grad():
        answers = network(torch.from_numpy(images[held]).float() / 255).argmax(1).numpy()
    right = float((answers == labels[held]).mean())
    return candidate(network, seed).with_training(
        validation_accuracy=right, validation_n=VALIDATION, selection="none: the last epoch"
    )


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
