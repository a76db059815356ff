"""A recording to be streamed: sound from a WAV file, sensors from a CSV file."""

import csv
import wave
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import invalid
from .tensor import Array


@dataclass(frozen=True, eq=False)
class Recording:
    """`values` is int16 or float32 [samples] (sound) or float32 [rows, columns] (sensors)."""

    path: str
    values: Array
    rate_hz: float | None  # samples or rows a second; None: not known
    columns: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """How long it lasts; None if the rate is not known."""
        return len(self.values) / self.rate_hz if self.rate_hz else None

    def chunks(self, samples: int) -> Iterator[Array]:
        """Yield it in order, `samples` at a time; the last chunk may be shorter."""
        for start in range(0, len(self.values), samples):
            yield self.values[start : start + samples]

    def suited(self, entry: Mapping[str, Any]) -> "Recording":
        """Return this recording as the manifest's input `entry` wants it; raises InvalidInput."""
        rate = entry.get("rate_hz")
        if rate and self.rate_hz and rate != self.rate_hz:
            raise invalid(
                f"{self.path} has {self.rate_hz:g} Hz, the model's input {entry['name']!r} takes "
                f"{rate:g} Hz; resample the file",
                "WRONG_INPUT",
            )
        values = _columns(self, entry) if self.columns else _samples(self.values, entry)
        shape = [axis for axis in range(len(entry["shape"])) if axis != entry.get("batch_axis", 0)]
        if entry.get("time_axis") is None or entry["time_axis"] != shape[0]:
            raise invalid(
                f"the model's input {entry['name']!r} has no time axis to stream along; use tenuto predict",
                "NOT_SUPPORTED",
            )
        if len(shape) != values.ndim:
            raise invalid(
                f"{self.path} gives {values.ndim} axes, the model's input {entry['name']!r} takes "
                f"{entry['shape']}",
                "WRONG_SHAPE",
            )
        return Recording(self.path, values, self.rate_hz or rate, self.columns)


def read(path: str) -> Recording:
    """Return a .wav or .csv file; raises InvalidInput, OSError."""
    kind = Path(path).suffix.lower()
    if kind == ".wav":
        return _read_wav(path)
    if kind == ".csv":
        return _read_csv(path)
    raise invalid(f"{path}: expected a file named .wav or .csv", "WRONG_INPUT")


def _read_wav(path: str) -> Recording:
    try:
        with wave.open(path) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise invalid(f"{path} is no PCM WAV file: {error}", "WRONG_ENCODING") from error
    if (channels, width) != (1, 2):
        raise invalid(
            f"{path} has {channels} channels of {8 * width} bits; expected 1 of 16 bits; convert it",
            "WRONG_ENCODING",
        )
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.int16)
    return Recording(path, samples, float(rate))


def _read_csv(path: str) -> Recording:
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            header, *rows = [row for row in csv.reader(file) if row]
        except (ValueError, csv.Error) as error:  # no line at all, no UTF-8, or no CSV
            raise invalid(f"{path} is no CSV file with a header row", "WRONG_ENCODING") from error
    # A first column that holds no number is a date or a name.
    first = 1 if rows and not _is_number(rows[0][0]) else 0
    values = np.empty((len(rows), len(header) - first), np.float32)
    for index, row in enumerate(rows):
        try:
            values[index] = row[first:]
        except ValueError as error:
            raise invalid(
                f"{path}: row {index + 1} after the header has {len(row)} cells; expected "
                f"{len(header)}, with a number in each from column {header[first]!r} on: {error}",
                "WRONG_ENCODING",
            ) from error
    return Recording(path, values, None, tuple(name.strip() for name in header[first:]))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _columns(recording: Recording, entry: Mapping[str, Any]) -> Array:
    """Return the columns that the manifest names, in its order; all of them if it names none."""
    wanted = entry.get("columns", ())
    missing = [name for name in wanted if name not in recording.columns]
    if missing:
        raise invalid(
            f"{recording.path} has no column {', '.join(missing)}; the model's input "
            f"{entry['name']!r} takes {', '.join(wanted)}, the file has "
            f"{', '.join(recording.columns)}",
            "WRONG_INPUT",
        )
    if not wanted:
        return recording.values
    return recording.values[:, [recording.columns.index(name) for name in wanted]]


def _samples(pcm: Array, entry: Mapping[str, Any]) -> Array:
    """Return int16 sound as the input takes it: as it is, or float32 from -1 to 1."""
    accepted = {entry["dtype"], *(wire.get("dtype") for wire in entry.get("wire", ()))}
    return pcm if "int16" in accepted else (pcm / 32768).astype(np.float32)
