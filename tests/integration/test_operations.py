"""What operators and orchestrators ask: models, health, reflection, metrics, keepalive."""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import queue
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tenuto.serving.manifest import Manifest
from tenuto.serving.server import READINESS, Server
from tenuto.v1 import tenuto_pb2 as pb

from . import running
from .running import Counting, build, engine_of, metrics_text, number, serving
from .wire import Conversation, chunk, connect, ending, opening, tensor

transport = running.every_transport

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 1 << 15, 1 << 6  # bits of MXCSR


def mxcsr() -> int:
    """This thread's; x86-64 with glibc."""
    environment = (ctypes.c_uint32 * 8)()
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    return environment[7]


def test_models_are_listed_with_what_they_are(
    api: Any, conversation: Conversation, server: Server, toy_repository: Path
) -> None:
    conversation.send(opening("accumulator"))
    conversation.opened()
    models = {m.name: m for m in api.ListModels(pb.ListModelsRequest()).models}
    assert sorted(models) == sorted(p.name for p in toy_repository.iterdir())
    one = models["accumulator"]
    assert (one.version, one.state, one.why) == (1, pb.Model.READY, "")
    assert one.stateful
    assert not models["doubler"].stateful
    assert (one.provider, one.sequences) == ("CPUExecutionProvider", 1)
    assert one.slots == server.config.max_sequences
    onnx = (toy_repository / "accumulator" / "1" / "model.onnx").read_bytes()
    assert one.sha256 == hashlib.sha256(onnx).hexdigest()


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="x86-64 and glibc only"
)
def test_the_engine_thread_of_a_running_server_takes_denormals_for_zero(
    conversation: Conversation, server: Server
) -> None:
    """The bits are set there, and a run on that thread, which none of this thread has, flushes."""
    engine = engine_of(server, "accumulator")
    denormal = np.full((1, 1), 1e-40, np.float32)
    feeds: dict[str, Any] = {"x": denormal, "lengths": np.ones(1, np.int32)}
    feeds |= engine._pool.gather(np.array([engine._pool.dump], np.intp))
    assert engine._runner.run(feeds)[0].view(np.uint32).max() > 0
    found: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    engine._inbox.put((lambda *_: found.put((threading.current_thread().name, mxcsr())), None, None))
    name, bits = found.get(timeout=30)
    assert name == "engine-accumulator-1"
    assert bits & FLUSH_TO_ZERO
    assert bits & DENORMALS_ARE_ZERO
    assert not mxcsr() & (FLUSH_TO_ZERO | DENORMALS_ARE_ZERO)

    conversation.send(opening("accumulator"), chunk(1, tensor([1e-40])), ending())
    conversation.opened()
    (y,) = conversation.output(1).outputs
    assert y.data == bytes(4)
    conversation.closed()


def test_a_model_tells_its_whole_manifest(api: Any, toy_repository: Path) -> None:
    response = api.GetModel(pb.GetModelRequest(model="gain"))
    assert (response.model.name, response.model.state) == ("gain", pb.Model.READY)
    sidecar = (toy_repository / "gain" / "1" / "manifest.json").read_text()
    told = Manifest.parse(response.manifest_json, "told")
    assert told == Manifest.parse(sidecar, "sidecar")
    assert json.loads(response.manifest_json)["format"] == 1


def test_health_names_liveness_and_readiness_apart(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
    for name in ("", "tenuto.v1.Tenuto", "liveness", "readiness"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
    with pytest.raises(grpc.RpcError) as error:
        stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_watcher_of_readiness_sees_the_server_leave(toy_repository: Path, transport: str) -> None:
    with serving(toy_repository, transport=transport) as server, connect(server.port) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
        ready = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=40)
        alive = stub.Watch(health_pb2.HealthCheckRequest(service="liveness"), timeout=40)
        assert next(ready).status == SERVING
        assert next(alive).status == SERVING
        server.stop(0.0)
        assert next(ready).status == NOT_SERVING
        with pytest.raises(grpc.RpcError):
            next(alive)  # nothing but the end of the connection


def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="tenuto.v1.StreamRequest")
    services, file = stub.ServerReflectionInfo(iter([request, symbol]), timeout=30)
    names = {s.name for s in services.list_services_response.service}
    assert {"tenuto.v1.Tenuto", "grpc.health.v1.Health"} <= names
    assert pb.DESCRIPTOR.serialized_pb in list(file.file_descriptor_response.file_descriptor_proto)


