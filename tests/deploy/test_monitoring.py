"""deploy/monitoring: every query is one that Prometheus parses, and asks for series that a server has.

What needs no tool is checked without one; promtool and prometheus are on the path (Debian's package
`prometheus`), and without them the tests that need them skip. The server and Prometheus are real, on free
ports of this machine.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

import tenuto
from deploy.monitoring import dashboard as source
from tenuto.serving.config import ServerConfig, variable_of
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys
from tests.faults.process import ServerProcess, server_process
from tests.integration.wire import Conversation, chunk, connect, ending, opening, stub

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/monitoring"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RULES = ROOT / "deploy/kubernetes/components/monitoring/rules.yaml"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]

# What a query may ask for that no server exports.
OF_PROMETHEUS = {"up": "written by Prometheus at every scrape", "ALERTS": "written by its rules"}
TARGET_LABELS = {"job", "instance", "namespace", "pod"}  # of the scrape: prometheus.yml, or a PodMonitor
NOT_SHOWN = {
    "process_virtual_memory_bytes": "addresses, not memory: a GPU's libraries alone reserve many gigabytes",
}
# Panels that show 0 all the time while all is well, or while nothing is under way; all others must show more.
MAY_BE_ZERO = {
    "Chunks slower than 50 ms": "none was, on a machine with time",
    "Chunks beyond their period": "as above",
    "Bytes of unanswered requests": "nothing waits behind the load",
    "Chunks that wait": "as above",
    "Predicts that wait": "as above",
    "Streams that are read later": "nobody is too fast",
    "Engine busy": "the last full second may have been a quiet one",
    "Padding": "no two chunks of different lengths met in a batch",
    "Rows run again alone": "no run failed",
    "Restarts within an hour": "the server was started once",
    "Draining and retiring": "it does not drain",
    "Front ends": "it has none",
}
UNITS = {"s", "percentunit", "cps", "short", "bytes", "none"}

# The first test that needs the server starts it, checks its models, and loads it, on whatever else runs here.
pytestmark = pytest.mark.timeout(180)

Labels = dict[str, str]
Series = frozenset[tuple[str, str]]  # labels and their values, __name__ among them


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls until it holds. Fails after 30 seconds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


# --- the file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """One of a panel."""

    panel: str
    expr: str
    legend: str

    def filled(self, **values: str) -> str:
        """With values in the place of variables."""
        expr = self.expr.replace("$__rate_interval", "1m")
        for name, value in values.items():
            expr = expr.replace(f"${name}", value)
        assert "$" not in expr, expr
        return expr


QUERIES = [Query(p["title"], t["expr"], t["legendFormat"]) for p in PANELS for t in p["targets"]]
ALL = {"job": "servers/tenuto", "namespace": ".*", "pod": ".*", "model": ".*"}
VARIABLES = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
_VALUES = re.compile(r"label_values\((\w+)(\{.*\})?, (\w+)\)")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_file_is_what_the_script_writes() -> None:
    written = (FOLDER / "dashboard.json").read_text(encoding="utf-8")
    assert written == source.text(), "run: python deploy/monitoring/dashboard.py"


def test_each_row_answers_its_question_in_order() -> None:
    assert [p["title"] for p in DASHBOARD["panels"] if p["type"] == "row"] == [
        "Are my streams healthy?",
        "When do I scale?",
        "What is it doing?",
        "What runs?",
    ]


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][name] for name in "xywh")
        cells = {(x + i, y + j) for i in range(w) for j in range(h)}
        assert x + w <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({p["title"] for p in PANELS}) == len(PANELS)


@pytest.mark.parametrize("panel", PANELS, ids=[p["title"] for p in PANELS])
def test_a_panel_says_what_to_do_in_one_sentence_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert re.fullmatch(r"[A-Z0-9d].{30,260}[^.]\.", panel["description"])
    assert ". " not in panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"]["uid"] == "${datasource}"
    assert [t["datasource"] for t in panel["targets"]] == [panel["datasource"]] * len(panel["targets"])
    assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
    assert all(t["legendFormat"] not in ("", "__auto") for t in panel["targets"])


def limits(rule: dict[str, Any]) -> set[float]:
    """The numbers that an alert compares with."""
    found = re.findall(r"(?:>=?|<=?) ([\d.]+)(?: \* ([\d.]+))?(?:\s|$)", rule["expr"])
    return {round(float(a) * float(b or 1), 9) for a, b in found}


def test_every_alert_is_on_a_panel_with_its_limit() -> None:
    """Its name stands in the panel's sentence. An alert above 0 has a limit just above."""
    alerts = {r["alert"]: r for r in rules() if "alert" in r}
    shown: dict[str, list[float]] = {}
    for panel in PANELS:
        steps = [s["value"] for s in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]]
        for name in re.findall(r"\bTenuto[A-Z]\w+", panel["description"]):
            shown[name] = steps
    assert shown.keys() == alerts.keys()
    for name, steps in shown.items():
        wanted = limits(alerts[name])
        if wanted == {0}:
            assert [s for s in steps if 0 < s <= 0.001], name
        elif wanted:
            assert wanted & set(steps), (name, wanted, steps)
        else:  # `up == 0`, and nothing at all
            assert (name, steps) in (("TenutoDown", [1]), ("TenutoAbsent", [1]))


