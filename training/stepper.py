"""Feeds an exported model the way the server does: residue, lengths, padding and states.

It is the reference for golden files, for checks and for the evaluation of streams; it needs
onnxruntime and numpy, not torch. It covers what the models of this repository use: one input, and
states that begin as zeros.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from tenuto.serving.manifest import METADATA_KEY, Manifest

from .candidate import AnyArray, Tensors


class NotOurs(ValueError):
    """A file that is no model of this package; the text says why."""


def load(model: bytes | Path, threads: int = 1) -> tuple[onnxruntime.InferenceSession, Manifest]:
    """Return a CPU session of `threads` threads, and the manifest inside the file.

    Raises OSError for a file that cannot be read and NotOurs for one without a manifest.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    where = "the model" if isinstance(model, bytes) else str(model)
    content = model if isinstance(model, bytes) else model.read_bytes()
    try:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map[METADATA_KEY]
        return session, Manifest.parse(text, where)
    except KeyError as error:
        raise NotOurs(f"{where} has no {METADATA_KEY} in its metadata") from error
    except Exception as error:  # ONNX Runtime's errors have no other base in common
        raise NotOurs(f"{where}: {error}") from error


def initial(manifest: Manifest) -> Tensors:
    """Return the states of a sequence that has seen nothing, by input name, without batch axis."""
    return {state.input: np.zeros(state.slot_shape, state.dtype) for state in manifest.states}


def turn(
    session: onnxruntime.InferenceSession,
    manifest: Manifest,
    chunks: Sequence[AnyArray],
    states: Sequence[Tensors],
) -> list[tuple[Tensors, Tensors]]:
    """Run one batch; return each row's outputs and next states, without the batch axis.

    Chunks are [time, ...] of whole frames, of any lengths; shorter rows are padded with zeros.
    """
    entry = manifest.inputs[0]
    lengths = np.array([len(chunk) for chunk in chunks], np.int32)
    padded = np.zeros((len(chunks), lengths.max(), *chunks[0].shape[1:]), entry.dtype)
    for row, chunk in zip(padded, chunks, strict=True):
        row[: len(chunk)] = chunk
    feeds: Tensors = {entry.name: padded}
    if entry.lengths is not None:
        feeds[entry.lengths] = lengths
    for state in manifest.states:
        feeds[state.input] = np.stack([row[state.input] for row in states], state.batch_axis or 0)
    names = [o.name for o in manifest.outputs] + [s.output for s in manifest.states]
    results = dict(zip(names, session.run(names, feeds), strict=True))
    return [_row(manifest, results, row, int(n)) for row, n in enumerate(lengths)]


def _row(manifest: Manifest, results: Tensors, row: int, length: int) -> tuple[Tensors, Tensors]:
    outputs = {}
    for output in manifest.outputs:
        value = results[output.name].take(row, output.batch_axis or 0)
        outputs[output.name] = value[: length // output.stride] if output.time_axis else value
    after = {s.input: results[s.output].take(row, s.batch_axis or 0) for s in manifest.states}
    return outputs, after


class Stepper:
    """One sequence. Chunks may have any length; samples that fill no frame wait for the next."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
        self._session, self._manifest = session, manifest
        self._states = initial(manifest)
        entry = manifest.inputs[0]
        self._residue = np.zeros((0, *entry.sample_shape), entry.dtype)

    def step(self, chunk: AnyArray) -> Tensors:
        """Return the outputs, by name, of the frames that this chunk completed; {} for none."""
        entry = self._manifest.inputs[0]
        waiting = np.concatenate([self._residue, chunk.astype(entry.dtype, copy=False)])
        whole = len(waiting) // entry.multiple * entry.multiple
        self._residue = waiting[whole:]
        if not whole:
            return {}
        longest = self._manifest.frames_per_turn * entry.multiple
        parts: list[Tensors] = []
        for start in range(0, whole, longest):
            piece = waiting[start : min(start + longest, whole)]
            row = turn(self._session, self._manifest, [piece], [self._states])[0]
            parts.append(row[0])
            self._states = row[1]
        return _joined(self._manifest, parts)


def _joined(manifest: Manifest, parts: Sequence[Tensors]) -> Tensors:
    """Join the parts of one step along time; an output without time is the last part's."""
    return {
        output.name: np.concatenate([part[output.name] for part in parts])
        if output.time_axis
        else parts[-1][output.name]
        for output in manifest.outputs
    }


def replay_batch(
    session: onnxruntime.InferenceSession, manifest: Manifest, steps: Sequence[AnyArray]
) -> list[Tensors]:
    """Return each row's outputs after the last step. Steps are [row, time, ...]; rows begin anew together."""
    states = [initial(manifest) for _ in steps[0]]
    for step in steps:
        rows = turn(session, manifest, list(step), states)
        states = [after for _, after in rows]
    return [outputs for outputs, _ in rows]


def replay(
    session: onnxruntime.InferenceSession, manifest: Manifest, chunks: Sequence[AnyArray]
) -> list[Tensors]:
    """Return the outputs of each step: one new sequence, or one batch a step if stateless."""
    if manifest.stateful:
        stepper = Stepper(session, manifest)
        return [stepper.step(chunk) for chunk in chunks]
    names = [output.name for output in manifest.outputs]
    entry = manifest.inputs[0].name
    return [dict(zip(names, session.run(names, {entry: chunk}), strict=True)) for chunk in chunks]
