"""The Grafana dashboard: this file is its source, dashboard.json what it writes.

    python deploy/monitoring/dashboard.py

Python's own library is all that it needs. What is changed in Grafana is to be written here, or the next run
undoes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboard.json")
Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
# Every query selects by these. A label that the scrape does not add is matched by "All", which is `.*`.
SERVERS = 'job=~"$job", namespace=~"$namespace", pod=~"$pod"'
MODELS = SERVERS + ', model=~"$model"'
WINDOW = "[$__rate_interval]"
PANELS_A_LINE, WIDTH, HEIGHT = 3, 8, 8  # of Grafana's 24 columns
# The limit shown for an alert that fires above 0: one event within minutes, as a rate a second, is above it.
SOME = 0.001


@dataclass(frozen=True)
class Query:
    """One expression, and how its series are called."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One picture. `alerts`: the alerts that watch the same, and above which value each fires."""

    title: str
    text: str  # what to do when it is bad; one sentence
    unit: str
    queries: tuple[Query, ...]
    alerts: dict[str, float] = field(default_factory=dict)
    kind: str = "timeseries"
    limits: tuple[float, ...] = ()  # further ones, of no alert
    low_is_bad: bool = False  # red below the limit
    most: float | None = None  # where the axis ends, at least

    @property
    def description(self) -> str:
        """The sentence, and behind it the names of the alerts."""
        names = ", ".join(self.alerts)
        return f"{self.text.removesuffix('.')} ({names})." if names else self.text


@dataclass(frozen=True)
class Row:
    """The panels that answer one question."""

    question: str
    panels: tuple[Panel, ...]


# -- expressions -----------------------------------------------------------------------------------


def rate(name: str, by: str, where: str = MODELS) -> str:
    """How many a second."""
    return f"sum by ({by}) (rate({name}{{{where}}}{WINDOW}))"


def share(part: str, whole: str) -> str:
    """One over the other; nothing where the other is nothing."""
    return f"{part} / ({whole} > 0)"


def mean(name: str, by: str, where: str = MODELS) -> str:
    """The mean of a histogram."""
    return share(rate(f"{name}_sum", by, where), rate(f"{name}_count", by, where))


def quantile(q: float, name: str, by: str, where: str = MODELS) -> str:
    """A quantile of a histogram, within its buckets."""
    return f"histogram_quantile({q}, {rate(f'{name}_bucket', f'le, {by}', where)})"


def quantiles(name: str) -> tuple[Query, ...]:
    """The median and the 99th percentile, by model."""
    return (
        Query(quantile(0.5, name, "model"), "{{model}} p50"),
        Query(quantile(0.99, name, "model"), "{{model}} p99"),
    )


def ours(expr: str) -> str:
    """Series of processes, of those alone that are Tenuto's."""
    return f"{expr} and on (job, instance) tenuto_build_info{{{SERVERS}}}"


# -- panels ----------------------------------------------------------------------------------------

QUEUE = MODELS + ', stage="queue"'

