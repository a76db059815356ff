"""The whole of what a model says of itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from tenuto.serving.errors import ManifestInvalid

from .constant import Constant
from .control import Control
from .fault import told
from .generate import Generate
from .graph import GraphTensor, differences
from .part import Part
from .state import State
from .tensors import Exact, Input, Output

METADATA_KEY = "tenuto.manifest"
FORMAT = 1

Precision = Literal["float32", "tf32", "float16"]


class Manifest(Part):
    """A model with states, controls or a left context is stateful and is served on `Stream`. One without is
    stateless: its batches are joined with those of other callers, on `Predict` or `Stream`."""

    format: Literal[1] = 1
    """version of this vocabulary"""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
    """that of the model's folder; the folder in it is the version"""
    description: str = ""
    """for people"""
    licence: str = ""
    """for people"""
    inputs: Annotated[tuple[Input, ...], Field(min_length=1)]
    """what clients send: one or more"""
    constants: tuple[Constant, ...] = ()
    """graph inputs that are the same in every run"""
    states: tuple[State, ...] = ()
    """what is carried from run to run"""
    controls: tuple[Control, ...] = ()
    """graph inputs of models that reset themselves"""
    outputs: Annotated[tuple[Output, ...], Field(min_length=1)]
    """what clients receive: one or more"""
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    """rows in one run, at most"""
    max_frames: Annotated[int, Field(ge=1, le=65536)] = 32
    """frames that one sequence brings into one run, at most"""
    fixed_batch: Annotated[int, Field(ge=1)] | None = None
    """the graph's fixed batch: fewer rows are padded to it; of 1: rows are run one by one, and sequences take
    turns"""
    precision: Precision = "float32"
    """on CUDA alone. `"tf32"`: factors of products may be rounded to 10 bits; `"float16"`: products,
    convolutions and recurrent layers in half the width, inputs, outputs and states as they are. The log says
    at load by how much the golden steps then differ. On a CPU all is computed in float32"""
    generate: Generate | None = None
    """how sequences go on by themselves"""
    resumes_from: tuple[str, ...] = ()
    """fingerprints (ListModels) of older versions whose resume tokens it may take over; their inputs and
    states must be the same"""

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Manifest:
        """Reads JSON. `where` names the file in the error.

        Raises: ManifestInvalid, with every fault on a line of its own.
        """
        try:
            return cls.model_validate(json.loads(text))
        except ValidationError as error:
            faults = "\n".join(
                f"  {'.'.join(str(p) for p in e['loc']) or 'manifest'}: {told(e, cls)}"
                for e in error.errors()
            )
            raise ManifestInvalid(f"{where}: the manifest is not valid:\n{faults}") from error
        except (ValueError, RecursionError) as error:
            raise ManifestInvalid(f"{where}: the manifest is no JSON: {error}") from error

    def to_json(self) -> str:
        """The same text for the same manifest, defaults left out."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True) | {"format": FORMAT}, indent=1)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        self._check_names()
        axes = [i.batch_axis for i in self.inputs] + [s.batch_axis for s in self.states]
        axes += [c.batch_axis for c in self.controls]
        if len({axis is None for axis in axes}) > 1 and self.fixed_batch != 1:
            raise ValueError("batch_axis must be null everywhere, or nowhere, unless fixed_batch is 1")
        self._check_time()
        if len(self.inputs) > 1 and any(i.text for i in self.inputs):
            raise ValueError("utf8 is for a model of one input: a text gives as many ids as it gives")
        if self.generate:
            self.generate.check(self.inputs, self.outputs, stateful=self.stateful)
        return self

    def _check_names(self) -> None:
        inputs = [i.name for i in self.inputs] + [s.input for s in self.states]
        inputs += [c.name for c in self.constants] + [c.name for c in self.controls]
        inputs += [i.lengths for i in self.inputs if i.lengths]
        outputs = [o.name for o in self.outputs] + [s.output for s in self.states]
        for kind, group in (("inputs", inputs), ("outputs", outputs)):
            twice = sorted({n for n in group if group.count(n) > 1})
            if twice:
                raise ValueError(f"{kind} named twice: {', '.join(twice)}")

    def _check_time(self) -> None:
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
        fed, given = {t.name: t for t in inputs}, {t.name: t for t in outputs}
        faults: list[str] = []
        for i in self.inputs:
            faults += differences(fed, "input", i.name, i.dtype, i.shape)
            if i.lengths:
                rows = 1 if i.batch_axis is None else i.shape[i.batch_axis]
                faults += differences(fed, "input", i.lengths, "int32", (rows,))
        for s in self.states:
            faults += differences(fed, "state input", s.input, s.dtype, s.shape)
            faults += differences(given, "state output", s.output, s.dtype, None)
        for c in self.constants:
            faults += differences(fed, "constant", c.name, c.dtype, c.shape)
        for k in self.controls:
            faults += differences(fed, "control", k.name, k.dtype, k.shape)
        for o in self.outputs:
            faults += differences(given, "output", o.name, o.dtype, None)
            lengths = given.get(o.lengths_output or "")
            if o.lengths_output and (lengths is None or lengths.dtype not in ("int32", "int64")):
                got = f"is {lengths.dtype}" if lengths else "is not in the graph"
                faults.append(f"lengths_output {o.lengths_output!r} {got}; it is int32 or int64, a row each")
        faults += [f"the graph's input {n!r} is not in the manifest" for n in fed if n not in self._fed]
        if faults:
            lines = "\n  ".join(faults)
            raise ManifestInvalid(f"{where}: the manifest disagrees with the graph:\n  {lines}")

    @cached_property
    def _fed(self) -> frozenset[str]:
        names = {i.name for i in self.inputs} | {i.lengths for i in self.inputs if i.lengths}
        names |= {s.input for s in self.states} | {c.name for c in self.constants}
        return frozenset(names | {k.name for k in self.controls})
