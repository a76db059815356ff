"""What one model says of itself: `tenuto.manifest` in its ONNX metadata, or `manifest.json` beside it.

Tensors are bound by name, never by order; unknown keys are refused; `check_graph` compares every statement
with the graph. docs/manifest.md is the reference for people.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ManifestInvalid
from .text import Characters, Cutter, Words

METADATA_KEY = "tenuto.manifest"
FORMAT = 1

Dtype = Literal[
    "float16", "float32", "float64", "bool",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
]  # fmt: skip
Encoding = Literal["png", "jpeg"]
Precision = Literal["float32", "tf32", "float16"]
# What a sequence's number takes of an integer: no sign.
_ID_BITS = {"int32": 31, "uint32": 32, "int64": 63, "uint64": 63}
Dim = int | str  # a fixed length, or the name of an axis that may vary
Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Multiple(_Frozen):
    """The model eats any positive multiple of that many samples along the time axis."""

    multiple: Annotated[int, Field(ge=1)]


class Exact(_Frozen):
    """The model eats exactly that many samples a run."""

    exact: Annotated[int, Field(ge=1)]


class WireDtype(_Frozen):
    """A dtype that clients may send instead of the graph's: value = wire * scale + offset."""

    dtype: Dtype
    scale: float = 1.0
    offset: float = 0.0


class WireEncoding(_Frozen):
    """Encoded images: decoded to the input's [height, width] or [height, width, 3], uint8, then sent through
    the manifest's own uint8 entry."""

    encoding: Encoding


class WireWords(_Frozen):
    """UTF-8 text, cut into words, each hashed to one of `buckets` ids: `text.Words` says how."""

    encoding: Literal["utf8"]
    tokens: Literal["words"]
    buckets: Annotated[int, Field(ge=1, le=2**31 - 1)]
    lower: bool = False

    @cached_property
    def cutter(self) -> Cutter:
        return Words(self.buckets, self.lower)


class WireCharacters(_Frozen):
    """UTF-8 text, each character its place in `alphabet`."""

    encoding: Literal["utf8"]
    tokens: Literal["characters"]
    alphabet: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> WireCharacters:
        twice = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if twice:
            raise ValueError(f"alphabet holds {', '.join(map(repr, twice))} more than once")
        return self

    @cached_property
    def cutter(self) -> Cutter:
        return Characters(self.alphabet)


class Value(_Frozen):
    """Every element starts at that value."""

    value: float


class _Tensor(_Frozen):
    name: Name
    dtype: Dtype
    shape: tuple[Dim, ...]
    batch_axis: int | None = 0

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    def _check_axis(self, axis: int | None, word: str) -> None:
        if axis is not None and not 0 <= axis < len(self.shape):
            raise ValueError(f"{self.name}: {word} {axis} is no axis of {list(self.shape)}")

    def _row_shape(self, time_axis: int | None) -> tuple[int, ...]:
        fixed = [d for a, d in enumerate(self.shape) if a not in (self.batch_axis, time_axis)]
        if not all(isinstance(d, int) and d > 0 for d in fixed):
            raise ValueError(
                f"{self.name}: every axis but batch and time needs a positive length, got {list(self.shape)}"
            )
        return tuple(int(d) for d in fixed)


