"""The client against a real gRPC server, on whatever grpcio, protobuf and numpy are installed.

`make test-oldest` runs this, and the client's own tests, on the oldest versions allowed and on the
newest; `make test` runs it on the pinned ones.
"""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto import Client, InvalidInput, Unavailable
from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1 import tenuto_pb2_grpc


class RunningSum(tenuto_pb2_grpc.TenutoServicer):
    """Predict doubles its rows; a sequence's answer is the sum of all that it ever sent."""

    def Predict(self, request: Any, context: Any) -> Any:
        if request.model != "double":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no rows for {request.model}")
        rows = np.frombuffer(request.inputs[0].data, "<f4").reshape(request.inputs[0].shape)
        return pb.PredictResponse(outputs=[tensor("doubled", 2 * rows)], version=1)

    def Stream(self, requests: Any, context: Any) -> Iterator[Any]:
        total = np.float32(0)
        for request in requests:
            for event in request.events:
                reply = pb.Reply(sequence=event.sequence)
                if event.HasField("open"):
                    reply.opened.MergeFrom(pb.Opened(sequence_id="one", version=1, next_step=1, window=4))
                elif event.HasField("chunk"):
                    total += np.frombuffer(event.chunk.inputs[0].data, "<f4").sum()
                    output = pb.Output(step=event.chunk.step, last=True)
                    output.outputs.append(tensor("sum", np.array([total])))
                    reply.output.MergeFrom(output)
                else:
                    reply.closed.MergeFrom(pb.Closed(reason=pb.END))
                yield pb.StreamResponse(replies=[reply])


def tensor(name: str, values: Any) -> Any:
    data = values.astype("<f4").tobytes()
    return pb.Tensor(name=name, dtype="float32", shape=values.shape, data=data)


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        tenuto_pb2_grpc.add_TenutoServicer_to_server(RunningSum(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(grace=None).wait()


def test_a_batch_is_answered(address: str) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Client(address) as client:
        np.testing.assert_array_equal(client.predict("double", rows)["doubled"], 2 * rows)


def test_a_refusal_is_an_exception_of_its_own(address: str) -> None:
    with Client(address) as client, pytest.raises(InvalidInput, match="no rows for triple"):
        client.predict("triple", np.zeros((1, 1), np.float32))


def test_a_sequence_is_answered_step_by_step(address: str) -> None:
    sums = []
    with Client(address) as client, client.stream("sum") as stream:
        for value in (1, 2, 3):
            stream.send(np.array([value], np.float32))
            sums.append(float(next(stream)["sum"][0]))
        stream.end()
        assert list(stream) == []
    assert sums == [1, 3, 6]


def test_no_server_is_an_exception_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # free once the `with` is left
    with Client(f"127.0.0.1:{port}", timeout_seconds=5) as client, pytest.raises(Unavailable):
        client.predict("double", np.zeros((1, 1), np.float32))
