"""The picture of a run: server CPU per message of each server, by streams and frames."""

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from . import suites
from .budgets import Spread, by_message
from .scenario import Taken

COLOURS = ("#0b6e4f", "#cfe8d9", "#9ad1b3", "#d1495b", "#e79aa4", "#edae49", "#66788a")


def draw(rounds: list[Taken], path: Path) -> None:
    """Writes an SVG with one group of bars for each table of peers; none measured, nothing written."""
    cases = [case for case in rounds[0] if case.row == case.server and case.row in suites.SERVERS]
    peers = [c for c in cases if c.table == suites.peers_table(c.parties[0].streams, c.parties[0].frames)]
    tables = [t for t in dict.fromkeys(case.table for case in peers) if not t.startswith("1 stream,")]
    if not tables:
        return
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    width = 0.8 / len(suites.SERVERS)
    for place, server in enumerate(suites.SERVERS):
        bars = [(tables.index(c.table), c) for c in peers if c.server == server and c.table in tables]
        spreads = [Spread.of([by_message(taken[case]) for taken in rounds]) for _, case in bars]
        axes.bar(
            [at + place * width for at, _ in bars],
            [spread.median for spread in spreads],
            width,
            yerr=[
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ],
            label=server,
            color=COLOURS[place],
        )
    middle = width * (len(suites.SERVERS) - 1) / 2
    axes.set_xticks([at + middle for at in range(len(tables))], [t.replace(", ", "\n") for t in tables])
    axes.set_ylabel("server CPU-µs per message")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": "tenuto"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