class Input(_Tensor):
    """A tensor that clients send. Without `time_axis`, one chunk is one step of the model."""

    time_axis: int | None = None
    chunk: Multiple | Exact | Literal["free"] = "free"
    left_context: Annotated[int, Field(ge=0)] = 0
    left_context_value: float = 0.0
    lengths: Name | None = None  # the int32 input that takes each row's length in samples of this input
    range: tuple[int, int] | None = None  # inclusive; integer inputs
    finite: bool = True
    wire: tuple[WireDtype | WireEncoding | WireWords | WireCharacters, ...] = ()
    tail: Literal["drop", "pad"] = "drop"
    unit: str = ""
    rate_hz: Annotated[float, Field(gt=0)] | None = None  # samples a second along the time axis
    columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Input:
        self._check_axis(self.batch_axis, "batch_axis")
        self._check_axis(self.time_axis, "time_axis")
        if self.time_axis is not None and self.time_axis == self.batch_axis:
            raise ValueError(f"{self.name}: time_axis and batch_axis are both {self.time_axis}")
        if self.time_axis is None and (self.left_context or self.lengths or self.chunk != "free"):
            raise ValueError(f"{self.name}: chunk, lengths and left_context need a time_axis")
        if self.range is not None and self.numpy_dtype.kind not in "iu":
            raise ValueError(f"{self.name}: range is for integer inputs, this one is {self.dtype}")
        encoded = any(isinstance(w, WireEncoding) for w in self.wire)
        if encoded and not (self.dtype == "uint8" or "uint8" in self.wire_dtypes):
            raise ValueError(f"{self.name}: png and jpeg need a uint8 entry in wire, to say how pixels scale")
        if encoded and len(self._row_shape(self.time_axis)) not in (2, 3):
            raise ValueError(
                f"{self.name}: png and jpeg need [height, width] and perhaps colours in the shape"
            )
        self._row_shape(self.time_axis)
        self._check_text()
        return self

    def _check_text(self) -> None:
        texts = [w for w in self.wire if isinstance(w, WireWords | WireCharacters)]
        if not texts:
            return
        if len(texts) > 1:
            raise ValueError(f"{self.name}: wire has {len(texts)} entries of utf8, of which one can hold")
        if self.dtype != "int64" or self.time_axis is None or self.sample_shape:
            raise ValueError(
                f"{self.name}: utf8 needs int64 [batch, time] with a time_axis, one id a sample; this is "
                f"{self.dtype} {list(self.shape)}"
            )
        last = texts[0].cutter.count - 1
        if self.range is not None and not self.range[0] <= 0 <= last <= self.range[1]:
            raise ValueError(f"{self.name}: utf8 gives ids from 0 to {last}, range is {list(self.range)}")

    @cached_property
    def text(self) -> Cutter | None:
        """How text that clients send becomes ids; None: they send none."""
        cutters = [w.cutter for w in self.wire if isinstance(w, WireWords | WireCharacters)]
        return cutters[0] if cutters else None

    @cached_property
    def multiple(self) -> int:
        """Samples along the time axis that make one frame; 1 for inputs without a time axis."""
        if isinstance(self.chunk, Multiple):
            return self.chunk.multiple
        return self.chunk.exact if isinstance(self.chunk, Exact) else 1

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """One sample along the time axis, without the batch axis."""
        return self._row_shape(self.time_axis)

    @cached_property
    def sample_bytes(self) -> int:
        return math.prod(self.sample_shape) * self.numpy_dtype.itemsize

    @cached_property
    def wire_dtypes(self) -> dict[str, WireDtype]:
        return {w.dtype: w for w in self.wire if isinstance(w, WireDtype)}

    @cached_property
    def wire_encodings(self) -> frozenset[str]:
        return frozenset(w.encoding for w in self.wire if isinstance(w, WireEncoding))


class Constant(_Frozen):
    """A graph input that the server feeds; `allowed` lists what a client may choose at Open."""

    name: Name
    dtype: Dtype
    value: float | tuple[float, ...]
    shape: tuple[int, ...] = ()
    allowed: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Constant:
        if isinstance(self.value, tuple) and len(self.value) != math.prod(self.shape):
            raise ValueError(
                f"{self.name}: value holds {len(self.value)} numbers, the shape {math.prod(self.shape)}"
            )
        return self


