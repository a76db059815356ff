"""Two LSTMs that listen to spoken digits: `tenuto train spoken-digits` (about 5 CPU minutes).

Every 20 ms of 8 kHz sound become two log-mel frames of 25 ms (Davis and Mermelstein 1980, without
the cosine transform). The first LSTM (Hochreiter and Schmidhuber 1997) says what it hears in each
20 ms; the second reads the first and says what digit was spoken last: the running answer. Trained on
the Free Spoken Digit Dataset, with speed, loudness, noise, pauses and pairs of digits at random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from . import spoken_digits_graph
from .candidate import AnyArray, Candidate, Tensors
from .datasets import fsdd
from .datasets.fsdd import RATE_HZ, Recording
from .graph import Array
from .progress import progress
from .weights import count, exported

NAME = "spoken-digits"
EPOCHS = 60
THREADS = 1
BATCH = 64
LEARNING_RATE = 3e-3
VALIDATION_TAKES = range(5, 10)  # of every speaker and digit, held out of the training split

DATA = {
    "name": "Free Spoken Digit Dataset v1.0.10",
    "licence": fsdd.LICENCE,
    "sha256": {"recordings/*.wav, see training/datasets/fsdd.py": fsdd.CHECKSUM},
    "split": "official: takes 0 to 4 of each speaker and digit to test; of the others, 5 to 9 for "
    "validation and 10 to 49 to train on",
}

CARD = """
Listens to 8 kHz sound and says which English digit was spoken last. For demonstrations and tests of
live streams: sound may come in chunks of any length. Two outputs for each 20 ms: `log_probabilities`,
what the first LSTM hears now, and `answer`, what the second one has understood so far. The answer stays
in the pause after a digit and changes with the next. Both are arbitrary before the first digit
and in the first part of a word: there is no "nothing heard" among the labels.

Six speakers, all in training and test: the figure says how well it knows their voices. For a voice
that it never heard expect about 90 % (measured with one speaker held out, on a smaller model of the
same kind). Of validation recordings played five in a row with half a second between them, 99 % were right
in the pause, and 94 % of the last ones still so after 3 seconds of silence; under noise at -40 dB of
full scale 92 %, but the answer wanders off within those 3 seconds. Nothing is heard below about -60 dB
of full scale. States are bounded; a stream may run for as long as it likes.
"""

WINDOW, HOP = 200, 80  # samples: 25 ms of sound every 10 ms
STEP = 2 * HOP  # samples that make one output frame: 20 ms
OVERLAP = WINDOW - HOP  # samples that the next chunk needs again
BINS = 128  # frequencies of a 256-point Fourier transform, without 0 Hz
BANDS = 40  # a multiple of 8: whole vectors, so that a frame's bits do not depend on its neighbours
HEAR, ANSWER = 160, 64  # hidden sizes of the two LSTMs
FLOOR = 1e-6  # power added before the logarithm: about -60 dB below a full-scale tone in one band


def fourier() -> Array:
    """Return float32 [200, 256]: a Hann window times the cosines, then the sines, of 128 bins."""
    time = np.arange(WINDOW)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * (time + 0.5) / WINDOW)
    angle = 2 * np.pi * np.outer(time, np.arange(1, BINS + 1)) / (2 * BINS)
    waves = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray(hann[:, None] * waves * 2 / hann.sum(), np.float32)


def mel_bands() -> Array:
    """Return float32 [128, 40]: triangles of equal width on the mel scale, 60 Hz to 4 kHz."""

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    bins = np.array([mel(k * RATE_HZ / (2 * BINS)) for k in range(1, BINS + 1)])
    edges = np.linspace(mel(60), mel(RATE_HZ / 2), BANDS + 2)
    up = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.asarray(np.maximum(0, np.minimum(up, down)), np.float32)


@dataclass
class SpokenState:
    """What one step leaves for the next: sound [batch, 120] and both LSTMs' (h, c) [1, batch, n]."""

    overlap: Tensor
    hear: tuple[Tensor, Tensor]
    answer: tuple[Tensor, Tensor]

    @classmethod
    def zeros(cls, batch: int) -> "SpokenState":
        """Return the state before the first sound: silence, and nothing heard."""

        def pair(size: int) -> tuple[Tensor, Tensor]:
            return torch.zeros(1, batch, size), torch.zeros(1, batch, size)

        return cls(torch.zeros(batch, OVERLAP), pair(HEAR), pair(ANSWER))


