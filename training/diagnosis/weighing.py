"""Which steps count: an LSTM learns to heed two of thirty, an RNN weighs them by their age."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.training.progress import progress
from tenuto.training.recurrent import Cell, RecurrentNetwork, Shape

from .plot import COLOURS, picture

LENGTH, BATCH, STEPS = 30, 64, 1500
MARKED = (8, 21)  # the steps that count in the sequence that is drawn


@dataclass(frozen=True)
class Weighing:
    """`influence[cell]`: how the answer moves with each step's number; `errors[cell]`: mean squared."""

    influence: Mapping[Cell, list[float]]
    errors: Mapping[Cell, float]

    @classmethod
    def measure(cls, steps: int = STEPS) -> "Weighing":
        """Train both on the adding problem (Hochreiter and Schmidhuber 1997, experiment 4)."""
        influence: dict[Cell, list[float]] = {}
        errors: dict[Cell, float] = {}
        cells: tuple[Cell, ...] = ("rnn", "lstm")
        with progress("which steps count", len(cells)) as bar:
            for cell in cells:
                network = _taught(cell, steps)
                x, sums = sequences(1000, torch.Generator().manual_seed(10**6))
                with torch.no_grad():
                    errors[cell] = float(F.mse_loss(_answer(network, x), sums))
                influence[cell] = _influence(network)
                bar.update()
        return cls(influence, errors)

    def draw(self, path: Path) -> None:
        """Draw the influence of each step, the two marked ones shaded."""
        with picture(path, columns=2, size=(7.6, 2.8)) as both:
            for axes, (cell, influence) in zip(both, self.influence.items(), strict=True):
                axes.bar(range(LENGTH), influence, color=COLOURS[cell])
                for step in MARKED:
                    axes.axvspan(step - 0.5, step + 0.5, color="#eeeecc", zorder=0)
                axes.set(title=f"{cell.upper()}: mean squared error {self.errors[cell]:.3f}", ylim=(0, 1.1))
                axes.set(xlabel="step", ylabel="change of the answer with it")


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return [count, 30, 2], numbers in [-1, 1] and marks, and the sums [count] of the two marked ones."""
    numbers = torch.rand(count, LENGTH, generator=generator) * 2 - 1
    first = torch.randint(0, LENGTH // 2, (count, 1), generator=generator)
    second = torch.randint(LENGTH // 2, LENGTH, (count, 1), generator=generator)
    marks = torch.zeros(count, LENGTH).scatter_(1, first, 1.0).scatter_(1, second, 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)


def _taught(cell: Cell, steps: int) -> RecurrentNetwork:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = RecurrentNetwork(Shape(inputs=2, hidden=(32,), outputs=1, cell=cell, activation=""))
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(steps):
        x, sums = sequences(BATCH, generator)
        loss = F.mse_loss(_answer(network, x), sums)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network


def _answer(network: RecurrentNetwork, x: Tensor) -> Tensor:
    y, _ = network(x, network.initial_state(len(x)))
    last: Tensor = y[:, -1, 0]
    return last


def _influence(network: RecurrentNetwork) -> list[float]:
    """Return |d answer / d number| at each step, the mean over 100 sequences with the same marks."""
    x, _ = sequences(100, torch.Generator().manual_seed(1))
    x[:, :, 1] = 0.0
    x[:, list(MARKED), 1] = 1.0
    x.requires_grad_(True)
    _answer(network, x).sum().backward()
    assert x.grad is not None
    return [float(value) for value in x.grad[:, :, 0].abs().mean(0)]
