"""Magic wand: 1,000 digits that one person drew in the air with an orientation sensor (P. Warden).

Licence: Apache-2.0 (github.com/petewarden/magic_wand_digit_data). 100 strokes a digit, 32 to 145
points each, in steps of 1/128. There is no official split. Ours, of each digit's 100 strokes sorted by
the SHA-256 of "<digit>/<place in the file>": 30 to test, 10 to validate, 60 to train on. One person
made all of them, so no split says how well a model knows the hands of others.
"""

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import store

LICENCE = "Apache-2.0"
COMMIT = "8170591863f9addca27b1a963263f7c7bed33f41"
REPOSITORY = "https://raw.githubusercontent.com/petewarden/magic_wand_digit_data"
CHECKSUMS = {
    "petewarden_0.json": "446316ff5677b01d3e304aaf60d1c448b60185cfcb395328913bcb7a5b2af949",
    "petewarden_1.json": "6e929f6ea5e76091dd5cd01e80045a47215bfaed2c4d93bc22c8a22d7ec01387",
    "petewarden_2.json": "2e823f3f374dce27005ad594871679c3db8ab81c2ef4b3767889edaff6d4e866",
    "petewarden_3.json": "836a4fa621ec7bb60b26e48b91e58de25a7c2f9cb6f0be34da8f1215c5ee2dfa",
    "petewarden_4.json": "35d44f391307c9f24a7c464a9b839dc6b28eb484d84f25b459f6476d21d05c6f",
    "petewarden_5.json": "4f0ef98ce3d7d885ffbc014dde4845889ff2f67d5b7712b03d8e853e728afcd7",
    "petewarden_6.json": "a44d0a2685469fe5481ac6a69ab520fe8fa256227bc9becfd95d32b55f74f930",
    "petewarden_7.json": "5f2c7dd40ba568cddaaf384624be801944a6e1205a10eeba3e5e47e7fc080deb",
    "petewarden_8.json": "7ea7270543adf10d1af3624f09fe6e21d004e33e5598eca4b87ab84bd61f1d90",
    "petewarden_9.json": "b0e3dae6876c802c6aacaf2016b380a9f8b3c62966f23339e403a3b1b493e30d",
}
LABELS = tuple("0123456789")
TEST, VALIDATION = 30, 10  # strokes of each digit; the others are to train on

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class Stroke:
    """One digit in the air: `points` float32 [n, 2], x to the right and y up, about -0.5 to 0.5.

    `place` is its place in its file, 0 to 99 (the files' own `index` is not unique).
    """

    digit: int
    place: int
    points: NDArray[np.float32]


def strokes(split: Split) -> list[Stroke]:
    """Return one split, digit by digit: 600 strokes to train on, 100 to validate, 300 to test."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"magic wand: split must be 'train', 'validation' or 'test', got {split!r}")
    chosen: list[Stroke] = []
    for digit in range(10):
        ordered = sorted(_read(digit), key=_order)
        parts = {
            "test": ordered[:TEST],
            "validation": ordered[TEST : TEST + VALIDATION],
            "train": ordered[TEST + VALIDATION :],
        }
        chosen += parts[split]
    return chosen


def _order(stroke: Stroke) -> str:
    return store.sha256(f"{stroke.digit}/{stroke.place}".encode())


def _read(digit: int) -> list[Stroke]:
    name = f"petewarden_{digit}.json"
    urls = [f"{REPOSITORY}/{revision}/{name}" for revision in (COMMIT, "main")]
    path = store.locate("magic_wand", name, urls)
    content = path.read_bytes()
    store.check("magic_wand", store.sha256(content), CHECKSUMS[name], path)
    return [
        Stroke(digit, place, np.array([(p["x"], p["y"]) for p in stroke["strokePoints"]], np.float32))
        for place, stroke in enumerate(json.loads(content)["strokes"])
    ]
