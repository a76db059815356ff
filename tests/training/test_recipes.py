"""The recipes, on a slice of synthetic data: same bytes twice, and nothing written if a check fails."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tenuto.training import checks
from tenuto.training.datasets import magic_wand, mnist
from tenuto.training.datasets.magic_wand import Stroke
from tenuto.training.stepper import load

if TYPE_CHECKING:
    from tenuto.training.study import Study


def _some_images(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    from tenuto.training import handwriting

    images = (handwriting.strokes(n + 50, seed=3) * 255).astype(np.uint8)
    labels = np.arange(n + 50, dtype=np.uint8) % 10
    monkeypatch.setattr(handwriting, "VALIDATION", 50)
    monkeypatch.setattr(mnist, "train", lambda: (images, labels))


def _some_strokes(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    from tenuto.training.tasks import gestures

    strokes = [Stroke(place % 10, place, gestures.loops(place, points=30 + place % 60)) for place in range(n)]
    monkeypatch.setattr(magic_wand, "strokes", lambda split: strokes)


# What stands for the data set of each task, and how many examples of it are enough for two steps.
SLICES: dict[str, tuple[Callable[[pytest.MonkeyPatch, int], None], int]] = {
    "digits": (_some_images, 256),
    "digits-mlp": (_some_images, 256),
    "digits-rows": (_some_images, 256),
    "gestures": (_some_strokes, 100),
}


def _trained(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> "Study":
    """Train one of our tasks for one epoch on a synthetic slice, with its own recipe but for that."""
    from tenuto.training import tasks
    from tenuto.training.study import Study
    from tenuto.training.trainer import Trainer

    prepare, examples = SLICES[name]
    prepare(monkeypatch, examples)
    task = tasks.find(name)
    recipe = dataclasses.replace(task.recipe, epochs=1)
    return Study.run(task, [5], lambda one, seed, _: Trainer(one, recipe, seed, folder).run())


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_gives_the_same_bytes_twice(
    name: str, one_thread: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = [_trained(name, tmp_path / run, monkeypatch) for run in ("first", "second")]
    first, second = (study.candidate() for study in studies)
    assert first.model == second.model
    assert studies[0].seeds[5].curve[0]["gradient_norm"] > 0
    session, manifest = load(first.model)
    assert manifest == first.manifest
    assert manifest.name == name
    assert checks.parity(first, session) <= first.tolerance
    assert checks.invariance(session, manifest, first.probe, trials=5) == 0.0


def test_export_writes_all_or_nothing(
    one_thread: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenuto.training.export import export
    from tenuto.training.study import Study

    study, output = _trained("gestures", tmp_path / "runs", monkeypatch), tmp_path / "exported"
    figures = {"metric": "accuracy", "value": 0.1, "n": 10, "test_set": "none"}
    monkeypatch.setattr(type(study.task), "test", lambda *_: figures)
    facts = {"command": "tenuto train gestures", "data": study.task.data, "cpu_seconds": 1.0, "threads": 1}
    whole = study.candidate()
    broken = dataclasses.replace(whole, reference=_shifted(whole.reference))
    monkeypatch.setattr(Study, "candidate", lambda self: broken)
    with pytest.raises(checks.CheckFailed, match="gestures: ONNX differs from torch by 0.5"):
        export(study, facts, output)
    assert not output.exists()

    monkeypatch.setattr(Study, "candidate", lambda self: whole)
    for _ in range(2):  # the second replaces the first
        folder = export(study, facts, output)
        assert folder == output / "gestures/1"
        assert [entry.name for entry in output.iterdir()] == ["gestures"]
        assert [entry.name for entry in (output / "gestures").iterdir()] == ["1"]
        assert (folder / "model.onnx").read_bytes() == whole.model
        assert "10.00%" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def _shifted(reference: Callable[..., Any]) -> Callable[..., Any]:
    return lambda chunks: [{k: v + 0.5 for k, v in step.items()} for step in reference(chunks)]
