"""`tenuto adopt`: a file's folder in a model repository, written once its checks held, all at once."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tenuto.serving.errors import ModelInvalid, TenutoError
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU
from tenuto.serving.repository import ModelFolder, ModelRepository
from tenuto.serving.runners import RunSettings
from tenuto.serving.vetting import Limits, Verdict, vet

from .checking import TOLERANCE, Row, Table, check
from .graph_facts import Facts

_SERVED = "the server takes it"


@dataclass(frozen=True)
class Adopted:
    """`folder` is None where a check failed: then nothing was written."""

    folder: ModelFolder | None
    table: Table


def adopt(
    facts: Facts,
    manifest: Manifest,
    repository: Path,
    version: int,
    limits: Limits,
    tolerance: float = TOLERANCE,
) -> Adopted:
    """`version` 0: the one behind the newest that is there.

    Raises: TenutoError if that version is there, or files cannot be copied; OSError.
    """
    if not repository.is_dir():
        raise TenutoError(
            f"the repository {repository} is no folder; make it, or name another with --repository"
        )
    taken = {f.version for f in ModelRepository(repository).folders().get(manifest.name, [])}
    version = version or max(taken, default=0) + 1
    at = repository / manifest.name / str(version)
    if os.path.lexists(at):
        raise TenutoError(
            f"{at} is there, and nothing is overwritten; leave --version out for the next free one"
        )
    with _staged(at.parent) as staging:
        folder = ModelFolder(manifest.name, version, staging)
        copy(facts, manifest, staging)
        table = check(folder, limits, tolerance, staging / "golden.npz")
        if table.failed:
            return Adopted(None, table)
        verdict = _vetted(folder, limits)
        table = Table((*table.rows, Row(_SERVED, not verdict.why, verdict.why or _golden(verdict))))
        if table.failed:
            return Adopted(None, table)
        _publish(staging, at)
    return Adopted(ModelFolder(manifest.name, version, at), table)


def copy(facts: Facts, manifest: Manifest, folder: Path) -> None:
    """The model bit for bit, the files in which its weights lie, and its manifest.

    Raises: ModelInvalid if one of them lies, or a link leads, outside of the model's own folder.
    """
    shutil.copyfile(facts.path, folder / "model.onnx")
    source = facts.path.parent.resolve()
    for name in facts.external:
        real = (source / name).resolve()
        if not real.is_relative_to(source) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelInvalid(
                f"{facts.path}: its weights in {name!r} lie outside of its folder; nothing was copied"
            )
        if not real.is_file():
            raise ModelInvalid(f"{facts.path}: its weights are in {name!r}, which is no file here")
        to = folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real, to)
    (folder / "manifest.json").write_text(manifest.to_json() + "\n", encoding="utf-8")


@contextmanager
def _staged(model: Path) -> Iterator[Path]:
    """A folder beside the versions, of a name that is none; gone afterwards, unless it was renamed."""
    made = not model.exists()
    model.mkdir(exist_ok=True)
    staging = model / f".adopting-{secrets.token_hex(4)}"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made and not any(model.iterdir()):
            model.rmdir()


def _vetted(folder: ModelFolder, limits: Limits) -> Verdict:
    """What the server's own check says, in one more process, of what is about to be served."""
    return vet([folder], RunSettings(CPU), limits)[folder]


def _golden(verdict: Verdict) -> str:
    return f"{verdict.golden_steps} golden steps replayed, off by {verdict.golden_worst:.2g} at most"


def _publish(staging: Path, at: Path) -> None:
    """Raises: TenutoError if somebody else was faster."""
    try:
        staging.rename(at)
    except OSError as error:
        raise TenutoError(f"{at} could not be made: {error.strerror}; nothing was written") from error
