"""Plain numbers that the threads add to, and the collector that Prometheus reads them through.

Each field has one writing thread, so that adding needs no lock; `.labels()` is never called on a message's
way (0.3 to 1.1 µs each). Counts are per model version or process wide, never per sequence, peer or tenant.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

_SECONDS = (
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3,
    0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_BYTES = tuple(float(4**power) for power in range(4, 13))  # 256 B to 16 MiB
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


Bucket = tuple[str, float] | tuple[str, float, Exemplar]


class Distribution:
    """A classic histogram: counts by upper bound, and the sum."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}  # by bucket, the newest

    def exemplify(self, value: float, trace_id: str, at: float) -> None:
        """A trace of one of about that value, which was or will be added, and its time of day in seconds."""
        self.exemplars[bisect_left(self.bounds, value)] = Exemplar({"trace_id": trace_id}, value, at)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_all(self, values: list[float]) -> None:
        bounds, counts = self.bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(values)

    def buckets(self) -> list[Bucket]:
        """Cumulative counts, as Prometheus wants them. Exemplars are for the OpenMetrics format alone."""
        cumulative = 0
        rows: list[Bucket] = []
        for i, (bound, count) in enumerate(zip((*self.bounds, math.inf), list(self.counts), strict=True)):
            cumulative += count
            label = "+Inf" if bound == math.inf else repr(bound)
            exemplar = self.exemplars.get(i)
            rows.append((label, float(cumulative), exemplar) if exemplar else (label, float(cumulative)))
        return rows


def _seconds() -> Distribution:
    return Distribution(_SECONDS)


STAGES = ("queue", "gather", "compute", "scatter", "reply")
# What is shown as 0 before the first of each: `rate` and `increase` do not see a series come.
OUTCOMES = ("answered", "dropped", "failed")
ENDINGS = (
    "END", "STREAM_ENDED", "CANCELLED", "IDLE_EXPIRED", "EVICTED", "DRAINING", "REBALANCE", "MAX_AGE",
    "SUPERSEDED", "WINDOW_EXCEEDED", "STATE_NOT_FINITE", "FAILED",
)  # fmt: skip
REJECTIONS = ("POOL_FULL", "OVERLOADED", "DRAINING", "MODEL_NOT_READY")
REFUSALS = ("UNKNOWN_MODEL", "NOT_OPEN", "POOL_FULL", "RATE_EXCEEDED")
RESULTS = ("resumed", "TOKEN_INVALID", "POOL_FULL", "DRAINING")


@dataclass(slots=True)
class ModelMetrics:
    """One model version. Written by its engine thread alone, but for `rejected_calls`."""

    model: str
    version: int
    provider: str = ""
    chunks: Counter[str] = field(default_factory=Counter)  # by outcome
    steps_repeated: int = 0
    batches: int = 0
    pending_chunks: int = 0
    active_sequences: int = 0
    slots: int = 0
    slots_used: int = 0
    sequences_started: int = 0
    resumed: int = 0
    resumes_refused: Counter[str] = field(default_factory=Counter)  # by reason
    ended: Counter[str] = field(default_factory=Counter)  # by reason
    rejected: Counter[str] = field(default_factory=Counter)  # sequences, by reason
    rejected_calls: Counter[str] = field(default_factory=Counter)  # Predicts, by reason; the servicer's
    generated_parts: int = 0
    deadline_misses: int = 0
    late_arrivals: int = 0
    rows_rerun: int = 0
    retiring: bool = False  # the rollout's
    busy_ratio: Callable[[], float] = lambda: 0.0
    load_seconds: float = 0.0
    nodes: dict[str, int] = field(default_factory=dict)  # of the graph, by the provider that runs them
    sha256: str = ""  # of its files
    stages: dict[str, Distribution] = field(default_factory=lambda: {s: _seconds() for s in STAGES})
    chunk_latency: Distribution = field(default_factory=_seconds)
    first_output: Distribution = field(default_factory=_seconds)
    chunk_lag: Distribution = field(default_factory=_seconds)
    batch_size: Distribution = field(default_factory=lambda: Distribution(_ROWS))
    occupancy: Distribution = field(default_factory=lambda: Distribution(_SHARES))
    padding: Distribution = field(default_factory=lambda: Distribution(_SHARES))
    token_bytes: Distribution = field(default_factory=lambda: Distribution(_BYTES))


