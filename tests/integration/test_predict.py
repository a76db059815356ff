"""One batch through a stateless model: joined, split, decoded, refused."""

from __future__ import annotations

import io
import struct
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb

from .running import Counting, Gate, engine_of, serving, wait_for
from .wire import Conversation, array, chunk, connect, opening, refused, stub, tensor

Code = grpc.StatusCode


def doubling(rows: int, first: float = 0.0) -> pb.PredictRequest:
    batch = np.arange(2 * rows, dtype="float32").reshape(rows, 2) + first
    return pb.PredictRequest(model="doubler", inputs=[tensor(batch)])


def assert_doubled(request: pb.PredictRequest, response: pb.PredictResponse) -> None:
    (output,) = response.outputs
    assert (output.name, output.dtype) == ("y", "float32")
    assert array(output).tolist() == (2 * array(request.inputs[0])).tolist()


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 30])
def test_a_batch_of_any_size_is_answered_whole(api: Any, rows: int) -> None:
    request = doubling(rows)
    response = api.Predict(request, timeout=30)
    if rows:
        assert_doubled(request, response)
    assert response.version == 1


def test_a_batch_over_the_models_limit_is_split(api: Any, server: Server) -> None:
    counting = Counting(server)
    request = doubling(30)  # max_batch is 8
    assert_doubled(request, api.Predict(request, timeout=30))
    assert counting.rise("tenuto_batches_total", model="doubler") == 4


def test_batches_of_many_callers_are_joined(api: Any, server: Server) -> None:
    counting, engine = Counting(server), engine_of(server, "doubler")
    requests = [doubling(1 + n % 3, first=10.0 * n) for n in range(12)]
    with Gate(engine) as gate:
        first = api.Predict.future(doubling(1), timeout=30)
        gate.wait_for_arrival()
        futures = [api.Predict.future(r, timeout=30) for r in requests]
        wait_for(lambda: len(engine._inbox) == len(requests), "the calls to arrive")
        gate.open()
        for request, future in zip(requests, futures, strict=True):
            assert_doubled(request, future.result())
        first.result()
    # 24 rows in batches of 8 at most, of which no row is padding.
    assert counting.rise("tenuto_batches_total", model="doubler") == 1 + 3
    assert counting.rise("tenuto_batch_size_sum", model="doubler") == 1 + 24


def test_calls_of_many_threads_get_their_own_answers(channel: grpc.Channel) -> None:
    api, wrong = stub(channel), []

    def call(first: float) -> None:
        for rows in (1, 2, 3):
            request = doubling(rows, first)
            got = array(api.Predict(request, timeout=30).outputs[0])
            if got.tolist() != (2 * array(request.inputs[0])).tolist():
                wrong.append(first)

    threads = [threading.Thread(target=call, args=(1000.0 * n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert wrong == []


def test_more_calls_than_may_wait_are_refused_at_once(toy_repository: Path, transport: str) -> None:
    with (
        serving(toy_repository, transport=transport, max_predicts=2) as server,
        connect(server.port) as channel,
    ):
        api, engine = stub(channel), engine_of(server, "doubler")
        with Gate(engine) as gate:
            waiting = [api.Predict.future(doubling(1), timeout=30)]
            gate.wait_for_arrival()
            waiting.append(api.Predict.future(doubling(1), timeout=30))
            wait_for(lambda: len(engine._inbox) == 1, "both calls to arrive")
            refusal = refused(api.Predict, doubling(1))
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "POOL_FULL")
            assert "2 Predict calls wait already" in refusal.text
            assert refusal.retry_after_ms > 0
            gate.open()
            for future in waiting:
                assert_doubled(doubling(1), future.result())
        assert_doubled(doubling(1), api.Predict(doubling(1), timeout=30))


def test_a_call_whose_deadline_passes_is_dropped_and_counted(api: Any, server: Server) -> None:
    counting, engine = Counting(server), engine_of(server, "doubler")
    with Gate(engine) as gate:
        first = api.Predict.future(doubling(1), timeout=30)
        gate.wait_for_arrival()
        refusal = refused(api.Predict, doubling(1), timeout=0.3)
        assert refusal.code is Code.DEADLINE_EXCEEDED
        wait_for(lambda: len(engine._inbox) == 2, "the server to notice")
        gate.open()
        assert_doubled(doubling(1), first.result())
    dropped = {"model": "doubler", "outcome": "dropped"}
    counting.wait_for_rise(1, "tenuto_chunks_total", **dropped)


# Images: the same pixels, however they are sent, give the same number.


def pixels(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, 4, 4), np.uint8)


def encoded(image: NDArray[np.uint8], encoding: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, encoding, **({"quality": 95} if encoding == "jpeg" else {}))
    return buffer.getvalue()


def packed(files: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(f)) + f for f in files)


def decoded(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)))


def brightness(images: NDArray[np.uint8]) -> list[float]:
    return [float(v) for v in (images.astype("float32") / 255).mean((1, 2), dtype="float32")]


def as_tensors(encoding: str, count: int) -> tuple[pb.Tensor, list[float]]:
    images = pixels(count)
    if encoding == "uint8":
        return tensor(images, "uint8"), brightness(images)
    if encoding == "float32":
        return tensor(images.astype("float32") / np.float32(255)), brightness(images)
    files = [encoded(image, encoding) for image in images]
    expected = brightness(np.stack([decoded(f) for f in files]))
    if count == 1:
        return pb.Tensor(dtype=encoding, data=files[0]), expected
    return pb.Tensor(dtype=encoding, shape=[count], data=packed(files)), expected


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("encoding", ["uint8", "float32", "png", "jpeg"])
def test_images_are_taken_raw_and_encoded_by_predict_and_on_a_stream(
    channel: grpc.Channel, conversation: Conversation, encoding: str, count: int
) -> None:
    images, expected = as_tensors(encoding, count)
    request = pb.PredictRequest(model="brightness", inputs=[images])
    unary = stub(channel).Predict(request, timeout=30).outputs[0]
    conversation.send(opening("brightness"), chunk(1, images))
    conversation.opened()
    streamed = conversation.output(1).outputs[0]

    assert list(unary.shape) == [count]
    assert array(unary).tolist() == pytest.approx(expected, abs=1e-6)
    assert streamed.data == unary.data


def test_a_colour_image_is_taken_as_grey_by_a_grey_model(api: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (51, 51, 51)).save(buffer, "png")
    request = pb.PredictRequest(model="brightness", inputs=[pb.Tensor(dtype="png", data=buffer.getvalue())])
    (mean,) = array(api.Predict(request, timeout=30).outputs[0]).tolist()
    assert mean == pytest.approx(0.2)
