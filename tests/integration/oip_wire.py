"""The Open Inference Protocol as its messages, for tests: requests, one stream, and what comes back."""

from __future__ import annotations

import queue
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from tenuto.oip import inference_pb2 as pb
from tenuto.oip import inference_pb2_grpc

_SECONDS = 30.0
_DATATYPES = {"float32": "FP32", "uint8": "UINT8", "int64": "INT64", "int32": "INT32"}


def stub(channel: grpc.Channel) -> Any:
    make: Any = inference_pb2_grpc.GRPCInferenceServiceStub
    return make(channel)


def parameter(value: object) -> pb.InferParameter:
    fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    made = pb.InferParameter()
    setattr(made, fields[type(value)], value)
    return made


def packed(*elements: bytes) -> bytes:
    """Elements of BYTES."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def ask(
    model: str,
    values: object = (),
    *,
    name: str = "x",
    request_id: str = "",
    version: str = "",
    shape: list[int] | None = None,
    dtype: str = "float32",
    **parameters: object,
) -> pb.ModelInferRequest:
    """A request of one input; a row of values is `[1, n]`."""
    array = np.array(values, dtype)
    shape = list(array.shape) if shape is None else shape
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    request.inputs.add(name=name, datatype=_DATATYPES[dtype], shape=shape)
    request.raw_input_contents.append(array.tobytes())
    for key, value in parameters.items():
        request.parameters[key].CopyFrom(parameter(value))
    return request


def step(
    sequence: int | str, *values: float, model: str = "accumulator", **more: Any
) -> pb.ModelInferRequest:
    """One of a sequence; `start` and `end` are its flags."""
    flags = {f"sequence_{flag}": more.pop(flag) for flag in ("start", "end", "step") if flag in more}
    return ask(model, [values], sequence_id=sequence, **flags, **more)


def floats(response: pb.ModelInferResponse, index: int = 0) -> NDArray[np.float32]:
    """One output in its own shape."""
    shape = tuple(response.outputs[index].shape)
    return np.frombuffer(response.raw_output_contents[index], np.float32).reshape(shape)


class InferStream:
    """One ModelStreamInfer."""

    def __init__(self, channel: grpc.Channel, **metadata: str) -> None:
        self._requests: queue.SimpleQueue[pb.ModelInferRequest | None] = queue.SimpleQueue()
        self.call = stub(channel).ModelStreamInfer(
            iter(self._requests.get, None), timeout=_SECONDS, metadata=tuple(metadata.items())
        )

    def __enter__(self) -> InferStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self.call.cancel()

    def send(self, *requests: pb.ModelInferRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def half_close(self) -> None:
        self._requests.put(None)

    def next(self) -> pb.ModelStreamInferResponse:
        response: pb.ModelStreamInferResponse = next(self.call)
        return response

    def totals(self, count: int) -> list[list[float]]:
        """The next answers, which are no errors."""
        answers = [self.next() for _ in range(count)]
        assert [answer.error_message for answer in answers] == [""] * count
        return [floats(answer.infer_response).ravel().tolist() for answer in answers]

    def rest(self) -> Iterator[pb.ModelStreamInferResponse]:
        yield from self.call
