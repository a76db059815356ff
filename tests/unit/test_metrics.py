"""Numbers in, Prometheus text out: with a closed set of names and labels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar

from tenuto.serving.metrics import (
    ENDINGS,
    REJECTIONS,
    STAGES,
    Distribution,
    ModelMetrics,
    ServerMetrics,
    TenutoCollector,
)
from tenuto.serving.sequence import Ending

MODEL = {"model", "version"}
LABELS = {  # of every family; a new one is added here on purpose
    "tenuto_active_sequences": MODEL,
    "tenuto_admission_rejections": MODEL | {"reason"},
    "tenuto_batch_occupancy_ratio": MODEL,
    "tenuto_batch_size": MODEL,
    "tenuto_batches": MODEL,
    "tenuto_build_info": {"version"},
    "tenuto_calls_unauthenticated": set(),
    "tenuto_chunk_lag_seconds": MODEL,
    "tenuto_chunk_latency_seconds": MODEL,
    "tenuto_chunks": MODEL | {"outcome"},
    "tenuto_deadline_misses": MODEL,
    "tenuto_front_ends": set(),
    "tenuto_front_ends_lost": set(),
    "tenuto_generated_parts": MODEL,
    "tenuto_draining": set(),
    "tenuto_engine_busy_ratio": MODEL,
    "tenuto_late_arrivals": MODEL,
    "tenuto_messages_refused": set(),
    "tenuto_model_info": MODEL | {"provider", "sha256"},
    "tenuto_model_load_seconds": MODEL,
    "tenuto_model_loads": {"model", "result"},
    "tenuto_model_nodes": MODEL | {"provider"},
    "tenuto_model_retiring": MODEL,
    "tenuto_open_streams": set(),
    "tenuto_open_streams_limit": set(),
    "tenuto_paced_streams": set(),
    "tenuto_pending_bytes_limit": set(),
    "tenuto_requests_refused": {"reason"},
    "tenuto_waiting_predicts": set(),
    "tenuto_waiting_predicts_limit": set(),
    "tenuto_padding_ratio": MODEL,
    "tenuto_pending_bytes": set(),
    "tenuto_pending_chunks": MODEL,
    "tenuto_resume_token_bytes": MODEL,
    "tenuto_rows_rerun": MODEL,
    "tenuto_sequence_slots": MODEL,
    "tenuto_sequence_slots_used": MODEL,
    "tenuto_sequences_resumed": {"result"},
    "tenuto_sequences_ended": MODEL | {"reason"},
    "tenuto_sequences_started": MODEL,
    "tenuto_stage_seconds": MODEL | {"stage"},
    "tenuto_steps_repeated": MODEL,
    "tenuto_streams_refused": set(),
    "tenuto_time_to_first_output_seconds": MODEL,
}


def create_metrics() -> ServerMetrics:
    server = ServerMetrics("1.2.3", pending_bytes=lambda: 12, open_streams=lambda: 3)
    model = ModelMetrics("digits", 2, "CPUExecutionProvider", slots=8, nodes={"CPUExecutionProvider": 6})
    model.sha256 = "f" * 64
    model.chunks["answered"] += 5
    model.ended["END"] += 1
    model.rejected["POOL_FULL"] += 1
    model.batch_size.add(3)
    server.models.append(model)
    server.refuse("UNKNOWN_MODEL")
    server.loads["digits", "failed"] += 7
    return server


def scrape(server: ServerMetrics) -> dict[str, Metric]:
    registry = CollectorRegistry()
    registry.register(TenutoCollector(server))
    text = generate_latest(registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(server: ServerMetrics, sample: str, **labels: str) -> float:
    found = [s.value for f in scrape(server).values() for s in f.samples
             if s.name == sample and labels.items() <= s.labels.items()]  # fmt: skip
    (one,) = found
    return float(one)


def test_the_names_and_their_labels_are_a_closed_set() -> None:
    """Never a sequence, a peer or a tenant: each would be a series of its own."""
    families = scrape(create_metrics())
    labels = {name: set().union(*(set(s.labels) - {"le"} for s in f.samples)) for name, f in families.items()}
    assert labels == LABELS


def test_every_family_has_a_help_text() -> None:
    assert all(f.documentation.endswith(".") for f in scrape(create_metrics()).values())


def test_a_server_without_models_can_be_scraped() -> None:
    assert set(scrape(ServerMetrics("1"))) == set(LABELS)


def test_values_arrive_under_their_names() -> None:
    server = create_metrics()
    assert value(server, "tenuto_chunks_total", outcome="answered", model="digits", version="2") == 5
    assert value(server, "tenuto_sequences_ended_total", reason="END") == 1
    assert value(server, "tenuto_admission_rejections_total", reason="POOL_FULL") == 1
    assert value(server, "tenuto_sequence_slots") == 8
    assert value(server, "tenuto_pending_bytes") == 12
    assert value(server, "tenuto_open_streams") == 3
    assert value(server, "tenuto_build_info", version="1.2.3") == 1
    assert value(server, "tenuto_model_info", provider="CPUExecutionProvider", sha256="f" * 64) == 1
    assert value(server, "tenuto_model_nodes", provider="CPUExecutionProvider") == 6
    assert value(server, "tenuto_batch_size_bucket", le="2.0") == 0
    assert value(server, "tenuto_batch_size_bucket", le="4.0") == 1
    assert value(server, "tenuto_batch_size_bucket", le="+Inf") == 1
    assert value(server, "tenuto_batch_size_sum") == 3
    assert value(server, "tenuto_engine_busy_ratio") == 0
    server.models[0].busy_ratio = lambda: 0.75
    assert value(server, "tenuto_engine_busy_ratio") == 0.75
    assert value(server, "tenuto_model_loads_total", model="digits", result="failed") == 7
    assert value(server, "tenuto_model_retiring") == 0
    server.models[0].retiring = True
    assert value(server, "tenuto_model_retiring") == 1
    server.draining = True
    assert value(server, "tenuto_draining") == 1


def test_each_stage_is_a_series() -> None:
    samples = scrape(create_metrics())["tenuto_stage_seconds"].samples
    assert {s.labels["stage"] for s in samples} == set(STAGES)


def test_model_versions_are_told_apart() -> None:
    server = create_metrics()
    server.models.append(ModelMetrics("digits", 3, batches=9))
    assert value(server, "tenuto_batches_total", version="2") == 0
    assert value(server, "tenuto_batches_total", version="3") == 9


def test_a_bound_belongs_to_its_bucket() -> None:
    d = Distribution((1.0, 2.0))
    for v in (0.5, 1.0, 1.5, 2.0, 2.1):
        d.add(v)
    assert d.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert d.total == pytest.approx(7.1)


def test_an_empty_distribution_has_all_its_buckets() -> None:
    assert Distribution((1.0,)).buckets() == [("1.0", 0.0), ("+Inf", 0.0)]


def test_refused_sequences_and_refused_calls_are_one_count() -> None:
    model = ModelMetrics("m", 1)
    model.rejected["POOL_FULL"] += 2
    model.rejected_calls.update(POOL_FULL=3, DRAINING=1)
    families = {f.name: f for f in TenutoCollector(ServerMetrics("0", models=[model])).collect()}
    samples = families["tenuto_admission_rejections"].samples
    counts = {s.labels["reason"]: s.value for s in samples}
    assert counts == dict.fromkeys(REJECTIONS, 0) | {"POOL_FULL": 5, "DRAINING": 1}


def test_an_exemplar_stands_in_its_bucket() -> None:
    d = Distribution((1.0, 2.0))
    d.exemplify(1.5, "a" * 32, at=1.0)
    (_, (*_, shown), _) = d.buckets()
    assert isinstance(shown, Exemplar)
    assert (shown.labels, shown.value) == ({"trace_id": "a" * 32}, 1.5)


def test_what_may_come_is_there_before_the_first() -> None:
    """`rate` and `increase` do not see a series come."""
    server = create_metrics()
    server.models.append(ModelMetrics("fresh", 1))
    for outcome in ("answered", "dropped", "failed"):
        assert value(server, "tenuto_chunks_total", model="fresh", outcome=outcome) == 0
    for result in ("resumed", "TOKEN_INVALID", "POOL_FULL", "DRAINING"):
        assert value(server, "tenuto_sequences_resumed_total", result=result) == 0
    assert set(ENDINGS) == {ending.name for ending in Ending}
    for ending in Ending:
        assert value(server, "tenuto_sequences_ended_total", model="fresh", reason=ending.name) == 0
    for reason in REJECTIONS:
        assert value(server, "tenuto_admission_rejections_total", model="fresh", reason=reason) == 0


def test_what_is_counted_over_all_versions_does_not_fall_when_one_is_unloaded() -> None:
    server = create_metrics()
    (model,) = server.models
    model.resumed = 3
    model.resumes_refused["TOKEN_INVALID"] += 2
    server.resumes_refused["TOKEN_INVALID"] += 1
    for _ in range(2):
        assert value(server, "tenuto_sequences_resumed_total", result="resumed") == 3
        assert value(server, "tenuto_sequences_resumed_total", result="TOKEN_INVALID") == 3
        if server.models:
            server.forget(model)
    assert server.models == []


def test_refusals_of_many_threads_are_all_counted() -> None:
    server = create_metrics()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(server.refuse, ["UNKNOWN_MODEL"] * 4_000))
    assert value(server, "tenuto_requests_refused_total", reason="UNKNOWN_MODEL") == 4_001