@dataclass(slots=True)
class ServerMetrics:
    """The process. `messages_refused` and `resumes_refused` are written by the thread that reads."""

    version: str
    pending_bytes_limit: int = 0
    open_streams_limit: int = 0
    waiting_predicts: Callable[[], int] = lambda: 0
    waiting_predicts_limit: int = 0
    paced_streams: Callable[[], int] = lambda: 0
    models: list[ModelMetrics] = field(default_factory=list)
    pending_bytes: Callable[[], int] = lambda: 0
    open_streams: Callable[[], int] = lambda: 0
    streams_refused: Callable[[], int] = lambda: 0
    unauthenticated: Callable[[], int] = lambda: 0
    front_ends: Callable[[], int] = lambda: 0
    front_ends_lost: Callable[[], int] = lambda: 0
    messages_refused: int = 0
    resumes_refused: Counter[str] = field(default_factory=Counter)  # by reason
    resumes_before: Counter[str] = field(default_factory=Counter)  # of versions unloaded; the rollout's
    requests_refused: Counter[str] = field(default_factory=Counter)  # by reason; `refuse` adds to it
    loads: Counter[tuple[str, str]] = field(default_factory=Counter)  # by model and result; the rollout's
    draining: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)  # of requests_refused

    def refuse(self, reason: str) -> None:
        """One request that was refused before any engine had it. Any thread."""
        with self.lock:
            self.requests_refused[reason] += 1

    def forget(self, model: ModelMetrics) -> None:
        """A version is unloaded. What is counted over all of them does not fall."""
        self.models.remove(model)
        self.resumes_before["resumed"] += model.resumed
        self.resumes_before.update(dict(model.resumes_refused))


@dataclass(frozen=True, slots=True)
class _Series:
    """One metric family of models: its name, help text, and the value of a model."""

    name: str
    text: str
    value: Callable[[ModelMetrics], float]


_MODEL_COUNTERS = (
    _Series(
        "tenuto_batches",
        "Runs of the model, reruns of single rows not counted.",
        lambda m: m.batches,
    ),
    _Series("tenuto_sequences_started", "Sequences admitted.", lambda m: m.sequences_started),
    _Series("tenuto_steps_repeated", "Steps that a client sent again.", lambda m: m.steps_repeated),
    _Series(
        "tenuto_generated_parts",
        "Parts of answers that were generated from the part before.",
        lambda m: m.generated_parts,
    ),
    _Series(
        "tenuto_deadline_misses",
        "Chunks answered later than their period.",
        lambda m: m.deadline_misses,
    ),
    _Series(
        "tenuto_late_arrivals",
        "Chunks that came more than a declared period late: the client, the network, or a server too busy "
        "to read.",
        lambda m: m.late_arrivals,
    ),
    _Series(
        "tenuto_rows_rerun",
        "Rows run again alone after their batch failed.",
        lambda m: m.rows_rerun,
    ),
)
_MODEL_GAUGES = (
    _Series("tenuto_pending_chunks", "Chunks accepted and not yet answered.", lambda m: m.pending_chunks),
    _Series("tenuto_active_sequences", "Live sequences.", lambda m: m.active_sequences),
    _Series("tenuto_sequence_slots", "Sequences that there may be.", lambda m: m.slots),
    _Series("tenuto_sequence_slots_used", "Slots of the state pool in use.", lambda m: m.slots_used),
    _Series(
        "tenuto_engine_busy_ratio",
        "Share of the last full second that the engine spent in turns.",
        lambda m: m.busy_ratio(),
    ),
    _Series(
        "tenuto_model_retiring",
        "1 for a version that was replaced and still has sequences.",
        lambda m: float(m.retiring),
    ),
    _Series("tenuto_model_load_seconds", "Time to check and load the model.", lambda m: m.load_seconds),
)


def _rejected(m: ModelMetrics) -> Counter[str]:
    """Both counts. Copied first: a copy is one step, and their writers do not stop for a scrape."""
    return Counter(dict(m.rejected)) + Counter(dict(m.rejected_calls))


_Reasons = tuple[str, str, str, tuple[str, ...], Callable[[ModelMetrics], Counter[str]]]
_MODEL_REASONS: tuple[_Reasons, ...] = (
    ("tenuto_chunks", "Chunks by what became of them.", "outcome", OUTCOMES, lambda m: m.chunks),
    ("tenuto_sequences_ended", "Sequences by why they ended.", "reason", ENDINGS, lambda m: m.ended),
    ("tenuto_admission_rejections", "Opens and requests refused.", "reason", REJECTIONS, _rejected),
)
_MODEL_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelMetrics], Distribution]], ...] = (
    (
        "tenuto_chunk_latency_seconds",
        "From a chunk accepted to its output handed over.",
        lambda m: m.chunk_latency,
    ),
    (
        "tenuto_time_to_first_output_seconds",
        "From a sequence opened to its first output.",
        lambda m: m.first_output,
    ),
    (
        "tenuto_chunk_lag_seconds",
        "How long after their declared period chunks were answered; 0: in time.",
        lambda m: m.chunk_lag,
    ),
    ("tenuto_batch_size", "Rows in a batch.", lambda m: m.batch_size),
    (
        "tenuto_batch_occupancy_ratio",
        "Rows in a batch over the most it may hold.",
        lambda m: m.occupancy,
    ),
    ("tenuto_resume_token_bytes", "Size of a resume token.", lambda m: m.token_bytes),
    ("tenuto_padding_ratio", "Share of a batch's samples that is padding.", lambda m: m.padding),
)


def _shown(known: tuple[str, ...], counts: Counter[str]) -> Counter[str]:
    """These, and 0 for those that are known and did not come yet."""
    shown = Counter(dict.fromkeys(known, 0))
    shown.update(dict(counts))
    return shown


