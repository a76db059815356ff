"""Silero's voice activity detector, adopted from the file as it is by two options, equals its reference."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np
import pytest

from tenuto import Client
from tenuto.serving.adoption.cli import main
from tenuto.serving.config import ServerConfig
from tenuto.serving.manifest import Manifest
from tenuto.serving.server import Server


@pytest.fixture(scope="module")
def silero() -> Path:
    root = Path(os.environ.get("TENUTO_MODELS", "no-such-folder")) / "silero_vad"
    if not root.is_dir():
        pytest.skip("TENUTO_MODELS does not name a folder with silero_vad/")
    return root


def test_it_says_what_it_cannot_know(silero: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(silero / "silero_vad.onnx")]) == 1
    said = capsys.readouterr().out
    assert "state 'state': comes back from 'stateN' (LSTM" in said
    assert "input 'sr': constant 16000" in said
    assert "->  --chunk input=exact:N, and perhaps --left-context input=N" in said


@pytest.mark.parametrize(
    "file,key",
    [
        ("silero_vad", "test_wav_16k"),
        ("silero_vad_16k_op15", "op15"),
        ("silero_vad_op18_ifless", "ifless"),
    ],
)
def test_a_second_of_sound_gives_31_probabilities(silero: Path, tmp_path: Path, file: str, key: str) -> None:
    """One for each 512 samples of a chunk; int16 is taken too, since a constant is called a rate."""
    options = ["--left-context", "input=64", "--chunk", "input=exact:512", "--repository", str(tmp_path)]
    if file == "silero_vad_16k_op15":  # it compares its rate with nothing
        options += ["--constant", "sr=16000"]
    assert main(["adopt", str(silero / f"{file}.onnx"), "--name", "voice-activity", *options]) == 0
    with wave.open(str(silero / "test.wav")) as sound:
        pcm = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
    expected = np.load(silero / "reference.npz")[key].ravel()
    server = Server(ServerConfig.build({"repository": tmp_path, "port": 0, "metrics_port": 0}, {}), "test")
    server.start()
    try:
        with Client(f"127.0.0.1:{server.port}") as client, client.stream("voice-activity") as stream:
            seconds = [pcm[at : at + 16000] for at in range(0, 10 * 16000, 16000)]
            answers = [output["output"] for output in stream.run(seconds)]
    finally:
        server.stop(0)
    assert answers[0].shape == (31,)
    got = np.concatenate(answers)
    assert len(got) == 10 * 16000 // 512
    np.testing.assert_allclose(got, expected[: len(got)], rtol=0, atol=1e-4)


def test_at_8_khz_it_takes_half(silero: Path, tmp_path: Path) -> None:
    options = ["--constant", "sr=8000", "--left-context", "input=32", "--chunk", "input=exact:256"]
    path = str(silero / "silero_vad.onnx")
    assert main(["adopt", path, "--name", "voice-8k", "--repository", str(tmp_path), *options]) == 0
    manifest = Manifest.parse((tmp_path / "voice-8k/1/manifest.json").read_bytes(), "written")
    assert manifest.inputs[0].rate_hz == 8000
    assert manifest.outputs[0].stride == 256