class SpokenDigitNetwork(nn.Module):
    """PCM int16 [batch, samples] to log-probabilities of each 20 ms and the running answer."""

    dft: Tensor
    mel: Tensor
    floor: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("floor", torch.tensor(FLOOR))
        self.register_buffer("dft", torch.from_numpy(fourier()))
        self.register_buffer("mel", torch.from_numpy(mel_bands()))
        self.register_buffer("mean", torch.zeros(BANDS))
        self.register_buffer("std", torch.ones(BANDS))
        self.hear = nn.LSTM(2 * BANDS, HEAR, batch_first=True)
        self.hear_head = nn.Linear(HEAR, 10)
        self.answer = nn.LSTM(HEAR, ANSWER, batch_first=True)
        self.answer_head = nn.Linear(ANSWER, 10)
        self.dropout = nn.Dropout(0.3)

    def log_mel(self, sound: Tensor) -> Tensor:
        """Return float32 [batch, frames, 40] of sound [batch, 120 + 80 * frames] in [-1, 1)."""
        spectrum = sound.unfold(1, WINDOW, HOP) @ self.dft
        power = spectrum[..., :BINS] ** 2 + spectrum[..., BINS:] ** 2
        return (torch.log(power @ self.mel + self.floor) - self.mean) / self.std

    def listen(
        self, features: Tensor, state: SpokenState
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Run both LSTMs over log-mel [batch, 2 * time, 40].

        Returns the logits of each, [batch, time, 10], and the new state of each.
        """
        batch, frames, _ = features.shape
        pairs = features.reshape(batch, frames // 2, 2 * BANDS)
        heard, hear_state = self.hear(pairs, state.hear)
        heard = self.dropout(heard)
        answer, answer_state = self.answer(heard, state.answer)
        logits = self.hear_head(heard), self.answer_head(self.dropout(answer))
        return *logits, hear_state, answer_state

    def forward(self, pcm: Tensor, state: SpokenState) -> tuple[Tensor, Tensor, SpokenState]:
        """Hear int16 [batch, samples], samples a multiple of 160, all rows of that length.

        Returns log-probabilities and the running answer, float32 [batch, samples / 160, 10], and
        the state for the next call.
        """
        sound = torch.cat([state.overlap, pcm.float() / 32768], dim=1)
        heard, answer, hear_state, answer_state = self.listen(self.log_mel(sound), state)
        after = SpokenState(sound[:, -OVERLAP:], hear_state, answer_state)
        return F.log_softmax(heard, -1), F.log_softmax(answer, -1), after


@dataclass(frozen=True, eq=False)
class Example:
    """Sound float32 [160 * time] in [-1, 1), and for each 20 ms a target and its weight [time]."""

    sound: Array
    targets: NDArray[np.int64]
    weights: Array


def vary(recordings: Sequence[Recording], rng: np.random.Generator) -> Example:
    """Put recordings one after the other, each at a random speed and loudness, into noise.

    The weight of a frame grows from 0 to 1 over its digit and stays 1 in the pause after it: at the
    beginning of a word nobody can know, and at its end the answer should be right and stay.
    """
    sound: list[Array] = [np.zeros(rng.integers(0, 3200), np.float32)]
    spans: list[tuple[int, int, int]] = []
    for recording in recordings:
        speed = rng.uniform(0.88, 1.14)
        word = np.interp(
            np.arange(0, len(recording.pcm) - 1, speed),
            np.arange(len(recording.pcm)),
            recording.pcm / 32768.0,
        )
        start = sum(map(len, sound))
        sound.append((word * 10 ** (rng.uniform(-15, 6) / 20)).astype(np.float32))
        spans.append((start, start + len(word), recording.digit))
        pause = rng.integers(0, 4800) if rng.random() < 0.6 else 0
        sound.append(np.zeros(pause, np.float32))
    joined = np.concatenate(sound)
    noise = rng.standard_normal(len(joined)) * 10 ** (rng.uniform(-80, -36) / 20)
    joined = np.clip(joined + noise, -1, 32767 / 32768).astype(np.float32)
    joined = joined[: len(joined) // STEP * STEP]
    targets = np.zeros(len(joined) // STEP, np.int64)
    weights = np.zeros(len(targets), np.float32)
    ends = (np.arange(len(targets)) + 1) * STEP
    for start, stop, digit in spans:
        targets[ends > start] = digit
        weights[ends > start] = np.clip((ends[ends > start] - start) / (stop - start), 0, 1) ** 2
    return Example(joined, targets, weights)


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sound [batch, 120 + samples], targets, weights [batch, time], each one's last frame.

    The 120 samples before the sound are zeros, as the overlap of a new sequence is.
    """
    time = max(len(example.targets) for example in examples)
    sound = np.zeros((len(examples), OVERLAP + time * STEP), np.float32)
    targets = np.zeros((len(examples), time), np.int64)
    weights = np.zeros((len(examples), time), np.float32)
    for row, example in enumerate(examples):
        sound[row, OVERLAP : OVERLAP + len(example.sound)] = example.sound
        targets[row, : len(example.targets)] = example.targets
        weights[row, : len(example.targets)] = example.weights
    last = np.array([len(example.targets) - 1 for example in examples])
    return (
        torch.from_numpy(sound),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        torch.from_numpy(last),
    )


def mask(features: Tensor, rng: np.random.Generator) -> Tensor:
    """Blank a band of frequencies and a stretch of time in each row (SpecAugment, Park 2019)."""
    features = features.clone()
    for row in features:
        band, moment = rng.integers(0, BANDS - 6), rng.integers(0, max(1, len(row) - 6))
        row[:, band : band + rng.integers(0, 7)] = 0
        row[moment : moment + rng.integers(0, 7)] = 0
    return features


def fit(recordings: Sequence[Recording], seed: int, epochs: int) -> SpokenDigitNetwork:
    """Train on whole recordings and return the network in eval mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = SpokenDigitNetwork()
    measure_features(network, recordings, rng)
    steps = epochs * -(-len(recordings) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with progress("spoken-digits: training", steps) as bar:
        for _ in range(epochs):
            order = rng.permutation(len(recordings))
            for batch in np.array_split(order, -(-len(order) // BATCH)):
                loss = _loss(network, [_draw(recordings, i, rng) for i in batch], rng)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
    return network.eval()


def measure_features(
    network: SpokenDigitNetwork, recordings: Sequence[Recording], rng: np.random.Generator
) -> None:
    """Set the mean and standard deviation by which the network normalises its log-mel bands."""
    with torch.no_grad():
        sound = [vary([recording], rng).sound for recording in recordings[:500]]
        frames = torch.cat([network.log_mel(torch.from_numpy(s)[None])[0] for s in sound])
        network.mean.copy_(frames.mean(0))
        network.std.copy_(frames.std(0))


def _draw(recordings: Sequence[Recording], i: int, rng: np.random.Generator) -> Example:
    """Vary one recording; one time in four another one comes before it."""
    first = [recordings[int(rng.integers(len(recordings)))]] if rng.random() < 0.25 else []
    return vary([*first, recordings[i]], rng)


def _loss(network: SpokenDigitNetwork, examples: Sequence[Example], rng: np.random.Generator) -> Tensor:
    sound, targets, weights, last = collate(examples)
    features = mask(network.log_mel(sound), rng)
    heard, answer, _, _ = network.listen(features, SpokenState.zeros(len(examples)))
    weights = weights / weights.sum()
    rows = torch.arange(len(examples))
    return (
        (weights * F.cross_entropy(heard.transpose(1, 2), targets, reduction="none")).sum()
        + (weights * F.cross_entropy(answer.transpose(1, 2), targets, reduction="none")).sum()
        + F.cross_entropy(answer[rows, last], targets[rows, last])
    )


def candidate(network: SpokenDigitNetwork, seed: int) -> Candidate:
    """Build the ONNX file, and synthetic sound to check it with."""
    described = spoken_digits_graph.manifest(HEAR, ANSWER, STEP, OVERLAP)

    def reference(chunks: Sequence[AnyArray]) -> list[Tensors]:
        state, outputs = SpokenState.zeros(1), []
        for chunk in chunks:
            with torch.no_grad():
                heard, answer, state = network(torch.from_numpy(chunk)[None], state)
            outputs.append({"log_probabilities": heard[0].numpy(), "answer": answer[0].numpy()})
        return outputs

    return Candidate(
        manifest=described,
        model=spoken_digits_graph.build(exported(network), described),
        reference=reference,
        golden=np.split(tones(seed), np.cumsum([160, 100, 60, 500, 1, 799, 3200, 40])),
        probe=tones(seed + 1, seconds=8.0),
        tolerance=1e-3,
        golden_tolerance=1e-2,
        parameters=count(network),
        card=CARD,
    )


def train(seed: int, epochs: int) -> Candidate:
    """Run the recipe on the official training split of the Free Spoken Digit Dataset."""
    recordings = fsdd.recordings("train")
    held = [one for one in recordings if one.index in VALIDATION_TAKES]
    network = fit([one for one in recordings if one not in held], seed, epochs)
    return candidate(network, seed).with_training(
        validation_accuracy=score(network, held),
        validation_n=len(held),
        selection="none: the last epoch; the recipe itself was chosen by validation accuracy",
    )


def score(network: SpokenDigitNetwork, recordings: Sequence[Recording]) -> float:
    """Return the part of the recordings whose last running answer is right."""
    right = 0
    for recording in recordings:
        whole = torch.from_numpy(recording.pcm[: len(recording.pcm) // STEP * STEP])
        with torch.no_grad():
            _, answer, _ = network(whole[None], SpokenState.zeros(1))
        right += int(answer[0, -1].argmax() == recording.digit)
    return right / len(recordings)


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
