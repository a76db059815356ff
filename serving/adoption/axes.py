"""Which axis of each tensor is the batch and which is time, and what lengths a graph takes: by its names and
layers, and by trying."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tenuto.serving.errors import ModelInvalid
from tenuto.serving.manifest import Exact, GraphTensor, Multiple

from .graph_facts import Facts
from .probe import Feed, Probe, Shapes
from .roles import Roles
from .wishes import Axis, Chunk, Notes, Wishes

_BATCH = re.compile(r"b|n|bs|batch.*|n_?batch|num_?seqs?")
_TIME = re.compile(
    r"t|time.*|t_?len|frames?|samples?|(num|n)_?(frames|samples)|seq.*|len(gth)?s?|steps?|chunk.*|.*_len(gth)?"
)
# Lengths that are tried along a time axis, until some run.
_TRIED = (
    *range(1, 9), 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 100, 120, 128, 160, 192, 200, 240, 256, 320,
    400, 480, 512, 576, 640, 800, 960, 1024, 1280, 1536, 1600, 1920, 2048, 3200, 4096, 4800, 8000, 16000,
)  # fmt: skip
_MOST_RUNS_THAT_FIT = 12  # of them, so many are enough
_MOST_ELEMENTS = 1 << 24  # of one feed that is tried


@dataclass
class Plan:
    """What is known of a graph's axes. `time` and `chunk` are of the inputs that clients send."""

    batch: dict[str, Axis] = field(default_factory=dict)  # of every tensor that is fed, then of every output
    time: dict[str, Axis] = field(default_factory=dict)
    fixed_batch: int | None = None
    chunk: dict[str, Chunk] = field(default_factory=dict)
    left_context: dict[str, int] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)  # what one row and one frame gave
    strides: dict[str, int] = field(default_factory=dict)  # of outputs with a time axis
    left_out: set[str] = field(default_factory=set)  # outputs that are no row's


