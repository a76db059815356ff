"""`tenuto train TASK`, `tenuto export TASK`, `tenuto evaluate MODEL_DIR` and `tenuto diagnose`."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .processes import Processes
    from .recipe import Recipe
    from .study import Study
    from .task import Task


def main(argv: list[str]) -> int:
    """Run a command and return the exit code.

    Failures are one line on stderr.
    """
    options = _parser().parse_args(argv)
    said_by, extra = f"tenuto {options.command}", "training"
    try:
        # Imported here: `--help` must not need them, and a missing one is worth a sentence.
        importlib.import_module("torch")
        from . import checks, evaluate
        from .datasets.store import ChecksumMismatch, DataUnavailable
        from .stepper import NotOurs
        from .tasks import UnknownTask
        from .trainer import NotTrained

        if options.command == "diagnose" or getattr(options, "diagnose", False):
            extra = "diagnosis"
            from .diagnosis import diagnose
    except ModuleNotFoundError as error:
        print(f"{said_by}: {error.name} is missing; pip install 'tenuto[{extra}]'", file=sys.stderr)
        return 2
    refusals = (DataUnavailable, ChecksumMismatch, checks.CheckFailed, NotOurs, NotTrained)
    try:
        if options.command == "evaluate":
            _print_figures(evaluate.evaluate(options.folder, options.task))
        elif options.command == "diagnose":
            print(diagnose.diagnose(options.exported, options.docs))
        else:
            _train(options)
    except (*refusals, UnknownTask, OSError) as error:
        print(f"{said_by}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UnknownTask) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tenuto", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="train a task's network and export it, or go on where it stopped"
    )
    export = commands.add_parser("export", help="export what was trained, anew")
    for command in (train, export):
        command.add_argument(
            "task", metavar="TASK", help=f"one of {', '.join(_tasks())}; or a file: ./mine.py"
        )
        command.add_argument("--seed", type=int, help="decides all that is random; all the recipe's seeds")
        command.add_argument(
            "--epochs", type=_positive, help="passes over the data (the recipe's own number)"
        )
        command.add_argument("--output", type=Path, default=Path("exported"), help="gets TASK/1 (exported)")
        command.add_argument("--version", type=_positive, default=1, help="the model's version (1)")
        command.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and curves (runs)")
        command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (cpu)")
    train.add_argument("--no-export", action="store_true", help="train only; see tenuto export")
    train.add_argument("--diagnose", action="store_true", help="draw its learning curve and what it can show")
    diagnose = commands.add_parser("diagnose", help="draw the pictures of docs/networks.md, write it")
    diagnose.add_argument("--exported", type=Path, default=Path("exported"), help="the models (exported)")
    diagnose.add_argument("--docs", type=Path, default=Path("docs"), help="gets networks.md and networks/")
    evaluate = commands.add_parser("evaluate", help="measure an exported model on its test set")
    evaluate.add_argument("folder", type=Path, metavar="MODEL_DIR", help="such as exported/digits/1")
    evaluate.add_argument("--task", help="the task's file, if it is none of ours: ./mine.py")
    return parser


def _tasks() -> list[str]:
    """Return the tasks' names without importing them, and so without torch."""
    modules = (Path(__file__).parent / "tasks").glob("[!_]*.py")
    return sorted(module.stem.replace("_", "-") for module in modules)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _train(options: argparse.Namespace) -> None:
    import torch

    from . import processes, tasks

    task = tasks.find(options.task)
    device = torch.device(options.device)
    with processes.joined(device) as joined:
        study = _study(options, task, device, joined)
        if joined.first and not getattr(options, "no_export", False):
            _export(options, study)


def _study(options: argparse.Namespace, task: "Task", device: "torch.device", joined: "Processes") -> "Study":
    from .study import Study
    from .trainer import Fitted, Trainer

    again = options.command == "train"

    def fit(one: "Task", seed: int, label: str) -> Fitted:
        folder = options.runs / task.name / label / f"seed-{seed}"
        return Trainer(one, _recipe(options, one), seed, folder, device, joined).run(again)

    seeds = task.recipe.seeds if options.seed is None else (options.seed,)
    return Study.run(task, seeds, fit, with_variants=options.seed is None)


def _recipe(options: argparse.Namespace, task: "Task") -> "Recipe":
    epochs = task.recipe.epochs if options.epochs is None else options.epochs
    return dataclasses.replace(task.recipe, epochs=epochs)


def _export(options: argparse.Namespace, study: "Study") -> None:
    from .export import export

    recipe, (seed, fitted) = _recipe(options, study.task), next(iter(study.seeds.items()))
    chosen = [
        f"--{name} {value}" for name in ("seed", "epochs") if (value := getattr(options, name)) is not None
    ]
    facts: dict[str, Any] = {
        "command": " ".join(["tenuto train", options.task, *chosen]),
        "seed": seed,
        "epochs": fitted.epochs,
        "kept_epoch": fitted.kept_epoch,
        "validation": fitted.validation,
        "threads": recipe.threads,
        "recipe": dataclasses.asdict(recipe),
        "device": options.device,
        "cpu_seconds": round(fitted.cpu_seconds, 1),
        "curve": [{name: float(f"{value:.5g}") for name, value in line.items()} for line in fitted.curve],
        "cpu_seconds_with_other_seeds_and_variants": round(study.cpu_seconds(), 1),
        "data": study.task.data,
    }
    folder = export(study, facts, options.output, options.version)
    print(folder)
    metrics = json.loads((folder / "metrics.json").read_bytes())
    _print_figures(metrics["test"])
    if getattr(options, "diagnose", False):
        from .diagnosis.diagnose import diagnose_model

        print(*diagnose_model(study.task, folder, options.runs / study.task.name / "diagnosis"), sep="\n")
    if len(study.seeds) > 1:
        _print_figures({f"{name} of {len(study.seeds)} seeds": v for name, v in metrics["seeds"].items()})


def _print_figures(figures: dict[str, Any]) -> None:
    print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n")
