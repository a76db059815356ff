"""What the load generator says in other protocols than ours: one chunk a message, and its answer."""

from typing import Protocol

from tenuto.oip import inference_pb2 as oip

from .peers import predictions
from .tracks import Chunk, Tracks

OIP, MLSERVER, TORCHSERVE = "oip", "mlserver", "torchserve"


class Dialect(Protocol):
    """Of one group, which has one sequence, or images."""

    stream: str  # the path of its method
    unary: str

    def question(self, sequence: int, chunk: Chunk, *, first: bool, last: bool) -> bytes:
        """The message with that chunk; a sequence's number is 1 or more, and of images nothing."""

    def answer(self, message: bytes, *, unary: bool) -> bytes:
        """The output's bytes.

        Raises: RuntimeError, if it is an error.
        """


class OpenInference:
    """Triton's form of the Open Inference Protocol."""

    stream = "/inference.GRPCInferenceService/ModelStreamInfer"
    unary = "/inference.GRPCInferenceService/ModelInfer"

    def __init__(self, tracks: Tracks) -> None:
        self.row = () if tracks.stateless else (1,)
        self.asked = oip.ModelInferRequest(model_name=tracks.model)
        self.asked.inputs.add(name=tracks.input, datatype="FP32")
        self.parameters = self.asked.parameters

    def question(self, sequence: int, chunk: Chunk, *, first: bool, last: bool) -> bytes:
        if self.row:
            self.parameters["sequence_id"].int64_param = sequence
            self.parameters["sequence_start"].bool_param = first
            self.parameters["sequence_end"].bool_param = last
        self.asked.inputs[0].shape[:] = (*self.row, *chunk.shape)
        self.asked.raw_input_contents[:] = [chunk.data]
        return self.asked.SerializeToString()

    def answer(self, message: bytes, *, unary: bool) -> bytes:
        if unary:
            return self._output(oip.ModelInferResponse.FromString(message))
        told = oip.ModelStreamInferResponse.FromString(message)
        if told.error_message:
            raise RuntimeError(f"a request was refused: {told.error_message}")
        return self._output(told.infer_response)

    def _output(self, response: oip.ModelInferResponse) -> bytes:
        return response.raw_output_contents[0]


class MlServer(OpenInference):
    """MLServer's: it streams answers as they are. When it forms a batch, parameters of requests are lost, and
    those of inputs become lists."""

    def __init__(self, tracks: Tracks) -> None:
        super().__init__(tracks)
        self.parameters = self.asked.inputs[0].parameters

    def answer(self, message: bytes, *, unary: bool) -> bytes:
        return self._output(oip.ModelInferResponse.FromString(message))


class TorchServe:
    """TorchServe's own. That a sequence begins or ends is said by an input, to the benchmark's handler."""

    stream, unary = f"{predictions.SERVICE}/StreamPredictions2", f"{predictions.SERVICE}/Predictions"

    def __init__(self, tracks: Tracks) -> None:
        self.model, self.stateless = tracks.model, tracks.stateless

    def question(self, sequence: int, chunk: Chunk, *, first: bool, last: bool) -> bytes:
        if self.stateless:
            return predictions.request(self.model, {"data": chunk.data})
        marks = {"first": first, "last": last}
        inputs = {"data": chunk.data} | {name: b"1" for name, here in marks.items() if here}
        return predictions.request(self.model, inputs, str(sequence))

    def answer(self, message: bytes, *, unary: bool) -> bytes:
        return predictions.prediction(message)


DIALECTS: dict[str, type[OpenInference | TorchServe]] = {
    OIP: OpenInference,
    MLSERVER: MlServer,
    TORCHSERVE: TorchServe,
}


def of(name: str, tracks: Tracks) -> Dialect | None:
    """Nothing, where our own protocol is spoken."""
    return DIALECTS[name](tracks) if name else None
