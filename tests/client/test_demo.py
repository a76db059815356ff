"""`examples/demo.py`: what it shows, how it fails, and that it leaves no server behind.

It needs the source tree and the extra `demo`; without them (`make test-oldest`) these are skipped.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo.py"
MODELS = ("digits", "oil-temperature", "spoken-digits")

if not DEMO.is_file() or any(find_spec(name) is None for name in ("onnxruntime", "pooch")):
    pytest.skip("needs the source tree and tenuto[demo]", allow_module_level=True)


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(DEMO), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture
def models() -> None:
    missing = [name for name in MODELS if not (ROOT / "exported" / name).is_dir()]
    if missing:
        pytest.skip(f"not exported: {', '.join(missing)}; make models")


def assert_no_server_at(address: str) -> None:
    host, port = address.rsplit(":", 1)
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect((host, int(port)))


@pytest.mark.usefixtures("models")
def test_it_shows_everything_and_stops_by_itself() -> None:
    code, out, err = finish(start("--recordings", "3", "--hours", "72", "--images", "8"))
    if "DATA_UNAVAILABLE" in err:
        pytest.skip(err)
    assert (code, err) == (0, "")
    assert re.search(r"\d of 8 right, one batch", out)
    assert out.count(".wav ") == 3
    assert "spoken:believed" in out
    assert re.search(r"all at once +\d of 3 right", out)
    assert "72 hours in" in out
    assert re.search(r"spoken-digits +3 ", out)
    assert out.endswith("the server has stopped\n")
    found = re.search(r" on (\S+:\d+),", out)
    assert found is not None
    assert_no_server_at(found[1])


@pytest.mark.usefixtures("models", "sigint")
def test_ctrl_c_stops_the_server_too() -> None:
    process = start()
    assert process.stdout is not None
    address = ""
    for line in process.stdout:
        if found := re.search(r" on (\S+:\d+),", line):
            address = found[1]
        if line.startswith("digits: "):
            process.send_signal(signal.SIGINT)
            break
    code, _, err = finish(process)
    if "DATA_UNAVAILABLE" in err:
        pytest.skip(err)
    assert (code, err) == (130, "")
    assert_no_server_at(address)


def test_missing_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    code, _, err = finish(start("--repository", str(tmp_path / "exported"), TENUTO_DATA=str(tmp_path)))
    assert code == 1
    assert err.startswith("error: DATA_UNAVAILABLE: mnist: ")
    assert err.count("\n") == 1


def test_missing_models_are_named(tmp_path: Path) -> None:
    code, _, err = finish(start("--repository", str(tmp_path / "none")))
    assert code == 1
    assert re.fullmatch(r"error: MODELS_MISSING: .*none is no folder; run: make models\n", err)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    code, _, err = finish(start("--repository", str(tmp_path)))  # a folder without models
    if "DATA_UNAVAILABLE" in err:
        pytest.skip(err)
    assert code == 1
    assert err.startswith("error: SERVER_FAILED: ")
    assert "tenuto serve: " in err