HEALTH = Row(
    "Are my streams healthy?",
    (
        Panel(
            "Alerts that fire",
            "Where one fires, its description says what to do; where none ever appears, see that the rules "
            "are loaded.",
            "none",
            (
                Query(
                    'sum by (alertname) (ALERTS{alertname=~"Tenuto.+", alertstate="firing", '
                    'namespace=~"$namespace"})',
                    "{{alertname}}",
                ),
            ),
            kind="stat",
            limits=(1,),
        ),
        Panel(
            "Chunk latency",
            "When p99 nears the line of 50 ms, see in “Stages of a batch” whether chunks wait (more "
            "servers) or "
            "compute (a smaller model, or a GPU).",
            "s",
            quantiles("tenuto_chunk_latency_seconds"),
            limits=(0.05,),
        ),
        Panel(
            "Chunks slower than 50 ms",
            "Above 1 % the objective is missed: add servers if “Engine busy” is near 1, and look at the "
            "stages if not.",
            "percentunit",
            (
                Query(
                    "1 - "
                    + share(
                        rate("tenuto_chunk_latency_seconds_bucket", "model", MODELS + ', le="0.05"'),
                        rate("tenuto_chunk_latency_seconds_count", "model"),
                    ),
                    "{{model}}",
                ),
            ),
            alerts={"TenutoSlowChunksSlow": 0.06, "TenutoSlowChunksFast": 0.144},
            limits=(0.01,),
        ),
        Panel(
            "Time to first output",
            "When it is long while chunk latency is not, clients open sequences and send their first chunk "
            "late.",
            "s",
            quantiles("tenuto_time_to_first_output_seconds"),
        ),
        Panel(
            "Lag behind declared periods",
            "When p99 rises above 0 for long, add servers, or let clients declare the period that they "
            "really have.",
            "s",
            quantiles("tenuto_chunk_lag_seconds"),
        ),
        Panel(
            "Chunks beyond their period",
            "Of the chunks with a declared period: answered late calls for more servers if “Engine busy” "
            "is near 1, "
            "came late is the client, the network, or a server too busy to read.",
            "percentunit",
            (
                Query(
                    share(
                        rate("tenuto_deadline_misses_total", "model"),
                        rate("tenuto_chunk_lag_seconds_count", "model"),
                    ),
                    "{{model}} answered late",
                ),
                Query(
                    share(
                        rate("tenuto_late_arrivals_total", "model"),
                        rate("tenuto_chunk_lag_seconds_count", "model"),
                    ),
                    "{{model}} came late",
                ),
            ),
            alerts={"TenutoPeriodsMissed": 0.01},
        ),
        Panel(
            "Endings by reason",
            "END and STREAM_ENDED are as it should be; CANCELLED is lost clients, STATE_NOT_FINITE the "
            "model or what is "
            "fed to it, and for the others see docs/operations.md.",
            "cps",
            (Query(rate("tenuto_sequences_ended_total", "reason"), "{{reason}}"),),
            alerts={"TenutoStatesBroken": SOME},
        ),
        Panel(
            "Resumes by result",
            "Any result but resumed is a sequence that could not go on at once: POOL_FULL calls for room "
            "(TENUTO_RESUME_RESERVE), TOKEN_INVALID for the panel beside this one.",
            "cps",
            (Query(rate("tenuto_sequences_resumed_total", "result", SERVERS), "{{result}}"),),
        ),
        Panel(
            "Resume tokens refused in 15 minutes",
            "Compare the servers' keys (TENUTO_TOKEN_KEY_FILE), and see whether the new version names the "
            "old one in "
            "resumes_from and whether tokens are older than TENUTO_TOKEN_SECONDS.",
            "short",
            (
                Query(
                    "sum by (pod) (increase(tenuto_sequences_resumed_total"
                    f'{{{SERVERS}, result="TOKEN_INVALID"}}[15m]))',
                    "{{pod}}",
                ),
            ),
            alerts={"TenutoTokensRefused": SOME},
        ),
        Panel(
            "Calls that are not let in",
            "Without a known token: a client whose token was taken from TENUTO_CALLERS, or a stranger; no "
            "request: a "
            "client that is broken, or a stranger.",
            "cps",
            (
                Query(
                    rate("tenuto_calls_unauthenticated_total", "pod", SERVERS),
                    "{{pod}} without a known token",
                ),
                Query(rate("tenuto_messages_refused_total", "pod", SERVERS), "{{pod}} no request"),
                Query(rate("tenuto_requests_refused_total", "pod, reason", SERVERS), "{{pod}} {{reason}}"),
            ),
        ),
        Panel(
            "Steps sent again",
            "Many without a server that left mean connections that break: look at the network and at "
            "proxies.",
            "cps",
            (Query(rate("tenuto_steps_repeated_total", "model"), "{{model}}"),),
        ),
    ),
)

