"""A client that speaks tenuto.v1 through the raw stubs, so that the wire itself is tested."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from numpy.typing import NDArray

from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1.tenuto_pb2_grpc import TenutoStub

Array = NDArray[Any]
STREAM = "/tenuto.v1.Tenuto/Stream"
PREDICT = "/tenuto.v1.Tenuto/Predict"
# No call of a test outlives that, so that a lost reply is DEADLINE_EXCEEDED and not a hanging test.
PATIENCE_SECONDS = 50.0


def connect(port: int, *options: tuple[str, Any]) -> grpc.Channel:
    """A channel with a connection of its own."""
    own = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=(*own, *options))


def stub(channel: grpc.Channel) -> Any:
    return TenutoStub(channel)  # type: ignore[no-untyped-call,unused-ignore]


def tensor(values: Any, dtype: str = "float32", name: str = "") -> pb.Tensor:
    array = np.ascontiguousarray(values, dtype)
    return pb.Tensor(name=name, dtype=dtype, shape=array.shape, data=array.tobytes())


def text(words: str | bytes, name: str = "") -> pb.Tensor:
    return pb.Tensor(name=name, dtype="utf8", data=words.encode() if isinstance(words, str) else words)


def array(message: pb.Tensor) -> Array:
    return np.frombuffer(message.data, message.dtype).reshape(tuple(message.shape))


def opening(model: str, sequence: int = 0, **fields: Any) -> pb.Event:
    return pb.Event(sequence=sequence, open=pb.Open(model=model, **fields))


def chunk(step: int, *inputs: pb.Tensor | Sequence[float], sequence: int = 0, **fields: Any) -> pb.Event:
    """One step. Numbers are sent as float32."""
    tensors = [i if isinstance(i, pb.Tensor) else tensor(i) for i in inputs]
    return pb.Event(sequence=sequence, chunk=pb.Chunk(step=step, inputs=tensors, **fields))


def ending(sequence: int = 0) -> pb.Event:
    return pb.Event(sequence=sequence, end=pb.End())


def checkpoint(sequence: int = 0) -> pb.Event:
    return pb.Event(sequence=sequence, checkpoint=pb.CheckpointNow())


class Refusal:
    """What a failed call says: status, reason, text, and the other metadata."""

    def __init__(self, error: Any) -> None:
        self.code: grpc.StatusCode = error.code()
        self.text = str(error.details())
        trailing = dict(error.trailing_metadata() or ())
        self.retry_after_ms = int(trailing.get("tenuto-retry-after-ms", 0))
        self.reason = str(trailing.get("tenuto-reason", ""))
        packed = trailing.get("grpc-status-details-bin")
        if packed is not None:  # the same in google.rpc's own words
            status = status_pb2.Status.FromString(packed)
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert (info.reason, info.domain) == (self.reason, "tenuto")
            assert (status.code, status.message) == (self.code.value[0], self.text)


class Conversation:
    """One stream. `send` never blocks, `read` takes the next reply in the order of arrival."""

    def __init__(
        self,
        channel: grpc.Channel,
        *,
        timeout: float = PATIENCE_SECONDS,
        token: str = "",
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream: Any = channel.stream_stream(STREAM)
        metadata += (("authorization", f"Bearer {token}"),) if token else ()
        self.call: Any = stream(iter(self._requests.get, None), timeout=timeout, metadata=metadata)
        self._unread: deque[pb.Reply] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.call.cancel()
        self.done_sending()  # ends the thread that reads our requests

    def send(self, *events: pb.Event) -> None:
        """All events in one message."""
        self._requests.put(pb.StreamRequest(events=events).SerializeToString())

    def send_apart(self, *events: pb.Event) -> None:
        """One event a message."""
        for event in events:
            self.send(event)

    def send_bytes(self, message: bytes) -> None:
        self._requests.put(message)

    def done_sending(self) -> None:
        self._requests.put(None)

    def read(self) -> pb.Reply:
        """Raises: grpc.RpcError, StopIteration at the stream's end."""
        while not self._unread:
            self._unread.extend(pb.StreamResponse.FromString(next(self.call)).replies)
        return self._unread.popleft()

    def _read_past_checkpoints(self) -> pb.Reply:
        """Tokens that the server sends by itself are skipped."""
        while (reply := self.read()).HasField("checkpoint"):
            pass
        return reply

    def rest(self) -> list[pb.Reply]:
        """All replies up to the stream's end.

        Raises: grpc.RpcError.
        """
        return list(self._until_the_end())

    def _until_the_end(self) -> Iterator[pb.Reply]:
        while True:
            try:
                yield self.read()
            except StopIteration:
                return

    def opened(self) -> pb.Opened:
        reply = self.read()
        assert reply.WhichOneof("reply") == "opened", reply
        return reply.opened

    def output(self, step: int | None = None) -> pb.Output:
        reply = self._read_past_checkpoints()
        assert reply.WhichOneof("reply") == "output", reply
        assert step is None or reply.output.step == step
        return reply.output

    def values(self, step: int | None = None) -> list[float]:
        """The next reply's only output."""
        (only,) = self.output(step).outputs
        return [float(v) for v in array(only)]

    def closed(self) -> pb.Closed:
        reply = self._read_past_checkpoints()
        assert reply.WhichOneof("reply") == "closed", reply
        return reply.closed

    def failed(self, reason: str) -> pb.Failed:
        reply = self.read()
        assert reply.WhichOneof("reply") == "failed", reply
        assert reply.failed.reason == reason, reply.failed
        return reply.failed

    def refused(self) -> Refusal:
        """How the stream fails; replies before that are skipped."""
        try:
            replies = self.rest()
        except grpc.RpcError as error:
            return Refusal(error)
        raise AssertionError(f"the stream ended well, with {replies}")


def refused(call: Any, request: Any, **arguments: Any) -> Refusal:
    """How a unary call fails."""
    try:
        answer = call(request, timeout=arguments.pop("timeout", PATIENCE_SECONDS), **arguments)
    except grpc.RpcError as error:
        return Refusal(error)
    raise AssertionError(f"the call succeeded: {answer}")
