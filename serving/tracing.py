"""Spans for OpenTelemetry: one a stream, and one for every so many chunks. Needs the extra `tracing`.

A client's `traceparent` makes its span the parent. A chunk's span begins when the chunk was accepted and ends
when its output is handed over; the latency histogram gets its trace as an exemplar.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .errors import PlatformError
from .metrics import ModelMetrics
from .sequence import Closed, Failed, Output, Sequence

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_LAST_SPANS_SECONDS = 2.0


class Traces:
    """All spans of a server, sent by a thread of their own to `endpoint` (OTLP over HTTP). Any thread.

    `every`: one chunk in so many has a span. Raises (when built): PlatformError without the packages.
    """

    def __init__(self, endpoint: str, every: int, version: str, exporter: SpanExporter | None = None) -> None:
        if find_spec("opentelemetry.sdk") is None:
            raise PlatformError(
                "--otlp-endpoint needs the packages of OpenTelemetry; install 'tenuto[tracing]'"
            )
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=endpoint)
        resource = Resource.create({"service.name": "tenuto", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tenuto", version)
        self._propagator = TraceContextTextMapPropagator()
        self._every = every

    def begin(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> StreamTrace:
        """The span of a stream that is opened."""
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract({k: v for k, v in metadata if isinstance(v, str)})
        attributes = {"rpc.system": "grpc", "rpc.method": "Stream", "network.peer.address": peer}
        span = self._tracer.start_span(
            "tenuto.v1.Tenuto/Stream", context=parent, kind=SpanKind.SERVER, attributes=attributes
        )
        return StreamTrace(self._tracer, span, self._every)

    def close(self) -> None:
        """Sends what is left, for a while: a collector that is away holds up no server that leaves."""
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(_LAST_SPANS_SECONDS)


class StreamTrace:
    """One stream's span. Any thread."""

    __slots__ = ("_context", "_count", "_every", "_span", "_tracer")

    def __init__(self, tracer: Any, span: Any, every: int) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self._every = every
        self._count = itertools.count(1)

    def answered(self, metrics: ModelMetrics, sequence: Sequence, output: Output) -> None:
        """An output is handed over. One in so many gets a span."""
        if next(self._count) % self._every:
            return
        ended, seconds = time.time_ns(), output.queue_seconds + output.compute_seconds
        attributes = {
            "tenuto.model": metrics.model,
            "tenuto.version": metrics.version,
            "tenuto.sequence": sequence.id,
            "tenuto.step": output.step,
            "tenuto.batch_size": output.batch_size,
            "tenuto.queue_seconds": output.queue_seconds,
            "tenuto.compute_seconds": output.compute_seconds,
        }
        span = self._tracer.start_span(
            "chunk", context=self._context, attributes=attributes, start_time=ended - int(1e9 * seconds)
        )
        span.end(ended)
        trace = format(span.get_span_context().trace_id, "032x")
        metrics.chunk_latency.exemplify(seconds, trace, ended / 1e9)

    def ended(self, sequence: Sequence, ending: Closed | Failed) -> None:
        """One of its sequences is over."""
        reason = ending.error.reason if isinstance(ending, Failed) else ending.reason.name
        self._span.add_event(
            "sequence ended",
            {
                "tenuto.sequence": sequence.id,
                "tenuto.reason": reason,
                "tenuto.last_step": sequence.answered,
            },
        )

    def close(self) -> None:
        """The stream is over."""
        self._span.set_attribute("tenuto.outputs", next(self._count) - 1)
        self._span.end()
