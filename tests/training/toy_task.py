"""The smallest task that has everything: a running mean of noise, from a GRU with dropout."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.serving.manifest import Manifest
from tenuto.training import recurrent_graph
from tenuto.training.candidate import Candidate
from tenuto.training.recipe import Recipe
from tenuto.training.recurrent import RecurrentNetwork, Shape
from tenuto.training.stepper import replay
from tenuto.training.task import Batch, Figures, Task

SHAPE = Shape(inputs=2, hidden=(8,), outputs=1, cell="gru", activation="")


class Killed(Exception):
    """Stands for a process that is gone."""


class ToyTask(Task):
    """Eight batches an epoch; `batches_left` of them come, then the process is gone."""

    name = "toy"
    recipe = Recipe(epochs=4, learning_rate=1e-2)
    data: ClassVar[Mapping[str, Any]] = {
        "name": "noise",
        "licence": "none",
        "sha256": {"none": "0"},
        "split": "none",
    }
    card = "It says a running mean."

    def __init__(self, batches_left: int = 10**6, dropout: float = 0.2, rows: int = 16) -> None:
        self.batches_left, self.dropout, self.rows = batches_left, dropout, rows

    def load(self) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.standard_normal((8 * self.rows, 12, 2)).astype(np.float32))

    def network(self) -> nn.Module:
        return RecurrentNetwork(SHAPE, self.dropout)

    def steps(self) -> int:
        return 8

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        for chosen in torch.from_numpy(rng.permutation(len(self.x))).split(self.rows):
            if not self.batches_left:
                raise Killed
            self.batches_left -= 1
            noise = torch.from_numpy(rng.standard_normal((len(chosen), 12, 2)).astype(np.float32))
            yield (self.x[chosen] + 0.1 * noise,)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        (x,) = batch
        assert isinstance(network, RecurrentNetwork)
        y, _ = network(x, network.initial_state(len(x)))
        return F.mse_loss(y[..., 0], x.mean(-1).cumsum(1) / torch.arange(1, x.shape[1] + 1))

    def validate(self, network: nn.Module) -> float:
        return float(self.loss(network, (self.x,)))

    def candidate(self, network: nn.Module, seed: int) -> Candidate:
        assert isinstance(network, RecurrentNetwork)
        described = recurrent_graph.manifest(
            SHAPE, name=self.name, entry={"name": "x"}, output={"name": "mean"}, licence="none"
        )
        noise = np.random.default_rng(seed).standard_normal((200, 2)).astype(np.float32)
        return recurrent_graph.candidate(
            network, described, golden=np.split(noise[:9], [1, 4]), probe=noise, card=self.card
        )

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        self.load()
        said = [replay(session, manifest, [x.numpy()])[0]["mean"][-1, 0] for x in self.x[:20]]
        error = np.mean((np.array(said) - self.x[:20].mean((1, 2)).numpy()) ** 2)
        return {"metric": "mse", "value": float(error), "n": 20, "test_set": "the first twenty"}
