"""deploy/routing: the configurations as they are checked in, in front of two real servers.

A proxy is started with the very file of deploy/routing, in which little but addresses is replaced
(`Kind.places`). nginx, haproxy and envoy are those that the variables NGINX, HAPROXY and ENVOY name, or that
are on the path; without one the tests that need it skip. Where README.md tells of a trap, its test starts the
file with that one setting changed, and sees what happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import yaml

from tenuto import Client, Sampling, aio
from tenuto.errors import NotFound, Refused, ReplyTimeout, TenutoError, Unavailable
from tenuto.serving.config import ServerConfig
from tenuto.settings import Settings
from tenuto.v1 import tenuto_pb2
from tests import toys
from tests.faults.crowd import Crowd
from tests.faults.process import ServerProcess, server_process
from tests.integration.running import number, wait_for
from tests.integration.wire import Conversation, chunk, connect, ending, opening, tensor

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/routing"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
LOOPBACK = "127.0.0.1"
# A proxy that was told to end has that long.
END_SECONDS = 10.0
# More than nginx (128) and HAProxy (100) let into one connection by default.
MANY_STREAMS = 130
# More than nginx takes as a body by default, in values of four bytes.
LARGE_VALUES = 400_000

Changes = dict[str, str]


# --- the files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One proxy: its file, and how it is started in the foreground."""

    name: str
    file: str
    arguments: Callable[[Path, Path], list[str]]  # file, a folder of its own
    places: dict[str, str]  # in the file -> with this test's ports

    @property
    def text(self) -> str:
        return (FOLDER / self.file).read_text(encoding="utf-8")

    @property
    def program(self) -> str | None:
        return os.environ.get(self.name.upper()) or shutil.which(self.name)

    def placed(self, changes: Changes, **ports: int) -> str:
        """The file with other addresses, and what a test changes on purpose. Each is there exactly once."""
        text = self.text
        for old, new in (self.places | changes).items():
            assert text.count(old) == 1, f"{self.file} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        for name, port in ports.items():
            text = text.replace(f"<{name}>", str(port))
        return text


NGINX = Kind(
    "nginx",
    "nginx.conf",
    lambda file, own: [
        *("-c", str(file), "-p", str(own), "-e", "stderr"),
        *("-g", f"daemon off; pid {own}/pid; worker_processes 1;"),
    ],
    {
        "listen 8001 http2": f"listen {LOOPBACK}:<port> http2",
        "server tenuto-a:8001": f"server {LOOPBACK}:<a>",
        "server tenuto-b:8001": f"server {LOOPBACK}:<b>",
        "worker_processes auto;": "",  # given above
        "worker_rlimit_nofile 65536;": "",  # more than this machine may allow
    },
)
HAPROXY = Kind(
    "haproxy",
    "haproxy.cfg",
    lambda file, _: ["-db", "-f", str(file)],
    {
        "bind :8001 proto": f"bind {LOOPBACK}:<port> proto",
        "tenuto-a:8001 port 8002": f"{LOOPBACK}:<a> port <a_metrics>",
        "tenuto-b:8001 port 8002": f"{LOOPBACK}:<b> port <b_metrics>",
        "/run/haproxy/admin.sock mode 600": f"ipv4@{LOOPBACK}:<admin>",
    },
)
ENVOY = Kind(
    "envoy",
    "envoy.yaml",
    lambda file, _: [
        *("-c", str(file), "--concurrency", "1", "--disable-hot-restart"),
        *("--log-level", "warning"),
    ],
    {
        "{address: 0.0.0.0, port_value: 8001}": f"{{address: {LOOPBACK}, port_value: <port>}}",
        "{address: tenuto-a, port_value: 8001}": f"{{address: {LOOPBACK}, port_value: <a>}}",
        "{address: tenuto-b, port_value: 8001}": f"{{address: {LOOPBACK}, port_value: <b>}}",
        "{address: 127.0.0.1, port_value: 9901}": f"{{address: {LOOPBACK}, port_value: <admin>}}",
    },
)
KINDS = (NGINX, HAPROXY, ENVOY)
NAMES = [kind.name for kind in KINDS]


