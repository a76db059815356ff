"""Baseline: `grpc.aio`, one `session.run` a message, the state kept beside the stream.

With `--tuned` it has uvloop; gRPC's switch comes from its environment.
"""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1.tenuto_pb2_grpc import TenutoServicer

from . import model, peer
from .model import Floats


class NaiveServicer(peer.OneByOne, TenutoServicer):
    """Runs the model in the event loop, where nothing is handed to another thread."""

    async def Stream(
        self, requests: AsyncIterator[pb.StreamRequest], context: object
    ) -> AsyncIterator[pb.StreamResponse]:
        states: dict[int, dict[str, Floats]] = {}
        async for request in requests:
            yield pb.StreamResponse(replies=[self.reply(event, states) for event in request.events])


if __name__ == "__main__":
    peer.run(NaiveServicer(model.session(Path(sys.argv[1]))), tuned="--tuned" in sys.argv)
