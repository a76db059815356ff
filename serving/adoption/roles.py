"""Which part each of a graph's tensors plays: what clients send and get, states, constants, controls."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tenuto.serving.manifest import GraphTensor

from .graph_facts import Facts, word_set
from .wishes import Notes, Wishes

# Words of a name that say before and behind, and no more.
_BEFORE = word_set(
    """
    in input inputs i prev previous past old init initial before cur current last
    """
)
_BEHIND = word_set(
    """
    out output outputs o next new n updated update final after present upd nxt y
    """
)
# Names of what clients send and get: that such a pair looks alike makes it no state.
_PLAIN = word_set(
    """
    x y a b audio chunk data feature features feats frame frames image images input logits mel mix noisy
    output pcm sample samples sequence signal sound spec speech tokens wav waveform enh enhanced value
    values magnitude phase mag
    """
)
_STATE_WORDS = word_set(
    """
    buf buffer c cache cached caches carry cell context ctx h hidden hx cx key kv lstm gru rnn mem
    memory overlap past state states
    """
)
_CONTROLS = {
    "start": r"(sequence_?|seq_?)?start|begin|reset",
    "end": r"(sequence_?|seq_?)?(end|stop)",
    "ready": r"(sequence_?|seq_?)?ready|valid",
    "sequence_id": r"corr_?id|correlation_?id|(sequence|seq|session|stream)_?id",
}
_LENGTHS = re.compile(r".*(lengths?|lens?|num_(frames|samples))$")
_RATES = re.compile(r"(sr|sample_?rate|sampling_?rate|rate|fs)(_hz)?")
_SURE, _LIKELY = 3, 2  # of the evidence for a pair


@dataclass(frozen=True)
class StatePair:
    """An input that takes what an output gave the run before."""

    input: GraphTensor
    output: GraphTensor


@dataclass
class Roles:
    data: list[GraphTensor] = field(default_factory=list)
    states: list[StatePair] = field(default_factory=list)
    constants: dict[str, tuple[float, ...]] = field(
        default_factory=dict
    )  # by input: the value, others allowed
    controls: dict[str, str] = field(default_factory=dict)
    lengths: str = ""
    outputs: list[GraphTensor] = field(default_factory=list)

    @property
    def rate_hz(self) -> float:
        """What a constant says of samples a second; 0: none does."""
        for name, values in self.constants.items():
            if _RATES.fullmatch(name.lower()) and values[0] >= 1:
                return values[0]
        return 0.0


def find(facts: Facts, wishes: Wishes, notes: Notes) -> Roles:
    """What cannot be told is asked in the notes."""
    roles = Roles(states=_pairs(facts, wishes, notes))
    taken = {pair.input.name for pair in roles.states}
    for tensor in facts.inputs:
        if tensor.name in taken:
            continue
        if _is_control(tensor, wishes, roles, notes) or _is_constant(tensor, facts, wishes, roles, notes):
            continue
        if not roles.lengths and _is_lengths(tensor, facts, notes):
            roles.lengths = tensor.name
            continue
        roles.data.append(tensor)
    given = {pair.output.name for pair in roles.states}
    roles.outputs = [tensor for tensor in facts.outputs if tensor.name not in given]
    return roles


def _is_control(tensor: GraphTensor, wishes: Wishes, roles: Roles, notes: Notes) -> bool:
    kind = wishes.controls.get(tensor.name, "")
    others = [d for d in tensor.shape if isinstance(d, int) and d != 1]
    if not kind and not others and 1 <= len(tensor.shape) <= 3:
        name = tensor.name.lower()
        kind = next((k for k, pattern in _CONTROLS.items() if re.fullmatch(pattern, name)), "")
        if kind and len([d for d in tensor.shape if not isinstance(d, int)]) > 1:
            kind = ""
    if kind and kind != "none":
        roles.controls[tensor.name] = kind
        reason = "you said so" if tensor.name in wishes.controls else "its name, and one number a row"
        notes.guess(f"input {tensor.name!r}", f"control: {kind}", reason)
    return kind not in ("", "none")


def _is_constant(tensor: GraphTensor, facts: Facts, wishes: Wishes, roles: Roles, notes: Notes) -> bool:
    subject, name = f"input {tensor.name!r}", tensor.name
    if name in wishes.constants:
        roles.constants[name] = wishes.constants[name]
        notes.guess(subject, f"constant {_told(wishes.constants[name])}", "you said so")
        return True
    single = tensor.shape == (1,) and (
        tensor.dtype.startswith(("int", "uint")) or _RATES.fullmatch(name.lower())
    )
    if tensor.shape and not single:
        return False
    choices = facts.compared.get(name, ())
    if len(choices) == 1:
        roles.constants[name] = choices
        notes.guess(
            subject,
            f"constant {_told(choices)}",
            "one number for all rows, and the graph compares it with that",
        )
        notes.ask(
            subject,
            f"is {_told(choices)} the value that it should have?",
            f"--constant {name}=VALUE",
            needed=False,
        )
        return True
    if not any(name in sources for sources in facts.passed.values()):
        roles.constants[name] = (0.0,)
        notes.guess(subject, "constant 0", "one number for all rows, and no output depends on it")
        return True
    hint = f"; the graph compares it with {_told(choices)}" if choices else ""
    notes.ask(
        subject,
        f"{tensor.dtype} {list(tensor.shape)}: one number for all rows, which the server feeds. Which{hint}?",
        f"--constant {name}=VALUE, or VALUE,VALUE,… for those that a client may choose",
    )
    roles.constants[name] = (choices or (0.0,))[:1]
    return True


def _is_lengths(tensor: GraphTensor, facts: Facts, notes: Notes) -> bool:
    subject = f"input {tensor.name!r}"
    if len(tensor.shape) != 1 or tensor.dtype not in ("int32", "int64"):
        return False
    layer = facts.lengths.get(tensor.name)
    if not layer and not _LENGTHS.fullmatch(tensor.name.lower()):
        return False
    if tensor.dtype != "int32":
        notes.ask(
            subject, "by its place the rows' lengths, but int64; the server feeds int32. Export it so", ""
        )
    notes.guess(
        subject, "the rows' lengths", f"{layer} takes it for them" if layer else "its name, one number a row"
    )
    return True


# -- states ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    input: GraphTensor
    output: GraphTensor
    sure: int
    closeness: float
    reason: str


def _pairs(facts: Facts, wishes: Wishes, notes: Notes) -> list[StatePair]:
    by_name = {t.name: t for t in (*facts.inputs, *facts.outputs)}
    pairs: list[StatePair] = []
    for before, behind in wishes.states.items():
        pairs.append(StatePair(by_name[before], by_name[behind]))
        notes.guess(f"state {before!r}", f"comes back from {behind!r}", "you said so")
    candidates = [
        c
        for before in facts.inputs
        for behind in facts.outputs
        if before.name not in (*wishes.states, *wishes.no_states)
        and behind.name not in wishes.states.values()
        if (c := _candidate(facts, before, behind, wishes))
    ]
    taken: set[str] = set()
    for one in sorted(candidates, key=lambda c: (-c.sure, -c.closeness)):
        names = {f"in {one.input.name}", f"out {one.output.name}"}
        if names & taken:
            continue
        rivals = [
            c for c in candidates
            if c is not one and (c.sure, c.closeness) == (one.sure, one.closeness)
            and (c.input is one.input) != (c.output is one.output)
            and not {f"in {c.input.name}", f"out {c.output.name}"} & taken
        ]  # fmt: skip
        if one.sure < _LIKELY or rivals:
            _ask_about(one, notes)
            continue
        taken |= names
        pairs.append(StatePair(one.input, one.output))
        notes.guess(f"state {one.input.name!r}", f"comes back from {one.output.name!r}", one.reason)
    pairs = _some_left(facts, wishes, pairs, notes)
    for pair in pairs:
        free = _free(pair.input, wishes)
        if len(free) > 1:
            notes.ask(
                f"state {pair.input.name!r}",
                f"its axes {free} have no fixed length, and a state keeps its shape. How long are those that "
                "are not the batch? (One that grows with each step cannot be held.)",
                f"--length {pair.input.name}=AXIS:N",
            )
    order = [t.name for t in facts.inputs]
    return sorted(pairs, key=lambda p: order.index(p.input.name))


def _ask_about(one: _Candidate, notes: Notes) -> None:
    before, behind = one.input.name, one.output.name
    notes.ask(
        f"input {before!r}",
        f"is it a state, which comes back from {behind!r}? {one.reason}; nothing else says so",
        f"--state {before}={behind}",
        needed=False,
    )


def _candidate(facts: Facts, before: GraphTensor, behind: GraphTensor, wishes: Wishes) -> _Candidate | None:
    if before.dtype != behind.dtype or not _may_be_one(before, behind):
        return None
    if len(_free(before, wishes)) > 1 and not (set(_words(before.name)) & _STATE_WORDS):
        return None  # what clients send
    layer, back = facts.layer_states.get(before.name, ("", frozenset[str]()))
    if behind.name in back:
        return _Candidate(before, behind, _SURE, 2.0, f"{layer} begins with the one and ends with the other")
    if before.name not in facts.passed[behind.name] and not _stems(before.name) & _stems(behind.name):
        return None
    alike = f"same dtype and shape {_shape(before)}"
    if _stems(before.name) & _stems(behind.name):
        plain = all(set(stem) <= _PLAIN for stem in _stems(before.name) & _stems(behind.name))
        return _Candidate(
            before, behind, 1 if plain else _SURE, 1.5, f"{alike}, and the same name but for that"
        )
    closeness, words = _closeness(before.name, behind.name)
    if closeness >= 0.5 and words & _STATE_WORDS:
        return _Candidate(
            before, behind, _LIKELY, closeness, f"{alike}, and both names have {_listed(words)}"
        )
    if _is_only_one(facts, before, behind):
        reason = f"{alike}, which no other has, behind the first ones; each has a part in the other's"
        return _Candidate(before, behind, _LIKELY, 0.0, reason)
    if set(_words(before.name)) & (_STATE_WORDS - {"c", "h"}):
        return _Candidate(before, behind, 1, closeness, alike)
    return None


def _is_only_one(facts: Facts, before: GraphTensor, behind: GraphTensor) -> bool:
    """Whether that shape is no other tensor's, and what clients send, first by custom, changes what comes
    back, and what comes back what they get."""
    first, answer = facts.inputs[0], facts.outputs[0]
    if before is first or behind is answer or len(before.shape) < 2:
        return False
    like = [t for t in (*facts.inputs, *facts.outputs) if t.shape == before.shape]
    return (
        like == [before, behind]
        and before.name in facts.passed[answer.name]
        and {before.name, first.name} <= facts.passed[behind.name]
    )


def _free(tensor: GraphTensor, wishes: Wishes) -> list[int]:
    """Axes of no fixed length. A state has one at most, the batch."""
    return [
        a for a, d in enumerate(tensor.shape)
        if not isinstance(d, int) and (tensor.name, a) not in wishes.lengths
    ]  # fmt: skip


def _may_be_one(before: GraphTensor, behind: GraphTensor) -> bool:
    """Whether the declared shapes allow it; exporters leave them out, or call an axis by another name."""
    if not behind.shape:
        return True
    return len(before.shape) == len(behind.shape) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(before.shape, behind.shape, strict=True)
    )


def _words(name: str) -> list[str]:
    """`cachedKey.0` -> cached, key, 0; `stateN` -> state, n."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return [w.lower() for w in re.split(r"[^A-Za-z0-9]+", spaced) if w]