SCALE = Row(
    "When do I scale?",
    (
        Panel(
            "Slots used",
            "Above 80 % add servers, or slots (TENUTO_MAX_SEQUENCES) where engines are not busy; from 90 % "
            "on new "
            "sequences are refused.",
            "percentunit",
            (
                Query(
                    share(f"tenuto_sequence_slots_used{{{MODELS}}}", f"tenuto_sequence_slots{{{MODELS}}}"),
                    "{{pod}} {{model}}/{{version}}",
                ),
            ),
            alerts={"TenutoSlotsNearlyUsed": 0.8},
            most=1,
        ),
        Panel(
            "Engine busy",
            "Near 1 for minutes: add servers, because more slots would only make everybody later.",
            "percentunit",
            (Query(f"tenuto_engine_busy_ratio{{{MODELS}}}", "{{pod}} {{model}}/{{version}}"),),
            alerts={"TenutoEngineBusy": 0.95},
            most=1,
        ),
        Panel(
            "Time in the queue",
            "When chunks wait for longer than a batch takes, add servers; autoscalers go by the mean.",
            "s",
            (
                Query(mean("tenuto_stage_seconds", "model", QUEUE), "{{model}} mean"),
                Query(quantile(0.99, "tenuto_stage_seconds", "model", QUEUE), "{{model}} p99"),
            ),
        ),
        Panel(
            "Bytes of unanswered requests",
            "At TENUTO_MAX_PENDING_BYTES no stream is read any more: add servers, or find who sends "
            "without reading.",
            "bytes",
            (
                Query(f"tenuto_pending_bytes{{{SERVERS}}}", "{{pod}}"),
                Query(f"min(tenuto_pending_bytes_limit{{{SERVERS}}})", "limit"),
            ),
        ),
        Panel(
            "Chunks that wait",
            "When it rises and does not fall, more is sent than is answered: add servers.",
            "short",
            (Query(f"sum by (pod, model) (tenuto_pending_chunks{{{MODELS}}})", "{{pod}} {{model}}"),),
        ),
        Panel(
            "Live sequences",
            "When one server has many more than the others, its clients know no other one: give them the "
            "list of all.",
            "short",
            (Query(f"sum by (pod, model) (tenuto_active_sequences{{{MODELS}}})", "{{pod}} {{model}}"),),
        ),
        Panel(
            "Open streams",
            "Near TENUTO_MAX_STREAMS let clients carry several sequences on a stream, or add servers.",
            "short",
            (
                Query(f"tenuto_open_streams{{{SERVERS}}}", "{{pod}}"),
                Query(f"min(tenuto_open_streams_limit{{{SERVERS}}})", "limit"),
            ),
        ),
        Panel(
            "Front ends",
            "Where there are fewer than TENUTO_FRONT_ENDS for longer than a restart, the log says why.",
            "short",
            (
                Query(f"tenuto_front_ends{{{SERVERS}}}", "{{pod}}"),
                Query(rate("tenuto_front_ends_lost_total", "pod", SERVERS), "{{pod}} lost a second"),
            ),
        ),
        Panel(
            "Predicts that wait",
            "Near the limit add servers, or raise TENUTO_MAX_PREDICTS.",
            "short",
            (
                Query(f"tenuto_waiting_predicts{{{SERVERS}}}", "{{pod}}"),
                Query(f"min(tenuto_waiting_predicts_limit{{{SERVERS}}})", "limit"),
            ),
        ),
        Panel(
            "Streams that are read later",
            "Their callers send more than their chunks_per_second: raise it, or talk to them.",
            "short",
            (Query(f"tenuto_paced_streams{{{SERVERS}}}", "{{pod}}"),),
        ),
        Panel(
            "Streams refused",
            "The server has TENUTO_MAX_STREAMS open: raise it, add servers, or let clients use fewer.",
            "cps",
            (Query(rate("tenuto_streams_refused_total", "pod", SERVERS), "{{pod}}"),),
            alerts={"TenutoStreamsRefused": SOME},
        ),
        Panel(
            "Admissions refused by reason",
            "POOL_FULL calls for slots or servers, OVERLOADED for servers, and DRAINING for clients that "
            "know another one.",
            "cps",
            (Query(rate("tenuto_admission_rejections_total", "model, reason"), "{{model}} {{reason}}"),),
            alerts={"TenutoRefuses": SOME},
        ),
    ),
)

