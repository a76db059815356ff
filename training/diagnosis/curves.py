"""Learning curves, from the models' metrics.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from matplotlib.axes import Axes

from .plot import picture

COLUMNS = 3


@dataclass(frozen=True)
class Curves:
    """A line an epoch, by model: loss on the training part, the figure on the validation part."""

    lines: Mapping[str, list[dict[str, float]]]

    @classmethod
    def read(cls, exported: Path) -> "Curves":
        """Read what is recorded of every model below `exported`."""
        lines = {}
        for path in sorted(exported.glob("*/*/metrics.json")):
            metrics = json.loads(path.read_bytes())
            if curve := metrics["training"].get("curve"):
                lines[metrics["model"]] = curve
        return cls(lines)

    @classmethod
    def of(cls, folder: Path) -> "Curves":
        """Read what is recorded of the one model in `folder`."""
        metrics = json.loads((folder / "metrics.json").read_bytes())
        return cls({metrics["model"]: metrics["training"]["curve"]})

    def draw(self, path: Path) -> None:
        """Draw a small picture for each model, both figures with an axis of their own."""
        columns = min(COLUMNS, len(self.lines)) or 1
        rows = -(-len(self.lines) // columns) or 1
        with picture(path, rows, columns, size=(2.8 * columns, 2.1 * rows)) as axes:
            for one, name in zip_longest([axes] if rows * columns == 1 else axes, self.lines):
                if name is None:
                    one.axis("off")
                else:
                    _draw(one, name, self.lines[name])


def _draw(axes: Axes, name: str, curve: list[dict[str, float]]) -> None:
    epochs = range(1, len(curve) + 1)
    style = ".-" if len(curve) < 40 else "-"
    axes.plot(epochs, [line["loss"] for line in curve], style, ms=3, color="#888888")
    axes.set_title(name, fontsize=9)
    right = axes.twinx()
    right.plot(epochs, [line["validation"] for line in curve], style, ms=3, color="#2f6f8f")
    right.grid(visible=False)
    right.tick_params(axis="y", colors="#2f6f8f")
