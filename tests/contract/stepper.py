"""How the models of others are tried: alone, as their authors run them, and served, in company, cut anywhere
and moved between servers.

"Alone" is ONNX Runtime on the file, one row, one frame after another, the states carried by hand; of our code
it uses what the manifest says, and nothing that serves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from tenuto.serving.manifest import Input, Manifest, Output, State, Value
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb
from tests.integration.wire import Conversation, array, chunk, connect, ending, opening, tensor

Array = NDArray[Any]
Arrays = Mapping[str, Array]
WINDOW = 4  # unanswered chunks that a server allows


class Stepper:
    """One file as its author would run it."""

    def __init__(self, model: bytes, manifest: dict[str, Any]) -> None:
        self.manifest = Manifest.model_validate({"name": "stepped"} | manifest)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # or it would tell of wrong words in the file
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def draw(self, chance: np.random.Generator, frames: int, over: int = 0) -> dict[str, Array]:
        """Inputs of so many frames and `over` samples more, as a client has them; of a model without time, so
        many steps, one behind the other."""
        drawn: dict[str, Array] = {}
        for spec in self.manifest.inputs:
            length = frames * spec.multiple + over
            shape = [length if a == spec.time_axis else d for a, d in enumerate(spec.shape)]
            if spec.batch_axis is not None:
                del shape[spec.batch_axis]
            if spec.time_axis is None:
                shape.insert(0, length)
            drawn[spec.name] = chance.normal(size=[int(d) for d in shape]).astype(spec.dtype)
        return drawn

    def alone(
        self, inputs: Arrays, chosen: Mapping[str, float] | None = None, given: Arrays | None = None
    ) -> list[Arrays]:
        """What each frame gives, as a client would get it: without the batch axis. `chosen` are constants,
        `given` first states."""
        manifest = self.manifest
        states = {s.input: self._whole(s, _first(s, given or {})) for s in manifest.states}
        fixed = {c.name: _constant(c.shape, c.dtype, c.value) for c in manifest.constants}
        for name, number in (chosen or {}).items():
            fixed[name] = np.full_like(fixed[name], number)
        names = [o.name for o in manifest.outputs] + [s.output for s in manifest.states]
        answers: list[Arrays] = []
        for feeds in self._frames(inputs):
            results = dict(zip(names, self._session.run(names, feeds | states | fixed), strict=True))
            states = {s.input: results[s.output] for s in manifest.states}
            answers.append({o.name: _row(o, results[o.name]) for o in manifest.outputs})
        return answers

    def _frames(self, inputs: Arrays) -> Iterator[dict[str, Array]]:
        columns = [list(self._cut(spec, inputs[spec.name])) for spec in self.manifest.inputs]
        for column in zip(*columns, strict=True):
            feeds = {}
            for spec, frame in zip(self.manifest.inputs, column, strict=True):
                feeds[spec.name] = self._whole(spec, frame)
                if spec.lengths:
                    feeds[spec.lengths] = np.array([spec.left_context + spec.multiple], np.int32)
            yield feeds

    def _cut(self, spec: Input, samples: Array) -> Iterator[Array]:
        """Each frame with the samples before it."""
        if spec.time_axis is None:
            yield from samples
            return
        time, size = client_axis(spec), spec.multiple
        behind = -samples.shape[time] % size if spec.tail == "pad" else 0
        before = [(spec.left_context if a == time else 0, behind if a == time else 0)
                  for a in range(samples.ndim)]  # fmt: skip
        whole = np.pad(samples, before)  # of zeros
        for at in range(0, whole.shape[time] - spec.left_context - size + 1, size):
            yield whole.take(range(at, at + spec.left_context + size), time)

    def _whole(self, spec: Input | State, row: Array) -> Array:
        """With its batch axis, as many rows as the file insists on."""
        if spec.batch_axis is None:
            return row
        return np.repeat(
            np.expand_dims(row, spec.batch_axis), self.manifest.fixed_batch or 1, spec.batch_axis
        )

    def answers(self, frames: list[Arrays], pieces: list[Arrays]) -> list[list[Arrays]]:
        """Per chunk, what a client must get for it, part by part."""
        first = self.manifest.inputs[0]
        samples, begin, told = 0, 0, []
        for piece in pieces:
            samples += piece[first.name].shape[client_axis(first)] if first.time_axis is not None else 1
            end = samples // first.multiple
            told.append([self._together(frames[begin:end])])
            begin = end
        if frames[begin:]:  # padded at the end
            told[-1].append(self._together(frames[begin:]))
        return told

    def _together(self, frames: list[Arrays]) -> Arrays:
        if not frames:
            return {}
        return {
            o.name: np.concatenate([f[o.name] for f in frames], client_axis(o))
            if o.time_axis is not None
            else frames[-1][o.name]
            for o in self.manifest.outputs
        }


def client_axis(spec: Input | Output) -> int:
    """The time axis where there is no batch axis."""
    assert spec.time_axis is not None
    return spec.time_axis - (spec.batch_axis is not None and spec.batch_axis < spec.time_axis)


def _row(spec: Output, result: Array) -> Array:
    return result if spec.batch_axis is None else result.take(0, spec.batch_axis)


def _first(state: State, given: Arrays) -> Array:
    if state.init == "given":
        return given[state.input]
    if state.init == "zeros":
        return np.zeros(state.slot_shape, state.dtype)
    values = state.init.value if isinstance(state.init, Value) else state.init
    return _constant(state.slot_shape, state.dtype, values)


def _constant(shape: tuple[int, ...], dtype: str, values: float | tuple[float, ...]) -> Array:
    if isinstance(values, tuple):
        return np.array(values, dtype).reshape(shape)
    return np.full(shape, values, dtype)


@dataclass(frozen=True)
class Caller:
    """One sequence: its model, its chunks, what it says at Open, and by how much its company may change its
    answers."""

    model: str
    pieces: list[Arrays]
    opening: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0

    def chunk(self, step: int, key: int = 0) -> pb.Event:
        sent = self.pieces[step - 1]
        return chunk(step, *(tensor(a, a.dtype.name, name) for name, a in sent.items()), sequence=key)


def cut(stepper: Stepper, inputs: Arrays, longest: int, chance: random.Random) -> list[Arrays]:
    """Chunks of 1 to `longest` samples of the first input, many of them short; of a model without time, its
    steps."""
    specs = stepper.manifest.inputs
    if specs[0].time_axis is None:
        return [{s.name: inputs[s.name][at] for s in specs} for at in range(len(inputs[specs[0].name]))]
    pieces: list[Arrays] = []
    at, end = 0, inputs[specs[0].name].shape[client_axis(specs[0])]
    while at < end:
        until = min(end, at + round(longest ** chance.random()))
        pieces.append({s.name: inputs[s.name].take(range(at, until), client_axis(s)) for s in specs})
        at = until
    return pieces


def received(output: pb.Output) -> Arrays:
    return {message.name: array(message) for message in output.outputs}


def together(server: Server, callers: list[Caller], chance: random.Random) -> list[list[list[Arrays]]]:
    """Per caller and chunk, the parts of the answer. All on one stream, in random order and company."""
    got: list[list[list[Arrays]]] = [[] for _ in callers]
    sent, open_ = [0 for _ in callers], set(range(len(callers)))
    with connect(server.port) as channel, Conversation(channel) as conversation:
        conversation.send(*(opening(c.model, key, **c.opening) for key, c in enumerate(callers)))
        while open_:
            ready = [k for k in sorted(open_) if sent[k] <= len(callers[k].pieces)]
            ready = [k for k in ready if sent[k] - len(got[k]) < WINDOW]
            events = []
            for key in chance.sample(ready, min(len(ready), chance.randint(1, 8))):
                sent[key] += 1
                over = sent[key] > len(callers[key].pieces)
                events.append(ending(key) if over else callers[key].chunk(sent[key], key))
            if events:
                conversation.send(*events)
                if chance.random() < 0.5:
                    continue
            reply = conversation.read()
            assert not reply.HasField("failed"), reply.failed
            if reply.HasField("output"):
                _note(got[reply.sequence], reply.output)
            elif reply.HasField("closed"):
                assert reply.closed.reason == pb.END
                open_.discard(reply.sequence)
    return got


def _note(answers: list[list[Arrays]], output: pb.Output) -> None:
    if output.part == 0:
        answers.append([])
    assert (output.step, output.part) == (len(answers), len(answers[-1]))
    answers[-1].append(received(output))


def moved(servers: list[Server], callers: list[Caller], seed: int) -> list[list[list[Arrays]]]:
    """As `together`, but each caller's connection is lost again and again, and it goes on by its last token
    on whichever server it meets."""
    walks = [_Walk(servers, caller, random.Random(seed + i)) for i, caller in enumerate(callers)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(_Walk.walk, walks))
    assert sum(walk.moves for walk in walks) > len(walks), "they hardly moved"
    return got


class _Walk:
    """One caller that changes servers at random."""

    def __init__(self, servers: list[Server], caller: Caller, chance: random.Random) -> None:
        self._servers, self._caller, self._chance = servers, caller, chance
        self._token, self._token_step = b"", 0
        self._parts: dict[tuple[int, int], Arrays] = {}
        self.moves = 0

    def walk(self) -> list[list[Arrays]]:
        done = False
        while not done:
            server = self._chance.choice(self._servers)
            with connect(server.port) as channel, Conversation(channel) as conversation:
                done = self._stay(conversation)
            self.moves += 1
        answers: list[list[Arrays]] = [[] for _ in self._caller.pieces]
        for step, part in sorted(self._parts):
            answers[step - 1].append(self._parts[step, part])
        return answers

    def _stay(self, conversation: Conversation) -> bool:
        """Goes on until the end, or until the connection is lost. Whether it is at the end."""
        caller, every = self._caller, self._chance.randint(1, 3)
        words = caller.opening | {"resume_token": self._token, "checkpoint_every": every}
        conversation.send(opening(caller.model, **words))
        opened = self._until(conversation, "opened").opened
        assert opened.next_step == self._token_step + 1
        for step in range(opened.next_step, len(caller.pieces) + 1):
            conversation.send(caller.chunk(step))
            self._until(conversation, "output")
            if self._chance.random() < 0.2:
                return False
        conversation.send(ending())
        assert self._until(conversation, "closed").closed.reason == pb.END
        return True

    def _until(self, conversation: Conversation, kind: str) -> pb.Reply:
        while True:
            reply = conversation.read()
            assert not reply.HasField("failed"), reply.failed
            if reply.HasField("checkpoint"):
                self._token, self._token_step = reply.checkpoint.resume_token, reply.checkpoint.step
            if reply.HasField("output"):
                place, values = (reply.output.step, reply.output.part), received(reply.output)
                known = self._parts.setdefault(place, values)
                assert_close(values, known, self._caller.tolerance)  # again: the same again
            if reply.WhichOneof("reply") == kind:
                return reply


def assert_close(got: Arrays, expected: Arrays, tolerance: float = 0.0) -> None:
    """Every bit, unless there is a tolerance."""
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(
            got[name], expected[name], rtol=0, atol=tolerance, err_msg=name, strict=True
        )


def assert_answers(got: list[list[Arrays]], expected: list[list[Arrays]], tolerance: float = 0.0) -> None:
    """Each chunk got its own answer."""
    assert [len(parts) for parts in got] == [len(parts) for parts in expected]
    for parts, others in zip(got, expected, strict=True):
        for one, other in zip(parts, others, strict=True):
            assert_close(one, other, tolerance)
