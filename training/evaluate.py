"""Measures an exported model on its test set, as its callers feed it."""

from pathlib import Path

from . import tasks
from .stepper import load
from .task import Figures


def evaluate(folder: Path, task: str | None = None) -> Figures:
    """Return the test figures of the model in `folder`: metric, value, n, how it was measured, baselines.

    `task` is what made it: a name, or a Python file; else it goes by the model's name.

    Raises NotOurs for a file without a manifest, UnknownTask for a model that no task here made.
    """
    session, manifest = load(folder / "model.onnx")
    made_by = tasks.find(task or manifest.name)
    beside = {f"{label}: {one['metric']}": one["value"] for label, one in made_by.baselines().items()}
    return made_by.test(session, manifest) | beside
