"""Models of the kinds that others bring: alone = together, any chunking = whole, and a sequence that changes
servers gets what it would have got. Every bit, but for one operator.
"""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tenuto import Client, InvalidInput
from tenuto.serving.repository import ModelFolder
from tenuto.serving.server import Server
from tests import lookalikes, toys
from tests.integration.running import TRANSPORTS, assert_nothing_is_left, serving
from tests.integration.wire import Conversation, checkpoint, chunk, connect, ending, opening, tensor

from .stepper import Arrays, Caller, Stepper, assert_answers, cut, moved, received, together

Answers = list[list[list[Arrays]]]  # by caller, chunk and part
OPSETS = (7, 8, 13, 17, 21, 26)
# By the name under which they are served.
STATEFUL = {
    "first-stage": lookalikes.enhancer(257, is_mask=True),
    "second-stage": lookalikes.enhancer(512, is_mask=False),
    "denoiser": lookalikes.denoiser(has_batch_axes=True),
    "denoiser-without-axes": lookalikes.denoiser(has_batch_axes=False),
    **{f"opset-{opset}": lookalikes.of_opset(opset) for opset in OPSETS},
    "meter": lookalikes.meter(),
    "primed": lookalikes.primed(),
    "time-major": lookalikes.time_major(),
    "fours": lookalikes.fours(),
    "thirds": lookalikes.thirds(),
    "undeclared": lookalikes.undeclared(),
    "equaliser": lookalikes.equaliser(),
    "enrolled": lookalikes.enrolled(),
}
# ONNX Runtime's operator RNN adds in another order for a row that has company, or more frames than one.
TOLERANCES = {f"opset-{opset}": 5e-7 for opset in OPSETS}
OTHERS = {"digit": lookalikes.digit(), "self-resetting": lookalikes.self_resetting()}


@pytest.fixture(scope="module", params=TRANSPORTS)
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """Two, with the same files and keys."""
    root = tmp_path_factory.mktemp("lookalikes")
    for name, made in (STATEFUL | OTHERS).items():
        toys.write(root / "models", name, made)
    keys = root / "keys"
    keys.write_text("5a" * 32)
    shared: dict[str, Any] = {"vetted": True, "transport": request.param, "token_key_file": keys}
    with serving(root / "models", **shared) as one, serving(root / "models", **shared) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def steppers() -> dict[str, Stepper]:
    return {name: Stepper(*made) for name, made in (STATEFUL | OTHERS).items()}


def crowd(name: str, stepper: Stepper, size: int, seed: int) -> tuple[list[Caller], Answers]:
    """Callers of different lengths, each cut in its own way, and what they must get."""
    draw, chance = np.random.default_rng(seed), random.Random(seed)
    callers, expected = [], []
    for i in range(size):
        inputs = stepper.draw(draw, frames=5 + 4 * i, over=i % stepper.manifest.inputs[0].multiple)
        words: dict[str, Any] = {}
        chosen, given = {}, {}
        if name == "equaliser":  # the first one chooses nothing
            chosen = ({}, {"volume": 2}, {"gains": 5}, {"gains": 3, "volume": 4})[i % 4]
            words["constants"] = chosen
        if name == "enrolled":
            given = {"voice": draw.normal(size=4).astype(np.float32)}
            words["initial"] = [tensor(given["voice"], "float32", "voice")]
        pieces = cut(stepper, inputs, 25, chance)
        callers.append(Caller(name, pieces, words, TOLERANCES.get(name, 0.0)))
        expected.append(stepper.answers(stepper.alone(inputs, chosen, given), pieces))
    return callers, expected


def assert_all(got: Answers, callers: list[Caller], expected: Answers) -> None:
    for caller, one, other in zip(callers, got, expected, strict=True):
        assert_answers(one, other, caller.tolerance)


@pytest.mark.parametrize("name", STATEFUL)
def test_alone_or_together_cut_anywhere(
    servers: list[Server], steppers: dict[str, Stepper], name: str
) -> None:
    callers, expected = crowd(name, steppers[name], size=8, seed=1)
    assert_all(together(servers[0], callers, random.Random(2)), callers, expected)
    assert_nothing_is_left(servers[0])


@pytest.mark.parametrize("name", STATEFUL)
def test_it_goes_on_where_it_was(servers: list[Server], steppers: dict[str, Stepper], name: str) -> None:
    callers, expected = crowd(name, steppers[name], size=6, seed=3)
    assert_all(moved(servers, callers, seed=4), callers, expected)
    for server in servers:
        assert_nothing_is_left(server)


def test_all_of_them_at_once(servers: list[Server], steppers: dict[str, Stepper]) -> None:
    """Nineteen models on one stream."""
    callers, expected = [], []
    for name in STATEFUL:
        more = crowd(name, steppers[name], size=2, seed=5)
        callers += more[0]
        expected += more[1]
    assert_all(together(servers[0], callers, random.Random(6)), callers, expected)


def test_two_stages_of_an_enhancement_work_on_one_sound(
    servers: list[Server], steppers: dict[str, Stepper]
) -> None:
    """The first masks a spectrum, the second takes the sound that its caller makes of it; both have answered
    before the next frame goes in."""
    blocks = np.random.default_rng(7).normal(size=(20, 512)).astype(np.float32)
    spectra = np.fft.rfft(blocks)
    magnitudes = np.abs(spectra).astype(np.float32)
    masks = [f["y"] for f in steppers["first-stage"].alone({"x": magnitudes})]
    sounds = [np.fft.irfft(m[0] * s).astype(np.float32) for m, s in zip(masks, spectra, strict=True)]
    expected = [f["y"] for f in steppers["second-stage"].alone({"x": np.array(sounds)})]
    got = []
    with (
        Client(f"127.0.0.1:{servers[0].port}") as client,
        client.stream("first-stage") as first,
        client.stream("second-stage") as second,
    ):
        for magnitude, spectrum in zip(magnitudes, spectra, strict=True):
            first.send(magnitude[None])
            sound = np.fft.irfft(next(first)["y"][0] * spectrum).astype(np.float32)
            second.send(sound[None])
            got.append(next(second)["y"])
    np.testing.assert_array_equal(got, expected)


