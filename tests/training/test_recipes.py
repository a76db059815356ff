"""The recipes, on a slice of synthetic data: same bytes twice, and nothing written if a check fails."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenuto.training import checks
from tenuto.training.stepper import load


def _digits() -> Any:
    from tenuto.training import digits

    labels = np.arange(256, dtype=np.uint8) % 10
    images = (digits.strokes(256, seed=3) * 255).astype(np.uint8)
    return digits.candidate(digits.fit(images, labels, seed=5, epochs=1), seed=5)


def _spoken_digits() -> Any:
    from tenuto.training import spoken_digits
    from tenuto.training.datasets.fsdd import Recording

    recordings = [
        Recording(f"{n}_a_9.wav", n % 10, "a", 9, spoken_digits.tones(n, seconds=0.3)) for n in range(20)
    ]
    return spoken_digits.candidate(spoken_digits.fit(recordings, seed=5, epochs=1), seed=5)


RECIPES = {"digits": _digits, "spoken-digits": _spoken_digits}


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_seed_gives_the_same_bytes(recipe: str, one_thread: Any) -> None:
    first, second = RECIPES[recipe](), RECIPES[recipe]()
    assert first.model == second.model
    session, manifest = load(first.model)
    assert manifest == first.manifest
    assert checks.parity(first, session) <= first.tolerance
    assert checks.invariance(session, manifest, first.probe, trials=5) == 0.0


def test_export_writes_all_or_nothing(
    one_thread: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenuto.training import export

    figures = {"metric": "accuracy", "value": 0.1, "n": 10, "test_set": "none"}
    data = {"name": "synthetic", "licence": "none", "sha256": {}}
    facts = {"command": "tenuto train digits", "data": data}
    measured: list[list[str]] = []

    def evaluate(folder: Path) -> dict[str, Any]:
        measured.append(sorted(file.name for file in folder.iterdir()))
        return figures

    monkeypatch.setattr(export, "evaluate", evaluate)
    candidate = _digits()
    broken = dataclasses.replace(candidate, reference=_shifted(candidate.reference))
    with pytest.raises(checks.CheckFailed, match="digits: ONNX differs from torch by 0.5"):
        export.export(broken, facts, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert measured == []

    for _ in range(2):  # the second replaces the first
        folder = export.export(candidate, facts, tmp_path)
        assert folder == tmp_path / "digits/1"
        assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]
        assert [entry.name for entry in (tmp_path / "digits").iterdir()] == ["1"]
        assert (folder / "model.onnx").read_bytes() == candidate.model
        assert "10.00%" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert measured == [["golden.npz", "manifest.json", "model.onnx"]] * 2


def _shifted(reference: Callable[..., Any]) -> Callable[..., Any]:
    return lambda chunks: [{k: v + 0.5 for k, v in step.items()} for step in reference(chunks)]
