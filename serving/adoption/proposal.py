"""A manifest for a file that has none: guesses, each with its reason, and what only the user can say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tenuto.serving.errors import ManifestInvalid, ModelInvalid
from tenuto.serving.manifest import Dtype, Exact, GraphTensor, Manifest, Multiple
from tenuto.serving.vetting import Limits

from .axes import Plan, Survey
from .graph_facts import Facts
from .probe import Probe
from .roles import Roles, find
from .wishes import Guess, Notes, Question, Wishes

_DTYPES = get_args(Dtype)


@dataclass(frozen=True)
class Proposal:
    """`manifest` is None where `faults`, or questions that are needed, say why."""

    manifest: Manifest | None
    guesses: tuple[Guess, ...]
    questions: tuple[Question, ...]
    faults: tuple[str, ...] = ()
    left_to_cpu: tuple[str, ...] | None = (
        None  # nodes, by ONNX Runtime's own word; None: there is no CUDA here
    )


def propose(facts: Facts, wishes: Wishes, name: str, limits: Limits) -> Proposal:
    """Runs the file in a child process."""
    notes = Notes()
    faults = _unknown(facts, wishes)
    if faults:
        return Proposal(None, (), (), tuple(faults))
    with Probe(facts.path, limits) as probe:
        try:
            probe.load()
        except ModelInvalid as error:
            return Proposal(None, (), (), (str(error),))
        roles = find(facts, wishes, notes)
        _ask_for_the_impossible(facts, roles, notes)
        plan = Plan() if notes.needed else Survey(facts, roles, probe, wishes, notes).plan()
        nodes = probe.left_to_cpu() if probe.lives else None
    manifest = None
    if not notes.needed:
        text = json.dumps(_Writer(facts, roles, plan, wishes, notes).manifest(name))
        try:
            manifest = Manifest.parse(text, "the proposed manifest")
        except ManifestInvalid as error:
            faults = [str(error)]
    left = None if nodes is None else tuple(nodes)
    return Proposal(manifest, tuple(notes.guesses), tuple(notes.questions), tuple(faults), left)


def default_name(path: Path) -> str:
    """Of a file: what a model's folder may be called."""
    name = re.sub(r"[^a-z0-9.-]+", "-", path.stem.lower()).strip("-.")
    return name[:128] or "model"


def _unknown(facts: Facts, wishes: Wishes) -> list[str]:
    """Options that name no tensor of the graph, or one at the wrong end."""
    inputs, outputs = [t.name for t in facts.inputs], [t.name for t in facts.outputs]
    faults = [
        f"the options name {name!r}; the graph has the inputs {', '.join(inputs)} and the outputs "
        f"{', '.join(outputs)}"
        for name in sorted(wishes.tensors() - {*inputs, *outputs})
    ]
    for before, behind in wishes.states.items():
        if not faults and (before not in inputs or behind not in outputs):
            faults.append(f"--state {before}={behind}: it is an input, and the output that comes back to it")
    return faults


def _ask_for_the_impossible(facts: Facts, roles: Roles, notes: Notes) -> None:
    if not roles.data:
        notes.ask("graph", "no input is left that clients would send. Which is it?", "--no-state INPUT")
    if not roles.outputs:
        notes.ask("graph", "no output is left that clients would get. Which is it?", "--no-state INPUT")
    for tensor in (*facts.inputs, *roles.outputs):
        if tensor.dtype not in _DTYPES:
            asks = f"it is of {tensor.dtype}, which no client can send or get. Export it in another dtype"
            notes.ask(f"tensor {tensor.name!r}", asks, "")