def _stems(name: str) -> set[tuple[str, ...]]:
    """What is left of a name without the words for before and behind: `h0`, `h_in`, `hx`, `hn` are all h."""
    words = _words(name)
    stems = {tuple(w for w in words if w not in _BEFORE | _BEHIND)}
    # One word for before or behind may be a part of the name: last_label, past_key.
    stems |= {tuple(words)} | {tuple(w for w in words if w not in _BEHIND)}
    if words and re.fullmatch(r"[a-z]+[0nxy]", words[-1]) and len(words[-1]) == 2:
        stems.add((*words[:-1], words[-1][:-1]))
    if len(words) > 1 and words[-1] in ("0", "n"):
        stems.add(tuple(words[:-1]))
    return stems - {()}


def _closeness(before: str, behind: str) -> tuple[float, set[str]]:
    """The share of words, numbers among them, that two names have in common; and which."""
    a = [w for w in _words(before) if w not in _BEFORE | _BEHIND]
    b = [w for w in _words(behind) if w not in _BEFORE | _BEHIND]
    common = [w for w in a if w in b]
    return 2 * len(common) / max(1, len(a) + len(b)), set(common)


def _some_left(facts: Facts, wishes: Wishes, pairs: list[StatePair], notes: Notes) -> list[StatePair]:
    """A model takes something and gives something: if all were states, those of which the names say least
    are none."""
    for tensors, end in ((facts.inputs, "input"), (facts.outputs, "output")):
        states = {getattr(p, end).name for p in pairs}
        if any(t.name not in states and t.shape for t in tensors):
            continue
        loose = [p for p in pairs if p.input.name not in wishes.states]
        if not loose:
            continue
        least = min(loose, key=lambda p: bool(set(_words(p.input.name)) & _STATE_WORDS))
        pairs = [p for p in pairs if p is not least]
        names = (f"state {least.input.name!r}", f"input {least.input.name!r}")
        notes.guesses = [g for g in notes.guesses if g.subject not in names]
        notes.guess(names[1], "what clients send", "else nothing was left for them")
    return pairs


def _shape(tensor: GraphTensor) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in tensor.shape) + "]"


def _listed(words: set[str]) -> str:
    return " and ".join(repr(w) for w in sorted(words))


def _told(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" if abs(v) < 1e6 else str(v) for v in values)