class State(_Frozen):
    """One (input, output) pair that the server carries from run to run. `batch_axis` null: batch 1 graphs."""

    input: Name
    output: Name
    dtype: Dtype
    shape: tuple[Dim, ...]
    batch_axis: int | None = 0
    init: Literal["zeros", "given"] | Value | tuple[float, ...] = "zeros"  # "given": by the client, at Open
    finite: bool = True

    @model_validator(mode="after")
    def _check(self) -> State:
        if self.batch_axis is not None and not 0 <= self.batch_axis < len(self.shape):
            raise ValueError(f"{self.input}: batch_axis {self.batch_axis} is no axis of {list(self.shape)}")
        if not all(isinstance(d, int) and d > 0 for d in self._fixed):
            raise ValueError(
                f"{self.input}: every axis but batch needs a positive length, got {list(self.shape)}"
            )
        if isinstance(self.init, tuple) and len(self.init) != math.prod(self.slot_shape):
            raise ValueError(
                f"{self.input}: init holds {len(self.init)} values, one slot {math.prod(self.slot_shape)}"
            )
        return self

    @property
    def _fixed(self) -> list[Dim]:
        return [d for a, d in enumerate(self.shape) if a != self.batch_axis]

    @cached_property
    def slot_shape(self) -> tuple[int, ...]:
        """One sequence's part, without the batch axis."""
        return tuple(int(d) for d in self._fixed)

    @cached_property
    def slot_bytes(self) -> int:
        return math.prod(self.slot_shape) * np.dtype(self.dtype).itemsize


