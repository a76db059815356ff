"""A model that others made, served by a manifest beside it: Silero's voice activity detector.

It needs what the vocabulary is for: chunks of exactly 512 samples, the last 64 of the chunk before put in
front, a constant that the server feeds, a state whose batch axis is 1, and inputs bound by name.
"""

from __future__ import annotations

import json
import os
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenuto import Client
from tenuto.serving.config import ServerConfig
from tenuto.serving.server import Server

# Each file's key in the reference.
VARIANTS = {"silero_vad": "test_wav_16k", "silero_vad_16k_op15": "op15", "silero_vad_op18_ifless": "ifless"}


@pytest.fixture(scope="module")
def silero() -> Path:
    root = Path(os.environ.get("TENUTO_MODELS", "no-such-folder")) / "silero_vad"
    if not root.is_dir():
        pytest.skip("TENUTO_MODELS does not name a folder with silero_vad/")
    return root


def manifest(name: str) -> dict[str, Any]:
    return {
        "format": 1,
        "name": name,
        "licence": "MIT",
        "inputs": [
            {
                "name": "input",
                "dtype": "float32",
                "shape": ["batch", "samples"],
                "time_axis": 1,
                "chunk": {"exact": 512},
                "left_context": 64,
                "wire": [{"dtype": "int16", "scale": 1 / 32768}],
                "rate_hz": 16000,
            }
        ],
        "constants": [{"name": "sr", "dtype": "int64", "value": 16000}],
        "states": [
            {
                "input": "state",
                "output": "stateN",
                "dtype": "float32",
                "shape": [2, "batch", 128],
                "batch_axis": 1,
            }
        ],
        "outputs": [{"name": "output", "dtype": "float32", "shape": ["batch", 1]}],
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_silero_answers_as_its_reference(silero: Path, tmp_path: Path, variant: str) -> None:
    """Chunk by chunk the probabilities of the reference run, from int16 on the wire."""
    name = variant.replace("_", "-")
    folder = tmp_path / name / "1"
    folder.mkdir(parents=True)
    shutil.copy(silero / f"{variant}.onnx", folder / "model.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest(name)))
    with wave.open(str(silero / "test.wav")) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    expected = np.load(silero / "reference.npz")[VARIANTS[variant]].ravel()[:300]

    server = Server(ServerConfig.build({"repository": tmp_path, "port": 0, "metrics_port": 0}, {}), "test")
    server.start()
    try:
        with Client(f"127.0.0.1:{server.port}") as client, client.stream(name) as stream:
            chunks = (pcm[at : at + 512] for at in range(0, 512 * len(expected), 512))
            got = [float(output["output"][0]) for output in stream.run(chunks)]
    finally:
        server.stop(0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
