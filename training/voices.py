"""Makes few voices many: sound and spectra varied at random, for training only.

Six people in six rooms with six microphones say what the Free Spoken Digit Dataset has. What differs between
people, rooms and microphones is therefore drawn anew for every example: level, speed and pitch, length of the
vocal tract, the room's echo, the microphone's response and the noise.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .datasets.fsdd import Recording
from .graph import Array
from .sound import BANDS, Ear, mel_bands


@dataclass(frozen=True)
class Variety:
    """How far the drawn voices, rooms and microphones are from the recorded ones."""

    speed: float = 0.15  # speed and pitch together: a factor of up to e^0.15 up or down
    tract: float = 0.12  # the vocal tract: its resonances up or down by as much, apart from speed
    trim: float = 0.05  # of a word's length, cut off each end at most; half of the words keep all
    level_db: tuple[float, float] = (-44.0, -16.0)  # of a word, root mean square against full scale
    noise_db: tuple[float, float] = (-90.0, -55.0)  # white, of the whole example
    echo_db: tuple[float, float] = (-20.0, -3.0)  # energy against the sound; two of three examples have none
    echo_seconds: tuple[float, float] = (0.1, 0.7)  # until it has fallen by 60 dB
    tilt_db: float = 4.0  # at each end of the band
    waves_db: float = 1.5  # deviation of each of four cosines across the bands
    roll_off_db: float = 2.0  # a band at most, over up to 8 bands at each end: a telephone, a thin microphone

    @cached_property
    def warps(self) -> Tensor:
        """Mel bands for 21 lengths of the vocal tract, [21, 128, 40]."""
        lengths = np.exp(np.linspace(-self.tract, self.tract, 21))
        return torch.from_numpy(np.stack([mel_bands(length) for length in lengths]))


STRANGERS = Variety()  # for voices that were never heard
# For the six who are in training and test: a six that lost its ends sounds as an eight.
FAMILIAR = Variety(tract=0.08, echo_db=(-25.0, -12.0), tilt_db=2.0, waves_db=0.8, roll_off_db=0.5)


def say(recording: Recording, variety: Variety, rng: np.random.Generator) -> Array:
    """Return the word as someone else might say it, float32 [samples] in [-1, 1]."""
    pcm = recording.pcm / 32768.0
    if rng.random() < 0.5:
        cuts = (rng.uniform(0, variety.trim, 2) * len(pcm)).astype(int)
        pcm = pcm[cuts[0] : len(pcm) - cuts[1]]
    speed = math.exp(rng.uniform(-variety.speed, variety.speed))
    word = np.interp(np.arange(0, len(pcm) - 1, speed), np.arange(len(pcm)), pcm)
    loud = max(1e-4, math.sqrt(float(np.mean(word**2))))
    return np.asarray(np.clip(word * (_power(rng.uniform(*variety.level_db)) / loud), -1, 1), np.float32)


def noise(samples: int, variety: Variety, rng: np.random.Generator) -> Array:
    """Return white noise of a random level, float32 [samples]."""
    return rng.standard_normal(samples, dtype=np.float32) * np.float32(_power(rng.uniform(*variety.noise_db)))


def _power(decibels: float) -> float:
    return float(10 ** (decibels / 20))


def heard(ear: Ear, sound: Tensor, variety: Variety, rng: np.random.Generator) -> Tensor:
    """Return what `ear(sound)` would, [batch, time, 80], each row in another voice, room and microphone."""
    with torch.no_grad():
        warp = variety.warps[torch.from_numpy(rng.integers(0, len(variety.warps), len(sound)))]
        bands = echo(torch.bmm(ear.power(sound), warp), variety, rng)
        bands = bands * torch.from_numpy(microphones(len(sound), variety, rng))[:, None]
        return ear.steps(mask(ear.centred(bands), rng))


def echo(power: Tensor, variety: Variety, rng: np.random.Generator) -> Tensor:
    """Add to each frame what is left of the frames before it: energy that decays exponentially."""
    rows, frames, _ = power.shape
    wet = np.where(rng.random(rows) < 1 / 3, 10 ** (rng.uniform(*variety.echo_db, rows) / 10), 0)
    kept = 10 ** (-0.06 / rng.uniform(*variety.echo_seconds, rows))  # of the energy, 10 ms later
    by_age = (wet * (1 - kept) / kept)[:, None] * kept[:, None] ** np.arange(frames)
    by_age[:, 0] = 1
    # For each row a matrix [frames, frames]: nothing comes from the future, whose ages point at the zeros.
    ages = np.arange(frames)[:, None] - np.arange(frames)
    padded = np.concatenate([by_age, np.zeros((rows, frames))], axis=1).astype(np.float32)
    return torch.bmm(torch.from_numpy(padded[:, ages]), power)


def microphones(rows: int, variety: Variety, rng: np.random.Generator) -> Array:
    """Return a factor of each band's power, float32 [rows, 40]: a smooth response, weaker at the ends."""
    band = np.arange(BANDS)
    across = band / (BANDS - 1)
    decibels = rng.uniform(-variety.tilt_db, variety.tilt_db, (rows, 1)) * (2 * across - 1)
    for waves in (1, 2, 3, 4):
        phase = rng.uniform(0, 2, (rows, 1))
        decibels += rng.normal(0, variety.waves_db, (rows, 1)) * np.cos(np.pi * (waves * across + phase))
    for from_end in (band, band[::-1]):
        slope = rng.uniform(0, variety.roll_off_db, (rows, 1))
        decibels -= slope * np.maximum(0, rng.uniform(-6, 8, (rows, 1)) - from_end)
    return np.asarray(10 ** (decibels / 10), np.float32)


def mask(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """Blank some bands and some moments of each row of [rows, time, 40] (SpecAugment, Park 2019)."""
    time = frames.shape[1]
    drawn: NDArray[np.int64] = rng.integers(0, 8, (len(frames), 2))
    for row, (bands, moments) in zip(frames, drawn, strict=True):
        low, first = rng.integers(0, BANDS - 8), rng.integers(0, max(1, time - 8))
        row[:, low : low + bands] = 0
        row[first : first + moments] = 0
    return frames