def seconds(text: str) -> float:
    """Of a duration as the files write it."""
    found = re.fullmatch(r"(\d+)(s|m|h|d)", text)
    assert found, text
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def found(text: str, pattern: str) -> str:
    """The one setting of that form, "" if there is none; comments do not count."""
    bare = "\n".join(line.split("#")[0] for line in text.splitlines())
    values = re.findall(pattern, bare)
    return str(values[0]) if len(values) == 1 else ""


@dataclass(frozen=True)
class Demand:
    """What one setting has to be, and why."""

    kind: Kind
    pattern: str
    holds: Callable[[str], bool]
    why: str


def longer_than_idle(text: str) -> bool:
    """The server, and not the proxy, ends what is idle."""
    return seconds(text) > 10 * ServerConfig().idle_seconds


def holds_a_servers_streams(text: str) -> bool:
    return int(text) >= ServerConfig().max_streams


def leaves_time_for_another(text: str) -> bool:
    """Two servers can be tried before a client gives an opening up."""
    return 2 * seconds(text) < Settings(f"{LOOPBACK}:1").timeout_seconds


def is_one_second(text: str) -> bool:
    return text == "1s"


DEMANDS = [
    Demand(NGINX, r"client_max_body_size (\S+);", "0".__eq__, "all that a stream brings is its body"),
    Demand(NGINX, r"client_body_timeout (\S+);", longer_than_idle, "a client that says nothing"),
    Demand(NGINX, r"grpc_read_timeout (\S+);", longer_than_idle, "a server that says nothing"),
    Demand(NGINX, r"\bsend_timeout (\S+);", longer_than_idle, "a client that does not read"),
    Demand(NGINX, r"grpc_send_timeout (\S+);", longer_than_idle, "a server that does not read"),
    Demand(NGINX, r"grpc_connect_timeout (\S+);", leaves_time_for_another, "a machine that is gone"),
    Demand(NGINX, r"http2_max_concurrent_streams (\d+);", holds_a_servers_streams, "128 by default"),
    Demand(NGINX, r"worker_connections (\d+);", holds_a_servers_streams, "one a stream"),
    Demand(NGINX, r"so_keepalive=(\S+?)[ :;]", lambda text: text == "30s", "clients that vanish"),
    Demand(HAPROXY, r"timeout client (\S+)", longer_than_idle, "a client that says nothing"),
    Demand(HAPROXY, r"timeout server (\S+)", longer_than_idle, "a server that says nothing"),
    Demand(HAPROXY, r"timeout connect (\S+)", leaves_time_for_another, "a machine that is gone"),
    Demand(HAPROXY, r"tune\.h2\.max-concurrent-streams (\d+)", holds_a_servers_streams, "100 by default"),
    Demand(HAPROXY, r"http-reuse (\S+)", "never".__eq__, "a client that does not read stops others"),
    Demand(HAPROXY, r"option httpchk GET (\S+)", "/readyz".__eq__, "a server that drains"),
    Demand(HAPROXY, r"expect status 200 error-status (\S+)", "L7OKC".__eq__, "leaving is not dead"),
    Demand(HAPROXY, r"on-marked-down (\S+)", "shutdown-sessions".__eq__, "a process that hangs"),
    Demand(HAPROXY, r"\binter (\S+)", is_one_second, "new streams of a server that drains"),
    Demand(ENVOY, r"stream_idle_timeout: (\S+)", "0s".__eq__, "5m by default"),
    Demand(ENVOY, r"\n {28}timeout: (\S+)", "0s".__eq__, "15s by default"),
    Demand(ENVOY, r"connect_timeout: (\S+)", leaves_time_for_another, "a machine that is gone"),
    Demand(ENVOY, r"max_concurrent_streams: (\d+)", holds_a_servers_streams, "1024 by default"),
    Demand(ENVOY, r"max_requests: (\d+)", holds_a_servers_streams, "1024 by default, for all servers"),
    Demand(ENVOY, r"service_name: (\w+)", "readiness".__eq__, "a server that drains"),
    Demand(ENVOY, r"no_traffic_interval: (\S+)", is_one_second, "60s by default"),
    Demand(ENVOY, r"healthy_panic_threshold: {value: (\d+)}", "0".__eq__, "streams to servers that drain"),
    Demand(ENVOY, r"retry_on: (\S+)", "connect-failure,refused-stream,unavailable".__eq__, "and not reset"),
]


