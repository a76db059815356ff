"""Baseline: the micro-batcher that one writes by hand: `grpc.aio`, a queue, a batch at a time.

Messages that arrive while a batch runs form the next one. The run has a thread of its own, so that
the event loop reads and writes meanwhile. The chunks of a batch have one length.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1.tenuto_pb2_grpc import TenutoServicer

from . import model, peer
from .model import INPUTS, STATES, Floats

MAX_BATCH = 64


@dataclass(slots=True)
class Work:
    """One chunk that waits; `states` is its sequence's, read and replaced by the run."""

    data: bytes  # float32 [time, 40]
    states: dict[str, Floats]
    y: asyncio.Future[Floats]  # [time, 12]


class BatchingServicer(TenutoServicer):
    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.names = ["y", *(f"{state}_next" for state in STATES)]
        self.waiting: dict[int, list[Work]] = {}  # bytes of a chunk -> work
        self.turning: asyncio.Task[None] | None = None
        self.thread = ThreadPoolExecutor(1)

    async def Stream(
        self, requests: AsyncIterator[pb.StreamRequest], context: object
    ) -> AsyncIterator[pb.StreamResponse]:
        states: dict[int, dict[str, Floats]] = {}
        async for request in requests:
            accepted = [self.accept(event, states) for event in request.events]
            replies = [
                peer.opened(event.sequence)
                if work is None
                else peer.output(event.sequence, event.chunk.step, await work.y)
                for event, work in zip(request.events, accepted, strict=True)
            ]
            yield pb.StreamResponse(replies=replies)

    def accept(self, event: pb.Event, states: dict[int, dict[str, Floats]]) -> Work | None:
        if event.HasField("open"):
            states[event.sequence] = model.zero_state()
            return None
        data = event.chunk.inputs[0].data
        work = Work(data, states[event.sequence], asyncio.get_running_loop().create_future())
        self.waiting.setdefault(len(data), []).append(work)
        if self.turning is None:
            self.turning = asyncio.create_task(self.turn())
        return work

    async def turn(self) -> None:
        """Runs batches until nothing waits."""
        loop = asyncio.get_running_loop()
        while self.waiting:
            size = next(iter(self.waiting))
            ready = self.waiting.pop(size)
            batch, rest = ready[:MAX_BATCH], ready[MAX_BATCH:]
            if rest:
                self.waiting[size] = rest + self.waiting.pop(size, [])
            rows = await loop.run_in_executor(self.thread, self.run, batch)
            for work, y in zip(batch, rows, strict=True):
                if not work.y.done():  # its stream may have been cancelled meanwhile
                    work.y.set_result(y)
        self.turning = None

    def run(self, batch: list[Work]) -> Floats:
        """[batch, time, 12]; in the thread."""
        x = np.frombuffer(b"".join([work.data for work in batch]), np.float32)
        x = x.reshape(len(batch), -1, INPUTS)
        feeds = {"x": x, "lengths": np.full(len(batch), x.shape[1], np.int32)}
        for state in STATES:
            feeds[state] = np.concatenate([work.states[state] for work in batch], 1)
        y, *after = self.session.run(self.names, feeds)
        for state, rows in zip(STATES, after, strict=True):
            for row, work in enumerate(batch):
                work.states[state] = rows[:, row : row + 1]
        rows_of_y: Floats = y
        return rows_of_y


if __name__ == "__main__":
    peer.run(BatchingServicer(model.session(Path(sys.argv[1]))), tuned=True)
