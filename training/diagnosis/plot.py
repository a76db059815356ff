"""How the pictures look, and how they are written: the same bytes for the same figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: dict[str, Any] = {
    "svg.hashsalt": "tenuto",  # else element names differ from run to run
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "figure.facecolor": "white",  # dark pages too
    "legend.frameon": False,
}
COLOURS = {"rnn": "#c0504d", "gru": "#8f7a2f", "lstm": "#2f6f8f"}


@contextmanager
def picture(
    path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.2)
) -> Iterator[Any]:
    """Give the axes of a new figure, or a flat array of them; write it to `path`, an SVG or PNG."""
    with mpl.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield axes[0, 0] if rows * columns == 1 else axes.flatten()
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=110, metadata=metadata)


def bare(axes: Axes, title: str = "") -> None:
    """Take ticks and grid away, for images."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.set_title(title, fontsize=8)
