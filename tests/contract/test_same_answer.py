"""The first promise: alone or together, the same answer, bit for bit on one kind of CPU.

"Alone" is ONNX Runtime on the exported file, one row, the whole input at once, without any code of ours.
"Together" is the server: all sequences at once over several streams, each cut into random chunks.
"""

from __future__ import annotations

import queue
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings, strategies
from numpy.typing import NDArray

from tenuto.serving.manifest import Manifest
from tenuto.serving.server import Server
from tenuto.training.datasets import etth1, fsdd
from tenuto.training.datasets.store import DataUnavailable
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys
from tests.integration.running import ALL_TRANSPORTS, TRANSPORTS, engine_of, serving
from tests.integration.wire import (
    PATIENCE_SECONDS,
    array,
    chunk,
    connect,
    ending,
    opening,
    stub,
    tensor,
)

EXPORTED = Path(__file__).parents[2] / "exported"
STREAMS = 4
Array = NDArray[Any]
Outputs = dict[str, Array]


@pytest.fixture(scope="module", params=ALL_TRANSPORTS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(EXPORTED, vetted=True, threads=0, transport=request.param) as server:
        yield server


def alone(model: str, samples: Array) -> Outputs:
    """The whole of one input in one run of the file; the tail that fills no frame is left out."""
    folder = EXPORTED / model / "1"
    manifest = Manifest.parse((folder / "manifest.json").read_text(), model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    spec = manifest.inputs[0]
    assert manifest.stateful
    assert spec.lengths
    assert (spec.time_axis, len(manifest.inputs)) == (1, 1)
    whole = samples[: len(samples) // spec.multiple * spec.multiple]
    feeds: dict[str, Any] = {spec.name: whole[None], spec.lengths: np.array([len(whole)], np.int32)}
    for state in manifest.states:
        assert state.init == "zeros"
        feeds[state.input] = np.zeros([d if isinstance(d, int) else 1 for d in state.shape], state.dtype)
    names = [o.name for o in manifest.outputs]
    return {n: value[0] for n, value in zip(names, session.run(names, feeds), strict=True)}


def cut(samples: Array, longest: int, chance: random.Random) -> list[Array]:
    """Chunks of random lengths, 1 to `longest` samples."""
    chunks, at = [], 0
    while at < len(samples):
        length = chance.randint(1, longest)
        chunks.append(samples[at : at + length])
        at += length
    return chunks


def stream(
    port: int, model: str, pieces: dict[int, list[Array]], chance: random.Random
) -> dict[int, list[pb.Output]]:
    """All sequences of one gRPC stream: events in random order and company, at most four unanswered."""
    requests: queue.SimpleQueue[pb.StreamRequest | None] = queue.SimpleQueue()
    outputs: dict[int, list[pb.Output]] = {key: [] for key in pieces}
    sent, answered, open_ = dict.fromkeys(pieces, 0), dict.fromkeys(pieces, 0), set(pieces)
    with connect(port) as channel:
        replies = stub(channel).Stream(iter(requests.get, None), timeout=PATIENCE_SECONDS)
        requests.put(pb.StreamRequest(events=[opening(model, key) for key in pieces]))
        while open_:
            ready = deque(k for k in sorted(open_) if sent[k] <= len(pieces[k]) and sent[k] - answered[k] < 4)
            events = [
                _next(k, pieces[k], sent) for k in chance.sample(ready, min(len(ready), chance.randint(1, 8)))
            ]
            if events:
                requests.put(pb.StreamRequest(events=events))
                if chance.random() < 0.5:
                    continue
            for reply in next(replies).replies:
                assert not reply.HasField("failed"), reply.failed
                if reply.HasField("output"):
                    answered[reply.sequence] += 1
                    outputs[reply.sequence].append(reply.output)
                elif reply.HasField("closed"):
                    assert reply.closed.reason == pb.END
                    open_.discard(reply.sequence)
        requests.put(None)
        assert list(replies) == []
    return outputs


def _next(key: int, pieces: list[Array], sent: dict[int, int]) -> pb.Event:
    sent[key] += 1
    if sent[key] > len(pieces):
        return ending(key)
    piece = pieces[sent[key] - 1]
    return chunk(sent[key], tensor(piece, piece.dtype.name), sequence=key)


def together(port: int, model: str, inputs: list[Array], longest: int, seed: int) -> list[Outputs]:
    """Every input as one sequence, all at once; per input the outputs of its chunks, put together."""
    chance = random.Random(seed)
    pieces = {i: cut(samples, longest, chance) for i, samples in enumerate(inputs)}
    shares = [{i: pieces[i] for i in pieces if i % STREAMS == s} for s in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        runs = [
            pool.submit(stream, port, model, share, random.Random(seed + s)) for s, share in enumerate(shares)
        ]
    got = {key: outputs for run in runs for key, outputs in run.result().items()}
    for key, outputs in got.items():
        assert [o.step for o in outputs] == list(range(1, len(pieces[key]) + 1))
    return [_joined(got[i]) for i in range(len(inputs))]


def _joined(outputs: list[pb.Output]) -> Outputs:
    columns: dict[str, list[Array]] = {}
    for output in outputs:
        for message in output.outputs:
            columns.setdefault(message.name, []).append(array(message))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def assert_same(got: list[Outputs], expected: list[Outputs]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name, strict=True)


def assert_batched(server: Server, model: str) -> None:
    metrics = engine_of(server, model).metrics
    assert metrics.batch_size.total > 2 * metrics.batches, "the sequences did not meet in batches"


@pytest.mark.parametrize("longest", [300, 2000])
def test_sixty_four_recordings_together_equal_each_alone(server: Server, longest: int) -> None:
    """Served, concurrent, randomly chunked and interleaved = run alone and whole. All outputs, every bit."""
    try:
        recordings = fsdd.recordings("test")[::4][:64]
    except DataUnavailable as missing:
        pytest.skip(str(missing))
    assert len(recordings) == 64
    inputs = [r.pcm for r in recordings]
    got = together(server.port, "spoken-digits", inputs, longest, seed=longest)
    assert_same(got, [alone("spoken-digits", pcm) for pcm in inputs])
    assert_batched(server, "spoken-digits")


def test_synthetic_sound_together_equals_each_alone(server: Server) -> None:
    """The same without any data set, so that it never skips; up to two seconds each."""
    draw = np.random.default_rng(5)
    inputs = [draw.integers(-9000, 9000, draw.integers(160, 16000)).astype(np.int16) for _ in range(32)]
    got = together(server.port, "spoken-digits", inputs, 900, seed=3)
    assert_same(got, [alone("spoken-digits", pcm) for pcm in inputs])


def test_sensors_together_equal_each_alone(server: Server) -> None:
    """Hourly series of different lengths into the forecaster."""
    try:
        values = etth1.series().values
    except DataUnavailable as missing:
        pytest.skip(str(missing))
    inputs = [np.ascontiguousarray(values[at : at + 90 + at // 200]) for at in range(0, 16000, 1000)]
    got = together(server.port, "oil-temperature", inputs, 40, seed=7)
    assert_same(got, [alone("oil-temperature", series) for series in inputs])
    assert_batched(server, "oil-temperature")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ragged", [True, False], ids=["lengths", "grouped"])
def test_sums_do_not_leak(tmp_path: Path, transport: str, ragged: bool) -> None:
    """The accumulator's reply is the sum of all that its sequence ever sent: cross-talk would be a number."""
    toys.write(tmp_path, "accumulator", toys.accumulator(ragged=ragged))
    draw = np.random.default_rng(11)
    inputs = [draw.integers(-50, 50, draw.integers(1, 400)).astype(np.float32) for _ in range(48)]
    with serving(tmp_path, transport=transport) as server:
        got = together(server.port, "accumulator", inputs, 25, seed=13)
        engine_of(server, "accumulator").check()
    for outputs, sent in zip(got, inputs, strict=True):
        np.testing.assert_array_equal(outputs["y"], np.cumsum(sent, dtype=np.float32))


# Per sequence, the lengths of its chunks.
_CUTS = strategies.lists(strategies.lists(strategies.integers(0, 40), max_size=6), min_size=1, max_size=9)


@pytest.fixture(scope="module", params=TRANSPORTS)
def sums(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("sums")
    toys.write(root, "accumulator", toys.accumulator())
    toys.write(root, "grouped", toys.accumulator(ragged=False))
    toys.write(root, "fours", toys.accumulator(x={"chunk": {"multiple": 4}}))
    with serving(root, transport=request.param) as server:
        yield server


@pytest.mark.parametrize("model", ["accumulator", "grouped", "fours"])
@settings(max_examples=15)
@given(cuts=_CUTS)
def test_any_chunking_gives_the_running_sums(sums: Server, model: str, cuts: list[list[int]]) -> None:
    """Chunk lengths as hypothesis likes them, empty ones too, and what is left over at the end dropped."""
    eaten = 4 if model == "fours" else 1
    inputs = [np.arange(sum(lengths), dtype=np.float32) + i for i, lengths in enumerate(cuts)]
    pieces = {i: np.split(inputs[i], np.cumsum(lengths)[:-1]) for i, lengths in enumerate(cuts) if lengths}
    got = stream(sums.port, model, pieces, random.Random(0))
    for i in pieces:
        whole = inputs[i][: len(inputs[i]) // eaten * eaten]
        y = _joined(got[i]).get("y", np.zeros(0, np.float32))
        np.testing.assert_array_equal(y, np.cumsum(whole, dtype=np.float32))


def test_a_digit_is_the_same_in_any_batch(server: Server) -> None:
    """Stateless rows: one by one, in batches of the caller, and in a stream = the file on each row alone."""
    images = np.random.default_rng(17).integers(0, 256, (70, 28, 28), np.uint8)
    session = onnxruntime.InferenceSession(
        EXPORTED / "digits/1/model.onnx", providers=["CPUExecutionProvider"]
    )
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    name = session.get_inputs()[0].name
    expected = np.concatenate(
        [session.run(["log_probabilities"], {name: image[None]})[0] for image in scaled]
    )
    with connect(server.port) as channel:
        for size in (1, 7, 70):
            parts = [
                stub(channel).Predict(
                    pb.PredictRequest(model="digits", inputs=[tensor(images[at : at + size], "uint8")])
                )
                for at in range(0, 70, size)
            ]
            np.testing.assert_array_equal(np.concatenate([array(p.outputs[0]) for p in parts]), expected)
    streamed = together(server.port, "digits", [images] * 5, 33, seed=19)
    for outputs in streamed:
        np.testing.assert_array_equal(outputs["log_probabilities"], expected)
