"""Chords as a MIDI file, written by mido (extra: midi)."""

from pathlib import Path

import numpy as np

from .tensor import Array

LOWEST_PITCH = 21  # A0, a piano's first key
KEYS = 88
_TICKS_PER_BEAT = 480
_VELOCITY = 80


def write(path: str | Path, steps: Array, beats_per_minute: float) -> None:
    """Write `steps`, [steps, 88] of 0 and 1, one quarter note each, as one track.

    A key that is 1 in steps one behind the other is held: one long note, not several. Raises ImportError
    without mido, OSError.
    """
    import mido

    if steps.ndim != 2 or steps.shape[1] != KEYS:
        raise ValueError(f"steps are {list(steps.shape)}, expected [steps, {KEYS}]")
    track = mido.MidiTrack()
    track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(beats_per_minute)))
    silence = np.zeros((1, KEYS), np.int8)
    changes = np.diff(np.concatenate([silence, steps.astype(bool), silence]).astype(np.int8), axis=0)
    pause = 0
    for change in changes:
        for sign, kind in ((-1, "note_off"), (1, "note_on")):
            for key in np.flatnonzero(change == sign):
                pitch = LOWEST_PITCH + int(key)
                track.append(mido.Message(kind, note=pitch, velocity=_VELOCITY, time=pause))
                pause = 0
        pause += _TICKS_PER_BEAT
    track.append(mido.MetaMessage("end_of_track", time=pause - _TICKS_PER_BEAT))
    file = mido.MidiFile(type=0, ticks_per_beat=_TICKS_PER_BEAT, tracks=[track])
    file.save(path)
