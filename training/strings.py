"""Endless streams of spoken digits with pauses between them, made from single recordings at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import voices
from .datasets.fsdd import RATE_HZ, Recording
from .graph import Array
from .sound import STEP

LONGEST_PAUSE = 2 * RATE_HZ  # samples
SETTLE = RATE_HZ // 5  # samples of a segment's end in which no word is: its digit can be said before


def pause(rng: np.random.Generator) -> int:
    """Return the samples between two words: none, one time in four, else up to 2 seconds, rather few."""
    return 0 if rng.random() < 0.25 else int(LONGEST_PAUSE * rng.random() ** 2)


@dataclass(frozen=True, eq=False)
class Segment:
    """Sound float32 [samples] to train on; which digit is where: (digit, start, stop), in samples."""

    sound: Array
    spans: Sequence[tuple[int, int, int]]

    @property
    def digits(self) -> list[int]:
        """Return what is said."""
        return [digit for digit, _, _ in self.spans]

    def frames(self) -> tuple[NDArray[np.int64], Array]:
        """Return for each 20 ms the digit that is being said, and from 0 to 1 how much of it was said."""
        ends = (np.arange(len(self.sound) // STEP) + 1) * STEP
        digits, heard = np.zeros(len(ends), np.int64), np.zeros(len(ends), np.float32)
        for digit, start, stop in self.spans:
            within = (ends > start) & (ends < stop + STEP)
            digits[within] = digit
            heard[within] = np.minimum(1, (ends[within] - start) / (stop - start))
        return digits, heard


def segment(recordings: Sequence[Recording], samples: int, rng: np.random.Generator) -> Segment:
    """Return words and pauses over noise. No word crosses an end. One time in twenty there is noise alone."""
    sound, at = voices.noise(samples, voices.FAMILIAR, rng), pause(rng)
    spans: list[tuple[int, int, int]] = []
    while rng.random() < 0.95 or spans:
        recording = recordings[int(rng.integers(len(recordings)))]
        word = voices.say(recording, voices.FAMILIAR, rng)
        if at + len(word) > samples - SETTLE:
            break
        sound[at : at + len(word)] += word
        spans.append((recording.digit, at, at + len(word)))
        at += len(word) + pause(rng)
    return Segment(np.clip(sound, -1, 1), spans)


@dataclass(frozen=True, eq=False)
class Word:
    """A recording at its place in a stream."""

    digit: int
    start: int  # samples
    stop: int
    sound: Array  # float32 [stop - start], a full-scale value is 1


@dataclass(frozen=True, eq=False)
class Stream:
    """A stream to test on: words as they were recorded but for their level, over white noise."""

    words: Sequence[Word]
    noise: float  # standard deviation, against full scale

    @classmethod
    def draw(cls, recordings: Sequence[Recording], seconds: float, rng: np.random.Generator) -> "Stream":
        """Fill so many seconds: levels -10 to +6 dB of the recordings' own, noise at -80 to -55 dB."""
        words: list[Word] = []
        at = pause(rng)
        while at < seconds * RATE_HZ:
            one = recordings[int(rng.integers(len(recordings)))]
            level = 10 ** (rng.uniform(-10, 6) / 20)
            words.append(
                Word(one.digit, at, at + len(one.pcm), np.float32(level) * one.pcm / np.float32(32768))
            )
            at += len(one.pcm) + pause(rng)
        return cls(words, float(10 ** (rng.uniform(-80, -55) / 20)))

    def between(self, start: int, stop: int, rng: np.random.Generator) -> NDArray[np.int16]:
        """Return the sound from one sample to another."""
        sound = rng.standard_normal(stop - start, dtype=np.float32) * np.float32(self.noise)
        for word in self.words:
            if word.start < stop and word.stop > start:
                first, last = max(start, word.start), min(stop, word.stop)
                sound[first - start : last - start] += word.sound[first - word.start : last - word.start]
        pcm: NDArray[np.int16] = (np.clip(sound, -1, 32767 / 32768) * 32768).round().astype(np.int16)
        return pcm


def edit_distance(expected: Sequence[int], got: Sequence[int]) -> int:
    """Return how many digits must be put in, taken out or changed (Levenshtein 1966)."""
    row = list(range(len(got) + 1))
    for i, want in enumerate(expected, start=1):
        before, row = row, [i]
        for j, have in enumerate(got, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (want != have)))
    return row[-1]
