"""Makes the tracks: random input, and what the models give to each sequence alone and whole."""

from pathlib import Path

import numpy as np

from . import model, tracks
from .scenario import Party

TRACKS, CHUNKS = 256, 16  # different sequences, and how many chunks of each are known
DENORMAL = 1e-40  # in every input, so that the LSTM's products are denormal as well


def file(party: Party) -> str:
    """The name of the file that holds what the party sends."""
    return f"{party.tracks}-{party.frames}.npz"


def record(party: Party, repository: model.Repository, folder: Path) -> None:
    """Writes the party's tracks into `folder`, unless they are there."""
    path = folder / file(party)
    if path.exists():
        return
    rng = np.random.default_rng(model.SEED)
    if party.tracks == "images":
        pictures = rng.random((TRACKS, CHUNKS, *model.IMAGE), np.float32)
        runner = model.session(repository.images)
        answers = np.stack([runner.run(None, {"image": batch})[0] for batch in pictures])
        tracks.save(path, model.IMAGES, pictures, answers, [[1] * CHUNKS] * TRACKS, stateless=True)
        return
    lengths = [[party.frames] * CHUNKS] * TRACKS
    if party.tracks == "ragged":  # 1 … frames each; every track has the same length
        halves = rng.integers(1, party.frames + 1, (TRACKS, CHUNKS // 2))
        lengths = np.hstack([halves, party.frames + 1 - halves]).tolist()
    inputs = rng.standard_normal((TRACKS, sum(lengths[0]), model.INPUTS), np.float32)
    if party.tracks == "denormal":
        # The baselines do not flush denormals, so their answers differ from ours by as little as that.
        tracks.save(path, model.NAME, np.full_like(inputs, DENORMAL), np.empty(0), lengths)
        return
    lstm = model.session(repository.lstm)
    answers = np.stack([model.alone(lstm, sequence) for sequence in inputs])
    tracks.save(path, model.NAME, inputs, answers, lengths)
