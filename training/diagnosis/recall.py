"""How long a network can be taught to remember one bit: RNN against LSTM."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.training.progress import progress
from tenuto.training.recurrent import Cell, RecurrentNetwork, Shape

from .plot import COLOURS, picture

DISTANCES = (10, 20, 50, 100, 200, 500)  # steps between the bit and the question
SEEDS = (0, 1, 2, 3, 4)
STEPS = 400  # of training at most, 32 sequences each
BATCH = 32
LEARNING_RATE = 3e-3
CLIP = 1.0
HIDDEN = 32


def network(cell: Cell, distance: int) -> RecurrentNetwork:
    """Return a network for sequences of that length, untrained.

    An LSTM's forget gates begin as if they had to keep for 1 to `distance` steps (Tallec and Ollivier 2018,
    equation 16): with biases of 0 they would halve what they hold at each step.
    """
    made = RecurrentNetwork(Shape(inputs=1, hidden=(HIDDEN,), outputs=1, cell=cell, activation=""))
    if cell == "lstm":
        keep = torch.log(torch.rand(HIDDEN) * (distance - 2) + 1)
        with torch.no_grad():
            parts = {name: p for name, p in made.layers[0].named_parameters() if name.startswith("bias")}
            for bias in parts.values():
                bias.zero_()
            parts["bias_ih_l0"][:HIDDEN] = -keep  # i, f, g, o
            parts["bias_ih_l0"][HIDDEN : 2 * HIDDEN] = keep
    return made


def sequences(count: int, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return [count, 1 + distance, 1] and bits [count]: a bit as -1 or 1, and then noise of a tenth of it."""
    bits = torch.randint(0, 2, (count,), generator=generator)
    steps = torch.randn(count, 1 + distance, 1, generator=generator) * 0.1
    steps[:, 0, 0] = bits * 2.0 - 1
    return steps, bits


def answer(made: RecurrentNetwork, steps: Tensor) -> Tensor:
    """Return the logit [count] that the network gives after the last step."""
    y, _ = made(steps, made.initial_state(len(steps)))
    last: Tensor = y[:, -1, 0]
    return last


def losses(
    made: RecurrentNetwork, distance: int, generator: torch.Generator, steps: int = STEPS
) -> Iterator[float]:
    """Train; yield the loss of each step."""
    optimizer = torch.optim.Adam(made.parameters(), LEARNING_RATE)
    for _ in range(steps):
        x, bits = sequences(BATCH, distance, generator)
        loss = F.binary_cross_entropy_with_logits(answer(made, x), bits.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), CLIP)
        optimizer.step()
        yield loss.item()


def taught(cell: Cell, distance: int, seed: int) -> RecurrentNetwork:
    """Return a network trained until its loss is below 0.01 on ten batches in a row, or for 400 steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    made, in_a_row = network(cell, distance), 0
    for loss in losses(made, distance, generator):
        in_a_row = in_a_row + 1 if loss < 0.01 else 0
        if in_a_row == 10:
            break
    return made


def recalled(made: RecurrentNetwork, distance: int) -> float:
    """Return the part of 500 new bits that the network recalls; 0.5 is chance."""
    x, bits = sequences(500, distance, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        return float(((answer(made, x) > 0) == bits.bool()).float().mean())


@dataclass(frozen=True)
class Recall:
    """`rates[cell][distance]`: the part of bits recalled, by seed."""

    rates: Mapping[Cell, Mapping[int, Sequence[float]]]

    @classmethod
    def measure(cls, distances: Sequence[int] = DISTANCES, seeds: Sequence[int] = SEEDS) -> "Recall":
        """Train a network for each cell, distance and seed, and ask it. About 2 CPU minutes."""
        rates: dict[Cell, dict[int, list[float]]] = {"rnn": {}, "lstm": {}}
        with progress("recall of a bit", 2 * len(distances) * len(seeds)) as bar:
            for cell, found in rates.items():
                for distance in distances:
                    found[distance] = []
                    for seed in seeds:
                        found[distance].append(recalled(taught(cell, distance, seed), distance))
                        bar.update()
        return cls(rates)

    def draw(self, path: Path) -> None:
        """Draw medians, and every seed as a dot."""
        with picture(path) as axes:
            for cell, found in self.rates.items():
                at = list(found)
                axes.plot(at, [median(found[d]) for d in at], color=COLOURS[cell], label=cell.upper())
                for distance, rates in found.items():
                    axes.plot([distance] * len(rates), rates, "o", color=COLOURS[cell], ms=3, alpha=0.6)
            axes.axhline(0.5, color="#888888", lw=0.8, ls=":")
            axes.set(xscale="log", ylim=(0.4, 1.02), xlabel="steps since the bit", ylabel="bits recalled")
            axes.set_xticks(DISTANCES, [str(d) for d in DISTANCES], minor=False)
            axes.minorticks_off()
            axes.legend(loc="lower left")

    def table(self) -> str:
        """Return the medians as a table in Markdown."""
        distances = list(self.rates["rnn"])
        head = "| steps since the bit | " + " | ".join(map(str, distances)) + " |"
        rule = "|---" * (len(distances) + 1) + "|"
        rows = [
            f"| {cell.upper()} | " + " | ".join(f"{median(found[d]):.0%}" for d in distances) + " |"
            for cell, found in self.rates.items()
        ]
        return "\n".join([head, rule, *rows])