WORK = Row(
    "What is it doing?",
    (
        Panel(
            "Chunks by outcome",
            "dropped is what its sequence no longer needed when it ended; failed is answered with an "
            "error, which the "
            "log has.",
            "cps",
            (Query(rate("tenuto_chunks_total", "model, outcome"), "{{model}} {{outcome}}"),),
        ),
        Panel(
            "Sequences started",
            "When it rises while live sequences do not, clients open a sequence for what could be a chunk "
            "of one.",
            "cps",
            (Query(rate("tenuto_sequences_started_total", "model"), "{{model}}"),),
        ),
        Panel(
            "Batches",
            "When as many as chunks, nothing is shared: see the size of batches.",
            "cps",
            (Query(rate("tenuto_batches_total", "model"), "{{model}}"),),
        ),
        Panel(
            "Rows in a batch",
            "Near 1 with many live sequences: their chunks come one by one, which is cheap only as long as "
            "the engine is "
            "not busy.",
            "short",
            (
                Query(mean("tenuto_batch_size", "model"), "{{model}} mean"),
                Query(quantile(0.9, "tenuto_batch_size", "model"), "{{model}} p90"),
            ),
        ),
        Panel(
            "Batch occupancy",
            "Near 1 with a busy engine: the model's max_batch bounds it, so try a larger one, or add "
            "servers.",
            "percentunit",
            (Query(mean("tenuto_batch_occupancy_ratio", "model"), "{{model}}"),),
            most=1,
        ),
        Panel(
            "Padding",
            "Above a half the model computes more padding than samples: let clients send chunks of like "
            "length.",
            "percentunit",
            (Query(mean("tenuto_padding_ratio", "model"), "{{model}}"),),
            most=1,
        ),
        Panel(
            "Stages of a batch",
            "The longest is what to work on: queue by servers, compute by the model or a GPU, gather and "
            "scatter by "
            "smaller states or --pool graph on a GPU, reply by fewer outputs.",
            "s",
            (Query(mean("tenuto_stage_seconds", "model, stage"), "{{model}} {{stage}}"),),
        ),
        Panel(
            "Rows run again alone",
            "Any is a batch that failed: the log says which sequence was to blame and why.",
            "cps",
            (Query(rate("tenuto_rows_rerun_total", "model"), "{{model}}"),),
            limits=(SOME,),
        ),
        Panel(
            "Parts generated",
            "When generation takes the engine from live streams, bound a chunk by TENUTO_MAX_GENERATE, or "
            "serve it apart.",
            "cps",
            (Query(rate("tenuto_generated_parts_total", "model"), "{{model}}"),),
        ),
        Panel(
            "Size of resume tokens",
            "Large tokens cost bandwidth at each TENUTO_CHECKPOINT_EVERY: make them rarer, or the state "
            "smaller.",
            "bytes",
            quantiles("tenuto_resume_token_bytes"),
        ),
    ),
)

