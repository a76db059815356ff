"""docs/adopting.md, done word by word: a file that says nothing of itself becomes a served model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tenuto.serving.adoption.checking import CHECKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adopting.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
READY = re.compile(r"tenuto serving on (\S+),")


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def _run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(120)  # six processes, and each of them starts others
def test_a_file_becomes_a_served_model(tmp_path: Path) -> None:
    files = dict(re.findall(r"^```python file=(\S+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))
    assert list(files) == ["make_meter.py", "client.py"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    [commands] = _blocks("sh")
    said = {command: _run(command.split(), tmp_path) for command in commands.splitlines()}
    [shown] = _blocks("text")
    assert shown in said["tenuto inspect meter.onnx"]
    assert "FAILED" not in said["tenuto check meter.onnx"]
    written = sorted(path.name for path in (tmp_path / "models/meter/1").iterdir())
    assert written == ["golden.npz", "manifest.json", "model.onnx"]
    command = [str(BIN / "tenuto"), "serve", "models", "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            ready = READY.search(server.stdout.readline())
            assert ready is not None
            answers = _run([sys.executable, "client.py", ready[1]], tmp_path).splitlines()
        finally:
            server.terminate()
        assert server.wait() == 0
    assert answers == ["[1. 2. 3.]", "[4. 5.]"]


def test_the_options_that_the_page_names_exist() -> None:
    described = _run([str(BIN / "tenuto"), "adopt", "--help"], ROOT)
    named = set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--json", "--poll-seconds"}
    offered = set(re.findall(r"(--[a-z-]+)", described))
    assert named <= offered
    assert offered - named == {"--help", "--json", "--name", "--repository", "--version"}


def test_every_check_is_explained() -> None:
    explained = re.findall(r"^\| ([^|`]+) \|", PAGE.split("## What is checked")[1], flags=re.MULTILINE)
    assert explained[1:-1] == CHECKS