def unmet(kind: Kind, text: str) -> list[str]:
    """The demands that the text does not meet."""
    values = [(demand, found(text, demand.pattern)) for demand in DEMANDS if demand.kind is kind]
    return [d.pattern for d, value in values if not value or not d.holds(value)]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_limits_are_beyond_those_of_the_server(kind: Kind) -> None:
    """So that nothing but the server and its client decides how long a stream lasts and what it carries."""
    assert unmet(kind, kind.text) == []


@pytest.mark.parametrize("demand", DEMANDS, ids=lambda demand: f"{demand.kind.name} {demand.why}")
def test_a_setting_that_is_left_out_is_noticed(demand: Demand) -> None:
    """Each demand by itself."""
    bare = "\n".join(line.split("#")[0] for line in demand.kind.text.splitlines())
    assert unmet(demand.kind, re.sub(demand.pattern, "", bare)) == [demand.pattern]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_routes_lead_to_methods_that_exist_and_to_no_operators_one(kind: Kind) -> None:
    """Those that list and end sequences, and load and unload models, stay inside, as on Kubernetes."""
    methods = set(tenuto_pb2.DESCRIPTOR.services_by_name["Tenuto"].methods_by_name)
    text = kind.text.replace("\\", "")
    routed = set(re.findall(r"/tenuto\.v1\.Tenuto/(\w+)", text))
    for group in re.findall(r"/tenuto\.v1\.Tenuto/\(([\w|]+)\)", text):
        routed |= set(group.split("|"))
    inside = {"ListSequences", "EndSequence", "LoadModel", "UnloadModel", "ReloadModel"}
    assert methods - routed == inside
    assert routed < methods


def test_ports_are_the_servers_defaults() -> None:
    """8001 for streams, 8002 for /readyz."""
    for kind in KINDS:
        ports = set(re.findall(r"tenuto-[ab](?::|, port_value: )(\d+)", kind.text))
        assert ports == {str(ServerConfig().port)}
    assert set(re.findall(r" port (\d+)", HAPROXY.text)) == {str(ServerConfig().metrics_port)}


def test_envoys_file_is_yaml_without_a_key_twice() -> None:
    """Envoy itself would say so, but not where it is missing."""
    assert set(yaml.safe_load(ENVOY.text)) == {"admin", "overload_manager", "static_resources"}


def test_the_readme_is_short_and_names_every_file() -> None:
    """And the files are ASCII, which every tool can read."""
    assert len(README.splitlines()) <= 100
    assert {path.name for path in FOLDER.iterdir()} == {"README.md", *(kind.file for kind in KINDS)}
    assert all(f"({kind.file})" in README and kind.text.isascii() for kind in KINDS)


