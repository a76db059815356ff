"""What the baselines share: messages, and a `grpc.aio` server around a servicer."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import grpc
import numpy as np
import onnxruntime as ort

from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1 import tenuto_pb2_grpc

from . import model
from .model import INPUTS, STATES, Floats


class Servicer(Protocol):
    """The one method that the benchmark calls."""

    def Stream(
        self, requests: AsyncIterator[pb.StreamRequest], context: object
    ) -> AsyncIterator[pb.StreamResponse]: ...


def frames(chunk: pb.Chunk) -> Floats:
    """The chunk's samples as [time, 40]."""
    return np.frombuffer(chunk.inputs[0].data, np.float32).reshape(-1, INPUTS)


def opened(sequence: int) -> pb.Reply:
    return pb.Reply(sequence=sequence, opened=pb.Opened(version=1, next_step=1, window=4))


def output(sequence: int, step: int, y: Floats) -> pb.Reply:
    """The answer to one chunk: y is [time, 12]."""
    tensor = pb.Tensor(name="y", dtype="float32", shape=y.shape, data=y.tobytes())
    return pb.Reply(sequence=sequence, output=pb.Output(step=step, last=True, outputs=[tensor]))


class OneByOne:
    """One `session.run` a message."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.names = ["y", *(f"{state}_next" for state in STATES)]

    def reply(self, event: pb.Event, states: dict[int, dict[str, Floats]]) -> pb.Reply:
        sequence = event.sequence
        if event.HasField("open"):
            states[sequence] = model.zero_state()
            return opened(sequence)
        x = frames(event.chunk)
        feeds = {"x": x[None], "lengths": np.array([len(x)], np.int32), **states[sequence]}
        y, *after = self.session.run(self.names, feeds)
        states[sequence] = dict(zip(STATES, after, strict=True))
        return output(sequence, event.chunk.step, y[0])


def run_threads(servicer: tenuto_pb2_grpc.TenutoServicer, threads: int) -> None:
    """As `run`, on gRPC's thread pool: an open stream holds a thread."""
    server = grpc.server(ThreadPoolExecutor(threads), options=[("grpc.so_reuseport", 0)])
    tenuto_pb2_grpc.add_TenutoServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    threading.Event().wait()


async def serve(servicer: Servicer) -> None:
    """Serves on a free port of 127.0.0.1, says which on stdout, until the process is ended."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    tenuto_pb2_grpc.add_TenutoServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def run(servicer: Servicer, *, tuned: bool) -> None:
    """`serve` on asyncio's own loop; tuned, on uvloop where that is installed."""
    loop = import_module("uvloop").new_event_loop if tuned and find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(serve(servicer))
