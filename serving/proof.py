"""What a manifest says of its graph's runs, tried: shapes for one row and several, and the same answer twice.

A graph's own declarations may be wrong, or missing; what comes out of it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelInvalid, RunFailed
from .manifest import Manifest, Output
from .model_runner import CPU, ModelRunner

Array = NDArray[Any]
_STEPS = 2  # that a sequence makes, twice
_OFF = 1e-3  # between two runs on CUDA, whose sums may come in any order
_RANDOM = frozenset(
    ("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike")
)  # fmt: skip


def prove(runner: ModelRunner, model: bytes) -> None:
    """Runs it on zeros, on two frames and two rows where it takes them, and twice on the same.

    Raises: RunFailed on zeros; ModelInvalid where something else comes out than the manifest says.
    """
    m, rows = runner.manifest, runner.manifest.fixed_batch or 1
    _compare(runner, runner.zero_feeds(), rows, 1)
    if m.timed and m.frames_per_turn > 1:
        _try(runner, rows, 2, 'a "chunk" of {"exact": n}, or "max_frames" 1')
    if m.rows_per_batch > 1 and m.fixed_batch is None:
        _try(runner, 2, 1, '"fixed_batch": 1')
    _run_twice(runner, model)


def _try(runner: ModelRunner, rows: int, frames: int, instead: str) -> None:
    """Raises: ModelInvalid, with what the manifest should say instead."""
    what = f"a run of {rows} rows and {frames} frames"
    try:
        _compare(runner, _feeds(runner, rows, frames), rows, frames)
    except RunFailed as error:
        raise ModelInvalid(
            f"{error}; that was {what}, which the manifest allows; if the graph does not, the manifest needs "
            f"{instead}"
        ) from error


def _feeds(runner: ModelRunner, rows: int, frames: int) -> dict[str, Array]:
    """`zero_feeds` of another size."""
    m, feeds = runner.manifest, runner.zero_feeds()
    rowed = [(s.input, s.batch_axis) for s in m.states] + [(c.name, c.batch_axis) for c in m.controls]
    for i in m.inputs:
        length = i.multiple * frames + i.left_context
        feeds[i.name] = _resized(feeds[i.name], {i.batch_axis: rows, i.time_axis: length})
        if i.lengths:
            feeds[i.lengths] = np.full(rows, length, feeds[i.lengths].dtype)
    return feeds | {name: _resized(feeds[name], {axis: rows}) for name, axis in rowed}


def _resized(value: Array, axes: dict[int | None, int]) -> Array:
    """All of it is one number."""
    shape = [axes.get(a, length) for a, length in enumerate(value.shape)]
    return np.full(shape, value.flat[0] if value.size else 0, value.dtype)


def _compare(runner: ModelRunner, feeds: dict[str, Array], rows: int, frames: int) -> None:
    """Raises: RunFailed; ModelInvalid, with every difference on a line of its own."""
    m, faults = runner.manifest, list[str]()
    results = dict(zip(_names(m), runner.run(feeds), strict=True))
    for o in m.outputs:
        expected = _shape(o, m, rows, frames)
        _differ(faults, f"output {o.name!r}", results[o.name], o.dtype, expected)
    for s in m.states:
        value = feeds[s.input]
        name = f"state {s.output!r}, the next {s.input!r},"
        _differ(faults, name, results[s.output], s.dtype, list(value.shape))
    if faults:
        lines = "\n  ".join(faults)
        raise ModelInvalid(
            f"{runner.where}: a run of {rows} rows and {frames} frames does not give what the manifest says:"
            f"\n  {lines}"
        )


def _names(m: Manifest) -> list[str]:
    """Of what a run gives."""
    return [*m.fetched, *(s.output for s in m.states)]


def _shape(o: Output, m: Manifest, rows: int, frames: int) -> list[int | None]:
    """What the manifest says of it; None: any length."""
    lengths: dict[int | None, int | None] = {o.batch_axis: rows}
    if o.time_axis is not None:
        per = m.timed[0].multiple // o.stride
        lengths[o.time_axis] = None if o.lengths_output else frames * per
    return [lengths[a] if a in lengths else int(d) for a, d in enumerate(o.shape)]


def _differ(faults: list[str], name: str, value: Any, dtype: str, shape: Sequence[int | None]) -> None:
    """Appends what is wrong with it."""
    if not isinstance(value, np.ndarray):
        faults.append(f"{name} is no tensor")
    elif value.dtype != dtype:
        faults.append(f"{name} is {value.dtype}, expected {dtype}")
    elif len(value.shape) != len(shape) or any(
        w not in (None, got) for w, got in zip(shape, value.shape, strict=True)
    ):
        words = ", ".join("any" if length is None else str(length) for length in shape)
        faults.append(f"{name} is {list(value.shape)}, expected [{words}]")


def _run_twice(runner: ModelRunner, model: bytes) -> None:
    """Raises: ModelInvalid if the same steps are answered otherwise: no answer could be repeated then, and no
    sequence could go on elsewhere."""
    try:
        first, again = (_steps(runner, _lively(runner)) for _ in range(2))
    except RunFailed:  # they are within what the manifest allows, and the graph may know better
        first, again = (_steps(runner, runner.zero_feeds()) for _ in range(2))
    for step, (one, other) in enumerate(zip(first, again, strict=True), 1):
        for name, value in one.items():
            if not _same(value, other[name], runner.provider):
                raise ModelInvalid(
                    f"{runner.where}: run twice on the same numbers, it answers otherwise (step {step}, "
                    f"{name!r}): no answer could be repeated, and no sequence resumed. {_suspects(model)}"
                )


def _steps(runner: ModelRunner, feeds: dict[str, Array]) -> list[dict[str, Array]]:
    """What some steps of one sequence give."""
    m, given = runner.manifest, list[dict[str, Array]]()
    for _ in range(_STEPS):
        given.append(dict(zip(_names(m), runner.run(feeds), strict=True)))
        feeds = feeds | {s.input: given[-1][s.output] for s in m.states}
    return given


def _lively(runner: ModelRunner) -> dict[str, Array]:
    """`zero_feeds`, and numbers for inputs: of zeros, many graphs make zeros whatever they draw."""
    feeds, numbers = runner.zero_feeds(), np.random.default_rng(0)
    for i in runner.manifest.inputs:
        shape, kind = feeds[i.name].shape, i.numpy_dtype
        if kind.kind == "f":
            feeds[i.name] = numbers.standard_normal(shape).astype(kind)
        elif kind.kind in "iu":
            low, high = i.range or (0, 1)
            feeds[i.name] = numbers.integers(low, high, shape, kind, endpoint=True)
    return feeds


def _same(one: Array, other: Array, provider: str) -> bool:
    if provider == CPU or one.dtype.kind != "f":
        return one.tobytes() == other.tobytes()
    return one.shape == other.shape and np.allclose(one, other, _OFF, _OFF, equal_nan=True)


def _suspects(model: bytes) -> str:
    """The graph's random operators, in words."""
    import onnx  # for a refusal's text alone
    from google.protobuf.message import DecodeError

    found: set[str] = set()

    def look(nodes: Any) -> None:
        for node in nodes:
            found.update({node.op_type} & _RANDOM)
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    look(graph.node)

    try:
        proto = onnx.load_model_from_string(model)
    except DecodeError:  # ONNX Runtime's own format
        return "It is to draw no numbers of its own"
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        look(nodes)
    if not found:
        return "It has no operator that draws numbers; report this to whoever made ONNX Runtime's kernels"
    return (
        f"It draws numbers by {', '.join(sorted(found))}; export it for inference, or feed it what it draws "
        "as an input"
    )