def test_the_command_of_the_readme_runs_what_is_in_here() -> None:
    """Without TEST_ROUTING everything with a server in it skips, and all is green."""
    assert set(re.findall(r"make\s[^`]+", README)) == {"make test-routing"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^test-routing:.*\n\t(.+)", makefile, flags=re.MULTILINE)
    assert "TEST_ROUTING=1 " in recipe
    assert f" {Path(__file__).relative_to(ROOT)} " in recipe


# --- servers and proxies -----------------------------------------------------------------------------


class Fleet:
    """Two servers with common keys, on ports that stay what they are when a server is started again."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._repository = folder / "models"
        toys.write(self._repository, "accumulator", toys.accumulator(max_frames=8192))
        toys.write(self._repository, "doubler", toys.doubler(max_batch=4096))
        toys.write(self._repository, "speaker", toys.speaker())
        toys.write(self._repository, "spinner", toys.spinner())
        self._keys = folder / "keys"
        self._keys.write_text("5a" * 32)
        self._starts = 0
        with ThreadPoolExecutor(2) as pool:
            self.servers = list(pool.map(lambda _: self._start(0, 0), range(2)))

    def _start(self, port: int, metrics_port: int) -> ServerProcess:
        self._starts += 1
        folder = self._folder / f"server-{self._starts}"
        folder.mkdir()
        settings = {"token_key_file": self._keys, "checkpoint_every": 10, "threads": 1, "poll_seconds": 0}
        process = server_process(self._repository, folder, port=port, metrics_port=metrics_port, **settings)
        return self._stack.enter_context(process)

    @property
    def a(self) -> ServerProcess:
        return self.servers[0]

    @property
    def b(self) -> ServerProcess:
        return self.servers[1]

    @property
    def targets(self) -> list[str]:
        return [f"{LOOPBACK}:{server.port}" for server in self.servers]

    def heal(self) -> None:
        """Starts again what has ended."""
        for i, server in enumerate(self.servers):
            if server.ended:
                self.servers[i] = self._start(server.port, server.metrics_port)

    def counts(self, name: str, **labels: str) -> list[float]:
        """Of a metric, by server; those that have left count 0."""
        return [0.0 if s.ended else number(s.metrics(), name, **labels) for s in self.servers]

    def busiest(self) -> ServerProcess:
        """Who has the most streams of a crowd."""
        counts = self.counts("tenuto_active_sequences", model="accumulator")
        return self.servers[counts.index(max(counts))]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if os.environ.get("TEST_ROUTING") != "1":
        pytest.skip(
            "real servers are killed and drained for two minutes, at their own pace: make test-routing"
        )
    with ExitStack() as stack:
        yield Fleet(stack, tmp_path_factory.mktemp("fleet"))


def free_ports(count: int) -> list[int]:
    """Nobody listens there: all were taken at once, and given back."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass
class Proxy:
    kind: Kind
    port: int
    admin: int
    log: Path

    @property
    def target(self) -> str:
        return f"{LOOPBACK}:{self.port}"


@contextmanager
def proxied(kind: Kind, fleet: Fleet, folder: Path, changes: Changes | None = None) -> Iterator[Proxy]:
    """The proxy of that kind in front of the fleet; it has warned of nothing, and ends with the block."""
    program = kind.program
    if program is None:
        pytest.skip(f"{kind.name} is not installed (on the path, or named by {kind.name.upper()})")
    own = folder / f"{kind.name}-{len(list(folder.iterdir()))}"
    own.mkdir(parents=True)
    port, admin = free_ports(2)
    file = own / kind.file
    a, b = fleet.a, fleet.b
    places = {"port": port, "admin": admin, "a": a.port, "b": b.port}
    file.write_text(kind.placed(changes or {}, **places, a_metrics=a.metrics_port, b_metrics=b.metrics_port))
    log = own / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [program, *kind.arguments(file, own)], stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            proxy = Proxy(kind, port, admin, log)
            wait_for(lambda: process.poll() is not None or answers(proxy.target), f"{kind.name} to answer")
            assert process.poll() is None, log.read_text()
            assert not re.search(r"(?i)\[?(warn|alert|emerg|deprecat)", log.read_text()), log.read_text()
            yield proxy
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nginx has workers


def answers(target: str) -> bool:
    try:
        with Client(target, timeout_seconds=2) as client:
            client.predict("doubler", np.ones((1, 2), np.float32))
    except TenutoError:
        return False
    return True


@dataclass
class Route:
    """A way to both servers: through a proxy, or the client's own."""

    name: str
    target: str
    fleet: Fleet
    proxy: Proxy | None = None

    def reaches(self, *servers: ServerProcess) -> bool:
        """Whether calls come to each of them. Asks a few times at once."""
        before = [batches(server) for server in servers]
        with Client(self.target) as client:
            for _ in range(4):
                client.predict("doubler", np.ones((1, 2), np.float32))
        return all(batches(server) > count for server, count in zip(servers, before, strict=True))


def batches(server: ServerProcess) -> float:
    return number(server.metrics(), "tenuto_batches_total", model="doubler")


ROUTES = [*NAMES, "list", "name"]


@pytest.fixture(scope="module", params=ROUTES)
def standing(
    request: pytest.FixtureRequest, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Route]:
    """A route for many tests. `list` is the client's own list, `name` one name with two addresses."""
    fleet.heal()
    if request.param == "list":
        yield Route("list", ",".join(fleet.targets), fleet)
    elif request.param == "name":
        yield Route("name", "ipv4:" + ",".join(fleet.targets), fleet)
    else:
        kind = KINDS[NAMES.index(request.param)]
        with proxied(kind, fleet, tmp_path_factory.mktemp("proxy")) as proxy:
            yield Route(kind.name, proxy.target, fleet, proxy)


@pytest.fixture
def route(standing: Route) -> Route:
    """The same, with both servers there, whatever the test before did to them."""
    standing.fleet.heal()
    wait_for(lambda: standing.reaches(*standing.fleet.servers), "calls to reach both servers")
    return standing


# --- with each ---------------------------------------------------------------------------------------


def heard(target: str) -> list[Any]:
    """What a batch and two dozen streams are answered, half of which generate."""
    words, count = "abc", 30

    async def sums(client: aio.Client, seed: int) -> list[tuple[int, bytes]]:
        draw = np.random.default_rng(seed)
        pieces = [draw.normal(size=draw.integers(1, 20)).astype(np.float32) for _ in range(20)]
        async with client.stream("accumulator") as stream:
            return [(output.step, output["y"].tobytes()) async for output in stream.run(pieces)]

    async def speaks(client: aio.Client, seed: int) -> list[tuple[int, int]]:
        async with client.stream("speaker", sampling=Sampling(seed=seed)) as stream:
            await stream.send(words, generate=count)
            await stream.end()
            said = [(output.part, int(output["id"][0])) async for output in stream if output.part]
        assert [word for _, word in said] == toys.spoken([(words, count)], seed=seed)
        return said

    async def all_of_them() -> list[Any]:
        async with aio.Client(target) as client:
            batch = np.random.default_rng(1).normal(size=(50, 2)).astype(np.float32)
            doubled = (await client.predict("doubler", batch))["y"].tobytes()
            streams = [(sums if seed % 2 else speaks)(client, seed) for seed in range(24)]
            return [doubled, *await asyncio.gather(*streams)]

    return asyncio.run(all_of_them())


def test_answers_are_those_of_a_direct_connection(route: Route) -> None:
    """Bit for bit; and both servers had their share."""
    fleet, direct = route.fleet, heard(route.fleet.targets[0])

    def both_had_some() -> bool:
        before = fleet.counts("tenuto_sequences_started_total")
        assert heard(route.target) == direct
        after = fleet.counts("tenuto_sequences_started_total")
        return all(now - then >= 6 for then, now in zip(before, after, strict=True))

    if route.name == "name":  # whichever address is connected first may get all that are opened at once
        wait_for(both_had_some, "both servers to have some of the streams")
    else:
        assert both_had_some()


def test_sequences_outlive_a_killed_server(route: Route, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 in the middle: no output is lost, none comes twice, each is what it would have been."""
    killed = []

    def kill() -> None:
        killed.append(route.fleet.busiest())
        killed[0].terminate(signal.SIGKILL)

    figures = Crowd(route.target, 30, 40, at={0.5: kill}).run()
    with capsys.disabled():
        print(f"\n  kill -9 behind {route.name}: {figures}")
    assert killed[0].exit_status() == -signal.SIGKILL
    assert (figures.whole, figures.chunks) == ((0, 0, 0), 1200)
    assert figures.resumes >= 6
    (other,) = [server for server in route.fleet.servers if server is not killed[0]]
    assert heard(route.target) == heard(f"{LOOPBACK}:{other.port}")  # new ones go to who is left


def turns_for(fleet: Fleet, run_seconds: float) -> int:
    """Of `spinner`, so that one run takes about so long here and now."""
    turns = 100_000
    with Client(fleet.targets[0]) as client, client.stream("spinner") as stream:
        stream.send(np.ones(1, np.int64))
        next(stream)
        began = monotonic()
        stream.send(np.full(1, turns, np.int64))
        next(stream)
        return int(turns * run_seconds / (monotonic() - began))


@contextmanager
def busy(fleet: Fleet, port: int, turns: int) -> Iterator[tuple[Conversation, ServerProcess]]:
    """A stream whose server computes for long, and cannot leave before."""
    with connect(port) as channel, Conversation(channel) as conversation:
        conversation.send(opening("spinner"), chunk(1, tensor([turns], "int64")))
        conversation.opened()
        server = fleet.servers[fleet.counts("tenuto_active_sequences", model="spinner").index(1)]
        wait_for(lambda: number(server.metrics(), "tenuto_pending_chunks", model="spinner") == 1, "the run")
        try:
            yield conversation, server
        finally:
            if not server.ended:
                server.exit_status()


def refusals(target: str) -> set[str]:
    """Opens new streams, one after another: the reasons why one is refused, "" for one that is not."""
    reasons = set()
    with Client(target) as client:
        for _ in range(8):
            try:
                with client.stream("accumulator") as stream:
                    stream.send(np.ones(1, np.float32))
                    next(stream)
                reasons.add("")
            except Unavailable as error:
                reasons.add(error.reason)
    return reasons


def test_a_drained_server_loses_nothing(route: Route, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM in the middle: nobody notices but by a pause, what it still computes is delivered, it leaves
    with status 0, and new streams go to the other one.

    nginx has no health checks, and a name with several addresses is one server to the client: there, new
    streams meet the server that leaves, are refused, and are tried again.
    """
    fleet, turns = route.fleet, turns_for(route.fleet, 3.0)
    left: list[tuple[Conversation, ServerProcess]] = []
    with ExitStack() as stack:

        def drain() -> None:
            port = route.proxy.port if route.proxy is not None else fleet.busiest().port
            left.append(stack.enter_context(busy(fleet, port, turns)))
            left[0][1].terminate()

        figures = Crowd(route.target, 30, 60, at={0.3: drain}).run()
        with capsys.disabled():
            print(f"\n  SIGTERM behind {route.name}: {figures}")
        assert (figures.whole, figures.chunks) == ((0, 0, 0), 1800)
        assert figures.resumes >= 6
        ((conversation, server),) = left
        refused = refusals(route.target)
        assert not server.ended
        assert refused == {""}
        assert conversation.values(1) == [turns]
        assert conversation.closed().resume_token
        assert server.exit_status() == 0
        assert "Traceback" not in server.log


def test_a_message_larger_than_a_megabyte_passes(route: Route) -> None:
    """As a batch, as a chunk, and as what a stream brings in all."""
    values = np.ones(LARGE_VALUES, np.float32)
    with Client(route.target) as client:
        doubled = client.predict("doubler", values.reshape(-1, 2))["y"]
        assert np.array_equal(doubled, 2 * values.reshape(-1, 2))
        with client.stream("accumulator") as stream:
            (first, *rest) = list(stream.run([values, *np.split(values, 20)]))
            assert first["y"][-1] == LARGE_VALUES
            assert rest[-1]["y"][-1] == 2 * LARGE_VALUES
            assert stream.resumes == 0


def many_open(target: str, count: int) -> int:
    """How many streams of one connection can be open at once, of so many."""

    async def one(client: aio.Client, stack: contextlib.AsyncExitStack) -> bool:
        try:
            stream = await stack.enter_async_context(client.stream("accumulator"))
            await stream.send(np.ones(1, np.float32))
            await anext(stream)
        except ReplyTimeout:
            return False
        return True

    async def all_of_them() -> int:
        async with aio.Client(target, timeout_seconds=2) as client, contextlib.AsyncExitStack() as stack:
            return sum(await asyncio.gather(*(one(client, stack) for _ in range(count))))

    return asyncio.run(all_of_them())


def test_one_connection_holds_many_streams(route: Route) -> None:
    """More than nginx and HAProxy let in by default."""
    assert many_open(route.target, MANY_STREAMS) == MANY_STREAMS


@contextmanager
def silent_readers(fleet: Fleet, *ports: int) -> Iterator[None]:
    """Two streams a port, one at each server, that do not read the megabytes that they are answered."""
    window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))
    values = np.ones(LARGE_VALUES, np.float32)
    before = sum(fleet.counts("tenuto_chunks_total", model="accumulator"))
    with ExitStack() as stack:
        for port in ports * 2:
            silent = stack.enter_context(Conversation(stack.enter_context(connect(port, *window))))
            # Where gRPC itself takes the first answer as a whole, the second waits.
            silent.send_apart(opening("accumulator"), *(chunk(step, tensor(values)) for step in (1, 2)))
        answered = before + len(ports) * 2
        wait_for(
            lambda: sum(fleet.counts("tenuto_chunks_total", model="accumulator")) >= answered, "their answers"
        )
        yield


