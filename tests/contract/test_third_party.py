"""A model that others made, served from its file as it is: Silero's voice activity detector.

It needs what the vocabulary is for: chunks of exactly 512 samples, the last 64 of the chunk before put in
front, a rate that the server feeds, a state whose batch axis is 1, inputs bound by name, and an output whose
time the file does not declare.
"""

from __future__ import annotations

import json
import os
import random
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tenuto import Client
from tenuto.serving.server import Server
from tests.integration.running import TRANSPORTS, assert_nothing_is_left, engine_of, serving

from .stepper import Array, Arrays, Caller, Stepper, assert_answers, cut, moved, together

# What another CPU may make of it, which adds products in another order: two of the files differ from each
# other by 7e-7 for that reason. On the CPU of the references there is no difference.
OTHER_CPUS = 5e-6


class Variant(NamedTuple):
    """A file at a rate, and its key among the references, if there is one."""

    file: str
    rate_hz: int = 16000
    reference: str = ""


VARIANTS = {
    "silero-16k": Variant("silero_vad", reference="test_wav_16k"),
    "silero-8k": Variant("silero_vad", 8000, "aepyx_8k_first20s"),
    "silero-op15": Variant("silero_vad_16k_op15", reference="op15"),
    "silero-ifless": Variant("silero_vad_op18_ifless", reference="ifless"),
    "silero-ifless-8k": Variant("silero_vad_op18_ifless", 8000),
    "silero-half": Variant("silero_vad_half", reference="half"),
}


