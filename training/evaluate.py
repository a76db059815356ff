"""Measures an exported model on its test set, as its callers feed it."""

from pathlib import Path

from . import tasks
from .stepper import load
from .task import Figures


def evaluate(folder: Path) -> Figures:
    """Return the test figures of the model in `folder`: metric, value, n, how it was measured, baselines.

    Raises NotOurs for a file without a manifest, UnknownTask for a model that no task here made.
    """
    session, manifest = load(folder / "model.onnx")
    task = tasks.find(manifest.name)
    figures = task.test(session, manifest)
    return figures | {f"{label} {one['metric']}": one["value"] for label, one in task.baselines().items()}