class Survey:
    """Finds a `Plan`. What it cannot find is asked in the notes."""

    def __init__(self, facts: Facts, roles: Roles, probe: Probe, wishes: Wishes, notes: Notes) -> None:
        self._facts = facts
        self._roles = roles
        self._probe = probe
        self._wishes = wishes
        self._notes = notes
        self._plan = Plan()

    def plan(self) -> Plan:
        """Where something is asked that is needed, the plan is as far as it got."""
        for tensor in self._roles.data:
            self._find_batch(tensor)
        for pair in self._roles.states:
            self._find_state_batch(pair.input)
        self._settle_batch()
        for tensor in self._roles.data:
            self._find_time(tensor)
        if self._notes.needed:
            return self._plan
        samples = self._find_chunk()
        if samples and not self._notes.needed:
            self._look_at_rows(samples)
            self._check_states()
            self._look_at_outputs(samples)
        return self._plan

    # -- batch -----------------------------------------------------------------------------------------

    def _find_batch(self, tensor: GraphTensor) -> None:
        name, shape = tensor.name, tensor.shape
        subject, layer = f"input {name!r}", self._facts.layers.get(name)
        named = [a for a, d in enumerate(shape) if isinstance(d, str) and _BATCH.fullmatch(d.lower())]
        axis: Axis
        if name in self._wishes.batch_axes:
            axis, reason = self._wishes.batch_axes[name], "you said so"
        elif named:
            axis, reason = named[0], f"it is called {shape[named[0]]!r}"
        elif layer is not None and layer.batch is not None and layer.batch < len(shape):
            axis, reason = layer.batch, f"{layer.layer} takes it for the batch"
        elif not shape or (len(shape) == 1 and isinstance(shape[0], int)):
            axis, reason = None, "there is none"
        else:
            axis, reason = 0, "by custom the first"
        self._plan.batch[name] = axis
        self._notes.guess(subject, f"batch axis {'none' if axis is None else axis}", reason)

    def _find_state_batch(self, tensor: GraphTensor) -> None:
        """Of a fixed batch, any axis of that length will do; one with its name, or a layer's, is better."""
        name, shape = tensor.name, tensor.shape
        rows = self._rows_of_data()
        named = [a for a, d in enumerate(shape) if isinstance(d, str) and _BATCH.fullmatch(d.lower())]
        wished = self._wishes.lengths
        free = [a for a, d in enumerate(shape) if not isinstance(d, int) and (name, a) not in wished]
        layer = self._facts.layer_states.get(name, ("", frozenset[str]()))[0]
        axis: Axis = None
        if name in self._wishes.batch_axes:
            axis, reason = self._wishes.batch_axes[name], "you said so"
        elif named:
            axis, reason = named[0], f"it is called {shape[named[0]]!r}"
        elif free:
            axis, reason = free[0], "the only one of no fixed length"
        elif layer and len(shape) == 3 and (rows is None or shape[1] == rows):
            axis, reason = 1, f"{layer} begins with it"
        elif rows in shape:
            axis, reason = shape.index(rows), f"the first of the batch's length, {rows}"
        else:
            reason = "it has no axis of the batch's length"
        self._plan.batch[name] = axis
        self._notes.guess(f"state {name!r}", f"batch axis {'none' if axis is None else axis}", reason)

    def _rows_of_data(self) -> int | None:
        """The batch's fixed length in what clients send; None: it varies, or there is none."""
        for tensor in self._roles.data:
            axis = self._plan.batch[tensor.name]
            if axis is not None and isinstance(length := tensor.shape[axis], int):
                return length
        return None

    def _settle_batch(self) -> None:
        plan, fixed = self._plan, self._rows_of_data()
        fed = [*self._roles.data, *(pair.input for pair in self._roles.states)]
        axes = {t.name: plan.batch[t.name] for t in self._roles.data}
        why = "an input has no axis for it" if None in axes.values() else ""
        rows = {d for t in self._roles.data for a, d in enumerate(t.shape) if a == axes[t.name]}
        rows -= {d for d in rows if not isinstance(d, int)}
        if len(rows) > 1:
            why = f"its inputs have {' and '.join(sorted(map(str, rows)))} rows"
        if why:
            plan.batch = dict.fromkeys((t.name for t in fed), None)
            self._notes.guess("batch", "none: a run takes one of each", why)
            return
        without = [t.name for t in fed if plan.batch[t.name] is None]
        if fixed is None and without:
            fixed = 1
        if without and fixed != 1:
            self._notes.ask(
                f"state {without[0]!r}",
                f"which of its axes holds the {fixed} rows?",
                f"--batch-axis {without[0]}=AXIS",
            )
        plan.fixed_batch = fixed
        if fixed is not None:
            self._notes.guess("batch", f"rows in each run: {fixed}", "the graph says so")

    # -- time ------------------------------------------------------------------------------------------

    def _find_time(self, tensor: GraphTensor) -> None:
        name, shape, wishes = tensor.name, tensor.shape, self._wishes
        subject, batch = f"input {name!r}", self._plan.batch[name]
        free = [
            a for a, d in enumerate(shape)
            if not isinstance(d, int) and a != batch and (name, a) not in wishes.lengths
        ]  # fmt: skip
        axis: Axis = None
        if name in wishes.time_axes:
            axis, reason = wishes.time_axes[name], "you said so"
        elif not self._stateful():
            for a in free:
                self._ask_length(tensor, a)
            return
        elif not free:
            axis, reason = self._fixed_time(tensor)
        elif len(free) == 1:
            axis, reason = free[0], self._why_time(tensor, free[0])
        else:
            layer = self._facts.layers.get(name)
            named = [a for a in free if isinstance(d := shape[a], str) and _TIME.fullmatch(d.lower())]
            likely = [layer.time] if layer is not None and layer.time in free else named
            if not likely:
                self._notes.ask(subject, f"which of its axes {free} is time?", f"--time-axis {name}=AXIS")
                return
            axis, reason = likely[0], self._why_time(tensor, likely[0])
        self._plan.time[name] = axis
        said = "no time axis: one chunk is one step" if axis is None else f"time axis {axis}"
        self._notes.guess(subject, said, reason)
        for a in free:
            if a != axis:
                self._ask_length(tensor, a)

    def _fixed_time(self, tensor: GraphTensor) -> tuple[Axis, str]:
        """Where all lengths are fixed: the axis that is as long as the chunk that was asked for."""
        name, batch = tensor.name, self._plan.batch[tensor.name]
        chunk = self._wishes.chunks.get(name)
        length = chunk.exact if isinstance(chunk, Exact) else None
        context = self._wishes.left_context.get(name, 0)
        for axis, d in enumerate(tensor.shape):
            if axis != batch and length is not None and d == length + context:
                return axis, f"{d} long, as --chunk and --left-context say"
        long = [a for a, d in enumerate(tensor.shape) if a != batch]
        if long:
            self._notes.ask(
                f"input {name!r}",
                f"all its lengths are fixed; is one of its axes {long} time, so that clients may send "
                "chunks of any length?",
                f"--time-axis {name}=AXIS",
                needed=False,
            )
        return None, "all its lengths but the batch are fixed"

    def _why_time(self, tensor: GraphTensor, axis: int) -> str:
        layer, length = self._facts.layers.get(tensor.name), tensor.shape[axis]
        if layer is not None and layer.time == axis:
            return f"{layer.layer} goes along it"
        if isinstance(length, str) and _TIME.fullmatch(length.lower()):
            return f"it is called {length!r}"
        return "the only other one of no fixed length"

    def _ask_length(self, tensor: GraphTensor, axis: int) -> None:
        length = tensor.shape[axis]
        called = f", called {length!r}," if isinstance(length, str) else ""
        asks = f"how long is its axis {axis}{called} which the graph leaves open?"
        if not self._roles.states:
            asks += (
                f" (If a sequence goes on along it: --time-axis {tensor.name}={axis}, with --left-context.)"
            )
        self._notes.ask(f"input {tensor.name!r}", asks, f"--length {tensor.name}={axis}:N")

    def _stateful(self) -> bool:
        return bool(self._roles.states or self._roles.controls or self._wishes.left_context)

    # -- lengths ---------------------------------------------------------------------------------------

    def _feeds(self, samples: int, rows: int = 1) -> dict[str, Feed]:
        """For one run of so many samples along every time axis; a fixed batch is as it is."""
        plan, roles, rows = self._plan, self._roles, self._plan.fixed_batch or rows
        feeds: dict[str, Feed] = {}
        for tensor in roles.data:
            low, high = (-1.0, 1.0) if tensor.dtype.startswith("float") else (0.0, 2.0)
            high = float(self._facts.ranges.get(tensor.name, (high, ""))[0])
            lengths = {plan.batch[tensor.name]: rows, plan.time.get(tensor.name): samples}
            feeds[tensor.name] = Feed(tensor.dtype, self._shape(tensor, lengths), None, low, high)
        for pair in roles.states:
            lengths = {plan.batch[pair.input.name]: rows}
            feeds[pair.input.name] = Feed(pair.input.dtype, self._shape(pair.input, lengths), 0.0)
        for tensor in self._facts.inputs:
            if tensor.name in roles.constants:
                shape = tuple(d if isinstance(d, int) else 1 for d in tensor.shape)
                feeds[tensor.name] = Feed(tensor.dtype, shape, roles.constants[tensor.name][0])
            elif tensor.name == roles.lengths:
                feeds[tensor.name] = Feed(tensor.dtype, (rows,), float(samples))
            elif tensor.name in roles.controls:
                shape = tuple(d if isinstance(d, int) else rows for d in tensor.shape)
                feeds[tensor.name] = Feed(tensor.dtype, shape, 1.0)
        return feeds

    def _shape(self, tensor: GraphTensor, lengths: dict[Axis, int]) -> tuple[int, ...]:
        shape = []
        for axis, d in enumerate(tensor.shape):
            wished = self._wishes.lengths.get((tensor.name, axis))
            shape.append(lengths.get(axis) or wished or (d if isinstance(d, int) else 1))
        return tuple(shape)

    def _run(self, samples: int, rows: int = 1) -> Shapes | str:
        """What came, or why nothing did."""
        try:
            return self._probe.run(self._feeds(samples, rows))
        except ModelInvalid as error:
            return str(error)

    def _find_chunk(self) -> int:
        """Samples that make one run of one frame, the left context included; 0: none was found."""
        plan, wishes = self._plan, self._wishes
        timed = [t for t in self._roles.data if plan.time.get(t.name) is not None]
        if not timed:
            return self._one(1)
        first = timed[0]
        for t in timed:
            plan.left_context[t.name] = wishes.left_context.get(t.name, 0)
            plan.chunk[t.name] = wishes.chunks.get(t.name, "free")
        context, length = plan.left_context[first.name], first.shape[plan.time[first.name] or 0]
        if isinstance(length, int) and first.name not in wishes.chunks:
            for t in timed:
                plan.chunk[t.name] = Exact(exact=length - context)
            self._notes.guess(f"input {first.name!r}", f"chunk exact {length - context}", "the graph says so")
        chunk = plan.chunk[first.name]
        if first.name in wishes.chunks or isinstance(length, int):
            frame = 1 if chunk == "free" else chunk.exact if isinstance(chunk, Exact) else chunk.multiple
            return self._one(frame + context)
        return self._try_lengths(timed)

    def _one(self, samples: int) -> int:
        """So many samples must run."""
        found = self._run(samples)
        if isinstance(found, str):
            rows = self._plan.fixed_batch or 1
            self._notes.ask(
                "graph",
                f"a run of {rows} rows and {samples} samples failed: {found}. Which shape does it take?",
                "--chunk, --left-context, --length, --batch-axis or --state",
            )
            return 0
        self._plan.shapes = found
        return samples

    def _try_lengths(self, timed: list[GraphTensor]) -> int:
        ran: dict[int, Shapes] = {}
        why = ""
        for samples in _TRIED:
            if self._is_enough(ran) or samples * self._widest(timed) > _MOST_ELEMENTS:
                break
            found = self._run(samples)
            if isinstance(found, str):
                why = found
            else:
                ran[samples] = found
        subject = f"input {timed[0].name!r}"
        if not ran:
            self._notes.ask(
                subject,
                f"no run succeeded with 1 to {_TRIED[-1]} samples; the last said: {why}. Which does it take?",
                f"--chunk {timed[0].name}=exact:N",
            )
            return 0
        growing = self._growing(ran)
        if growing is not None and _counts(ran, growing) > 1:
            return self._fit(timed, ran, growing)
        least = min(ran)
        if least > 1:
            self._notes.ask(
                subject,
                f"runs of {_told(sorted(ran))} samples succeed, others fail, and no output says how many it "
                "made of them. How many does it take at once, and how many earlier ones in front of them?",
                f"--chunk {timed[0].name}=exact:N, and perhaps --left-context {timed[0].name}=N",
            )
            return 0
        self._plan.shapes = ran[least]
        self._notes.guess(subject, "chunk free", f"it ran with {_told(sorted(ran))} samples")
        return least

    def _is_enough(self, ran: dict[int, Shapes]) -> bool:
        """Whether more runs would tell no more: no output waits for its first or second frame."""
        if len(ran) < _MOST_RUNS_THAT_FIT:
            return False
        growing = self._growing(ran)
        if growing is None:
            return not any(0 in shape for shape in ran[max(ran)].values())
        return _counts(ran, growing) > 1

    def _widest(self, timed: list[GraphTensor]) -> int:
        """Elements a sample of the widest input."""
        widths = [1]
        for t in timed:
            width = 1
            for a, d in enumerate(t.shape):
                width *= d if isinstance(d, int) and a != self._plan.time[t.name] else 1
            widths.append(width)
        return max(widths)

    def _growing(self, ran: dict[int, Shapes]) -> tuple[str, int] | None:
        """An output, and the axis of it that grows with the samples."""
        for output in self._roles.outputs:
            shapes = [found[output.name] for found in ran.values()]
            if len({len(s) for s in shapes}) > 1:
                continue
            for axis in range(len(shapes[0])):
                if len({s[axis] for s in shapes}) > 1:
                    return output.name, axis
        return None

    def _fit(self, timed: list[GraphTensor], ran: dict[int, Shapes], growing: tuple[str, int]) -> int:
        """From the lengths that run and what they give, how many samples make a frame, and how many more lie
        in front."""
        name, axis = growing
        subject = f"input {timed[0].name!r}"

        def frames(samples: int) -> int | None:
            found = ran.get(samples) or self._run(samples)
            return None if isinstance(found, str) else found[name][axis]

        counts = {samples: found[name][axis] for samples, found in sorted(ran.items())}
        first = next(s for s, c in counts.items() if c > 0)
        more = next((s for s, c in counts.items() if c > counts[first]), 0)
        first, second = _least(frames, 1, first, counts[first]), _least(frames, first + 1, more, counts[more])
        stride, step = second - first, counts[more] - (frames(first) or 0)
        if stride < step or stride % step:
            self._notes.ask(
                subject,
                f"output {name!r} has {step} frames for {stride} samples, which a manifest cannot say",
                f"--time-axis {name}=none",
            )
            return 0
        if frames(first + stride // step) == (frames(first) or 0) + 1:
            stride, step = stride // step, 1
        context = max(0, first - stride) if frames(first) == step else 0
        samples = stride + context
        more = samples + stride
        tried = f"{samples} samples give {frames(samples)} of {name!r}, {more} {frames(more)}"
        for t in timed:
            if stride > 1:
                self._plan.chunk[t.name] = Multiple(multiple=stride)
            if t.name not in self._wishes.left_context:
                self._plan.left_context[t.name] = context
        self._notes.guess(subject, "chunk free" if stride == 1 else f"chunk multiple {stride}", tried)
        if context and timed[0].name not in self._wishes.left_context:
            self._notes.guess(
                subject, f"left context {context}", f"so many samples fewer come out than go in: {tried}"
            )
        return self._one(stride + self._plan.left_context[timed[0].name])

    # -- what comes out --------------------------------------------------------------------------------

    def _look_at_rows(self, samples: int) -> None:
        plan, roles = self._plan, self._roles
        outputs = [t.name for t in (*roles.outputs, *(p.output for p in roles.states))]
        if plan.fixed_batch is None and any(axis is not None for axis in plan.batch.values()):
            two = self._run(samples, 2)
            if isinstance(two, str):
                plan.fixed_batch = 1
                self._notes.guess("batch", "rows in each run: 1", f"a run of 2 failed: {two}")
            else:
                for name in outputs:
                    pairs = enumerate(zip(plan.shapes[name], two[name], strict=False))
                    plan.batch[name] = next((a for a, (one, both) in pairs if 2 * one == both), None)
        if plan.fixed_batch is not None:
            for name in outputs:
                shape = plan.shapes[name]
                plan.batch[name] = shape.index(plan.fixed_batch) if plan.fixed_batch in shape else None
        for tensor in roles.outputs:
            alone = plan.fixed_batch == 1 or all(plan.batch[t.name] is None for t in roles.data)
            if plan.batch.setdefault(tensor.name, None) is None and not alone:
                plan.left_out.add(tensor.name)
                self._notes.guess(
                    f"output {tensor.name!r}", "left out", "it has no row for each row of the batch"
                )

    def _check_states(self) -> None:
        """A state comes back in the shape in which it was fed."""
        for pair in self._roles.states:
            fed = self._feeds(1)[pair.input.name].shape
            came = self._plan.shapes[pair.output.name]
            if fed != came:
                self._notes.ask(
                    f"state {pair.input.name!r}",
                    f"{list(fed)} was fed and {list(came)} came back from {pair.output.name!r}; a state "
                    "keeps its shape. What is it?",
                    f"--no-state {pair.input.name}, or --state {pair.input.name}=OUTPUT",
                )

    def _look_at_outputs(self, samples: int) -> None:
        plan = self._plan
        timed = [t for t in self._roles.data if plan.time.get(t.name) is not None]
        if not timed:
            return
        context, chunk = plan.left_context[timed[0].name], plan.chunk[timed[0].name]
        frame = samples - context
        longer = None if isinstance(chunk, Exact) else self._run(samples + frame)
        for tensor in self._roles.outputs:
            name, shape = tensor.name, plan.shapes[tensor.name]
            if name in self._wishes.time_axes:
                self._time_of_output(name, self._wishes.time_axes[name], frame, "you said so")
            elif isinstance(longer, dict):
                grown = [a for a, (n, m) in enumerate(zip(shape, longer[name], strict=False)) if 2 * n == m]
                if grown:
                    self._time_of_output(name, grown[0], frame, "it grows with the samples")
                else:
                    self._notes.guess(
                        f"output {name!r}", "its value after the last frame", "it does not grow with them"
                    )
            elif isinstance(chunk, Exact):
                batch = plan.batch[name]
                same = [a for a, n in enumerate(shape) if a != batch and n == frame > 1]
                ones = [a for a, n in enumerate(shape) if a != batch and n == 1]
                reason = "as long as the chunk" if same else f"one for each {frame} samples, none is lost so"
                if same or ones:
                    self._time_of_output(name, (same or ones)[0], frame, reason)

    def _time_of_output(self, name: str, axis: Axis, frame: int, reason: str) -> None:
        self._plan.time[name] = axis
        if axis is None:
            return
        shape, rows = self._plan.shapes[name], self._plan.fixed_batch
        if self._plan.batch[name] == axis:  # both had one
            self._plan.batch[name] = next((a for a, n in enumerate(shape) if n == rows and a != axis), None)
        length = shape[axis]
        if not length or frame % length:
            self._notes.ask(
                f"output {name!r}",
                f"{frame} samples give {length} frames along axis {axis}, which a manifest cannot say",
                f"--time-axis {name}=none",
            )
            return
        self._plan.strides[name] = frame // length
        self._notes.guess(
            f"output {name!r}", f"time axis {axis}, a frame for {frame // length} samples", reason
        )


def _counts(ran: dict[int, Shapes], growing: tuple[str, int]) -> int:
    """How many different numbers of frames came, nothing left out."""
    name, axis = growing
    return len({found[name][axis] for found in ran.values()} - {0})


def _least(frames: Callable[[int], int | None], low: int, high: int, wanted: int) -> int:
    """The fewest samples from `low` that give `wanted` frames, where `high` do."""
    while low < high:
        middle = (low + high) // 2
        count = frames(middle)
        if count is not None and count >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


def _told(numbers: list[int]) -> str:
    """The first and the last of many."""
    if len(numbers) <= 6:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:3]))} … {numbers[-1]}"
