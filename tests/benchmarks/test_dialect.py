"""Other protocols of the load generator: its messages are what they should be, and sequences are ended."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from benchmarks import dialect, recording, tracks
from benchmarks.load import Job, measure
from benchmarks.peers import predictions
from benchmarks.scenario import Party
from tenuto.oip import inference_pb2 as oip

ENTRY = ".torchserve.Request.InputEntry"
Seen = list[tuple[str, bool, bool]]  # sequence, whether it begins, whether it ends
BYTES, STRING, MESSAGE = (
    descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{n}") for n in ("BYTES", "STRING", "MESSAGE")
)


def torchserve_messages() -> tuple[Any, Any]:
    """PredictionsRequest and PredictionResponse as protobuf itself reads them."""
    file = descriptor_pb2.FileDescriptorProto(name="torchserve.proto", package="torchserve", syntax="proto3")
    request = file.message_type.add(name="Request")
    request.field.add(name="model_name", number=1, type=STRING, label=1)
    request.field.add(
        name="input", number=3, type=MESSAGE, label=3, type_name=".torchserve.Request.InputEntry"
    )
    request.field.add(name="sequence_id", number=4, type=STRING, label=1)
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=STRING, label=1)
    entry.field.add(name="value", number=2, type=BYTES, label=1)
    response = file.message_type.add(name="Response")
    response.field.add(name="prediction", number=1, type=BYTES, label=1)
    response.field.add(name="sequence_id", number=2, type=STRING, label=1)
    response.field.add(name="status", number=3, type=BYTES, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = [pool.FindMessageTypeByName(f"torchserve.{name}") for name in ("Request", "Response")]
    return message_factory.GetMessageClass(found[0]), message_factory.GetMessageClass(found[1])


Request, Response = torchserve_messages()


def doubled(data: bytes) -> bytes:
    answer: bytes = (2 * np.frombuffer(data, np.float32)).tobytes()
    return answer


def triton(message: bytes, seen: Seen, *, unary: bool) -> bytes:
    request = oip.ModelInferRequest.FromString(message)
    given = request.parameters
    if given:
        number = str(given["sequence_id"].int64_param)
        seen.append((number, given["sequence_start"].bool_param, given["sequence_end"].bool_param))
    answer = oip.ModelInferResponse(raw_output_contents=[doubled(request.raw_input_contents[0])])
    told = answer if unary else oip.ModelStreamInferResponse(infer_response=answer)
    return told.SerializeToString()


def mlserver(message: bytes, seen: Seen, *, unary: bool) -> bytes:
    request = oip.ModelInferRequest.FromString(message)
    assert not request.parameters
    given = request.inputs[0].parameters
    if given:
        number = str(given["sequence_id"].int64_param)
        seen.append((number, given["sequence_start"].bool_param, given["sequence_end"].bool_param))
    answer = oip.ModelInferResponse(raw_output_contents=[doubled(request.raw_input_contents[0])])
    return answer.SerializeToString()


def torchserve(message: bytes, seen: Seen, *, unary: bool) -> bytes:
    request = Request.FromString(message)
    if request.sequence_id:
        seen.append((request.sequence_id, "first" in request.input, "last" in request.input))
    answer: bytes = Response(prediction=doubled(request.input["data"])).SerializeToString()
    return answer


SERVERS: dict[str, Callable[..., bytes]] = {
    dialect.OIP: triton,
    dialect.MLSERVER: mlserver,
    dialect.TORCHSERVE: torchserve,
}


@contextmanager
def serving(name: str, seen: Seen) -> Iterator[int]:
    spoken, answer = dialect.DIALECTS[name], SERVERS[name]

    def stream(requests: Iterator[bytes], context: object) -> Iterator[bytes]:
        for request in requests:
            yield answer(request, seen, unary=False)

    def unary(request: bytes, context: object) -> bytes:
        return answer(request, seen, unary=True)

    server = grpc.server(ThreadPoolExecutor(8))
    _, service, stream_name = spoken.stream.split("/")
    handlers: dict[str, Any] = {
        stream_name: grpc.stream_stream_rpc_method_handler(stream),
        spoken.unary.split("/")[2]: grpc.unary_unary_rpc_method_handler(unary),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inputs = np.random.default_rng(0).standard_normal((8, 8, 3), np.float32)
    tracks.save(tmp_path / recording.file(Party(1, 2)), "any", inputs, 2 * inputs, [[2] * 4] * 8)
    rows = recording.file(Party(1, 1, tracks="images"))
    tracks.save(tmp_path / rows, "rows", inputs, 2 * inputs, [[1] * 8] * 8, stateless=True)
    return tmp_path


@pytest.mark.parametrize("name", dialect.DIALECTS)
def test_sequences_begin_and_end_once_and_are_checked(name: str, folder: Path) -> None:
    seen: Seen = []
    with serving(name, seen) as port:
        found = measure(Job(os.getpid(), port, str(folder), True, 0.0, 0.2, (Party(3, 2, dialect=name),)))
    assert found.first.messages > 0
    assert found.checked == 3 * 4
    for number in ("1", "2", "3"):
        begins, ends = zip(*[marks for sequence, *marks in seen if sequence == number], strict=True)
        assert begins == (True, *(False,) * (len(begins) - 1))
        assert ends == (*(False,) * (len(ends) - 1), True)


@pytest.mark.parametrize("name", dialect.DIALECTS)
@pytest.mark.parametrize("unary", [False, True])
def test_images_are_of_no_sequence(name: str, unary: bool, folder: Path) -> None:
    seen: Seen = []
    images = Party(3, 1, tracks="images", unary=unary, dialect=name)
    with serving(name, seen) as port:
        found = measure(Job(os.getpid(), port, str(folder), True, 0.0, 0.2, (images,)))
    assert found.checked >= found.first.messages > 0
    assert not seen


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000])
def test_torchserves_messages_are_what_protobuf_makes_of_them(size: int) -> None:
    data = os.urandom(size)
    request = Request.FromString(predictions.request("lstm", {"data": data, "first": b"1"}, "7"))
    assert (request.model_name, dict(request.input), request.sequence_id) == (
        "lstm",
        {"data": data, "first": b"1"},
        "7",
    )
    response = Response(prediction=data, sequence_id="7").SerializeToString()
    assert predictions.prediction(response) == data


def test_what_a_server_refuses_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="TorchServe refused a request: b'no such model'"):
        predictions.prediction(Response(status=b"no such model").SerializeToString())
    told = oip.ModelStreamInferResponse(error_message="no such model")
    spoken = dialect.OpenInference(tracks.Tracks("any", [], []))
    with pytest.raises(RuntimeError, match="a request was refused: no such model"):
        spoken.answer(told.SerializeToString(), unary=False)