RUNS = Row(
    "What runs?",
    (
        Panel(
            "Servers that answer their scrape",
            "0 is a server that is gone, that still loads its models, or that Prometheus does not reach: "
            "see its log.",
            "none",
            (Query(f"up{{{SERVERS}}}", "{{pod}}"),),
            alerts={"TenutoDown": 1, "TenutoAbsent": 1},
            low_is_bad=True,
            most=1,
        ),
        Panel(
            "Servers by version",
            "More than one version for longer than a rollout takes: see why the rollout stands still.",
            "none",
            (Query(f"count by (version) (tenuto_build_info{{{SERVERS}}})", "{{version}}"),),
            kind="stat",
        ),
        Panel(
            "Restarts within an hour",
            "The exit status says why: 70 a run that did not return, 71 no run succeeds, 137 memory.",
            "short",
            (Query(ours(f"changes(process_start_time_seconds{{{SERVERS}}}[1h])"), "{{pod}}"),),
            alerts={"TenutoRestarts": 2},
        ),
        Panel(
            "Models",
            "A version that is missing on some servers was refused there; one with two checksums has other "
            "files on some; a provider that is not yours has lost the GPU.",
            "none",
            (
                Query(
                    f"count by (model, version, provider, sha256) (tenuto_model_info{{{MODELS}}})", "servers"
                ),
                Query(f"sum by (model, version) (tenuto_model_retiring{{{MODELS}}})", "retiring on"),
                Query(f"sum by (model, version) (tenuto_active_sequences{{{MODELS}}})", "live sequences"),
                Query(f"max by (model, version) (tenuto_model_load_seconds{{{MODELS}}})", "seconds to load"),
            ),
            kind="table",
        ),
        Panel(
            "Nodes of the graphs",
            "Nodes on the CPU beside ones on CUDA cost a copy at every run: the log names them.",
            "none",
            (Query(f"max by (model, version, provider) (tenuto_model_nodes{{{MODELS}}})", "nodes"),),
            kind="table",
        ),
        Panel(
            "Versions refused since the start",
            "The log and `tenuto models` say why; the old version, if there is one, serves on.",
            "none",
            # Of all models: one that never loaded is no value of $model.
            (
                Query(
                    f'sum by (pod, model) (tenuto_model_loads_total{{{SERVERS}, result="failed"}})',
                    "{{pod}} {{model}}",
                ),
            ),
            alerts={"TenutoModelNotLoaded": SOME},
        ),
        Panel(
            "Versions loaded since the start",
            "When it rises without a rollout, something rewrites the models' files.",
            "none",
            (
                Query(
                    f'sum by (pod, model) (tenuto_model_loads_total{{{SERVERS}, result="loaded"}})',
                    "{{pod}} {{model}}",
                ),
            ),
        ),
        Panel(
            "Draining and retiring",
            "A server that drains for minutes, or a version that retires for hours, waits for sequences: "
            "lower "
            "TENUTO_DRAIN_SECONDS or TENUTO_MAX_AGE_SECONDS.",
            "none",
            (
                Query(f"sum by (pod) (tenuto_draining{{{SERVERS}}})", "{{pod}} drains"),
                Query(
                    f"sum by (pod, model, version) (tenuto_model_retiring{{{MODELS}}}) > 0",
                    "{{pod}} {{model}}/{{version}} retires",
                ),
            ),
        ),
        Panel(
            "CPUs used",
            "At the limit of the container, with engines that are not busy, the interpreter is the bound: "
            "add servers.",
            "short",
            (Query(ours(f"rate(process_cpu_seconds_total{{{SERVERS}}}{WINDOW})"), "{{pod}}"),),
        ),
        Panel(
            "Memory",
            "When it rises for hours while live sequences do not, keep the graph and report it; near the "
            "limit lower "
            "TENUTO_MAX_SEQUENCES.",
            "bytes",
            (Query(ours(f"process_resident_memory_bytes{{{SERVERS}}}"), "{{pod}}"),),
        ),
        Panel(
            "Open files",
            "Near 1 connections are refused: raise the limit of open files (ulimit -n).",
            "percentunit",
            (
                Query(
                    ours(share(f"process_open_fds{{{SERVERS}}}", f"process_max_fds{{{SERVERS}}}")),
                    "{{pod}}",
                ),
            ),
            limits=(0.8,),
            most=1,
        ),
    ),
)

ROWS = (HEALTH, SCALE, WORK, RUNS)


# -- Grafana's schema ------------------------------------------------------------------------------


def thresholds(panel: Panel) -> Json:
    """One colour up to the lowest limit, the other one beyond it."""
    first, beyond = ("red", "green") if panel.low_is_bad else ("green", "red")
    limits = sorted({*panel.alerts.values(), *panel.limits})
    between = ["orange"] * (len(limits) - 1) + [beyond] if limits else []
    steps: list[Json] = [{"color": first, "value": None}]
    steps += [{"color": colour, "value": limit} for colour, limit in zip(between, limits, strict=True)]
    return {"mode": "absolute", "steps": steps}


