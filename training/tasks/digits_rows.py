"""An LSTM that reads a handwritten digit row by row: `tenuto train digits-rows`.

Many to one: 28 rows of 28 pixels come one after the other, from the top; the answer is what it says after
the last. Trained on MNIST with a random affine distortion of every image.
"""

from collections.abc import Iterator

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.serving.manifest import Manifest
from tenuto.training import recurrent_graph
from tenuto.training.candidate import Candidate
from tenuto.training.datasets import mnist
from tenuto.training.handwriting import DATA, PIXEL_MEAN, PIXEL_STD, distort, split, strokes
from tenuto.training.progress import progress
from tenuto.training.recipe import Recipe
from tenuto.training.recurrent import RecurrentNetwork, Shape
from tenuto.training.stepper import replay_batch
from tenuto.training.task import Answers, Batch, Figures, Task

BATCH = 128
SHAPE = Shape(inputs=28, hidden=(128,), outputs=10)


class DigitsRowsTask(Task):
    """MNIST, a row a step."""

    name = "digits-rows"
    recipe = Recipe(epochs=14, learning_rate=4e-3)
    data = DATA
    card = """
Reads one handwritten digit from its rows, as a line scanner would see them: 28 rows of 28 pixels, light
ink on dark paper, from the top. Its answer counts after the last row; before that it is a guess. A
demonstration of "many to one"; for reading digits `digits` is better and cheaper.
"""

    def load(self) -> None:
        """Read MNIST's training images; 5,000 are held out."""
        self._train, self._held = split()

    def network(self) -> nn.Module:
        """Return an LSTM over rows."""
        network = RecurrentNetwork(SHAPE, dropout=0.1)
        network.mean.fill_(PIXEL_MEAN)
        network.std.fill_(PIXEL_STD)
        return network

    def steps(self) -> int:
        """Return the number of whole batches."""
        return len(self._train.digits) // BATCH

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield rows [128, 28, 28] and digits [128]."""
        order = torch.from_numpy(rng.permutation(len(self._train.digits)))
        for chosen in order[: self.steps() * BATCH].split(BATCH):
            yield distort(self._train.pixels[chosen], rng), self._train.digits[chosen]

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy of the answer after the last row."""
        rows, digits = batch
        return F.nll_loss(_answers(network, rows), digits)

    def validate(self, network: nn.Module) -> float:
        """Return the part of the held-out images that is read wrongly."""
        wrong = sum(
            int((_answers(network, rows).argmax(1) != digits).sum())
            for rows, digits in zip(self._held.pixels.split(500), self._held.digits.split(500), strict=True)
        )
        return wrong / len(self._held.digits)

    def candidate(self, network: nn.Module, seed: int) -> Candidate:
        """Build the ONNX file, and synthetic images to check it with."""
        assert isinstance(network, RecurrentNetwork)
        return recurrent_graph.candidate(
            network,
            manifest(),
            golden=np.split(strokes(1, seed)[0], [1, 2, 5, 9, 20]),
            probe=strokes(40, seed + 1).reshape(-1, 28),
            card=self.card,
        )

    def answers(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Answers:
        """Read MNIST's test images, each one sequence, seven rows at a time."""
        images, digits = mnist.test()
        said = np.empty(len(images), np.int64)
        with progress("digits-rows: test", len(images)) as bar:
            for start in range(0, len(images), manifest.max_batch):
                rows = images[start : start + manifest.max_batch].astype(np.float32) / np.float32(255)
                outputs = replay_batch(session, manifest, np.split(rows, 4, axis=1))
                for row, output in enumerate(outputs, start):
                    said[row] = output["log_probabilities"][-1].argmax()
                bar.update(len(rows))
        return Answers(digits.astype(np.int64), said, mnist.LABELS)

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Accuracy after the last row."""
        test_set = "MNIST, the 10,000 test images, seven rows a chunk, the answer after the last"
        return self.answers(session, manifest).figures(test_set)


def _answers(network: nn.Module, rows: Tensor) -> Tensor:
    assert isinstance(network, RecurrentNetwork)
    answers: Tensor = network(rows, network.initial_state(len(rows)))[0]
    return answers[:, -1]


def manifest() -> Manifest:
    """Describe the model; rows may also come as uint8."""
    return recurrent_graph.manifest(
        SHAPE,
        name=DigitsRowsTask.name,
        description="Handwritten digits 0 to 9, read row by row from the top; the answer counts after 28 "
        "rows of 28 pixels, light ink on dark paper.",
        licence="CC-BY-SA-3.0",
        entry={"name": "rows", "unit": "ink, 0 to 1", "wire": [{"dtype": "uint8", "scale": 1 / 255}]},
        output={"name": "log_probabilities", "labels": mnist.LABELS},
        max_batch=64,
        max_frames=28,
    )
