"""How much of a loss's gradient reaches a step long ago: RNN against LSTM."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from tenuto.training.recurrent import RecurrentNetwork, Shape

from . import recall
from .plot import COLOURS, picture

DISTANCE = 200
TAUGHT = 50  # steps over which the trained networks were taught to remember


@dataclass(frozen=True)
class Vanishing:
    """`norms[label][d]`: the gradient at an input d steps before the loss, relative to that at d = 0."""

    norms: Mapping[str, list[float]]

    @classmethod
    def measure(cls, distance: int = DISTANCE) -> "Vanishing":
        """Measure new and trained networks of 32 units, with torch's own initial weights unless said."""
        torch.manual_seed(0)
        plain = {
            cell: RecurrentNetwork(Shape(1, (recall.HIDDEN,), 1, cell, None, "")) for cell in ("rnn", "lstm")
        }
        return cls(
            {
                "RNN, new": gradient_norms(plain["rnn"], distance),
                f"RNN, taught over {TAUGHT} steps": gradient_norms(recall.taught("rnn", TAUGHT, 0), distance),
                "LSTM, new, forget gates half open": gradient_norms(plain["lstm"], distance),
                f"LSTM, taught over {TAUGHT} steps": gradient_norms(
                    recall.taught("lstm", TAUGHT, 0), distance
                ),
            }
        )

    def draw(self, path: Path) -> None:
        """Draw the norms on a logarithmic axis."""
        with picture(path) as axes:
            for label, norms in self.norms.items():
                style = "-" if "taught" in label else "--"
                colour = COLOURS["lstm" if label.startswith("LSTM") else "rnn"]
                axes.plot([max(norm, 1e-30) for norm in norms], style, color=colour, label=label)
            axes.set(yscale="log", ylim=(1e-12, 10), xlabel="steps before the loss")
            axes.set(ylabel="gradient, relative to the last step's")
            axes.legend(loc="lower left")

    def after(self, label: str, distance: int) -> float:
        """Return what reaches `distance` steps back, by the beginning of the label."""
        return next(norms[distance] for name, norms in self.norms.items() if name.startswith(label))


def gradient_norms(network: RecurrentNetwork, distance: int) -> list[float]:
    """Return the mean length of the loss's gradient at each input, the last one first, relative to it."""
    steps, bits = recall.sequences(64, distance, torch.Generator().manual_seed(1))
    steps.requires_grad_(True)
    F.binary_cross_entropy_with_logits(recall.answer(network, steps), bits.float()).backward()
    assert steps.grad is not None
    norms = steps.grad.norm(dim=2).double().mean(0).flip(0)
    return [float(norm) for norm in norms / norms[0]]