def test_a_caller_who_does_not_read_holds_nobody_up(route: Route) -> None:
    """His answers wait at his proxy and his server; others at the same ones are answered."""
    fleet = route.fleet
    ports = [route.proxy.port] if route.proxy is not None else [fleet.a.port, fleet.b.port]
    with silent_readers(fleet, *ports):
        figures = Crowd(route.target, 20, 10, reply_seconds=10).run()
        assert (figures.whole, figures.resumes) == ((0, 0, 0), 0)


def test_errors_keep_their_reason(route: Route) -> None:
    """A long one too: its text travels twice, in trailers."""
    said = []
    for target in (route.target, route.fleet.targets[0]):
        with Client(target) as client, pytest.raises(NotFound) as caught:
            client.predict("n" * 2000, np.ones((1, 2), np.float32))
        said.append((caught.value.reason, caught.value.message))
    assert said[0] == said[1]
    assert said[0][0] == "UNKNOWN_MODEL"
    assert len(said[0][1]) > 1000


@pytest.mark.parametrize("standing", NAMES, indirect=True)
def test_operators_methods_do_not_pass(route: Route) -> None:
    """Nobody ends other people's sequences from outside."""
    with Client(route.target) as client:
        for call in (client.sequences, lambda: client.end_sequence("x"), lambda: client.unload("x")):
            with pytest.raises(Refused, match="UNIMPLEMENTED"):
                call()