def manifest(variant: Variant) -> dict[str, Any]:
    samples = 512 * variant.rate_hz // 16000
    pcm: dict[str, Any] = {"name": "input", "dtype": "float32", "shape": ["batch", "samples"], "time_axis": 1}
    pcm |= {"chunk": {"exact": samples}, "left_context": samples // 8, "rate_hz": variant.rate_hz}
    pcm |= {"wire": [{"dtype": "int16", "scale": 1 / 32768}]}
    rate = {"name": "sr", "dtype": "int64", "value": variant.rate_hz}
    state: dict[str, Any] = {"input": "state", "output": "stateN", "dtype": "float32"}
    speech = {"name": "output", "dtype": "float32", "shape": ["batch", "frames"], "time_axis": 1}
    return {
        "format": 1,
        "licence": "MIT",
        "inputs": [pcm],
        "constants": [] if variant.file.endswith("half") else [rate],
        "states": [state | {"shape": [2, "batch", 128], "batch_axis": 1}],
        "outputs": [speech | {"stride": samples}],
    }


def either() -> dict[str, Any]:
    """One model of both rates: the file takes the chunks of 8 kHz at 16 kHz too."""
    made = manifest(Variant("silero_vad", 8000))
    made["constants"][0]["allowed"] = [8000, 16000]
    return made


@pytest.fixture(scope="module")
def silero() -> Path:
    root = Path(os.environ.get("TENUTO_MODELS", "no-such-folder")) / "silero_vad"
    if not root.is_dir():
        pytest.skip("TENUTO_MODELS does not name a folder with silero_vad/")
    return root


@pytest.fixture(scope="module")
def steppers(silero: Path) -> dict[str, Stepper]:
    """Each file alone."""
    made = {
        name: Stepper((silero / f"{variant.file}.onnx").read_bytes(), manifest(variant))
        for name, variant in VARIANTS.items()
    }
    return made | {"silero-either": Stepper((silero / "silero_vad.onnx").read_bytes(), either())}


@pytest.fixture(scope="module", params=TRANSPORTS)
def servers(
    request: pytest.FixtureRequest, silero: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """Two servers with the same files and keys."""
    root = tmp_path_factory.mktemp("silero")
    files = {name: (variant.file, manifest(variant)) for name, variant in VARIANTS.items()}
    for name, (file, said) in (files | {"silero-either": ("silero_vad", either())}).items():
        folder = root / "models" / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").symlink_to(silero / f"{file}.onnx")
        (folder / "manifest.json").write_text(json.dumps(said | {"name": name}))
    keys = root / "keys"
    keys.write_text("5a" * 32)
    shared: dict[str, Any] = {"vetted": True, "transport": request.param, "token_key_file": keys}
    with serving(root / "models", **shared) as one, serving(root / "models", **shared) as other:
        yield [one, other]
        for server in (one, other):
            assert_nothing_is_left(server)


def recording(silero: Path, rate_hz: int) -> Array:
    """int16; one minute at 16 kHz, 20 s at 8 kHz."""
    with wave.open(str(silero / ("test.wav" if rate_hz == 16000 else "aepyx_8k.wav"))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (rate_hz, 1, 2)
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
    return pcm if rate_hz == 16000 else pcm[: 20 * rate_hz]


def as_floats(pcm: Array) -> Array:
    return pcm.astype(np.float32) * np.float32(1 / 32768)


def pieces(stepper: Stepper, pcm: Array, chance: random.Random, seconds: float = 2.0) -> list[Arrays]:
    """From one sample to so many seconds each."""
    rate_hz = stepper.manifest.inputs[0].rate_hz
    assert rate_hz
    return cut(stepper, {"input": pcm}, round(seconds * rate_hz), chance)


@pytest.mark.timeout(180)  # five minutes of sound
def test_silero_answers_as_its_references(
    silero: Path, servers: list[Server], steppers: dict[str, Stepper]
) -> None:
    """All of each recording, from int16 in chunks of any length, all files at once: every bit of what the
    file gives alone, which is the reference."""
    chance, references = random.Random(1), np.load(silero / "reference.npz")
    callers, expected = [], []
    for name, variant in VARIANTS.items():
        pcm = recording(silero, variant.rate_hz)
        frames = steppers[name].alone({"input": as_floats(pcm)})
        if variant.reference:
            alone = np.concatenate([frame["output"] for frame in frames])
            np.testing.assert_allclose(alone, references[variant.reference], rtol=0, atol=OTHER_CPUS)
        for part in (pcm, pcm[: 5 * variant.rate_hz]):
            callers.append(Caller(name, pieces(steppers[name], part, chance)))
            whole = len(part) // steppers[name].manifest.inputs[0].multiple
            expected.append(steppers[name].answers(frames[:whole], callers[-1].pieces))
    got = together(servers[0], callers, chance)
    for one, other in zip(got, expected, strict=True):
        assert_answers(one, other)


def test_a_second_of_sound_gets_31_probabilities(silero: Path, servers: list[Server]) -> None:
    """And the next one 31 as well: what is left over is a quarter of a frame each time."""
    pcm = recording(silero, 16000)
    counts = []
    with Client(f"127.0.0.1:{servers[0].port}") as client, client.stream("silero-16k") as stream:
        for second in range(4):
            stream.send(pcm[16000 * second : 16000 * (second + 1)])
            counts.append(next(stream)["output"].shape)
        stream.end()
        assert list(stream) == []
    assert counts == [(31,), (31,), (31,), (32,)]


def test_sequences_at_both_rates_share_a_model(
    silero: Path, servers: list[Server], steppers: dict[str, Stepper]
) -> None:
    """The rate is one number for a whole batch. Each sequence chooses its own at Open, in one model and on
    one stream, and gets what it gets alone."""
    chance, stepper = random.Random(2), steppers["silero-either"]
    pcm = recording(silero, 8000)
    callers, expected = [], []
    for i in range(6):
        rate_hz = (8000, 16000)[i % 2]
        frames = stepper.alone({"input": as_floats(pcm[100 * i :])}, {"sr": rate_hz})
        chosen: dict[str, Any] = {"constants": {"sr": rate_hz}} if i else {}  # 8000 is what nobody chooses
        callers.append(Caller("silero-either", pieces(stepper, pcm[100 * i :], chance, 0.2), chosen))
        expected.append(stepper.answers(frames, callers[-1].pieces))
    engine = engine_of(servers[0], "silero-either")
    rows, batches = engine.metrics.batch_size.total, engine.metrics.batches
    got = together(servers[0], callers, chance)
    for one, other in zip(got, expected, strict=True):
        assert_answers(one, other)
    assert engine.metrics.batch_size.total - rows > engine.metrics.batches - batches, "they never met"


@pytest.mark.parametrize("name", ["silero-16k", "silero-8k"])
def test_silero_goes_on_where_it_was(
    silero: Path, servers: list[Server], steppers: dict[str, Stepper], name: str
) -> None:
    """State, the samples before, and those that fill no frame are inside of a token."""
    stepper, callers, expected = steppers[name], [], []
    pcm = recording(silero, VARIANTS[name].rate_hz)[:80000]
    for i in range(4):
        own = pcm[1000 * i :]
        callers.append(Caller(name, pieces(stepper, own, random.Random(i), 0.5)))
        expected.append(stepper.answers(stepper.alone({"input": as_floats(own)}), callers[-1].pieces))
    for one, other in zip(moved(servers, callers, seed=3), expected, strict=True):
        assert_answers(one, other)