def test_every_setting_that_is_named_exists() -> None:
    texts = [README, *(p["description"] for p in PANELS)]
    named = {name for text in texts for name in re.findall(r"\bTENUTO_[A-Z_]+", text)}
    assert len(named) > 5
    assert named - {variable_of(name) for name in ServerConfig.model_fields} == set()


def test_a_panel_that_is_pointed_to_exists() -> None:
    titles = {p["title"] for p in PANELS}
    pointed = {name for p in PANELS for name in re.findall(r"“(.+?)”", p["description"])}
    assert pointed
    assert pointed <= titles


def test_the_readme_is_short_and_names_every_row_and_variable() -> None:
    assert len(README.splitlines()) <= 60
    for row in (p for p in DASHBOARD["panels"] if p["type"] == "row"):
        assert row["title"] in README
    for variable in DASHBOARD["templating"]["list"]:
        assert f"`{variable['name']}`" in README


def test_no_expression_names_a_place() -> None:
    """Jobs, namespaces and pods are variables."""
    for query in QUERIES:
        for name, matchers in selectors(query.expr):
            values = {label: value for label, _, value in matchers}
            if name != "ALERTS":
                assert values["job"] == "$job", query
                assert values["pod"] == "$pod", query
            assert values["namespace"] == "$namespace", query


def test_the_rules_for_prometheus_are_those_of_kubernetes() -> None:
    done = subprocess.run([FOLDER / "rules.sh"], capture_output=True, text=True, timeout=30, check=True)
    assert yaml.safe_load(done.stdout) == yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"]


# --- reading expressions -----------------------------------------------------------------------------

_CLAUSE = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right) \(([^)]*)\)")
_WORDS = {"and", "or", "unless", "bool", "offset"}
_RANGE = re.compile(r"\[[\w$:]+\]")
# A name that no bracket follows, for that would be a function; and what stands in braces behind it.
_IDENTIFIER = re.compile(r"(?<![\w.$])([A-Za-z_:][\w:]*)(?![\w:]*\s*\()(\{[^}]*\})?")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
Matchers = tuple[tuple[str, str, str], ...]


def selectors(expr: str) -> list[tuple[str, Matchers]]:
    """The series that an expression asks for: names, and matchers of labels."""
    bare = _CLAUSE.sub("", _RANGE.sub("", expr))
    found = _IDENTIFIER.findall(bare)
    return [(name, tuple(_MATCHER.findall(braces))) for name, braces in found if name not in _WORDS]


def grouped(expr: str) -> set[str]:
    """The labels by which it adds up or joins."""
    return {label.strip() for clause in _CLAUSE.findall(expr) for label in clause.split(",")}


def matches(matchers: Matchers, labels: Labels) -> bool:
    """As Prometheus does it."""
    for label, operator, value in matchers:
        have = labels.get(label, "")
        same = re.fullmatch(value, have) is not None if "~" in operator else value == have
        if same == operator.startswith("!"):
            return False
    return True


def faults(expr: str, samples: list[Labels]) -> list[str]:
    """What an expression asks for that these samples do not have."""
    found = []
    asked = selectors(expr)
    for name, matchers in asked:
        if name in OF_PROMETHEUS:
            continue
        own = [s for s in samples if s["__name__"] == name]
        inner = tuple(m for m in matchers if m[0] not in TARGET_LABELS)
        known = {label for s in own for label in s} | TARGET_LABELS
        if not own:
            found.append(f"no series {name}")
        elif unknown := {label for label, _, _ in matchers} - known:
            found.append(f"{name} has no label {', '.join(sorted(unknown))}")
        elif not any(matches(inner, s) for s in own):
            found.append(f"no series of {name} has {inner}")
    names = {name for name, _ in asked}
    known = {label for s in samples if s["__name__"] in names for label in s} | TARGET_LABELS
    known |= {"alertname"} if "ALERTS" in names else set()
    found += [f"by {label}, which none of the series has" for label in sorted(grouped(expr) - known)]
    return found


