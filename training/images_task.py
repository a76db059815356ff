"""What the tasks have in common whose network sees a whole image of MNIST at once."""

from abc import ABC
from collections.abc import Iterator

import numpy as np
import onnxruntime
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.serving.manifest import Manifest

from .datasets import mnist
from .handwriting import DATA, batches_of, distort, split, wrong_part
from .progress import progress
from .stepper import replay
from .task import Answers, Batch, Figures, Task

BATCH = 128


class ImagesTask(Task, ABC):
    """Images float32 [batch, 28, 28] in [0, 1] to log-probabilities [batch, 10]."""

    data = DATA
    elastic = 0.0  # pixels, as in `distort`

    def load(self) -> None:
        """Read MNIST's training images; 5,000 are held out."""
        self._train, self._held = split()

    def steps(self) -> int:
        """Return the number of whole batches."""
        return len(self._train.digits) // BATCH

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield distorted images [128, 28, 28] and digits [128]."""
        for pixels, digits in batches_of(self._train, BATCH, rng):
            yield distort(pixels, rng, self.elastic), digits

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy."""
        images, digits = batch
        return F.nll_loss(network(images), digits)

    def validate(self, network: nn.Module) -> float:
        """Return the part of the held-out images that is read wrongly."""
        return wrong_part(network, self._held)

    def answers(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Answers:
        """Read MNIST's test images, in batches of the model's `max_batch`."""
        images, digits = mnist.test()
        said = np.empty(len(images), np.int64)
        with progress(f"{self.name}: test", len(images)) as bar:
            for start in range(0, len(images), manifest.max_batch):
                batch = images[start : start + manifest.max_batch].astype(np.float32) / np.float32(255)
                output = replay(session, manifest, [batch])[0]["log_probabilities"]
                said[start : start + len(batch)] = output.argmax(1)
                bar.update(len(batch))
        return Answers(digits.astype(np.int64), said, mnist.LABELS)

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Accuracy on MNIST's test images."""
        return self.answers(session, manifest).figures("MNIST, the 10,000 test images")
