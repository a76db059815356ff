"""What must hold before a model is written: ONNX is torch, and no batch or chunking changes a bit."""

import hashlib
from collections.abc import Sequence

import numpy as np
import onnxruntime

from tenuto.serving.manifest import Manifest
from tenuto.serving.precision import halved

from .candidate import AnyArray, Candidate, Tensors
from .progress import progress
from .stepper import initial, load, replay, turn

ROWS = (1, 2, 6)  # sequences beside each other in one trial; the model's max_batch is tried too


class CheckFailed(RuntimeError):
    """A model that must not be written; the text says which check, and by how much."""


def parity(candidate: Candidate, session: onnxruntime.InferenceSession) -> float:
    """Return the largest difference between torch and ONNX over all steps and outputs.

    Raises CheckFailed if it is above the candidate's tolerance.
    """
    manifest = candidate.manifest
    chunks: Sequence[AnyArray] = candidate.golden
    if manifest.stateful:
        chunks = _split(np.concatenate(chunks), manifest.inputs[0].multiple, [1, 2, 5, 1, 7])
    expected = candidate.reference(chunks)
    got = replay(session, manifest, chunks)
    worst = max(_difference(a, b) for a, b in zip(expected, got, strict=True))
    if not worst <= candidate.tolerance:
        raise CheckFailed(
            f"{manifest.name}: ONNX differs from torch by {worst:g}, "
            f"more than {candidate.tolerance:g}; nothing was written"
        )
    return worst


def half(model: bytes, golden: Sequence[AnyArray]) -> float:
    """Return the largest difference between the model with `precision` float16 and as it is, golden steps.

    On the CPU: factors and results are rounded to 11 bits as on a GPU, and added up in float32. Infinite if
    one of the two overflows.
    """
    exact, got = (replay(*load(content), golden) for content in (model, halved(model, "the model")))
    return max(_difference(a, b) for a, b in zip(exact, got, strict=True))


def _split(whole: AnyArray, multiple: int, frames: Sequence[int]) -> list[AnyArray]:
    """Cut into chunks of `frames` frames, repeated; what fills no frame is left out."""
    chunks: list[AnyArray] = []
    stop, start = len(whole) // multiple * multiple, 0
    while start < stop:
        size = frames[len(chunks) % len(frames)] * multiple
        chunks.append(whole[start : min(start + size, stop)])
        start += size
    return chunks


def invariance(
    session: onnxruntime.InferenceSession, manifest: Manifest, source: AnyArray, trials: int
) -> float:
    """Return the largest difference that batching and chunking make, which must be 0.

    Each trial cuts rows out of `source` (time or rows first), runs them in random batches, chunks
    and padding, and compares outputs and states with each row alone and whole. Raises CheckFailed.
    """
    worst = 0.0
    with progress(f"{manifest.name}: chunk invariance", trials) as bar:
        for trial in range(trials):
            rng = np.random.default_rng(trial)
            one = _stream_trial if manifest.stateful else _batch_trial
            worst = max(worst, one(session, manifest, source, rng))
            bar.update()
    if worst != 0.0:
        raise CheckFailed(
            f"{manifest.name}: the same row differs by {worst:g} between batches or chunkings; "
            "nothing was written"
        )
    return worst


def _batch_trial(
    session: onnxruntime.InferenceSession,
    manifest: Manifest,
    source: AnyArray,
    rng: np.random.Generator,
) -> float:
    batch = source[rng.integers(len(source), size=rng.integers(2, 2 * manifest.max_batch))]
    together = replay(session, manifest, [batch])[0]
    row = rng.integers(len(batch))
    alone = replay(session, manifest, [batch[row : row + 1]])[0]
    return _difference(alone, {name: value[row : row + 1] for name, value in together.items()})


def _stream_trial(
    session: onnxruntime.InferenceSession,
    manifest: Manifest,
    source: AnyArray,
    rng: np.random.Generator,
) -> float:
    multiple, most = manifest.inputs[0].multiple, manifest.max_frames
    rows = []
    for frames in rng.integers(1, 3 * most, size=rng.choice([*ROWS, manifest.max_batch])):
        start = rng.integers(len(source) - frames * multiple)
        rows.append(source[start : start + frames * multiple])
    at = [0] * len(rows)
    states = [initial(manifest) for _ in rows]
    outputs: list[list[Tensors]] = [[] for _ in rows]
    while live := [i for i, row in enumerate(rows) if at[i] < len(row)]:
        chosen = [i for i in live if rng.random() < 0.7] or live[:1]
        longest = int(rng.choice([1, 2, 5, most]))
        chunks = [rows[i][at[i] :][: multiple * rng.integers(1, longest + 1)] for i in chosen]
        results = turn(session, manifest, chunks, [states[i] for i in chosen])
        for i, chunk, (output, after) in zip(chosen, chunks, results, strict=True):
            at[i] += len(chunk)
            states[i] = after
            outputs[i].append(output)
    worst = 0.0
    for row, parts, state in zip(rows, outputs, states, strict=True):
        whole, after = turn(session, manifest, [row], [initial(manifest)])[0]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
        worst = max(worst, _difference(whole, joined), _difference(after, state))
    return worst


def _difference(a: Tensors, b: Tensors) -> float:
    """Return the largest absolute difference; infinite where names, shapes or finiteness differ."""
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return float("inf")
    # Through float64: differences of float32 would themselves be rounded.
    gaps = [np.abs(a[n].astype(np.float64) - b[n].astype(np.float64)).max(initial=0) for n in a]
    return float(np.nan_to_num(max(gaps, default=0.0), nan=np.inf))


def fingerprint(model: bytes) -> str:
    """Return the SHA-256 of an ONNX file's bytes."""
    return hashlib.sha256(model).hexdigest()
