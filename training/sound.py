"""From 8 kHz sound to log-mel frames: what all the models that listen begin with.

25 ms every 10 ms, 40 bands (Davis and Mermelstein 1980, without the cosine transform). `sound_graph` builds
the same in ONNX.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .datasets.fsdd import RATE_HZ
from .graph import Array

WINDOW, HOP = 200, 80  # samples: 25 ms of sound every 10 ms
STEP = 2 * HOP  # samples that make one output frame: 20 ms
OVERLAP = WINDOW - HOP  # samples that the next chunk needs again
BINS = 128  # frequencies of a 256-point Fourier transform, without 0 Hz
BANDS = 40  # a multiple of 8: whole vectors, so that a frame's bits do not depend on its neighbours
FLOOR = 1e-8  # power added before the logarithm: about -80 dB below a full-scale tone in one band
TOP_HZ = RATE_HZ / 2
LEAST_VARIANCE = 0.1  # added to that of each principal axis, in which all 40 sum to 40
BEND = 0.8  # of TOP_HZ: above it a warped frequency axis bends back to its own end


def fourier() -> Array:
    """Return float32 [200, 256]: a Hann window times the cosines, then the sines, of 128 bins."""
    time = np.arange(WINDOW)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * (time + 0.5) / WINDOW)
    angle = 2 * np.pi * np.outer(time, np.arange(1, BINS + 1)) / (2 * BINS)
    waves = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray(hann[:, None] * waves * 2 / hann.sum(), np.float32)


def mel_bands(warp: float = 1.0) -> Array:
    """Return float32 [128, 40]: triangles of equal width on the mel scale, 60 Hz to 4 kHz.

    With `warp` other than 1 what is at a frequency f counts as if it were at f * warp, as in a vocal
    tract of another length (Jaitly and Hinton 2013).
    """
    hertz = np.arange(1, BINS + 1) * RATE_HZ / (2 * BINS)
    bend = TOP_HZ * BEND * min(1.0, 1 / warp)
    beyond = TOP_HZ - (TOP_HZ - bend * warp) / (TOP_HZ - bend) * (TOP_HZ - hertz)
    bins = _mel(np.where(hertz <= bend, hertz * warp, beyond))
    edges = np.linspace(_mel(np.array(60.0)), _mel(np.array(TOP_HZ)), BANDS + 2)
    up = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.asarray(np.maximum(0, np.minimum(up, down)), np.float32)


def _mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2595 * np.log10(1 + hertz / 700)


class Ear(nn.Module):
    """Sound in [-1, 1) to log-mel frames, two to a step of 20 ms. Nothing in it is learnt."""

    dft: Tensor
    mel: Tensor
    floor: Tensor
    mean: Tensor
    white: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("floor", torch.tensor(FLOOR))
        self.register_buffer("dft", torch.from_numpy(fourier()))
        self.register_buffer("mel", torch.from_numpy(mel_bands()))
        self.register_buffer("mean", torch.zeros(BANDS))
        self.register_buffer("white", torch.eye(BANDS))

    def power(self, sound: Tensor) -> Tensor:
        """Return float32 [batch, frames, 128] of sound [batch, 120 + 80 * frames]."""
        spectrum = sound.unfold(1, WINDOW, HOP) @ self.dft
        return spectrum[..., :BINS] ** 2 + spectrum[..., BINS:] ** 2

    def centred(self, bands: Tensor) -> Tensor:
        """Return the logarithm of power in bands [..., 40], less the mean of each."""
        return torch.log(bands + self.floor) - self.mean

    def steps(self, centred: Tensor) -> Tensor:
        """Make bands [batch, 2 * time, 40] alike and independent; return steps of 20 ms [batch, time, 80]."""
        batch, count, bands = centred.shape
        return (centred @ self.white).reshape(batch, count // 2, 2 * bands)

    def forward(self, sound: Tensor) -> Tensor:
        """Return float32 [batch, time, 80] of sound [batch, 120 + 160 * time]."""
        return self.steps(self.centred(self.power(sound) @ self.mel))

    def measure(self, sound: list[Array]) -> None:
        """Set mean and whitening of the bands to those of `sound`, each float32 [samples].

        Bands rise and fall together: raw, four fifths of their variance are the level alone, and a network
        takes long to look past it. ZCA (Bell and Sejnowski 1997), with less of what varies little.
        """
        with torch.no_grad():
            frames = torch.cat(
                [
                    torch.log(self.power(torch.from_numpy(one)[None])[0] @ self.mel + self.floor)
                    for one in sound
                ]
            )
            self.mean.copy_(frames.mean(0))
            deviation = frames.double().std(0).numpy()
            variances, axes = np.linalg.eigh(np.corrcoef(frames.double().numpy().T))
            white = (axes / np.sqrt(variances + LEAST_VARIANCE)) @ axes.T / deviation[:, None]
            self.white.copy_(torch.from_numpy(white))


def tones(seed: int, seconds: float = 1.5) -> NDArray[np.int16]:
    """Return synthetic sound at 8 kHz: three gliding tones that swell and fade, over noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    sound = rng.standard_normal(len(time)) * 0.01
    for low in (300, 900, 2100):
        pitch = low * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * time))
        swell = np.sin(np.pi * rng.uniform(1, 3) * time) ** 2
        sound += 0.2 * swell * np.sin(2 * np.pi * np.cumsum(pitch) / RATE_HZ)
    return (np.clip(sound, -1, 1) * 32767).astype(np.int16)