# --- the traps ---------------------------------------------------------------------------------------

SHORT = {
    ("nginx", "client_body_timeout 1d"): "client_body_timeout 1s",
    ("nginx", "grpc_read_timeout 1d"): "grpc_read_timeout 1s",
    ("haproxy", "timeout server 1d"): "timeout server 1s",
    ("envoy", "stream_idle_timeout: 0s"): "stream_idle_timeout: 1s",
}


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_quiet_stream_is_cut_by_those_timeouts_and_by_no_other(
    kind: Kind, fleet: Fleet, tmp_path: Path
) -> None:
    """With any of them at a second it is cut, while that of the file itself goes on."""
    fleet.heal()
    changes = [{old: new} for (name, old), new in SHORT.items() if name == kind.name]
    with ExitStack() as stack:
        quiet = []
        for change in [{}, *changes]:
            proxy = stack.enter_context(proxied(kind, fleet, tmp_path, change))
            conversation = stack.enter_context(Conversation(stack.enter_context(connect(proxy.port))))
            conversation.send(opening("accumulator"), chunk(1, [1.0]))
            conversation.opened()
            assert conversation.values(1) == [1.0]
            quiet.append(conversation)
        kept, *cut = quiet
        wait_for(lambda: not any(conversation.call.is_active() for conversation in cut), "all to be cut")
        assert kept.call.is_active()
        kept.send(chunk(2, [1.0]), ending())
        assert kept.values(2) == [2.0]