class Control(_Frozen):
    """A graph input that tells the model where each row's sequence stands, for models that reset themselves.

    `start` is yes in a sequence's first run, `end` in that of its last samples if its client said that they
    are the last ones (`Chunk.last`, or what is padded at End), `ready` for every row that is no padding;
    `values` are what stands for no and yes. `sequence_id` is a number that a sequence keeps, on other servers
    too: 63 bits, or as many as the dtype holds without a sign.
    """

    name: Name
    kind: Literal["start", "end", "ready", "sequence_id"]
    dtype: Dtype
    shape: tuple[Dim, ...] = ("batch",)
    batch_axis: int | None = 0
    values: tuple[float, float] = (0.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> Control:
        others = [d for a, d in enumerate(self.shape) if a != self.batch_axis]
        if self.batch_axis is not None and not 0 <= self.batch_axis < len(self.shape):
            raise ValueError(f"{self.name}: batch_axis {self.batch_axis} is no axis of {list(self.shape)}")
        if any(d != 1 for d in others):
            raise ValueError(
                f"{self.name}: a control is one number a row, so every axis but batch has length 1, got "
                f"{list(self.shape)}"
            )
        if self.kind == "sequence_id" and self.dtype not in _ID_BITS:
            raise ValueError(
                f"{self.name}: a sequence_id is one of {', '.join(_ID_BITS)}, this one is {self.dtype}"
            )
        return self

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def id_bits(self) -> int:
        """Of a sequence_id."""
        return _ID_BITS[self.dtype]


class Output(_Tensor):
    """A tensor that clients receive. Without `time_axis`, its value after the last frame of a chunk."""

    time_axis: int | None = None
    stride: Annotated[int, Field(ge=1)] = 1  # samples of the first timed input that make one output frame
    lengths_output: Name | None = None
    labels: tuple[str, ...] = ()
    activation: Literal["", "softmax", "log_softmax", "sigmoid"] = ""
    top_k: Annotated[int, Field(ge=0)] = 0
    unit: str = ""
    columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Output:
        self._check_axis(self.batch_axis, "batch_axis")
        self._check_axis(self.time_axis, "time_axis")
        self._row_shape(self.time_axis)
        return self

    @cached_property
    def frame_shape(self) -> tuple[int, ...]:
        return self._row_shape(self.time_axis)

    @cached_property
    def frame_bytes(self) -> int:
        return math.prod(self.frame_shape) * self.numpy_dtype.itemsize


# Beyond these all choices are alike, or one is certain; and none is denormal: an engine's thread takes such
# numbers for zero.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 1e6
# Those that an output cannot have from which is sampled in that way.
_OTHER_ACTIVATIONS = {"categorical": ("sigmoid",), "bernoulli": ("softmax", "log_softmax")}


class Generate(_Frozen):
    """Which output feeds which input, and how it is sampled.

    categorical: the output's last axis holds one number a choice, and the index of the choice that is drawn
    is fed back. bernoulli: each number is drawn by itself, and the ones and zeros are fed back. What the
    numbers are, the output's `activation` says: log_softmax, softmax, sigmoid, or "" for logits.
    `temperature` divides the logits (or log probabilities); `top_k` keeps the k largest, 0: all. Clients may
    choose others at Open.
    """

    output: Name
    input: Name
    sampling: Literal["categorical", "bernoulli"]
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE, le=MOST_TEMPERATURE)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class GraphTensor:
    """One input or output as the graph declares it. An unknown axis is None or a name."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Manifest(_Frozen):
    """The whole of it. `name` is the model's folder; the version is the folder below."""

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
    description: str = ""
    licence: str = ""
    inputs: Annotated[tuple[Input, ...], Field(min_length=1)]
    constants: tuple[Constant, ...] = ()
    states: tuple[State, ...] = ()
    controls: tuple[Control, ...] = ()
    outputs: Annotated[tuple[Output, ...], Field(min_length=1)]
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    max_frames: Annotated[int, Field(ge=1, le=65536)] = 32
    fixed_batch: Annotated[int, Field(ge=1)] | None = None
    precision: Precision = "float32"
    generate: Generate | None = None
    resumes_from: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Manifest:
        """Reads JSON. `where` names the file in the error.

        Raises: ManifestInvalid, with every fault on a line of its own.
        """
        try:
            return cls.model_validate(json.loads(text))
        except ValidationError as error:
            faults = "\n".join(
                f"  {'.'.join(str(p) for p in e['loc']) or 'manifest'}: {_told(e)}" for e in error.errors()
            )
            raise ManifestInvalid(f"{where}: the manifest is not valid:\n{faults}") from error
        except ValueError as error:
            raise ManifestInvalid(f"{where}: the manifest is no JSON: {error}") from error

    def to_json(self) -> str:
        """The same text for the same manifest, defaults left out."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True) | {"format": FORMAT}, indent=1)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        names = [i.name for i in self.inputs] + [s.input for s in self.states]
        names += [c.name for c in self.constants] + [c.name for c in self.controls]
        names += [i.lengths for i in self.inputs if i.lengths]
        outputs = [o.name for o in self.outputs] + [s.output for s in self.states]
        for kind, group in (("inputs", names), ("outputs", outputs)):
            twice = sorted({n for n in group if group.count(n) > 1})
            if twice:
                raise ValueError(f"{kind} named twice: {', '.join(twice)}")
        axes = [i.batch_axis for i in self.inputs] + [s.batch_axis for s in self.states]
        axes += [c.batch_axis for c in self.controls]
        if len({axis is None for axis in axes}) > 1 and self.fixed_batch != 1:
            raise ValueError("batch_axis must be null everywhere, or nowhere, unless fixed_batch is 1")
        if any(o.time_axis is not None for o in self.outputs) and not self.timed:
            raise ValueError("an output has a time_axis, but no input has one")
        if self.timed and len(self.timed) != len(self.inputs):
            untimed = ", ".join(i.name for i in self.inputs if i.time_axis is None)
            raise ValueError(
                f"{untimed}: with a timed input, every input needs a time_axis (or is a constant)"
            )
        for o in self.outputs:
            if o.lengths_output and o.time_axis is None:
                raise ValueError(f"{o.name}: lengths_output needs a time_axis, along which it counts")
            if o.time_axis is not None and not o.lengths_output and self.timed[0].multiple % o.stride:
                raise ValueError(
                    f"{o.name}: stride {o.stride} does not divide the {self.timed[0].multiple} samples "
                    f"that {self.timed[0].name} takes at once"
                )
        if self.timed and not self.stateful:
            raise ValueError("a time_axis needs states (or a left_context): else the axis is part of the row")
        if len(self.inputs) > 1 and any(i.text for i in self.inputs):
            raise ValueError("utf8 is for a model of one input: a text gives as many ids as it gives")
        if self.generate:
            self._check_generate(self.generate)
        return self

    def _check_generate(self, generate: Generate) -> None:
        """Whether what is sampled from the output is a sample of the input.

        Raises: ValueError.
        """
        output = next((o for o in self.outputs if o.name == generate.output), None)
        if output is None or [i.name for i in self.inputs] != [generate.input] or not self.stateful:
            raise ValueError(
                f"generate feeds output {generate.output!r} to input {generate.input!r}: it needs a stateful "
                "model with that output, and that input alone"
            )
        fed = self.inputs[0]
        if fed.multiple != 1 or (fed.time_axis is None) != (output.time_axis is None):
            raise ValueError(
                "generate: one sample in must give one frame out, so chunk is free, multiple 1 or exact 1, "
                "and both have a time_axis or neither"
            )
        frame, sample = list(output.frame_shape), list(fed.sample_shape)
        if output.numpy_dtype.kind != "f" or len(frame) != 1:
            raise ValueError(
                f"generate samples from float numbers, one axis a frame; {output.name} is {output.dtype} "
                f"with {frame} a frame"
            )
        if generate.sampling == "categorical":
            if fed.numpy_dtype.kind not in "iu" or sample:
                raise ValueError(
                    f"generate, categorical: the input takes one index a sample; {fed.name} is {fed.dtype} "
                    f"with {sample} a sample"
                )
            low, high = fed.range or (0, np.iinfo(fed.numpy_dtype).max)
            if not low <= 0 <= frame[0] - 1 <= high:
                raise ValueError(f"generate: indices go from 0 to {frame[0] - 1}, range is {[low, high]}")
        elif frame != sample or fed.numpy_dtype.kind not in "fiub":
            raise ValueError(
                f"generate, bernoulli: {output.name} has {frame} a frame, {fed.name} {sample} a sample; they "
                "must be the same"
            )
        if output.activation in _OTHER_ACTIVATIONS[generate.sampling]:
            raise ValueError(
                f"generate, {generate.sampling}: {output.name}'s activation is {output.activation}"
            )
        if generate.top_k > (frame[0] if generate.sampling == "categorical" else 0):
            raise ValueError(
                f"generate: top_k is {generate.top_k}; of a categorical output it is at most {frame[0]}, "
                "of a bernoulli one 0"
            )

    @cached_property
    def stateful(self) -> bool:
        """Whether sequences hold a slot: explicit states, left context, or the model's own controls."""
        return bool(self.states or self.controls or any(i.left_context for i in self.inputs))

    @cached_property
    def alone(self) -> bool:
        """Whether the graph has no batch axis, so that rows are run one by one."""
        return self.inputs[0].batch_axis is None

    @cached_property
    def fetched(self) -> tuple[str, ...]:
        """What a run gives before the states: the outputs, and the numbers of frames in them."""
        lengths = [o.lengths_output for o in self.outputs if o.lengths_output]
        return tuple(dict.fromkeys([*(o.name for o in self.outputs), *lengths]))

    @cached_property
    def given(self) -> tuple[State, ...]:
        """The states whose first values a client gives at Open."""
        return tuple(s for s in self.states if s.init == "given")

    @cached_property
    def timed(self) -> tuple[Input, ...]:
        return tuple(i for i in self.inputs if i.time_axis is not None)

    @cached_property
    def ragged(self) -> bool:
        """Whether rows of different lengths may share a batch."""
        return bool(self.timed) and all(i.lengths for i in self.timed)

    @cached_property
    def frames_per_turn(self) -> int:
        """Frames that one sequence may bring into one batch."""
        if not self.timed or any(isinstance(i.chunk, Exact) for i in self.timed):
            return 1
        return self.max_frames

    @cached_property
    def rows_per_batch(self) -> int:
        if self.alone:
            return 1
        return min(self.max_batch, self.fixed_batch or self.max_batch)

    @cached_property
    def slot_bytes(self) -> int:
        """State of one sequence in the pool, in bytes."""
        return sum(s.slot_bytes for s in self.states)

    def check_graph(self, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor], where: str) -> None:
        """Compares every statement with the graph. What comes out has the shapes that a run gives it: those
        that exporters declare are unknown or wrong in many files.

        Raises: ManifestInvalid, with every disagreement on a line of its own.
        """
        have_in, have_out = {t.name: t for t in inputs}, {t.name: t for t in outputs}
        faults: list[str] = []
        for i in self.inputs:
            _compare(faults, "input", have_in, i.name, i.dtype, i.shape)
            if i.lengths:
                rows = 1 if i.batch_axis is None else i.shape[i.batch_axis]
                _compare(faults, "input", have_in, i.lengths, "int32", (rows,))
        for s in self.states:
            _compare(faults, "state input", have_in, s.input, s.dtype, s.shape)
            _compare(faults, "state output", have_out, s.output, s.dtype, None)
        for c in self.constants:
            _compare(faults, "constant", have_in, c.name, c.dtype, c.shape)
        for k in self.controls:
            _compare(faults, "control", have_in, k.name, k.dtype, k.shape)
        for o in self.outputs:
            _compare(faults, "output", have_out, o.name, o.dtype, None)
            lengths = have_out.get(o.lengths_output or "")
            if o.lengths_output and (lengths is None or lengths.dtype not in ("int32", "int64")):
                got = f"is {lengths.dtype}" if lengths else "is not in the graph"
                faults.append(f"lengths_output {o.lengths_output!r} {got}; it is int32 or int64, a row each")
        faults += [f"the graph's input {n!r} is not in the manifest" for n in have_in if n not in self._fed]
        if faults:
            lines = "\n  ".join(faults)
            raise ManifestInvalid(f"{where}: the manifest disagrees with the graph:\n  {lines}")

    @cached_property
    def _fed(self) -> frozenset[str]:
        names = {i.name for i in self.inputs} | {i.lengths for i in self.inputs if i.lengths}
        names |= {s.input for s in self.states} | {c.name for c in self.constants}
        return frozenset(names | {k.name for k in self.controls})


