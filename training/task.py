"""One thing to learn: its data, network, loss and metric. A module in `training/tasks/` has one of these."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor, nn

from tenuto.serving.manifest import Manifest

from .candidate import Candidate
from .recipe import Recipe

# Tensors whose first axis is the examples of one step. So they can be moved to a device and be dealt out
# between processes without asking the task.
Batch = tuple[Tensor, ...]
Figures = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Answers:
    """A classifier's test: `truth` and `said` int64 [n], the right classes and its own; `labels` by class."""

    truth: NDArray[np.int64]
    said: NDArray[np.int64]
    labels: Sequence[str]

    def figures(self, test_set: str) -> Figures:
        """Return the accuracy as the figures of a test."""
        right = int((self.truth == self.said).sum())
        n = len(self.truth)
        return {"metric": "accuracy", "value": right / n, "n": n, "test_set": test_set}


class Task(ABC):
    """What the trainer asks of a task.

    Everything random in an epoch comes from the generator that `batches` gets, or from torch's own (dropout),
    which the trainer seeds: so a killed training goes on to the same weights.
    """

    name: ClassVar[str]  # the model's name: its folder in exported/
    recipe: ClassVar[Recipe]
    data: ClassVar[Mapping[str, Any]]  # name, licence, sha256 and split, for metrics.json and the card
    card: ClassVar[str]  # what the model is for and where it fails, for MODEL_CARD.md

    @abstractmethod
    def load(self) -> None:
        """Read the data and hold out the validation part. Raises DataUnavailable, ChecksumMismatch."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Return the untrained network, after `load`: what is measured on the training part is in it.

        A recurrent one has `forward(x, state) -> (y, state)` and `initial_state(batch)`.
        """

    @abstractmethod
    def steps(self) -> int:
        """Return the number of batches an epoch has, the same for each."""

    @abstractmethod
    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield one epoch's batches, `steps()` of them, shuffled and varied by `rng` alone."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the batch's mean loss, a scalar."""

    @abstractmethod
    def validate(self, network: nn.Module) -> float:
        """Return the figure to make small on the validation part; the network is in eval mode."""

    @abstractmethod
    def candidate(self, network: nn.Module, seed: int) -> Candidate:
        """Return the ONNX file with all that is needed to check it. The network is on the CPU."""

    @abstractmethod
    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Return metric, value, n and test_set of an exported model, fed as its callers feed it.

        The one place that reads the test part; it must not need `load`.
        """

    def answers(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Answers | None:
        """Return what a classifier says of each test example, for `test` and for the confusion matrix."""
        return None

    def variants(self) -> Mapping[str, "Task"]:
        """Return other trainings of the same network whose test figures belong beside it, by label.

        They are not exported: speakers left out, say.
        """
        return {}

    def baselines(self) -> Mapping[str, Figures]:
        """Return what simpler methods reach on the same test part, by label."""
        return {}

    def source(self) -> str:
        """Return the text of the task's module without its card: a change there makes its trainings stale."""
        module = inspect.getmodule(type(self))
        return inspect.getsource(module).replace(self.card, "") if module is not None else ""