def line(panel: Panel) -> Json:
    """How a time series is drawn."""
    whole = panel.unit == "none"  # something is, or is not: it has no values between
    return {
        "drawStyle": "line",
        "lineInterpolation": "stepAfter" if whole else "linear",
        "lineWidth": 1,
        "fillOpacity": 5,
        "showPoints": "auto",
        "spanNulls": False,
        "axisPlacement": "auto",
        "scaleDistribution": {"type": "linear"},
        "stacking": {"mode": "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if panel.alerts or panel.limits else "off"},
    }


def defaults(panel: Panel) -> Json:
    """Unit, axis, thresholds."""
    made: Json = {"unit": panel.unit, "thresholds": thresholds(panel), "mappings": []}
    if panel.kind == "timeseries":
        made |= {"color": {"mode": "palette-classic"}, "custom": line(panel), "min": 0}
        if panel.most is not None:
            made["max"] = panel.most
    elif panel.kind == "stat":
        made |= {"color": {"mode": "thresholds"}, "noValue": "none"}
    else:
        made |= {"custom": {"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True}}
    return made


def options(kind: str) -> Json:
    """Of the kinds of panels that are used here."""
    if kind == "timeseries":
        return {
            "legend": {
                "calcs": ["lastNotNull", "max"],
                "displayMode": "table",
                "placement": "bottom",
                "showLegend": True,
                "sortBy": "Last *",
                "sortDesc": True,
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if kind == "stat":
        return {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value_and_name",
        }
    return {
        "cellHeight": "sm",
        "showHeader": True,
        "footer": {"show": False, "reducer": ["sum"], "fields": ""},
    }


def target(panel: Panel, query: Query, letter: str) -> Json:
    """One query of a panel. A table and a stat ask for now alone."""
    instant = panel.kind != "timeseries"
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "format": "table" if panel.kind == "table" else "time_series",
        "instant": instant,
        "legendFormat": query.legend,
        "range": not instant,
        "refId": letter,
    }


def transformations(panel: Panel) -> list[Json]:
    """A table's queries become columns under their legends."""
    if panel.kind != "table":
        return []
    letters = "ABCDEFGH"[: len(panel.queries)]
    value = "Value #{}" if len(letters) > 1 else "Value"
    names = {value.format(x): q.legend for x, q in zip(letters, panel.queries, strict=True)}
    return [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names},
        },
    ]


def drawn(panel: Panel, number: int, x: int, y: int) -> Json:
    """The panel at its place."""
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": defaults(panel), "overrides": []},
        "options": options(panel.kind),
        "targets": [target(panel, q, letter) for q, letter in zip(panel.queries, "ABCDEFGH", strict=False)],
        "transformations": transformations(panel),
    }


def panels() -> Iterator[Json]:
    """The rows, one below the other, three panels a line."""
    number, y = 1, 0
    for row in ROWS:
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        yield {
            "id": number,
            "type": "row",
            "title": row.question,
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        for i, panel in enumerate(row.panels):
            line_, column = divmod(i, PANELS_A_LINE)
            yield drawn(panel, number + 1 + i, WIDTH * column, y + 1 + HEIGHT * line_)
        number += 1 + len(row.panels)
        y += 1 + HEIGHT * -(-len(row.panels) // PANELS_A_LINE)


def variable(name: str, label: str, metric: str, where: str, every: str | None = ".*") -> Json:
    """A choice among the values of a label. `every`: what "All" is; None: each value by its name."""
    query = f"label_values({metric}{{{where}}}, {name})" if where else f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "allValue": every,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "includeAll": True,
        "multi": True,
        "options": [],
        "refresh": 2,  # when the time range changes: a pod that is gone can still be looked at
        "regex": "",
        "skipUrlSync": False,
        "sort": 1,
    }


def variables() -> list[Json]:
    """Each one's choices are what the ones before it leave."""
    source: Json = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
    }
    job, namespace = 'job=~"$job"', 'job=~"$job", namespace=~"$namespace"'
    return [
        source,
        # Every scrape has this label, and `up` and the process_* series of other programs have others.
        variable("job", "Job", "tenuto_build_info", "", every=None),
        variable("namespace", "Namespace", "tenuto_build_info", job),
        variable("pod", "Pod", "tenuto_build_info", namespace),
        variable("model", "Model", "tenuto_model_info", SERVERS),
    ]


def dashboard() -> Json:
    """All of it, for Grafana 10 and newer."""
    return {
        "uid": "tenuto",
        "title": "Tenuto",
        "description": "Written by deploy/monitoring/dashboard.py of Tenuto's sources: change it there.",
        "tags": ["tenuto"],
        "id": None,
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "fiscalYearStartMonth": 0,
        "liveNow": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "weekStart": "",
        "links": [],
        "annotations": {
            "list": [
                {
                    "builtIn": 1,
                    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
                    "enable": True,
                    "hide": True,
                    "iconColor": "rgba(0, 211, 255, 1)",
                    "name": "Annotations & Alerts",
                    "type": "dashboard",
                }
            ]
        },
        "templating": {"list": variables()},
        "panels": list(panels()),
    }


def text() -> str:
    """What dashboard.json holds."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
