"""Baseline: `grpc.aio`, one `session.run` a message, the state kept beside the stream."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1.tenuto_pb2_grpc import TenutoServicer

from . import model, peer
from .model import STATES, Floats


class NaiveServicer(TenutoServicer):
    """Runs the model in the event loop, where nothing is handed to another thread."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.names = ["y", *(f"{state}_next" for state in STATES)]

    async def Stream(
        self, requests: AsyncIterator[pb.StreamRequest], context: object
    ) -> AsyncIterator[pb.StreamResponse]:
        states: dict[int, dict[str, Floats]] = {}
        async for request in requests:
            yield pb.StreamResponse(replies=[self.reply(event, states) for event in request.events])

    def reply(self, event: pb.Event, states: dict[int, dict[str, Floats]]) -> pb.Reply:
        sequence = event.sequence
        if event.HasField("open"):
            states[sequence] = model.zero_state()
            return peer.opened(sequence)
        x = peer.frames(event.chunk)
        feeds = {"x": x[None], "lengths": np.array([len(x)], np.int32), **states[sequence]}
        y, *after = self.session.run(self.names, feeds)
        states[sequence] = dict(zip(STATES, after, strict=True))
        return peer.output(sequence, event.chunk.step, y[0])


if __name__ == "__main__":
    peer.run(NaiveServicer(model.session(Path(sys.argv[1]))))
