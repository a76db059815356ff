"""A training whose gradients explode, and the same with their length clipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .plot import picture

STEPS, LENGTH, BATCH = 400, 60, 32
LEARNING_RATE = 0.02
SCALE = 1.3  # of the recurrent weights' singular values: each step back multiplies a gradient by it


@dataclass(frozen=True)
class Exploding:
    """`norms` and `losses` by label, a value a step, until they are no numbers any more."""

    norms: Mapping[str, list[float]]
    losses: Mapping[str, list[float]]

    @classmethod
    def measure(cls) -> "Exploding":
        """Train an RNN of rectified units to add 60 numbers up, without and with clipping."""
        norms, losses = {}, {}
        for label, clip in (("as they come", float("inf")), ("clipped to length 1", 1.0)):
            norms[label], losses[label] = _train(clip)
        return cls(norms, losses)

    def draw(self, path: Path) -> None:
        """Draw gradient lengths beside losses."""
        with picture(path, columns=2, size=(7.6, 3.0)) as (left, right):
            for (label, norms), colour in zip(self.norms.items(), ("#c0504d", "#2f6f8f"), strict=True):
                left.plot(norms, color=colour, label=label)
                right.plot(self.losses[label], color=colour)
            left.set(yscale="log", xlabel="training step", ylabel="gradient before clipping")
            right.set(yscale="log", xlabel="training step", ylabel="loss")
            left.legend()


def _train(clip: float) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    cells = nn.RNN(1, 32, nonlinearity="relu", batch_first=True)
    head = nn.Linear(32, 1)
    nn.init.orthogonal_(cells.get_parameter("weight_hh_l0"), SCALE)
    parameters = [*cells.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE)
    norms, losses = [], []
    for _ in range(STEPS):
        x = torch.randn(BATCH, LENGTH, 1, generator=generator)
        answer: Tensor = head(cells(x)[0][:, -1])
        loss = F.mse_loss(answer, x.sum(1) / LENGTH**0.5)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if not torch.isfinite(loss):
            break
        norms.append(float(norm))
        losses.append(loss.item())
        optimizer.step()
    return norms, losses
