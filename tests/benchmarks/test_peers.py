"""What is written for other people's servers fits the benchmark's model. Triton itself is not started."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import model
from benchmarks.peers import triton
from benchmarks.server_process import command


def test_tritons_configuration_is_that_of_the_model(tmp_path: Path) -> None:
    lstm = tmp_path / "model.onnx"
    lstm.write_bytes(b"graph")
    triton.write_repository(tmp_path / "models", lstm)
    folder = tmp_path / "models" / model.NAME
    text = (folder / "config.pbtxt").read_text()
    dims = re.findall(r"dims: \[ -1, (\d+) \]", text)
    assert dims == [str(model.INPUTS), str(model.OUTPUTS)]
    assert f"max_batch_size: {model.manifest()['max_batch']}" in text
    assert (folder / "1" / "lstm.onnx").read_bytes() == b"graph"
    code = (folder / "1" / "model.py").read_text()
    assert (
        f"STATES, LAYERS, WIDTH = {model.STATES!r}, {model.LAYERS}, {model.WIDTH}".replace("'", '"') in code
    )


def test_the_backend_gets_the_stub_of_this_python(tmp_path: Path) -> None:
    server = tmp_path / "wheel" / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for stub in (version, "2.7"):
        (server / "python_backend_stubs" / stub).mkdir(parents=True)
        (server / "python_backend_stubs" / stub / "triton_python_backend_stub").write_text(stub)
    (server / "backends" / "python").mkdir(parents=True)
    there = triton.backends(tmp_path / "wheel", tmp_path / "run")
    stub_file = there / "python" / "triton_python_backend_stub"
    assert stub_file.read_text() == version
    assert stub_file.stat().st_mode & 0o100


def test_a_triton_that_ends_is_not_waited_for() -> None:
    process = subprocess.Popen(["false"])
    process.wait()
    with pytest.raises(RuntimeError, match="did not become ready"):
        triton.wait_until_ready(1, process)


def test_triton_is_started_for_the_lstm(tmp_path: Path) -> None:
    words = command("triton", model.Repository(tmp_path))
    assert words[-2:] == ["benchmarks.peers.triton", str(tmp_path / "lstm" / "1" / "model.onnx")]