class _Writer:
    """The manifest's JSON, what is a default left out."""

    def __init__(self, facts: Facts, roles: Roles, plan: Plan, wishes: Wishes, notes: Notes) -> None:
        self._facts = facts
        self._roles = roles
        self._plan = plan
        self._wishes = wishes
        self._notes = notes

    def manifest(self, name: str) -> dict[str, Any]:
        plan, roles = self._plan, self._roles
        timed = any(plan.time.get(t.name) is not None for t in roles.data)
        made: dict[str, Any] = {
            "format": 1,
            "name": name,
            "inputs": [self._input(t) for t in roles.data],
            "outputs": [self._output(t, timed) for t in roles.outputs if t.name not in plan.left_out],
        }
        if roles.states:
            made["states"] = [
                {"input": p.input.name, "output": p.output.name} | self._tensor(p.input) for p in roles.states
            ]
        if roles.constants:
            made["constants"] = [self._constant(t) for t in self._facts.inputs if t.name in roles.constants]
        if roles.controls:
            made["controls"] = [self._control(t) for t in self._facts.inputs if t.name in roles.controls]
        if plan.fixed_batch is not None:
            made["fixed_batch"] = plan.fixed_batch
        return made

    def _tensor(self, tensor: GraphTensor, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
        """`shape`: what a run gave, where the graph's own word is not to be trusted."""
        batch, time = self._plan.batch.get(tensor.name), self._plan.time.get(tensor.name)
        dims: list[int | str] = []
        for axis, d in enumerate(tensor.shape if shape is None else shape):
            wished = self._wishes.lengths.get((tensor.name, axis))
            free = axis in (batch, time) and (shape is not None or not isinstance(d, int))
            if axis == batch and self._plan.fixed_batch is not None and shape is not None:
                free = False
            dims.append(self._axis_name(tensor, axis) if free else wished or (d if isinstance(d, int) else 1))
        told: dict[str, Any] = {"dtype": tensor.dtype, "shape": dims}
        if batch != 0:
            told["batch_axis"] = batch
        return told | ({"time_axis": time} if time is not None else {})

    def _axis_name(self, tensor: GraphTensor, axis: int) -> str:
        own = tensor.shape[axis] if axis < len(tensor.shape) else None
        if isinstance(own, str):
            return own
        return "batch" if axis == self._plan.batch.get(tensor.name) else "time"

    def _input(self, tensor: GraphTensor) -> dict[str, Any]:
        plan, name, rate = self._plan, tensor.name, self._roles.rate_hz
        made = {"name": name} | self._tensor(tensor)
        timed = plan.time.get(name) is not None
        if timed and self._roles.lengths:
            made["lengths"] = self._roles.lengths
        chunk = plan.chunk.get(name, "free")
        if isinstance(chunk, Multiple | Exact):
            made["chunk"] = chunk.model_dump()
        if plan.left_context.get(name):
            made["left_context"] = plan.left_context[name]
        if name in self._facts.ranges:
            rows, table = self._facts.ranges[name]
            made["range"] = [0, rows - 1]
            self._notes.guess(f"input {name!r}", f"range 0 to {rows - 1}", f"an index into {table!r}")
        if timed and rate and tensor.dtype == "float32" and len(made["shape"]) == 2:
            made |= {"rate_hz": rate, "wire": [{"dtype": "int16", "scale": 1 / 32768}]}
            self._notes.guess(
                f"input {name!r}",
                f"sound of {rate:g} Hz, sent as int16 / 32768 too",
                "its constant is called a rate",
            )
        return made

    def _output(self, tensor: GraphTensor, timed: bool) -> dict[str, Any]:
        made = {"name": tensor.name} | self._tensor(tensor, self._plan.shapes[tensor.name])
        stride = self._plan.strides.get(tensor.name, 1)
        return made | ({"stride": stride} if timed and stride > 1 else {})

    def _constant(self, tensor: GraphTensor) -> dict[str, Any]:
        value, *others = self._roles.constants[tensor.name]
        made: dict[str, Any] = {"name": tensor.name, "dtype": tensor.dtype, "value": value}
        if tensor.shape:
            made["shape"] = [d if isinstance(d, int) else 1 for d in tensor.shape]
        return made | ({"allowed": [value, *others]} if others else {})

    def _control(self, tensor: GraphTensor) -> dict[str, Any]:
        made: dict[str, Any] = {
            "name": tensor.name,
            "kind": self._roles.controls[tensor.name],
            "dtype": tensor.dtype,
        }
        shape = [d if isinstance(d, int) else "batch" for d in tensor.shape]
        batch = next((a for a, d in enumerate(shape) if d == "batch"), 0 if shape else None)
        alone = all(self._plan.batch[t.name] is None for t in self._roles.data)
        return made | {"shape": shape, "batch_axis": None if alone else batch}
