"""docs/examples/voice-activity.md, done word by word: a file of others becomes a model and a picture."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/examples"
PAGE = (FOLDER / "voice-activity.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
READY = re.compile(r"tenuto serving on (\S+),")
# In place of the program that downloads: the files are here, and tests have no net.
CURL = """#!/bin/sh
for word; do
  case "$word" in
    https://github.com/snakers4/silero-vad/raw/*) cp "$TENUTO_MODELS/silero_vad/${word##*/}" . || exit 1 ;;
    -fL|-O) ;;
    *) exit 2 ;;
  esac
done
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a reader has before the first command."""
    if not (Path(os.environ.get("TENUTO_MODELS", "no-such-folder")) / "silero_vad").is_dir():
        pytest.skip("TENUTO_MODELS does not name a folder with silero_vad/")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/curl").write_text(CURL)
    (tmp_path / "bin/curl").chmod(0o755)
    (tmp_path / "empty").mkdir()
    shutil.copy(ROOT / "examples/voice_activity.py", tmp_path / "empty")
    return tmp_path / "empty"


def run(script: str, folder: Path, **variables: str) -> str:
    path = os.pathsep.join([str(folder.parent / "bin"), str(BIN), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(300)
def test_a_file_of_others_becomes_a_served_model_and_a_picture(folder: Path) -> None:
    download, adopt, serve, stream, at_8_khz = blocks("sh")
    held, said = blocks("text")
    assert run(download, folder) == "silero_vad.onnx: OK\ntest.wav: OK\n"
    assert held in run(adopt, folder)
    command = [str(BIN / "tenuto"), *serve.split()[1:], "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            ready = READY.search(server.stdout.readline())
            assert ready is not None
            assert run(stream, folder, TENUTO_SERVER=ready[1]) == said
            (folder / "listen.py").write_text(blocks("python file=listen.py")[0], encoding="utf-8")
            heard = run(f"python listen.py {ready[1]}", folder).splitlines()
        finally:
            server.terminate()
        assert server.wait() == 0
    assert [line.split(": ")[1] for line in heard] == (["speech", "silence"] * len(heard))[: len(heard)]
    assert len(heard) > 20
    made = [
        (folder / "models" / name / "1/model.onnx").exists()
        for name in ("voice-activity", "voice-activity-8k")
    ]
    assert made == [True, False]
    run(at_8_khz, folder)
    assert (folder / "models/voice-activity-8k/1/manifest.json").is_file()
    _assert_same_picture(folder / "speech.svg")


def _assert_same_picture(made: Path) -> None:
    """That of the page: the same words, and as many points of the line within a hundredth."""
    shown, drawn = ((file.read_text(encoding="utf-8")) for file in (FOLDER / "voice-activity.svg", made))
    words = r"<text [^>]*>([^<]+)</text>"
    assert re.findall(words, drawn) == re.findall(words, shown)
    assert abs(len(drawn) - len(shown)) < len(shown) / 100
    assert len(shown) < 40_000


def test_the_picture_needs_an_answer(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples/voice_activity.py"), str(tmp_path / "none.svg")]
    done = subprocess.run(script, input='{"summary": {}}\n', capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("error: NO_OUTPUT: ")) == (1, True)
    assert not (tmp_path / "none.svg").exists()


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert len(targets) > 2
    assert [target for target in targets if not (FOLDER / target).exists()] == []
