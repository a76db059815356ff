"""What is written beside a model: the revision of the code that made it."""

import subprocess
from pathlib import Path

import pytest

from tenuto.training import record


def _git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=A Tester", "-c", "user.email=tester@example.org"]
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with this module's place in it, and an exported model."""
    for name in ("training/record.py", "serving/engine.py", "exported/digits/1/model.onnx"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1", encoding="utf-8")
    monkeypatch.setattr(record, "__file__", str(tmp_path / "training/record.py"))
    _git(tmp_path, "init", "-q")
    return tmp_path


def test_a_revision_is_that_of_the_code(code: Path) -> None:
    assert record.revision() is None  # nothing is committed
    _git(code, "add", "-A")
    _git(code, "commit", "-q", "-m", "one")
    head = _git(code, "rev-parse", "HEAD")
    assert record.revision() == head
    (code / "exported/digits/1/model.onnx").write_text("2", encoding="utf-8")
    (code / "notes.txt").write_text("not tracked", encoding="utf-8")
    assert record.revision() == head
    (code / "serving/engine.py").write_text("2", encoding="utf-8")
    assert record.revision() == f"{head}-dirty"


def test_without_git_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.revision() is None
