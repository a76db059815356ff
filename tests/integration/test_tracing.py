"""Traces of streams and chunks: what they hold, whose children they are, and nothing where nobody asked."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tenuto
from tenuto.serving import tracing
from tenuto.serving.errors import PlatformError
from tenuto.serving.server import Server
from tests import toys

from .running import TRANSPORTS, build, serving, wait_for
from .wire import Conversation, chunk, connect, ending, opening

pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

ROOT = Path(__file__).parents[2]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def traced(
    repository: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[tuple[Server, InMemorySpanExporter]]:
    """A server whose spans stay here."""
    exporter = InMemorySpanExporter()
    real = tracing.Traces.__init__

    def build_here(traces: tracing.Traces, endpoint: str, every: int, version: str) -> None:
        real(traces, endpoint, every, version, exporter)

    monkeypatch.setattr(tracing.Traces, "__init__", build_here)
    with serving(repository, otlp_endpoint="http://127.0.0.1:1/v1/traces", **settings) as server:
        yield server, exporter
        assert server._traces is not None


def spans(server: Server, exporter: InMemorySpanExporter, count: int) -> list[Any]:
    assert server._traces is not None
    provider = server._traces._provider

    def there() -> bool:
        provider.force_flush()
        return len(exporter.get_finished_spans()) >= count

    wait_for(there, f"{count} spans")
    found = list(exporter.get_finished_spans())
    assert len(found) == count
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stream_and_one_chunk_in_so_many_have_spans(
    transport: str, toy_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced(toy_repository, monkeypatch, transport=transport, trace_chunks=3) as (server, exporter):
        with (
            connect(server.port) as channel,
            Conversation(channel, metadata=(("traceparent", PARENT),)) as conversation,
        ):
            conversation.send(opening("accumulator"))
            conversation.opened()
            for step in range(1, 8):
                conversation.send(chunk(step, [1.0]))
                conversation.values(step)
            conversation.send(ending())
            conversation.closed()
            conversation.done_sending()
            conversation.rest()
        *chunks, stream = spans(server, exporter, 3)
        assert stream.name == "tenuto.v1.Tenuto/Stream"
        assert format(stream.context.trace_id, "032x") == PARENT.split("-")[1]
        assert format(stream.parent.span_id, "016x") == PARENT.split("-")[2]
        assert stream.attributes["tenuto.outputs"] == 7
        (event,) = stream.events
        assert (event.name, event.attributes["tenuto.reason"]) == ("sequence ended", "END")
        assert [one.attributes["tenuto.step"] for one in chunks] == [3, 6]
        for one in chunks:
            assert one.name == "chunk"
            assert one.parent.span_id == stream.context.span_id
            assert one.attributes["tenuto.model"] == "accumulator"
            assert stream.start_time <= one.end_time <= stream.end_time
            assert one.start_time <= one.end_time


def test_the_latency_histogram_shows_a_trace(toy_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To those who ask for OpenMetrics; the classic format knows no exemplars."""
    with traced(toy_repository, monkeypatch, trace_chunks=1) as (server, exporter):
        with (
            tenuto.Client(f"127.0.0.1:{server.port}") as client,
            client.stream("accumulator") as stream,
        ):
            stream.send(np.ones(1, np.float32))
            next(stream)
        (one, _) = spans(server, exporter, 2)
        url = f"http://127.0.0.1:{server.metrics_port}/metrics"
        modern = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text"})
        with urllib.request.urlopen(modern, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        shown = [line for line in lines if f'trace_id="{one.context.trace_id:032x}"' in line]
        assert len(shown) == 1
        assert shown[0].startswith('tenuto_chunk_latency_seconds_bucket{le="')
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"trace_id" not in answer.read()


def test_a_sequence_that_failed_says_why(toy_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with traced(toy_repository, monkeypatch) as (server, exporter):
        with connect(server.port) as channel, Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(5, [1.0]))
            conversation.opened()
            conversation.failed("STEP_GAP")
        (stream,) = spans(server, exporter, 1)
        assert [event.attributes["tenuto.reason"] for event in stream.events] == ["STEP_GAP"]


SERVES = """
import sys
from pathlib import Path
import numpy as np
import tenuto
from tests.integration.running import metrics_text, serving
more = {"otlp_endpoint": sys.argv[2]} if len(sys.argv) > 2 else {}
with serving(Path(sys.argv[1]), **more) as server, tenuto.Client(f"127.0.0.1:{server.port}") as client:
    with client.stream("accumulator") as stream:
        stream.send(np.ones(1, np.float32))
        next(stream)
    client.predict("doubler", np.ones((1, 2), np.float32))
    metrics_text(server)
print(*(name for name in sys.modules if name.partition(".")[0] == "opentelemetry"))
"""


def test_without_the_setting_there_is_nothing(tmp_path: Path) -> None:
    """Whatever the server does, no module of the package is loaded, although it is installed."""
    toys.write(tmp_path, "accumulator", toys.accumulator())
    toys.write(tmp_path, "doubler", toys.doubler())

    def loaded(*endpoint: str) -> str:
        command = [sys.executable, "-c", SERVES, str(tmp_path), *endpoint]
        return subprocess.check_output(command, cwd=ROOT, timeout=50, text=True)

    assert loaded() == "\n"
    assert "opentelemetry.sdk.trace" in loaded("http://127.0.0.1:1/v1/traces").split()


def test_a_collector_that_is_away_holds_nobody_up(toy_repository: Path) -> None:
    with (
        serving(toy_repository, otlp_endpoint="http://127.0.0.1:1/v1/traces", trace_chunks=1) as server,
        tenuto.Client(f"127.0.0.1:{server.port}") as client,
        client.stream("accumulator") as stream,
    ):
        for _ in range(20):
            stream.send(np.ones(1, np.float32))
            next(stream)


def test_a_missing_package_is_named(toy_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)
    with pytest.raises(PlatformError, match="install 'tenuto\\[tracing\\]'"):
        build(toy_repository, otlp_endpoint="http://127.0.0.1:1")
