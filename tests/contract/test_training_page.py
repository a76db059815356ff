"""docs/training.md, done word by word: a CSV becomes a trained, exported and served model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/training.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
READY = re.compile(r"tenuto serving on (\S+),")


def _files() -> dict[str, str]:
    found = re.findall(r"^```python file=(\S+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return dict(found)


def _commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def _run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_csv_becomes_a_served_model(tmp_path: Path) -> None:
    files = _files()
    assert list(files) == ["make_pump.py", "pump.py", "client.py"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert _commands() == [
        "python make_pump.py",
        "tenuto train ./pump.py --diagnose",
        "tenuto evaluate exported/pump/1 --task ./pump.py",
    ]
    said = [_run(command.split(), tmp_path) for command in _commands()]
    trained, evaluated = (re.search(r"^value: (\S+)$", text, flags=re.MULTILINE) for text in said[1:])
    assert trained is not None
    assert evaluated is not None
    assert trained[1] == evaluated[1]
    assert float(trained[1]) > 0.8  # three states: a third by guessing
    drawn = [path.name for path in sorted((tmp_path / "runs/pump/diagnosis").iterdir())]
    assert drawn == ["confusion.svg", "curve.svg"]
    command = [str(BIN / "tenuto"), "serve", "exported", "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            ready = READY.search(server.stdout.readline())
            assert ready is not None
            answers = _run([sys.executable, "client.py", ready[1]], tmp_path).splitlines()
        finally:
            server.terminate()
        assert server.wait() == 0
    assert len(answers) == 3
    assert set(answers) <= {"sound", "cavitating", "worn bearing"}


def test_the_options_that_the_page_names_exist() -> None:
    described = _run([str(BIN / "tenuto"), "train", "--help"], ROOT)
    named = set(re.findall(r"^\| `(--[a-z-]+)", PAGE, flags=re.MULTILINE))
    assert named
    assert {option for option in named if option not in described} == set()