def test_nginx_counts_all_that_a_stream_brings_as_its_body(fleet: Fleet, tmp_path: Path) -> None:
    """Without client_max_body_size 0, small chunks are cut off after a megabyte."""
    fleet.heal()
    values = np.ones(LARGE_VALUES // 20, np.float32)
    with (
        proxied(NGINX, fleet, tmp_path, {"client_max_body_size 0;": ""}) as proxy,
        Client(proxy.target) as client,
        client.stream("accumulator") as stream,
    ):
        steps = [output.step for output in stream.run([values] * 20)]
        assert steps == list(range(1, 21))
        assert stream.resumes >= 1  # it was cut, and went on
        with pytest.raises(TenutoError):
            client.predict("doubler", np.ones((LARGE_VALUES // 2, 2), np.float32))


@pytest.mark.parametrize(
    "kind, line, most",
    [
        (NGINX, "http2_max_concurrent_streams 8192;", 128),
        (HAPROXY, "tune.h2.max-concurrent-streams 8192", 100),
    ],
    ids=["nginx", "haproxy"],
)
def test_by_default_a_connection_holds_few_streams(
    kind: Kind, line: str, most: int, fleet: Fleet, tmp_path: Path
) -> None:
    """The next one is not refused but waits, until the client gives up."""
    fleet.heal()
    with proxied(kind, fleet, tmp_path, {line: ""}) as proxy:
        assert many_open(proxy.target, MANY_STREAMS) == most


def test_haproxy_that_takes_leaving_for_dead_cuts_streams(fleet: Fleet, tmp_path: Path) -> None:
    """shutdown-sessions without L7OKC: what the server still computes for them is lost."""
    fleet.heal()
    changes = {" error-status L7OKC": "", "inter 1s fall 3": "inter 200ms fall 1"}
    with (
        proxied(HAPROXY, fleet, tmp_path, changes) as proxy,
        busy(fleet, proxy.port, turns_for(fleet, 2.0)) as (conversation, server),
    ):
        server.terminate()
        wait_for(lambda: not conversation.call.is_active(), "the stream to be cut")
        assert not server.ended
        assert server.exit_status() == 0


def test_haproxy_that_shares_connections_lets_one_client_stop_others(fleet: Fleet, tmp_path: Path) -> None:
    """With "http-reuse always": whoever does not read holds up others on his connection to the server."""
    fleet.heal()
    with (
        proxied(HAPROXY, fleet, tmp_path, {"http-reuse never": "http-reuse always"}) as proxy,
        silent_readers(fleet, proxy.port),
    ):
        wait_for(lambda: not answers(proxy.target), "a call to stand still")


def test_a_server_that_hangs_is_noticed_by_haproxy_and_envoy(fleet: Fleet, tmp_path: Path) -> None:
    """SIGSTOP: nothing is closed, and these clients wait for ever; only the proxy can end their streams."""
    fleet.heal()
    shorter = [
        (HAPROXY, {"timeout check 2s": "timeout check 500ms"}),
        (ENVOY, {"{interval: 5s, timeout: 5s}": "{interval: 1s, timeout: 1s}"}),
    ]
    with ExitStack() as stack:
        resumed = []
        streams = []
        for kind, changes in shorter:
            proxy = stack.enter_context(proxied(kind, fleet, tmp_path, changes))
            client = stack.enter_context(Client(proxy.target, reply_seconds=None))
            resumed.append(client)
            for _ in range(4):
                stream = stack.enter_context(client.stream("accumulator"))
                stream.send(np.ones(1, np.float32))
                next(stream)
                streams.append(stream)
        stack.callback(fleet.a.terminate, signal.SIGCONT)  # before all else ends
        fleet.a.terminate(signal.SIGSTOP)
        for stream in streams:
            stream.send(np.ones(1, np.float32))
        assert [next(stream)["y"].tolist() for stream in streams] == [[2.0]] * len(streams)
        assert [client.resumes for client in resumed] == [2, 2]
