"""Checks a trained model, measures it and writes its folder: all of it, or nothing."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tenuto.serving.manifest import Manifest

from . import checks, record
from .candidate import AnyArray, Candidate
from .card import card
from .stepper import load, replay
from .study import Study

TRIALS = 60  # of the chunk-invariance check


def export(study: Study, facts: dict[str, Any], output: Path, version: int = 1) -> Path:
    """Write `output/<name>/<version>` and return it; `facts` go into metrics.json.

    The checks run first, then the tests of the files themselves; only then does the folder get its
    name, and what had that name before is removed. Raises CheckFailed.
    """
    candidate = study.candidate()
    session, manifest = load(candidate.model)
    figures = {
        "parity_max_abs_error": checks.parity(candidate, session),
        "parity_tolerance": candidate.tolerance,
        "chunk_invariance_max_abs_error": checks.invariance(session, manifest, candidate.probe, TRIALS),
        "chunk_invariance_trials": TRIALS,
        "float16_max_abs_error": checks.half(candidate.model, candidate.golden),
    }
    test = study.task.test(session, manifest)
    baselines = study.task.baselines()
    metrics = {
        "model": manifest.name,
        "version": version,
        "test": test,
        **study.figures(test),
        **({"baselines": baselines} if baselines else {}),
        "training": {**facts, **candidate.training, "parameters": candidate.parameters},
        "checks": figures,
        "versions": record.versions(),
        "git_revision": record.revision(),
        "date": record.today(),
        "model_sha256": checks.fingerprint(candidate.model),
    }
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tenuto-", dir=output) as scratch:
        fresh = Path(scratch) / str(version)
        fresh.mkdir()
        (fresh / "model.onnx").write_bytes(candidate.model)
        (fresh / "manifest.json").write_text(manifest.to_json() + "\n", encoding="utf-8")
        write_golden(fresh / "golden.npz", session, candidate)
        (fresh / "metrics.json").write_text(record.text(metrics), encoding="utf-8")
        text = card(manifest, metrics, candidate.card)
        (fresh / "MODEL_CARD.md").write_text(text, encoding="utf-8")
        return _publish(fresh, output / manifest.name / str(version))


def _publish(fresh: Path, final: Path) -> Path:
    """Move `fresh` to `final`; an older `final` is moved aside first and goes with the scratch."""
    final.parent.mkdir(exist_ok=True)
    if final.exists():
        os.rename(final, fresh.parent / "replaced")
    os.rename(fresh, final)
    shutil.rmtree(fresh.parent / "replaced", ignore_errors=True)
    return final


def write_golden(path: Path, session: onnxruntime.InferenceSession, candidate: Candidate) -> None:
    """Write the golden chunks and what ONNX Runtime answered, by step, and the tolerance."""
    manifest: Manifest = candidate.manifest
    name = manifest.inputs[0].name
    arrays: dict[str, AnyArray] = {"tolerance": np.array(candidate.golden_tolerance)}
    steps = zip(candidate.golden, replay(session, manifest, candidate.golden), strict=True)
    for step, (chunk, outputs) in enumerate(steps, start=1):
        arrays[f"{step}.in.{name}"] = chunk
        arrays |= {f"{step}.out.{key}": value for key, value in outputs.items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)
