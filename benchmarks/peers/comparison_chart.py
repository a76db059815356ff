"""The picture of that run: server CPU per message, a panel for each number of frames and one for images."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.budgets import Rows, rows_of
from benchmarks.scenario import Taken

from . import comparison
from .comparison import IMAGES, SEQUENCES, Comparison

COLOURS = {
    "Tenuto, own protocol": "#0b6e4f",
    "Tenuto, stream": "#0b6e4f",
    "Tenuto, OIP": "#57b894",
    "Tenuto, OIP stream": "#57b894",
    "Tenuto, unary": "#9ad1b3",
    "Tenuto, OIP unary": "#cfe8d9",
    "Triton": "#d1495b",
    "TorchServe": "#edae49",
    "MLServer": "#5b8db8",
    "batcher": "#66788a",
    "least engine": "#c9ced6",
}


def draw(rounds: list[Taken], path: Path) -> None:
    rows = [rows_of(taken) for taken in rounds]
    by_frames: dict[str, dict[str, str]] = {}
    for line, name in comparison.sequences(rounds).items():
        frames, streams = line.split(", ")
        by_frames.setdefault(frames, {})[streams] = name
    panels = [
        (f"{frames} frames a message", "streams", SEQUENCES, lines) for frames, lines in by_frames.items()
    ]
    panels.append(("images", "at a time", IMAGES, comparison.images(rounds)))
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(10, 3.4 * len(panels)), layout="constrained", squeeze=False
    )
    for axes, (title, counted, compared, lines) in zip(all_axes.flat, panels, strict=True):
        _panel(axes, rows, compared, lines)
        axes.set_title(title.replace("1 frames", "1 frame"), loc="left")
        axes.set_xlabel(counted)
    with mpl.rc_context({"svg.hashsalt": "tenuto"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(axes: Axes, rows: list[Rows], compared: Comparison, lines: Mapping[str, str]) -> None:
    columns = comparison.measured(rows, compared, lines)
    width = 0.8 / len(columns)
    for place, (row, title) in enumerate(columns.items()):
        spreads = [comparison.spread(rows, name, row) for name in lines.values()]
        axes.bar(
            [at + (place - (len(columns) - 1) / 2) * width for at in range(len(lines))],
            [spread.median for spread in spreads],
            width,
            yerr=[
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ],
            label=title,
            color=COLOURS[title],
        )
    axes.set_xticks(range(len(lines)), list(lines))
    axes.set_yscale("log")
    axes.set_ylim(bottom=10)
    axes.set_ylabel("server CPU-µs per message")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
