"""Baseline: the thread pool of grpc's tutorials, one `session.run` a message."""

import sys
from collections.abc import Iterator
from pathlib import Path

from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1.tenuto_pb2_grpc import TenutoServicer

from . import model, peer
from .model import Floats

MAX_STREAMS = 1_100  # each holds a thread


class NaiveServicer(peer.OneByOne, TenutoServicer):
    def Stream(self, requests: Iterator[pb.StreamRequest], context: object) -> Iterator[pb.StreamResponse]:
        states: dict[int, dict[str, Floats]] = {}
        for request in requests:
            yield pb.StreamResponse(replies=[self.reply(event, states) for event in request.events])


if __name__ == "__main__":
    peer.run_threads(NaiveServicer(model.session(Path(sys.argv[1]))), MAX_STREAMS)
