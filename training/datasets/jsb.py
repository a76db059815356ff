"""JSB chorales: 382 of J. S. Bach's chorales as chords, one for each quarter note, 88 keys.

The music is in the public domain; the split and the grid of quarter notes are those of Boulanger-Lewandowski
2012. Licence: the repository that the file is from (github.com/czhuang/JSB-Chorales-dataset) states none.
"""

import json
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import store

LICENCE = "music in the public domain; the collection states none"
URL = "https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/master/jsb-chorales-quarter.json"
FILENAME = "jsb-chorales-quarter.json"
CHECKSUM = "2db9329f1881a1d3f49703ec556bf1d6f84b4f6c1d702c156536e93cf31e1c91"
KEYS = 88  # of a piano
LOWEST = 21  # the MIDI pitch of the first key, A0

Chorale = NDArray[np.uint8]  # [quarter notes, 88]: 1 where the key sounds


def chorales(split: Literal["train", "valid", "test"]) -> list[Chorale]:
    """Return one split in the file's order: 229 chorales to train on, 76 for validation, 77 to test."""
    path = store.locate("jsb", FILENAME, [URL])
    content = path.read_bytes()
    store.check("jsb", store.sha256(content), CHECKSUM, path)
    return [_roll(chords) for chords in json.loads(content)[split]]


def _roll(chords: list[list[int]]) -> Chorale:
    roll = np.zeros((len(chords), KEYS), np.uint8)
    for step, pitches in enumerate(chords):
        roll[step, np.array(pitches, np.int64) - LOWEST] = 1
    return roll
