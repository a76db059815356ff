"""A server without gRPC: real streams over real engines, turned by hand."""

from __future__ import annotations

from collections import deque
from typing import Any

import grpc

from tenuto.serving.catalogue import Catalogue, Served
from tenuto.serving.engine import Engine
from tenuto.serving.manifest import Manifest
from tenuto.serving.metrics import ServerMetrics
from tenuto.serving.pending import PendingBytes
from tenuto.serving.reply import OutputWriter
from tenuto.serving.resume_token import TokenSealer
from tenuto.serving.snapshot import Checkpoints
from tenuto.serving.stream import Stream, StreamLimits
from tenuto.serving.tensor import Reader
from tenuto.v1 import tenuto_pb2 as pb
from tests.unit.fakes import Accumulator, Doubler, accumulator, doubler

SEALER = TokenSealer()  # every core has the same keys
MAX_BYTES = 1 << 20


class FakeCall:
    """Keeps what is sent; says OK to everything."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.metadata = ()
        self.code: grpc.StatusCode | None = None

    backed_up = False

    def suggest_leaving(self) -> None: ...

    @property
    def replies(self) -> list[pb.Reply]:
        return [r for message in self.messages for r in pb.StreamResponse.FromString(message).replies]

    def send(self, message: bytes) -> None:
        assert self.code is None, "a reply after the status"
        self.messages.append(message)

    def finish(
        self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "", metadata: Any = ()
    ) -> None:
        assert self.code is None, "a second status"
        self.code = code

    def cancel(self) -> None:
        raise AssertionError("a bug cancelled the stream")

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


class Core:
    """Two models: `stateful`, by default the accumulator, and the doubler."""

    def __init__(self, stateful: Manifest | None = None, *, max_sequences: int = 50) -> None:
        self.pending = PendingBytes(1 << 30)
        served = []
        for manifest, runner in ((stateful or accumulator(), Accumulator()), (doubler(), Doubler())):
            engine = Engine(
                manifest,
                runner,
                version=1,
                max_sequences=max_sequences,
                checkpoints=Checkpoints(SEALER.seal, manifest.name, "", 3),
                pending=self.pending,
            )
            reader = Reader(manifest, MAX_BYTES)
            served.append(Served(engine, reader, OutputWriter(manifest), "cpu", "", manifest.name))
        self.catalogue = Catalogue(served, [])
        self.metrics = ServerMetrics("1")

    def connect(self) -> tuple[Stream, FakeCall]:
        call = FakeCall()
        limits = StreamLimits(4, 0.0)
        return Stream(call, self.catalogue, self.pending, self.metrics, limits, SEALER.unseal), call

    def turn(self) -> None:
        """Commands, and one batch of each model."""
        for engine in self.catalogue.engines:
            engine.turn()

    def settle(self) -> None:
        for engine in self.catalogue.engines:
            while engine.turn():
                pass

    def drain(self) -> None:
        for engine in self.catalogue.engines:
            engine.drain()

    def assert_nothing_is_left(self) -> None:
        self.settle()
        assert self.pending.bytes == 0
        for engine in self.catalogue.engines:
            assert engine.sequences() == []
            assert engine.metrics.pending_chunks == 0
            engine.check()