def initial(state: State) -> np.ndarray[Any, np.dtype[Any]]:
    """What a slot of it begins with, unless a client says so."""
    if isinstance(state.init, tuple):
        return np.array(state.init, state.dtype).reshape(state.slot_shape)
    value = state.init.value if isinstance(state.init, Value) else 0
    return np.full(state.slot_shape, value, state.dtype)


# What may stand in the manifest's own parts.
_PARTS: dict[str, tuple[type[_Frozen], ...]] = {
    "inputs": (Input, Multiple, Exact, WireDtype, WireEncoding, WireWords, WireCharacters),
    "outputs": (Output,), "states": (State, Value), "constants": (Constant,), "controls": (Control,),
    "generate": (Generate,),
}  # fmt: skip


def _told(fault: Any) -> str:
    """One of pydantic's faults. Of a key that is unknown, the nearest known one."""
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"])
    where, key = fault["loc"][:-1], str(fault["loc"][-1])
    models = _PARTS.get(str(where[0]), (Manifest,)) if where else (Manifest,)
    known = [name for model in models for name in model.model_fields]
    near = difflib.get_close_matches(key, known, 1)
    return f"no such key; did you mean {near[0]!r}?" if near else f"no such key; there are {', '.join(known)}"


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


def _compare(
    faults: list[str],
    kind: str,
    graph: Mapping[str, GraphTensor],
    name: str,
    dtype: str,
    shape: tuple[Dim, ...] | None,
) -> None:
    """Appends a line for each way in which `name` differs from the graph's tensor of that name."""
    tensor = graph.get(name)
    if tensor is None:
        faults.append(f"{kind} {name!r} is not in the graph, which has {', '.join(sorted(graph)) or 'none'}")
        return
    if tensor.dtype != dtype:
        faults.append(f"{kind} {name!r} is {tensor.dtype} in the graph, {dtype} in the manifest")
    if shape is None or (not tensor.shape and shape):  # some exporters leave shapes out
        return
    same_rank = len(tensor.shape) == len(shape)
    # A fixed axis in the graph must be the same in the manifest; a named one may be anything.
    agree = same_rank and all(
        not isinstance(g, int) or g == m for g, m in zip(tensor.shape, shape, strict=True)
    )
    if not agree:
        faults.append(f"{kind} {name!r} is {list(tensor.shape)} in the graph, {list(shape)} in the manifest")