def test_metrics_after_known_traffic(conversation: Conversation, server: Server) -> None:
    counting = Counting(server)
    model = {"model": "accumulator", "version": "1"}
    conversation.send(opening("accumulator", 1), opening("accumulator", 2))
    conversation.send(chunk(1, [1.0] * 8, sequence=1), chunk(2, [1.0] * 9, sequence=1))
    conversation.send(chunk(1, [1.0], sequence=2))
    for _ in range(5):
        conversation.read()

    assert counting.rise("tenuto_sequences_started_total", **model) == 2
    assert counting.rise("tenuto_active_sequences", **model) == 2
    assert counting.rise("tenuto_sequence_slots_used", **model) == 2
    assert counting.rise("tenuto_chunks_total", outcome="answered", **model) == 3
    assert counting.rise("tenuto_chunk_latency_seconds_count", **model) == 3
    assert counting.rise("tenuto_time_to_first_output_seconds_count", **model) == 2
    # max_frames is 8: the chunk of 9 took two turns.
    assert counting.rise("tenuto_batch_size_sum", **model) == 4
    batches = counting.rise("tenuto_batches_total", **model)
    assert 3 <= batches <= 4
    for stage in ("gather", "compute", "scatter", "reply"):
        assert counting.rise("tenuto_stage_seconds_count", stage=stage, **model) == batches
    assert counting.rise("tenuto_stage_seconds_count", stage="queue", **model) == 4

    conversation.send(ending(1), ending(2))
    for _ in range(2):
        conversation.closed()
    assert counting.rise("tenuto_sequences_ended_total", reason="END", **model) == 2
    for gauge in ("active_sequences", "sequence_slots_used", "pending_chunks", "pending_bytes"):
        assert counting.rise(f"tenuto_{gauge}") == 0

    text = metrics_text(server)
    assert number(text, "tenuto_open_streams") == 1
    assert number(text, "tenuto_sequence_slots", **model) == server.config.max_sequences
    assert number(text, "tenuto_build_info", version="0") == 1
    assert number(text, "tenuto_model_info", provider="CPUExecutionProvider", **model) == 1
    assert number(text, "tenuto_model_load_seconds", **model) > 0
    assert number(text, "tenuto_draining") == 0
    for line in text.splitlines():  # closed label sets: no peer, no sequence id
        assert "127.0.0.1" not in line


def test_keepalive_pings_of_quiet_clients_are_permitted(
    toy_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC's default is to answer pings every 10 s with GOAWAY too_many_pings.
    seen: dict[str, Any] = {}
    real: Any = grpc.server

    def recording(*arguments: Any, options: Any, **named: Any) -> Any:
        seen.update(options)
        return real(*arguments, options=options, **named)

    monkeypatch.setattr("tenuto.serving.transport.grpc.server", recording)
    build(toy_repository, transport="threads")
    assert seen["grpc.keepalive_permit_without_calls"] == 1
    assert seen["grpc.http2.min_ping_interval_without_data_ms"] <= 5_000
    assert seen["grpc.http2.max_ping_strikes"] == 0
    assert seen["grpc.so_reuseport"] == 0


def test_a_channel_that_pings_often_keeps_its_stream(server: Server) -> None:
    options = (("grpc.keepalive_time_ms", 100), ("grpc.keepalive_permit_without_calls", 1),
               ("grpc.http2.max_pings_without_data", 0))  # fmt: skip
    with connect(server.port, *options) as channel, Conversation(channel) as conversation:
        conversation.send(opening("accumulator"), chunk(1, [1.0]))
        conversation.opened()
        assert conversation.values(1) == [1.0]
        conversation.send(chunk(2, tensor([1.0])), ending())
        assert conversation.values(2) == [2.0]
        assert conversation.closed().reason == pb.END


def probe(server: Server, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}{path}", timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_probes_over_http_say_what_health_says(toy_repository: Path) -> None:
    """For Kubernetes, whose probes cannot speak gRPC over TLS."""
    server = build(toy_repository)
    assert (probe(server, "/livez"), probe(server, "/readyz")) == (503, 503)  # it does not serve yet
    server.start()
    try:
        assert (probe(server, "/livez"), probe(server, "/readyz")) == (200, 200)
        assert probe(server, "/readyz/") == 404  # who mistypes it must not find the server well
        server.health.set(READINESS, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (probe(server, "/livez"), probe(server, "/readyz")) == (200, 503)
    finally:
        server.stop(0.0)
