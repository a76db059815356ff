"""Free Spoken Digit Dataset v1.0.10: 3,000 recordings of ten digits by six speakers, 8 kHz int16.

Licence: CC BY-SA 4.0 (github.com/Jakobovski/free-spoken-digit-dataset). Official split: takes 0 to 4
of each speaker and digit are the test set, 5 to 49 the training set.

GitHub's archives are not byte-stable, so CHECKSUM covers the WAV files: it is the SHA-256 of the
lines "<name> <sha256 of the file>\\n", sorted by name. The loader reads the repository's tag archive or
any zip that has the WAV files in a folder `recordings/`.
"""

import io
import wave
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import store

LICENCE = "CC-BY-SA-4.0"
URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip"
FILENAME = "recordings.zip"
CHECKSUM = "dbd573d7cafe79c4b49f65718115e1304e24e067fa39eff18a660dc6cb9c360f"
RATE_HZ = 8000
TEST_TAKES = 5
LABELS = tuple("0123456789")


@dataclass(frozen=True, eq=False)
class Recording:
    """One spoken digit: `pcm` is int16 [samples] at 8 kHz; `index` is the take, 0 to 49."""

    name: str
    digit: int
    speaker: str
    index: int
    pcm: NDArray[np.int16]


def recordings(split: Literal["train", "test"]) -> list[Recording]:
    """Return one split, sorted by name: 2,700 recordings to train on, 300 to test on."""
    if split not in ("train", "test"):
        raise ValueError(f"fsdd: split must be 'train' or 'test', got {split!r}")
    path = store.locate("fsdd", FILENAME, [URL])
    files = _files(path)
    store.check("fsdd", digest(files), CHECKSUM, path)
    found = [_recording(name, content) for name, content in sorted(files.items())]
    return [one for one in found if (one.index < TEST_TAKES) == (split == "test")]


def digest(files: dict[str, bytes]) -> str:
    """Return the SHA-256 over sorted lines of file name and SHA-256 of its content."""
    lines = [f"{name} {store.sha256(content)}\n" for name, content in sorted(files.items())]
    return store.sha256("".join(lines).encode())


def _files(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                Path(entry).name: archive.read(entry)
                for entry in archive.namelist()
                if entry.endswith(".wav") and Path(entry).parent.name == "recordings"
            }
    except zipfile.BadZipFile as error:
        raise store.ChecksumMismatch(f"fsdd: {path} is not a whole zip file") from error


def _recording(name: str, content: bytes) -> Recording:
    digit, speaker, index = name.removesuffix(".wav").split("_")
    with wave.open(io.BytesIO(content)) as file:
        form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        if form != (1, 2, RATE_HZ):
            raise ValueError(f"fsdd: {name} is {form}, expected mono, 2 bytes, {RATE_HZ} Hz")
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
    return Recording(name, int(digit), speaker, int(index), pcm)
