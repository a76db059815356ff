"""What the server answers: predictions, outputs of a stream, models, live sequences."""

from dataclasses import dataclass, field
from typing import Any

from .tensor import Array


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a step took, as the server saw it."""

    queue_us: int  # from accepted to the start of its (last) batch, in microseconds
    compute_us: int  # inside the model, summed over its batches, in microseconds
    batch_size: int  # rows in its (last) batch, those of other callers included


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The answer of a stateless model to one batch.

    `outputs`: name -> array [batch, …]; `prediction["name"]` is `prediction.outputs["name"]`.
    `version` is the model version that answered.
    """

    outputs: dict[str, Array]
    version: int
    timing: Timing

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """The answer of a stateful model to one chunk.

    `outputs`: name -> array without the batch axis. Outputs with a time axis hold the frames that
    the chunk completed, those without one their value after the last of these; it is empty if the
    chunk completed no frame. `step` is the chunk's number, from 1; `part` counts up where one step
    has several outputs, and `last` marks the last of them. `latency_seconds` is from the call of
    `send` (waiting for the window included) to the arrival here. A part that was generated holds the
    sample that the model was fed, under the name of its input.
    """

    step: int
    part: int
    last: bool
    outputs: dict[str, Array]
    timing: Timing
    latency_seconds: float

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a model, as the server knows it.

    `state` is "READY", "RETIRING" (replaced, and still with sequences), "LOADING", "UNLOADED" (by an
    operator) or "FAILED", and then `why` says so. `sequences` of `slots` are live. `sha256` is of
    model.onnx, `fingerprint` of it and manifest.json: what a newer version's `resumes_from` names.
    `state_bytes` is what the states of all slots take once each was used, `state_bytes_used` those of the
    live sequences; `file_bytes` is the graph with its external data, which take more once they are loaded.
    `manifest` is the model's own description (docs/manifest.md); empty in a listing.
    """

    name: str
    version: int
    state: str
    why: str
    stateful: bool
    provider: str
    sha256: str
    description: str
    sequences: int
    slots: int
    manifest: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    state_bytes: int = 0
    state_bytes_used: int = 0
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Loaded:
    """What serves after `Client.load` or `Client.reload`.

    `changed` is False where it served before. `sequences` ended because their version's files were
    exchanged.
    """

    model: Model
    changed: bool
    sequences: int = 0


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What `Client.unload` took away: the versions that were loaded, and how many sequences ended by it."""

    versions: tuple[int, ...]
    sequences: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """One live sequence, as operators see it.

    `last_step` is the last step that was answered; `age_seconds` counts from its opening,
    `idle_seconds` from when its client was last heard.
    """

    id: str
    model: str
    version: int
    label: str
    last_step: int
    age_seconds: float
    idle_seconds: float