def test_a_picture_is_the_same_in_any_batch_and_any_form(servers: list[Server]) -> None:
    """The graph takes one picture; a request brings as many as its caller has, as bytes or as files."""
    made, _ = OTHERS["digit"]
    pictures = np.random.default_rng(8).integers(0, 256, (7, 1, 28, 28), np.uint8)
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    floats = pictures.astype(np.float32)
    expected = np.concatenate([session.run(["scores"], {"picture": one[None]})[0] for one in floats])
    forms: list[Any] = [floats, pictures, [_png(one[0]) for one in pictures]]
    with Client(f"127.0.0.1:{servers[0].port}") as client:
        for form in forms:
            np.testing.assert_array_equal(client.predict("digit", form)["scores"], expected)
        np.testing.assert_array_equal(client.predict("digit", pictures[:1])["scores"], expected[:1])
        np.testing.assert_array_equal(client.predict("digit", _png(pictures[3, 0]))["scores"], expected[3:4])


def _png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    "constants", [{"volume": 3.0}, {"gains": 1.0}, {"echo": 1.0}], ids=["number", "tensor", "state"]
)
def test_what_a_model_does_not_let_its_callers_choose(servers: list[Server], constants: Any) -> None:
    with (
        Client(f"127.0.0.1:{servers[0].port}") as client,
        pytest.raises(InvalidInput, match=next(iter(constants))),
    ):
        client.stream("equaliser", constants=constants).__enter__()


def test_a_version_may_have_its_inputs_in_another_order(tmp_path: Path) -> None:
    """Inputs are bound by name: a sequence goes on, by its token, on a newer version whose graph has them in
    reverse."""
    older = toys.write(tmp_path / "old", "mixer", lookalikes.mixer(["left", "right", "total"]))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    made, manifest = lookalikes.mixer(["total", "right", "left"])
    taken = [ModelFolder("mixer", 1, older).read().fingerprint]
    toys.write(tmp_path / "new", "mixer", (made, manifest | {"resumes_from": taken}), version=2)
    keys = tmp_path / "keys"
    keys.write_text("5a" * 32)
    stepper = Stepper(made, manifest)
    inputs = stepper.draw(np.random.default_rng(10), frames=12)
    pieces = cut(stepper, inputs, 1, random.Random(0))
    expected = stepper.answers(stepper.alone(inputs), pieces)
    caller, token, got = Caller("mixer", pieces), b"", []
    for folder, steps in (("old", range(1, 7)), ("new", range(7, 13))):
        with (
            serving(tmp_path / folder, vetted=True, token_key_file=keys) as server,
            connect(server.port) as channel,
            Conversation(channel) as conversation,
        ):
            conversation.send(opening("mixer", resume_token=token))
            opened = conversation.opened()
            assert (opened.version, opened.next_step) == ({"old": 1, "new": 2}[folder], steps[0])
            for step in steps:
                conversation.send(caller.chunk(step))
                got.append([received(conversation.output(step))])
            conversation.send(checkpoint())
            token = conversation.read().checkpoint.resume_token
    assert_answers(got, expected)


def test_a_model_that_resets_itself_is_told_where_each_sequence_stands(servers: list[Server]) -> None:
    """START in the first run alone, and never again after a move; READY in all; END with the chunk that its
    caller calls the last; one number for each caller, wherever it is."""
    sums: list[list[float]] = [[] for _ in range(5)]
    callers: list[set[int]] = [set() for _ in range(5)]
    tokens = [b"" for _ in range(5)]
    for part, server in enumerate([*servers, servers[0]]):
        with connect(server.port) as channel, Conversation(channel) as conversation:
            for key in range(5):
                conversation.send(opening("self-resetting", key, resume_token=tokens[key]))
            for step in range(4 * part + 1, 4 * part + 5):
                for key in range(5):
                    conversation.send(chunk(step, [float(step + key)], sequence=key, last=step == 12))
            for key in range(5):
                conversation.send(checkpoint(key) if part < 2 else ending(key))
            tokens = _listen(conversation, sums, callers, rounds=5)
    for key in range(5):
        running = np.cumsum(np.arange(1, 13, dtype=np.float32) + key)
        running[-1] *= -1
        np.testing.assert_array_equal(sums[key], running)
    assert [len(numbers) for numbers in callers] == [1] * 5
    assert len(set.union(*callers)) == 5


def _listen(
    conversation: Conversation, sums: list[list[float]], callers: list[set[int]], rounds: int
) -> list[bytes]:
    """Reads until each sequence has its token, or is at its end; the tokens."""
    tokens: dict[int, bytes] = {}
    while len(tokens) < rounds:
        reply = conversation.read()
        assert not reply.HasField("failed"), reply.failed
        if reply.HasField("output"):
            answer = received(reply.output)
            sums[reply.sequence].append(float(answer["sum"][0]))
            callers[reply.sequence].add(int(answer["caller"][0]))
        elif not reply.HasField("opened"):
            tokens[reply.sequence] = reply.checkpoint.resume_token  # none at the end
    return [tokens[key] for key in range(rounds)]
