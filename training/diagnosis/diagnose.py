"""`tenuto diagnose`: draws all pictures of docs/networks.md and writes the page, or those of one model."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tenuto.training import tasks
from tenuto.training.task import Task

from .confusion import Confusion
from .convolution import Convolution
from .curves import Curves
from .exploding import Exploding
from .gates import SpokenGates
from .inside import Inside
from .page import Figures, page
from .recall import Recall
from .vanishing import DISTANCE, Vanishing
from .weighing import Weighing

RECORDING = 210  # of FSDD's test recordings, for the gates


def diagnose(exported: Path, docs: Path) -> Path:
    """Draw everything into `docs/networks/`, write `docs/networks.md` and return it.

    About 3 CPU minutes. Raises DataUnavailable; OSError where a model is not exported.
    """
    torch.set_num_threads(1)
    folder = docs / "networks"
    folder.mkdir(parents=True, exist_ok=True)
    figures = Figures(
        {
            "convolution": _convolution(exported / "digits/1", folder),
            "confusion": _confusions(exported, folder),
            "gates": _gates(exported / "spoken-digits/1", folder),
            "rnn": {"accuracy": _accuracy(exported / "spoken-digits-rnn/1")},
            "lstm": {"accuracy": _accuracy(exported / "spoken-digits/1")},
            "weighing": _weighing(folder),
            "vanishing": _vanishing(folder),
            "exploding": _exploding(folder),
            "recall": _recall(folder),
        }
    )
    Curves.read(exported).draw(folder / "curves.svg")
    figures.write(folder / "figures.json")
    written = docs / "networks.md"
    written.write_text(page(figures), encoding="utf-8")
    return written


def diagnose_model(task: Task, folder: Path, output: Path) -> list[Path]:
    """Draw what one exported model can show of itself into `output`; return the pictures."""
    drawn = [output / "curve.svg"]
    Curves.of(folder).draw(drawn[0])
    confusion = Confusion.measure(task, folder)
    if confusion is not None:
        drawn.append(output / "confusion.svg")
        confusion.draw(drawn[-1])
    if Inside((folder / "model.onnx").read_bytes()).nodes("Conv"):
        drawn.append(output / "convolution.png")
        Convolution.measure(folder).draw(drawn[-1])
    return drawn


def _convolution(model: Path, folder: Path) -> dict[str, Any]:
    convolution = Convolution.measure(model)
    convolution.draw(folder / "convolution.png")
    return {"answer": convolution.answer}


def _confusions(exported: Path, folder: Path) -> dict[str, Any]:
    """Draw every classifier's matrix; models whose file is not there (weights kept back) are left out."""
    pictures, rows = [], ["| model | answers | wrong | commonest mistake |", "|---|---|---|---|"]
    for name in tasks.names():
        if not (exported / name / "1/model.onnx").is_file():
            continue
        confusion = Confusion.measure(tasks.find(name), exported / name / "1")
        if confusion is None:
            continue
        confusion.draw(folder / f"confusion-{name}.svg")
        pictures.append(f"![confusion of {name}](networks/confusion-{name}.svg)")
        truth, said, count = confusion.worst()
        total = int(confusion.counts.sum())
        wrong = total - int(confusion.counts.trace())
        rows.append(f"| `{name}` | {total:,} | {wrong:,} | {truth} taken for {said}, {count} times |")
    return {"pictures": "\n".join(pictures), "table": "\n".join(rows)}


def _gates(model: Path, folder: Path) -> dict[str, Any]:
    gates = SpokenGates.measure(model, RECORDING)
    gates.draw(folder / "gates.png")
    return {"name": gates.name, "digit": gates.digit, **gates.figures()}


def _accuracy(model: Path) -> str:
    metrics = json.loads((model / "metrics.json").read_bytes())
    seeds = metrics["seeds"]
    if len(seeds["values"]) == 1:
        return f"{metrics['test']['value']:.2%}"
    return f"{seeds['mean']:.2%} (mean of {len(seeds['values'])} seeds)"


def _weighing(folder: Path) -> dict[str, Any]:
    weighing = Weighing.measure()
    weighing.draw(folder / "weighing.svg")
    zero = {"zero": 2 / 3}  # the variance of the sum of two numbers in [-1, 1]
    return zero | {f"{cell}": error for cell, error in weighing.errors.items()}


def _vanishing(folder: Path) -> dict[str, Any]:
    vanishing = Vanishing.measure()
    vanishing.draw(folder / "vanishing.svg")
    at = DISTANCE // 4
    labels = {
        "rnn_new": "RNN, new",
        "rnn_taught": "RNN, taught",
        "lstm_new": "LSTM, new",
        "lstm_taught": "LSTM, taught",
    }
    return {"distance": at, **{key: vanishing.after(label, at) for key, label in labels.items()}}


def _exploding(folder: Path) -> dict[str, Any]:
    exploding = Exploding.measure()
    exploding.draw(folder / "exploding.svg")
    (exploded, norms), (clipped, _) = exploding.norms.items()
    last = fmean(exploding.losses[clipped][-50:])
    return {"steps": len(norms), "norm": max(exploding.norms[exploded]), "clipped": last}


def _recall(folder: Path) -> dict[str, Any]:
    recall = Recall.measure()
    recall.draw(folder / "recall.svg")
    return {"table": recall.table(), "seeds": len(recall.rates["rnn"][10])}