@pytest.mark.parametrize(
    "expr, says",
    [
        ("rate(tenuto_chunk_total[1m])", "no series tenuto_chunk_total"),
        ('sum by (le) (rate(tenuto_chunks_total{modell="m"}[1m]))', "no label modell"),
        ('tenuto_chunks_total{outcome="answred"}', "no series of tenuto_chunks_total has"),
        ("sum by (modle) (tenuto_chunks_total)", "by modle"),
        ("tenuto_chunks_total and on (jobb) tenuto_chunks_total", "by jobb"),
        ("tenuto_chunks_total unless tenuto_draning", "no series tenuto_draning"),
    ],
)
def test_a_query_for_what_is_not_there_is_found(expr: str, says: str) -> None:
    samples = [{"__name__": "tenuto_chunks_total", "model": "m", "outcome": "answered"}]
    (found,) = [text for text in faults(expr, samples) if says in text]
    assert found
    assert faults('sum by (model) (rate(tenuto_chunks_total{outcome=~"a.+"}[1m])) > 0', samples) == []


# --- promtool ----------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """Where it is; or the test skips."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} (Debian: apt-get install prometheus)")
    return found


def check_expressions(folder: Path, expressions: list[str]) -> subprocess.CompletedProcess[str]:
    """By promtool, each as a rule that records it: `promtool promql` came later than 2.42."""
    recorded = [{"record": f"expression:{i}", "expr": expr} for i, expr in enumerate(expressions)]
    file = folder / "expressions.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    command = [tool("promtool"), "check", "rules", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_promtool_parses_every_query(tmp_path: Path) -> None:
    """With "All", and with chosen values as Grafana writes several of them."""
    chosen = {
        "job": "(a/tenuto|b/tenuto)",
        "namespace": "n",
        "pod": r"(127\\.0\\.0\\.1:1|p)",
        "model": "(m|digit-strings)",
    }
    expressions = [query.filled(**values) for query in QUERIES for values in (ALL, chosen)]
    done = check_expressions(tmp_path, expressions)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(expressions)} rules found" in done.stdout


@pytest.mark.parametrize("expr", ["rate(up)", "sum by (a (up)", "up{a=~b}", "histogram_quantile(up)", "up >"])
def test_promtool_refuses_what_is_no_query(tmp_path: Path, expr: str) -> None:
    assert check_expressions(tmp_path, [expr]).returncode != 0


def test_the_configuration_and_its_rules_are_valid(tmp_path: Path) -> None:
    done = subprocess.run([FOLDER / "rules.sh"], capture_output=True, text=True, timeout=30, check=True)
    (tmp_path / "rules.yml").write_text(done.stdout)
    shutil.copy(FOLDER / "prometheus.yml", tmp_path)
    command = [tool("promtool"), "check", "config", "prometheus.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(rules())} rules found" in done.stdout


def test_the_job_is_one_that_the_alerts_look_at() -> None:
    """Under the labels by which the rules add up."""
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    (down,) = [r for r in rules() if r.get("alert") == "TenutoDown"]
    ((name, matchers),) = selectors(down["expr"].removesuffix(" == 0"))
    assert name == "up"
    assert matches(matchers, {"job": job["job_name"]})
    assert ALL["job"] == job["job_name"]
    assert job["static_configs"][0]["labels"].keys() == {"namespace"}
    assert job["relabel_configs"] == [{"source_labels": ["__address__"], "target_label": "pod"}]


# --- a server, its load, and a Prometheus that scrapes it --------------------------------------------

TOKEN = "operator-" * 3
CALLERS = f'[operator]\ntokens = ["{TOKEN}"]\noperator = true\n'
SLOTS, STREAMS = 4, 8
SCRAPE_INTERVAL = "500ms"
EXPORTED = f'{{job="{ALL["job"]}", __name__=~"(tenuto|process)_.+"}}'  # all that a server has


class Prometheus:
    """Its HTTP API."""

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str, **fields: Any) -> Any:
        """The data of an answer. Raises: OSError."""
        query = urllib.parse.urlencode(fields, doseq=True)
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{query}"
        with urllib.request.urlopen(url, timeout=20) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def ask(self, expr: str, at: float | None = None) -> dict[Series, float]:
        """An expression's value, now or at that time."""
        fields = {} if at is None else {"time": f"{at:.3f}"}
        result = self.get("query", query=expr, **fields)["result"]
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in result}

    def has_scraped(self) -> bool:
        """Whether it serves, and the server answered it."""
        try:
            return self.number("up") == 1
        except OSError:  # it has only begun to listen
            return False

    def scraped_at(self) -> float:
        """When the newest scrape began, seconds since 1970."""
        return self.number("timestamp(up)")

    def number(self, expr: str, at: float | None = None) -> float:
        """The only value; 0 where there is none."""
        values = list(self.ask(expr, at).values())
        assert len(values) <= 1, (expr, values)
        return values[0] if values else 0.0


