"""`tenuto train MODEL` and `tenuto evaluate MODEL_DIR`."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol, cast

MODELS = ("digits", "spoken-digits", "oil-temperature")


class Recipe(Protocol):
    """What a recipe module offers."""

    EPOCHS: int
    THREADS: int
    DATA: dict[str, Any]

    def train(self, seed: int, epochs: int) -> Any:
        """Return a Candidate."""


def main(argv: list[str]) -> int:
    """Run `train ...` or `evaluate ...`; return the exit code. Failures are one line on stderr."""
    options = _parser().parse_args(argv)
    said_by = f"tenuto {options.command}"
    try:
        # Imported here: `--help` must not need them, and a missing one is worth a sentence.
        from . import checks, evaluate
        from .datasets.store import ChecksumMismatch, DataUnavailable
        from .stepper import NotOurs

        if options.command == "train":
            importlib.import_module("torch")
    except ModuleNotFoundError as error:
        print(f"{said_by}: {error.name} is missing; pip install 'tenuto[training]'", file=sys.stderr)
        return 2
    refusals = (DataUnavailable, ChecksumMismatch, checks.CheckFailed, evaluate.NoTestSet, NotOurs)
    try:
        if options.command == "train":
            _train(options.model, options.seed, options.epochs, options.output)
        else:
            _print_figures(evaluate.evaluate(options.folder))
    except (*refusals, OSError) as error:
        print(f"{said_by}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tenuto", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, evaluate and export one of our models")
    train.add_argument("model", choices=MODELS)
    train.add_argument("--seed", type=int, default=0, help="decides all that is random (0)")
    train.add_argument("--epochs", type=_positive, help="passes over the data (the recipe's own number)")
    train.add_argument("--output", type=Path, default=Path("exported"), help="gets <model>/1 (exported)")
    evaluate = commands.add_parser("evaluate", help="measure an exported model on its test set")
    evaluate.add_argument("folder", type=Path, metavar="MODEL_DIR", help="such as exported/digits/1")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _train(model: str, seed: int, epochs: int | None, output: Path) -> None:
    import torch

    from .export import export

    recipe = cast(Recipe, importlib.import_module(f".{model.replace('-', '_')}", __package__))
    epochs = recipe.EPOCHS if epochs is None else epochs
    # Sums are cut differently with another number of threads: it is part of the recipe.
    torch.set_num_threads(recipe.THREADS)
    started = time.process_time()
    candidate = recipe.train(seed, epochs)
    facts = {
        "command": f"tenuto train {model} --seed {seed} --epochs {epochs}",
        "seed": seed,
        "epochs": epochs,
        "threads": recipe.THREADS,
        "cpu_seconds": round(time.process_time() - started, 1),
        "data": recipe.DATA,
    }
    folder = export(candidate, facts, output)
    print(folder)
    _print_figures(json.loads((folder / "metrics.json").read_bytes())["test"])


def _print_figures(figures: dict[str, Any]) -> None:
    print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n")