class TenutoCollector(Collector):
    """Turns the numbers into families at scrape time."""

    def __init__(self, server: ServerMetrics) -> None:
        self._server = server

    def collect(self) -> Iterable[Metric]:
        yield from self._process()
        models = list(self._server.models)
        labels = ["model", "version"]
        for kind, group in (
            (CounterMetricFamily, _MODEL_COUNTERS),
            (GaugeMetricFamily, _MODEL_GAUGES),
        ):
            for series in group:
                family = kind(series.name, series.text, labels=labels)
                for m in models:
                    family.add_metric([m.model, str(m.version)], series.value(m))
                yield family
        for name, text, label, known, counts in _MODEL_REASONS:
            reasons = CounterMetricFamily(name, text, labels=[*labels, label])
            for m in models:
                for reason, count in _shown(known, counts(m)).items():
                    reasons.add_metric([m.model, str(m.version), reason], count)
            yield reasons
        for name, text, distribution in _MODEL_HISTOGRAMS:
            histogram = HistogramMetricFamily(name, text, labels=labels)
            for m in models:
                d = distribution(m)
                histogram.add_metric([m.model, str(m.version)], d.buckets(), d.total)
            yield histogram
        yield self._stages(models)

    def _process(self) -> Iterator[Metric]:
        s = self._server
        yield GaugeMetricFamily("tenuto_pending_bytes", "Bytes of unanswered requests.", s.pending_bytes())
        yield GaugeMetricFamily(
            "tenuto_pending_bytes_limit", "Above it no stream is read.", s.pending_bytes_limit
        )
        yield GaugeMetricFamily("tenuto_open_streams", "Open streams.", s.open_streams())
        yield GaugeMetricFamily(
            "tenuto_open_streams_limit", "Streams that there may be.", s.open_streams_limit
        )
        yield GaugeMetricFamily(
            "tenuto_waiting_predicts", "Predicts that wait for their answer.", s.waiting_predicts()
        )
        yield GaugeMetricFamily(
            "tenuto_waiting_predicts_limit", "Predicts that may wait.", s.waiting_predicts_limit
        )
        yield GaugeMetricFamily(
            "tenuto_paced_streams", "Streams read later: their callers are too fast.", s.paced_streams()
        )
        refused = CounterMetricFamily(
            "tenuto_requests_refused",
            "Opens, events and Predicts refused before any model had them.",
            labels=["reason"],
        )
        for reason, count in _shown(REFUSALS, s.requests_refused).items():
            refused.add_metric([reason], count)
        yield refused
        yield CounterMetricFamily(
            "tenuto_streams_refused", "Streams refused at the limit.", s.streams_refused()
        )
        yield CounterMetricFamily(
            "tenuto_messages_refused", "Messages that were no request.", s.messages_refused
        )
        yield CounterMetricFamily(
            "tenuto_calls_unauthenticated",
            "Calls without a token that is known.",
            s.unauthenticated(),
        )
        yield GaugeMetricFamily(
            "tenuto_front_ends", "Processes that receive for this one and listen.", s.front_ends()
        )
        yield CounterMetricFamily(
            "tenuto_front_ends_lost", "Such processes that died, and their connections.", s.front_ends_lost()
        )
        yield GaugeMetricFamily("tenuto_draining", "1 from the first stop signal on.", float(s.draining))
        yield self._resumes()
        build = GaugeMetricFamily("tenuto_build_info", "The server's version.", labels=["version"])
        build.add_metric([s.version], 1)
        yield build
        loads = CounterMetricFamily(
            "tenuto_model_loads", "Versions that were tried: loaded, failed.", labels=["model", "result"]
        )
        for (model, result), count in list(s.loads.items()):
            loads.add_metric([model, result], count)
        yield loads
        info = GaugeMetricFamily(
            "tenuto_model_info",
            "A model version that serves or retires.",
            labels=["model", "version", "provider", "sha256"],
        )
        for m in list(s.models):
            info.add_metric([m.model, str(m.version), m.provider, m.sha256], 1)
        yield info
        nodes = GaugeMetricFamily(
            "tenuto_model_nodes",
            "Nodes of a model's graph, by the provider that runs them.",
            labels=["model", "version", "provider"],
        )
        for m in list(self._server.models):
            for provider, count in m.nodes.items():
                nodes.add_metric([m.model, str(m.version), provider], count)
        yield nodes

    def _resumes(self) -> Metric:
        family = CounterMetricFamily(
            "tenuto_sequences_resumed",
            "Opens with a resume token, by what became of them.",
            labels=["result"],
        )
        found = _shown(RESULTS, self._server.resumes_before)
        found.update(dict(self._server.resumes_refused))
        for model in list(self._server.models):
            found["resumed"] += model.resumed
            found.update(dict(model.resumes_refused))
        for result, count in found.items():
            family.add_metric([result], count)
        return family

    def _stages(self, models: list[ModelMetrics]) -> Metric:
        family = HistogramMetricFamily(
            "tenuto_stage_seconds",
            "Time of a batch by stage.",
            labels=["model", "version", "stage"],
        )
        for m in models:
            for stage, d in m.stages.items():
                family.add_metric([m.model, str(m.version), stage], d.buckets(), d.total)
        return family