@contextmanager
def prometheus_process(folder: Path, metrics_port: int) -> Iterator[Prometheus]:
    """Scrapes that port as prometheus.yml says, but sooner. Its data is in `folder`; it ends at the end."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = dict.fromkeys(config["global"], SCRAPE_INTERVAL)
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{metrics_port}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    extracted = subprocess.run([FOLDER / "rules.sh"], capture_output=True, timeout=30, check=True)
    (folder / "rules.yml").write_bytes(extracted.stdout)
    command = [
        tool("prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        "--web.listen-address=127.0.0.1:0",
    ]
    log = folder / "prometheus.log"
    environment = os.environ | {"GOMAXPROCS": "1"}
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=stderr, stderr=stderr) as process,
    ):
        try:
            wait_until(lambda: "Listening on" in log.read_text() or process.poll() is not None, "its port")
            found = re.search(r'"Listening on" address=127\.0\.0\.1:(\d+)', log.read_text())
            assert found, log.read_text()
            yield Prometheus(int(found[1]))
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass
class Loaded:
    """A server that has served, and what it must have counted."""

    server: ServerProcess
    prometheus: Prometheus | None
    why: str  # there is no Prometheus
    sent: dict[str, int]  # expression -> its value
    text: str  # the scrape behind the load
    at: float  # when Prometheus had seen all of it, seconds since 1970

    @functools.cached_property
    def samples(self) -> list[Labels]:
        return samples(self.text)

    @functools.cached_property
    def families(self) -> dict[str, Metric]:
        return families(self.text)

    def asked(self) -> Prometheus:
        """Skips where there is none."""
        if self.prometheus is None:
            pytest.skip(self.why)
        return self.prometheus


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str) -> list[Labels]:
    """Every series of a scrape."""
    return [{"__name__": s.name, **s.labels} for f in families(text).values() for s in f.samples]


def write_models(repository: Path) -> None:
    """Good ones, and one that is refused."""
    toys.write(repository, "accumulator", toys.accumulator())
    toys.write(repository, "doubler", toys.doubler())
    toys.write(repository, "explosive", toys.explosive())
    toys.write(repository, "speaker", toys.speaker())
    (toys.write(repository, "broken", toys.doubler()) / "model.onnx").write_bytes(b"no model")


def numbers(count: int, value: float = 1.0) -> Any:
    return np.full(count, value, np.float32)


def go_round(server: ServerProcess, client: tenuto.Client) -> None:
    """Some traffic of every kind, all of which is over at the end."""
    # Three streams of 20 chunks to their end, at a period that nobody misses by being slow.
    for _ in range(3):
        with client.stream("accumulator", period_ms=20_000) as stream:
            assert len(list(stream.run(numbers(4) for _ in range(20)))) == 20
    for _ in range(10):
        client.predict("doubler", np.ones((2, 2), np.float32))
    with client.stream("speaker") as stream:
        assert len(list(stream.generate("abc", 5))) >= 5
        stream.end()
        assert list(stream) == []
    broken = pytest.raises(tenuto.SequenceFailed, match="STATE_NOT_FINITE")
    with client.stream("explosive") as stream, broken:
        list(stream.run([numbers(1, 1e30)] * 2))

    # An operator ends one, which goes on by its token; and a token that is none.
    with client.stream("accumulator") as stream:
        stream.send(numbers(1))
        next(stream)
        client.end_sequence(stream.sequence_id)
        with pytest.raises(tenuto.SequenceEnded) as ended:
            next(stream)
        assert ended.value.reason == "EVICTED"
    with client.stream("accumulator", resume_token=ended.value.resume_token) as stream:
        assert [o.outputs["y"].tolist() for o in stream.run([numbers(1)])] == [[2.0]]
    with pytest.raises(tenuto.Refused, match="TOKEN_INVALID"), client.stream("", resume_token=b"x" * 99):
        pass

    with connect(server.port) as channel:
        # A step that comes twice, and what is no message.
        with Conversation(channel, token=TOKEN) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            conversation.opened()
            assert conversation.values(1) == [1.0]
            conversation.send(chunk(1, [1.0]), ending())
            assert conversation.values(1) == [1.0]
            conversation.closed()
        with Conversation(channel, token=TOKEN) as conversation:
            conversation.send_bytes(b"\xff" * 9)
            assert conversation.refused().reason == "WRONG_MESSAGE"
        for token in ("", "unknown", "x" * 999):
            with (
                tenuto.Client(f"127.0.0.1:{server.port}", token=token) as stranger,
                pytest.raises(tenuto.ServerError),
            ):
                stranger.models()

        # All slots taken: the rest is refused. Then all streams.
        with ExitStack() as crowd:
            for _ in range(SLOTS):
                crowd.enter_context(client.stream("accumulator"))
            with pytest.raises(tenuto.Overloaded, match="POOL_FULL"), client.stream("accumulator"):
                pass
        wait_until(lambda: count(server, "tenuto_open_streams") == 0, "the end of all streams")
        with ExitStack() as crowd:
            for _ in range(STREAMS):
                conversation = crowd.enter_context(Conversation(channel, token=TOKEN))
                conversation.send(opening("nobody"))
                conversation.failed("UNKNOWN_MODEL")
            with Conversation(channel, token=TOKEN) as conversation:
                conversation.send(opening("accumulator"))
                assert conversation.refused().code is grpc.StatusCode.RESOURCE_EXHAUSTED
    wait_until(lambda: count(server, "tenuto_open_streams") == 0, "the end of all streams")
    wait_until(lambda: count(server, "tenuto_pending_bytes") == 0, "all replies to be taken")


def drive(
    server: ServerProcess, repository: Path, held: ExitStack, pause: Callable[[], None]
) -> dict[str, int]:
    """Two rounds, for what is counted for the first time has no rate yet; and one sequence that stays, on
    `held`. Returns what must be counted."""
    client = tenuto.Client(f"127.0.0.1:{server.port}", token=TOKEN, resume_seconds=0)
    held.enter_context(client)
    go_round(server, client)
    pause()
    go_round(server, client)
    # One that lives on, on a version that retires.
    stays = held.enter_context(client.stream("accumulator", label="stays"))
    stays.send(numbers(1))
    next(stays)
    new = toys.write(repository.with_name("new"), "accumulator", toys.accumulator(scale=2.0), version=2)
    new.rename(repository / "accumulator" / "2")
    wait_until(
        lambda: count(server, "tenuto_model_retiring", model="accumulator", version="1") == 1,
        "a new version",
    )
    wait_until(lambda: count(server, "tenuto_pending_bytes") == 0, "all replies to be taken")
    twice: dict[str, int] = {
        'sum(tenuto_chunks_total{model="accumulator", outcome="answered"})': 3 * 20 + 2 + 1,
        'tenuto_chunks_total{model="doubler", outcome="answered"}': 10,
        'tenuto_chunks_total{model="explosive", outcome="failed"}': 1,
        'tenuto_chunk_latency_seconds_count{model="doubler"}': 10,
        'tenuto_chunk_lag_seconds_count{model="accumulator", version="1"}': 60,
        'tenuto_chunk_lag_seconds_bucket{model="accumulator", version="1", le="+Inf"}': 60,
        'tenuto_time_to_first_output_seconds_count{model="explosive"}': 1,
        'sum(tenuto_sequences_ended_total{model="accumulator", reason="END"})': 3 + 1 + 1,
        'sum(tenuto_sequences_ended_total{model="accumulator", reason="EVICTED"})': 1,
        'sum(tenuto_sequences_ended_total{model="accumulator", reason="CANCELLED"})': SLOTS,
        'tenuto_sequences_ended_total{model="explosive", reason="STATE_NOT_FINITE"}': 1,
        'tenuto_sequences_ended_total{model="speaker", reason="END"}': 1,
        'tenuto_generated_parts_total{model="speaker"}': 5,
        'tenuto_sequences_resumed_total{result="resumed"}': 1,
        'tenuto_sequences_resumed_total{result="TOKEN_INVALID"}': 1,
        'sum(tenuto_admission_rejections_total{model="accumulator", reason="POOL_FULL"})': 1,
        'tenuto_steps_repeated_total{model="accumulator", version="1"}': 1,
        "tenuto_messages_refused_total": 1,
        "tenuto_calls_unauthenticated_total": 3,
        "tenuto_streams_refused_total": 1,
    }
    once = {
        'sum(tenuto_chunks_total{model="accumulator", outcome="answered"})': 1,
        'tenuto_chunk_latency_seconds_count{model="accumulator", version="1"}': 2 * 63 + 1,
        'tenuto_stage_seconds_count{model="accumulator", version="1", stage="queue"}': 2 * 63 + 1,
        'tenuto_sequences_started_total{model="accumulator", version="1"}': 2 * (3 + 2 + 1 + SLOTS) + 1,
        'tenuto_active_sequences{model="accumulator", version="1"}': 1,
        'tenuto_sequence_slots_used{model="accumulator", version="1"}': 1,
        'tenuto_sequence_slots{model="accumulator", version="1"}': SLOTS,
        "sum(tenuto_pending_chunks)": 0,
        "tenuto_pending_bytes": 0,
        "tenuto_open_streams": 1,
        "tenuto_draining": 0,
        'tenuto_model_retiring{model="accumulator", version="1"}': 1,
        'tenuto_model_retiring{model="accumulator", version="2"}': 0,
        'tenuto_model_loads_total{model="accumulator", result="loaded"}': 2,
        'tenuto_model_loads_total{model="broken", result="failed"}': 1,
        "count(tenuto_model_info)": 5,
        "count(tenuto_build_info)": 1,
    }
    return {expr: 2 * twice.get(expr, 0) + once.get(expr, 0) for expr in twice | once}


def count(server: ServerProcess, name: str, **labels: str) -> float:
    """A value of /metrics."""
    found = [
        s.value
        for f in families(server.metrics()).values()
        for s in f.samples
        if s.name == name and labels.items() <= s.labels.items()
    ]
    return float(sum(found))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """The server behind its load, scraped before, within and after it."""
    folder = tmp_path_factory.mktemp("monitoring")
    (repository := folder / "models").mkdir()
    write_models(repository)
    (folder / "callers.toml").write_text(CALLERS)
    settings: dict[str, object] = {
        "callers": folder / "callers.toml",
        "max_sequences": SLOTS,
        "max_streams": STREAMS,
        "resume_reserve": 0,
        "checkpoint_every": 1,
        "poll_seconds": 0.1,
        "threads": 1,
    }
    with ExitStack() as held:
        server = held.enter_context(server_process(repository, folder, **settings))
        prometheus: Prometheus | None = None
        why = "needs prometheus (Debian: apt-get install prometheus)"
        if shutil.which("prometheus"):
            prometheus = held.enter_context(prometheus_process(folder, server.metrics_port))
            wait_until(prometheus.has_scraped, "the first scrape")

        def pause() -> None:
            """Until what was counted so far is in Prometheus."""
            if prometheus is not None:
                whole, since = len(samples(server.metrics())), time.time()
                wait_until(lambda: prometheus.scraped_at() > since, "a scrape")
                wait_until(lambda: prometheus.number(f"count({EXPORTED})") >= whole, "every series")

        sent = drive(server, repository, held.enter_context(ExitStack()), pause)
        text = server.metrics()
        pause()
        if prometheus is not None:
            fire = 'count(ALERTS{alertstate="firing"})'
            wait_until(lambda: prometheus.number(fire) > 0, "the alert of the model that was refused")
        at = time.time()
        pause()  # once more: with two samples a series has a rate
        yield Loaded(server, prometheus, why, sent, text, at)


def test_each_query_asks_for_what_the_server_exports(loaded: Loaded) -> None:
    """Names, labels and their values, and what is grouped by."""
    assert [(q.panel, text) for q in QUERIES for text in faults(q.filled(**ALL), loaded.samples)] == []


def test_each_variable_has_values(loaded: Loaded) -> None:
    """By a label of a family that the server, or its scrape, has."""
    for variable in VARIABLES:
        name, braces, label = _VALUES.fullmatch(variable["query"]["query"]).groups()  # type: ignore[union-attr]
        expr = Query("", name + (braces or ""), "").filled(**ALL)
        assert label == variable["name"]
        assert faults(f"sum by ({label}) ({expr})", loaded.samples) == []
        if loaded.prometheus is not None:
            values = loaded.prometheus.get(f"label/{label}/values", **{"match[]": expr})
            assert values, variable["name"]


def test_every_family_is_shown_or_left_out_for_a_reason(loaded: Loaded) -> None:
    """A new one finds its panel, or its reason here."""
    asked = {name for q in QUERIES for name, _ in selectors(q.expr)}
    missing = {
        family.name for family in loaded.families.values() if not {s.name for s in family.samples} & asked
    }
    assert missing == NOT_SHOWN.keys()


def test_the_scrape_is_what_promtool_calls_valid(loaded: Loaded) -> None:
    """Types, and HELP of all families; and units in names."""
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=loaded.text,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", loaded.text, flags=re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", loaded.text, flags=re.MULTILINE))
    assert kinds.keys() == helps.keys()
    assert set(kinds.values()) == {"counter", "gauge", "histogram"}


def test_the_counts_are_what_was_sent(loaded: Loaded) -> None:
    """On the way through Prometheus, whose scrape succeeded."""
    prometheus = loaded.asked()
    assert prometheus.number("up", loaded.at) == 1
    assert {expr: prometheus.number(expr, loaded.at) for expr in loaded.sent} == loaded.sent


def test_the_page_counts_the_same(loaded: Loaded) -> None:
    """Without Prometheus."""
    for expr, value in loaded.sent.items():
        ((name, matchers),) = selectors(expr)
        found = [
            s.value
            for f in loaded.families.values()
            for s in f.samples
            if s.name == name and matches(matchers, s.labels)
        ]
        assert (len(found) if expr.startswith("count(") else sum(found)) == value, expr


def test_prometheus_has_every_series_with_its_labels_and_no_other(loaded: Loaded) -> None:
    """Those of the scrape, and those of the target."""
    port = loaded.server.metrics_port
    added = {
        "job": ALL["job"],
        "instance": f"127.0.0.1:{port}",
        "namespace": "servers",
        "pod": f"127.0.0.1:{port}",
    }
    there = set(loaded.asked().ask(EXPORTED, loaded.at))
    assert there == {frozenset((sample | added).items()) for sample in loaded.samples}


def test_prometheus_knows_type_and_help_of_every_family(loaded: Loaded) -> None:
    known = loaded.asked().get("targets/metadata", match_target=f'{{job="{ALL["job"]}"}}')
    metadata = {one["metric"]: (one["type"], one["help"]) for one in known}
    for family in loaded.families.values():
        name = family.name if family.name in metadata else f"{family.name}_total"
        assert metadata[name] == (family.type, family.documentation)


@pytest.mark.parametrize("query", QUERIES, ids=[f"{q.panel}: {q.legend}" for q in QUERIES])
def test_each_query_returns_data(loaded: Loaded, query: Query) -> None:
    """A number, under labels that its legend names; with all models, and with those that were chosen."""
    prometheus = loaded.asked()
    chosen = ALL | {"namespace": "servers", "pod": r"127\\.0\\.0\\.1:\\d+", "model": "(accumulator|speaker)"}
    for values in (ALL, chosen):
        answer = prometheus.ask(query.filled(**values), loaded.at)
        assert answer, "no data"
        real = [value for value in answer.values() if not math.isnan(value)]
        assert real, answer
        assert any(real) or query.panel in MAY_BE_ZERO, answer
        named = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        assert all(named <= dict(series).keys() for series in answer), answer
        shown = [tuple(dict(series)[name] for name in sorted(named)) for series in answer]
        if named:
            assert max(Counter(shown).values()) == 1, f"series that look alike: {shown}"


def test_the_rules_work_on_real_series(loaded: Loaded) -> None:
    """What autoscalers read is there, the refused model is an alert, and no rule fails."""
    prometheus = loaded.asked()
    groups = prometheus.get("rules")["groups"]
    found = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert found.keys() == {rule.get("record", rule.get("alert")) for rule in rules()}
    assert {name: rule["lastError"] for name, rule in found.items() if rule.get("lastError")} == {}
    assert {rule["health"] for rule in found.values()} == {"ok"}
    firing = prometheus.ask('ALERTS{alertstate="firing", alertname="TenutoModelNotLoaded"}', loaded.at)
    assert [dict(series)["model"] for series in firing] == ["broken"]
    # The version that retires has the only sequence, and does not count.
    fullest = "pod:tenuto_slots_used:ratio"
    wait_until(lambda: list(prometheus.ask(fullest).values()) == [0], "the slots used of what takes more")


# --- hostile clients ---------------------------------------------------------------------------------

MANY = 2000


def storm(server: ServerProcess, many: int) -> None:
    """So many unknown names of models, versions, labels, sequences and resume tokens on streams; of all that
    unary calls name, methods and callers' tokens among it, a quarter of that."""
    names = [f'{i}-{"x" * (i % 40)}-é"\\\n' for i in range(many)]
    with connect(server.port) as channel:
        with Conversation(channel, token=TOKEN) as conversation:
            conversation.send(*(opening(name, sequence=i) for i, name in enumerate(names)))
            for _ in names:
                conversation.failed("UNKNOWN_MODEL")
            conversation.send(*(opening("accumulator", i, version=100 + i) for i in range(many)))
            for _ in names:
                conversation.failed("UNKNOWN_MODEL")
            conversation.send(
                *(opening("", sequence=i, resume_token=name.encode()) for i, name in enumerate(names))
            )
            for _ in names:
                conversation.failed("TOKEN_INVALID")
            conversation.send(*(chunk(1, [1.0], sequence=2**31 + i) for i in range(many)))
            for _ in names:
                conversation.failed("NOT_OPEN")
            # Each ends before the next one begins: there are few slots.
            pairs = [(opening("accumulator", i, label=n), ending(i)) for i, n in enumerate(names)]
            conversation.send(*(event for pair in pairs for event in pair))
            for _ in names:
                conversation.opened()
                conversation.closed()
        api, known, code = stub(channel), (("authorization", f"Bearer {TOKEN}"),), grpc.StatusCode
        calls: list[tuple[Any, Any, Any, grpc.StatusCode]] = []
        for i, name in enumerate(names[: many // 4 or 1]):
            unknown: Any = channel.unary_unary(f"/tenuto.v1.Tenuto/Method{i}")
            stranger = (("authorization", f"Bearer unknown-{i}"),)
            calls += [
                (api.Predict, pb.PredictRequest(model=name), known, code.NOT_FOUND),
                (api.GetModel, pb.GetModelRequest(model="doubler", version=i + 9), known, code.NOT_FOUND),
                (api.EndSequence, pb.EndSequenceRequest(sequence_id=name), known, code.NOT_FOUND),
                (api.ListSequences, pb.ListSequencesRequest(model=name), known, code.NOT_FOUND),
                (unknown, b"", known, code.UNIMPLEMENTED),
                (api.ListModels, pb.ListModelsRequest(), stranger, code.UNAUTHENTICATED),
            ]

        def refused(one: tuple[Any, Any, Any, grpc.StatusCode]) -> tuple[grpc.StatusCode, grpc.StatusCode]:
            call, request, metadata, expected = one
            with pytest.raises(grpc.RpcError) as error:
                call(request, timeout=30, metadata=metadata)
            return error.value.code(), expected

        with ThreadPoolExecutor(4) as pool:
            answers = Counter(pool.map(refused, calls))
    assert [pair for pair in answers if pair[0] is not pair[1]] == []


def test_hostile_names_make_no_series(loaded: Loaded) -> None:
    """Neither on the page nor in Prometheus; they are counted."""
    server = loaded.server
    storm(server, 1)  # a reason that comes for the first time is a series of its own; there are few
    before, unknown = samples(server.metrics()), count(server, "tenuto_calls_unauthenticated_total")
    tokens = count(server, "tenuto_sequences_resumed_total", result="TOKEN_INVALID")
    started = count(server, "tenuto_sequences_started_total")
    storm(server, MANY)
    after = samples(server.metrics())
    assert sorted(map(str, after)) == sorted(map(str, before))
    assert len(before) < 2000
    assert count(server, "tenuto_calls_unauthenticated_total") - unknown == MANY // 4
    assert count(server, "tenuto_sequences_resumed_total", result="TOKEN_INVALID") - tokens == MANY
    assert count(server, "tenuto_sequences_started_total") - started == MANY
    if loaded.prometheus is not None:
        one, now = loaded.prometheus, time.time()
        wait_until(lambda: one.scraped_at() > now, "a scrape behind the storm")
        assert one.number("scrape_samples_scraped") == len(before)
        assert len(one.get("series", **{"match[]": EXPORTED})) == len(before)
