"""Which versions of a model can go on with each other's sequences."""

from __future__ import annotations

import hashlib
import json

from .manifest import Manifest


def state_schema(manifest: Manifest) -> str:
    """A hash of what one sequence's snapshot holds: two versions of a model of which it is the same can read
    each other's. Names of axes, first values and all that concerns outputs are left out."""
    states = [[s.input, s.dtype, list(s.slot_shape), s.batch_axis] for s in manifest.states]
    inputs = [
        [i.name, i.dtype, list(i.sample_shape), i.time_axis is None, i.multiple, i.left_context]
        + ([repr(i.text)] if i.text else [])  # a part of a word waits there
        for i in manifest.inputs
    ]
    return hashlib.sha256(json.dumps([states, inputs]).encode()).hexdigest()
