"""What the capacity page's arithmetic needs, measured here: `python -m benchmarks.capacity --measure`.

Each figure comes from a real `tenuto serve` process. Server CPU is what the kernel counts for its threads
(/proc/PID/task/*/schedstat, nanoseconds), never wall time: the load generator runs on the same cores. Rounds
go through all loads, every other one in the opposite order.
"""

import asyncio
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto import aio
from tenuto.v1 import tenuto_pb2 as pb

from . import memory, model, recording, report, tracks
from .http2 import Connection
from .load import STREAM, Job, Load
from .scenario import Party
from .server_process import SERVE, ServerProcess

FILE = Path(__file__).with_name("measured.json")
PERIOD_SECONDS = 0.02
ROUNDS = 3
WARMUP_SECONDS, WINDOW_SECONDS = 0.8, 1.5
SPOKEN, SAMPLES = "spoken-digits", 160  # 20 ms at 8 kHz
MODELS = (model.NAME, SPOKEN)
SERVED = len(MODELS) + 1  # the images' model is there as well
PACED = (16, 64, 128)  # streams, each on a connection of its own
FLAT_OUT = 256  # streams in a closed loop, each on a connection of its own
PACKED_STREAMS, PACKED_EACH = 8, 32  # a gateway's: sequences of one stream that share its messages
OPENS, WAVE = 512, 32  # and how many are asked for at once
GROWN_CONNECTIONS = 500
WIRE_CHUNKS = 1_000
CALLERS = ((40, PERIOD_SECONDS), (400, 0.5))  # and how often each sends
CALLERS_PER_CLIENT = 10
LOSS_LIMIT_SECONDS = 30.0
ANSWER_LIMIT_SECONDS = 30.0

Figures = dict[str, Any]


class Pod(ServerProcess):
    """`tenuto serve`, with keys in common with others, say; `metrics` is the address of its metrics page."""

    def __init__(self, repository: Path, *settings: str) -> None:
        self.name = "tenuto"
        words = [sys.executable, "-m", "tenuto.cli", "serve", str(repository), *SERVE]
        began = time.perf_counter()
        self.process = Popen([*words, *settings], stdout=PIPE, text=True, bufsize=1)
        self.metrics = ""
        try:
            self.port = self._ready()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.perf_counter() - began

    def _ready(self) -> int:
        """Waits for the line that names both ports."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+), metrics on (\S+/metrics)", line)
        if found is None:
            raise RuntimeError(f"tenuto did not say where it serves; it said {line!r}")
        self.metrics = found[2]
        return int(found[1])


def thread_seconds(pid: int) -> dict[int, float]:
    """CPU seconds of each thread of a process so far, to the nanosecond."""
    found = {}
    for folder in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[int(folder.name)] = int((folder / "schedstat").read_text().split()[0]) / 1e9
        except OSError:  # it ended meanwhile
            continue
    return found


class Cpu:
    """What a server's threads take between `begin` and `end`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.before: dict[int, float] = {}

    def begin(self) -> None:
        self.before = thread_seconds(self.pid)

    def end(self) -> list[float]:
        """CPU seconds of each thread since, the busiest first."""
        after = thread_seconds(self.pid)
        return sorted((spent - self.before.get(at, 0.0) for at, spent in after.items()), reverse=True)


def spread(values: list[float], digits: int = 1) -> list[float]:
    """[median, lowest, highest]"""
    return [round(value, digits) for value in (median(values), min(values), max(values))]


# -- chunks --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One load on one model."""

    model: str
    row: str
    party: Party


def cases() -> list[Case]:
    """Paced and flat out, both models; packed messages and frequent tokens, the LSTM alone."""
    found = []
    rate = 1 / PERIOD_SECONDS
    for name in MODELS:
        kind = (
            {"tracks": "lstm", "frames": 1} if name == model.NAME else {"tracks": SPOKEN, "frames": SAMPLES}
        )
        for streams in PACED:
            party = Party(streams, channels=streams, messages_per_second=streams * rate, **kind)  # type: ignore[arg-type]
            found.append(Case(name, f"paced {streams}", party))
        found.append(Case(name, "flat out", Party(FLAT_OUT, channels=FLAT_OUT, **kind)))  # type: ignore[arg-type]
    few = Party(FLAT_OUT, 1, channels=16)
    packed = Party(
        PACKED_STREAMS,
        1,
        sequences_per_group=PACKED_EACH,
        chunks_per_message=PACKED_EACH,
        channels=PACKED_STREAMS,
    )
    found.append(Case(model.NAME, "flat out, 16 connections", few))
    found.append(Case(model.NAME, "flat out, packed", packed))
    for every in (1, 1_000_000):
        party = Party(64, 1, channels=16, checkpoint_every=every)
        found.append(Case(model.NAME, f"token every {every}", party))
    return found


def record_spoken(folder: Path) -> None:
    """What the streams of spoken digits send: noise, int16; nothing is compared."""
    path = folder / recording.file(Party(1, SAMPLES, tracks=SPOKEN))
    rng = np.random.default_rng(model.SEED)
    sound = rng.integers(-3000, 3000, (recording.TRACKS, recording.CHUNKS * SAMPLES)).astype(np.int16)
    lengths = [[SAMPLES] * recording.CHUNKS] * recording.TRACKS
    tracks.save(path, SPOKEN, sound, np.empty(0), lengths)


def run_case(case: Case, pod: Pod, folder: Path) -> dict[str, float]:
    """One window of one load."""
    job = Job(pod.pid, pod.port, str(folder), True, WARMUP_SECONDS, WINDOW_SECONDS, (case.party,))
    cpu = Cpu(pod.pid)
    with closing(Load(job)) as load:
        (crowd,) = load.crowds
        load.begin()
        load.run(job.warmup_seconds)
        crowd.forget()
        cpu.begin()
        began = time.perf_counter()
        load.run(job.seconds)
        seconds = time.perf_counter() - began
        threads = cpu.end()
        seen = crowd.seen()
    return {
        "us_per_chunk": 1e6 * sum(threads) / seen.chunks,
        "busiest_us": 1e6 * threads[0] / seen.chunks,
        "second_us": 1e6 * threads[1] / seen.chunks,
        "chunks_per_second": seen.chunks / seconds,
        "cores": sum(threads) / seconds,
        "p50_ms": seen.p50_ms,
        "p99_ms": seen.p99_ms,
        "checked": crowd.checked,
    }


def chunks(pod: Pod, folder: Path, rounds: int) -> Figures:
    """By model and load: [median, lowest, highest] of each figure."""
    every = cases()
    for party in {case.party for case in every if case.model == model.NAME}:
        recording.record(party, model.Repository(folder / "repository"), folder)
    record_spoken(folder)
    taken: dict[Case, list[dict[str, float]]] = {case: [] for case in every}
    for number in range(rounds):
        print(f"chunks, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for case in every[::-1] if number % 2 else every:
            taken[case].append(run_case(case, pod, folder))
    found: Figures = {name: {} for name in MODELS}
    for case, runs in taken.items():
        found[case.model][case.row] = {
            key: spread([run[key] for run in runs], 2 if key == "cores" else 1) for key in runs[0]
        }
    return found


# -- opens, tokens, connections ------------------------------------------------------------------------


def replies(connection: Connection) -> Iterator[pb.Reply]:
    for _, message in connection.receive():
        yield from pb.StreamResponse.FromString(message).replies


def ask(connection: Connection, *events: pb.Event) -> int:
    """A new stream with these events; its number."""
    number = connection.open(STREAM)
    connection.send(number, pb.StreamRequest(events=events).SerializeToString())
    return number


def until(connection: Connection, kinds: set[str], count: int) -> list[pb.Reply]:
    """The next `count` replies of these kinds. Raises: RuntimeError for a failure."""
    found: list[pb.Reply] = []
    connection.socket.settimeout(ANSWER_LIMIT_SECONDS)
    while len(found) < count:
        for reply in replies(connection):
            kind = reply.WhichOneof("reply")
            if kind == "failed":
                raise RuntimeError(f"the server refused: {reply}")
            if kind in kinds:
                found.append(reply)
    return found


def opening(token: bytes = b"") -> pb.Event:
    return pb.Event(open=pb.Open(model=model.NAME, resume_token=token, period_ms=20))


def tokens(pod: Pod, count: int) -> list[bytes]:
    """Resume tokens of so many different sequences after their first chunk."""
    found = []
    with closing(Connection(pod.port)) as connection:
        for _ in range(count):
            ask(connection, opening(), pb.Event(chunk=memory.CHUNK))
            (reply,) = until(connection, {"checkpoint"}, 1)
            found.append(reply.checkpoint.resume_token)
    return found


def open_us(pod: Pod, events: list[pb.Event], alone: bool) -> float:
    """Server CPU-µs of one Open, answered; `alone`: each on a new connection, which is made then."""
    cpu = Cpu(pod.pid)
    with ExitStack() as stack:

        def connect() -> Connection:
            return stack.enter_context(closing(Connection(pod.port)))

        shared = connect()
        ask(shared, opening())
        until(shared, {"opened"}, 1)
        cpu.begin()
        for at in range(0, len(events), WAVE):
            wave = [(connect() if alone else shared, event) for event in events[at : at + WAVE]]
            for connection, event in wave:
                ask(connection, event)
            if alone:
                for connection, _ in wave:
                    until(connection, {"opened"}, 1)
            else:
                until(shared, {"opened"}, len(wave))
        return 1e6 * sum(cpu.end()) / len(events)


def opens(pod: Pod, other: Pod, rounds: int) -> Figures:
    """CPU-µs of an Open: new, or resumed from another server's token; its connection is there, or new."""
    print("opens", file=sys.stderr, flush=True)
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        fresh = [opening() for _ in range(OPENS)]
        resumed = [opening(token) for token in tokens(other, OPENS)]
        for name, events, alone in (
            ("open", fresh, False),
            ("open, new connection", fresh, True),
            ("resume", resumed, False),
            ("resume, new connection", resumed, True),
        ):
            taken.setdefault(name, []).append(open_us(pod, events, alone))
    return {name: spread(values) for name, values in taken.items()}


def bytes_per_connection(repository: Path, keys: Path) -> float:
    """Resident bytes of a connection with one empty stream, beyond such a stream on a shared connection."""
    print("connections", file=sys.stderr, flush=True)

    def grown(own: bool) -> int:
        stray = pb.Event(sequence=1, end=pb.End())  # answered by Failed: the stream is there
        with Pod(repository, "--token-key-file", str(keys)) as pod, ExitStack() as stack:

            def connect() -> Connection:
                return stack.enter_context(closing(Connection(pod.port)))

            def empty(connection: Connection) -> None:
                ask(connection, stray)
                while not any(reply.HasField("failed") for reply in replies(connection)):
                    pass

            shared = connect()
            for _ in range(50):
                empty(shared)
            before = memory.resident_bytes(pod.pid)
            for _ in range(GROWN_CONNECTIONS):
                empty(connect() if own else shared)
            return memory.resident_bytes(pod.pid) - before

    return (grown(own=True) - grown(own=False)) / GROWN_CONNECTIONS


def series(pod: Pod) -> dict[str, int]:
    """Lines of the metrics page that are samples: of all, and of one model."""
    with urllib.request.urlopen(pod.metrics, timeout=30) as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    one = sum(f'model="{model.NAME}"' in line for line in lines)
    return {"total": len(lines), "per model": one, "page bytes": len(text)}


# -- the wire ------------------------------------------------------------------------------------------


class Counter:
    """A forwarder on the loopback that counts the bytes of TCP payload both ways."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.to_server = self.to_client = 0
        self._pumping: set[asyncio.Task[Any]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)

        def up(count: int) -> None:
            self.to_server += count

        def down(count: int) -> None:
            self.to_client += count

        self._writers += [writer, back]
        pumps = {self._pump(reader, back, up), self._pump(there, writer, down)}
        self._pumping |= {asyncio.create_task(pump) for pump in pumps}

    async def stop(self) -> None:
        """Forwards no more, and closes its connections."""
        for task in self._pumping:
            task.cancel()
        await asyncio.wait(self._pumping)
        for writer in self._writers:
            writer.close()
        closing = [asyncio.create_task(writer.wait_closed()) for writer in self._writers]
        await asyncio.wait(closing, timeout=ANSWER_LIMIT_SECONDS)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None]
    ) -> None:
        while data := await reader.read(1 << 16):
            count(len(data))
            writer.write(data)


async def _wire(pod: Pod, name: str, chunk: NDArray[Any]) -> Figures:
    counter = Counter(pod.port)
    listening = await asyncio.start_server(counter.accept, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    up: list[int] = []
    down: list[int] = []
    sealed: list[bytes] = []
    async with aio.Client(f"127.0.0.1:{port}") as client, client.stream(name, period_ms=20) as stream:
        opened = counter.to_server, counter.to_client
        for _ in range(WIRE_CHUNKS):
            up.append(counter.to_server)
            down.append(counter.to_client)
            sealed.append(stream.resume_token)
            await stream.send(chunk)
            await anext(stream)
        up.append(counter.to_server)
        down.append(counter.to_client)
        token = stream.resume_token
    listening.close()
    await listening.wait_closed()
    await counter.stop()
    each_up, each_down = np.diff(up), np.diff(down)
    fresh = [i for i in range(1, WIRE_CHUNKS) if sealed[i] != sealed[i - 1]]
    near = {j for i in fresh for j in (i - 2, i - 1, i, i + 1)}
    plain = [i for i in range(10, WIRE_CHUNKS) if i not in near]
    up_each, down_each = float(each_up[plain].mean()), float(each_down[plain].mean())
    rest = down[-1] - down[10] - (WIRE_CHUNKS - 10) * down_each
    of_tokens = len([i for i in fresh if i > 10]) or 1
    return {
        "chunk up": round(up_each, 1),
        "chunk down": round(down_each, 1),
        "token": len(token),
        "token on the wire": round(rest / of_tokens, 1),
        "opening up": opened[0],
        "opening down": opened[1],
    }


def wire(pod: Pod) -> Figures:
    """Bytes of TCP payload of the public client, a chunk a message, counted by a forwarder."""
    print("the wire", file=sys.stderr, flush=True)
    rng = np.random.default_rng(model.SEED)
    sent: dict[str, NDArray[Any]] = {
        model.NAME: rng.standard_normal((1, model.INPUTS)).astype(np.float32),
        SPOKEN: rng.integers(-3000, 3000, SAMPLES).astype(np.int16),
    }
    return {name: asyncio.run(_wire(pod, name, chunk)) for name, chunk in sent.items()}


class _Counted:
    """The socket of a load generator's connection, counted."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.sent = self.received = 0

    def sendall(self, data: bytes) -> None:
        self.sent += len(data)
        self.inner.sendall(data)

    def recv(self, count: int) -> bytes:
        data: bytes = self.inner.recv(count)
        self.received += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def packed_wire(pod: Pod) -> Figures:
    """Bytes a chunk where one message carries the chunks of many sequences."""
    count, messages = PACKED_EACH, 20
    with closing(Connection(pod.port)) as connection:
        counted = _Counted(connection.socket)
        connection.socket = counted  # type: ignore[assignment]
        wish = pb.Open(model=model.NAME, checkpoint_every=1_000_000)
        number = ask(connection, *(pb.Event(sequence=key, open=wish) for key in range(count)))
        until(connection, {"opened"}, count)

        def all_send(step: int) -> None:
            chunk = pb.Chunk(step=step, inputs=memory.CHUNK.inputs)
            events = [pb.Event(sequence=key, chunk=chunk) for key in range(count)]
            connection.send(number, pb.StreamRequest(events=events).SerializeToString())
            until(connection, {"output"}, count)

        for step in range(1, 3):  # the first brings tokens
            all_send(step)
        sent, received = counted.sent, counted.received
        for step in range(3, 3 + messages):
            all_send(step)
        total = count * messages
        return {
            "chunk up": round((counted.sent - sent) / total, 1),
            "chunk down": round((counted.received - received) / total, 1),
        }


# -- a server that is lost -----------------------------------------------------------------------------


class Noted(logging.Handler):
    """When the client said that a sequence is opened again, and that it goes on; perf_counter seconds."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lost: dict[str, float] = {}
        self.resumed: dict[str, float] = {}

    def emit(self, entry: logging.LogRecord) -> None:
        now = time.perf_counter()
        name = str(entry.args[0]) if isinstance(entry.args, tuple) and entry.args else ""
        if "is opened again" in str(entry.msg):
            self.lost.setdefault(name, now)
        elif "goes on" in str(entry.msg):
            self.resumed.setdefault(name, now)


async def _loss(pods: list[Pod], noted: Noted, count: int, period: float) -> Figures:
    frame = np.zeros((1, model.INPUTS), np.float32)
    target = ",".join(f"127.0.0.1:{pod.port}" for pod in pods)
    ready = asyncio.Event()
    answered = 0
    over = asyncio.Event()

    async def caller(client: aio.Client, number: int) -> None:
        nonlocal answered
        async with client.stream(model.NAME) as stream:
            for turn in range(int(LOSS_LIMIT_SECONDS / period)):
                await stream.send(frame)
                await anext(stream)
                if not turn:
                    answered += 1
                    if answered == count:
                        ready.set()
                if over.is_set():
                    return
                with_phase = period * (0.5 + (number * 0.618) % 1)
                try:
                    await asyncio.wait_for(over.wait(), with_phase)
                except TimeoutError:
                    continue

    clients = [aio.Client(target) for _ in range(0, count, CALLERS_PER_CLIENT)]
    callers = [asyncio.create_task(caller(clients[number % len(clients)], number)) for number in range(count)]
    await asyncio.wait_for(ready.wait(), LOSS_LIMIT_SECONDS)
    killed = time.perf_counter()
    pods[0].process.kill()
    limit = killed + LOSS_LIMIT_SECONDS
    while time.perf_counter() < limit:
        if noted.lost and len(noted.resumed) >= len(noted.lost) and time.perf_counter() > killed + 2.0:
            break
        await asyncio.sleep(0.02)
    over.set()
    await asyncio.gather(*callers)
    for client in clients:
        await client.close()
    noticed = [at - killed for at in noted.lost.values()]
    resumed = [noted.resumed[name] - killed for name in noted.lost if name in noted.resumed]
    return {
        "sequences": count,
        "period_seconds": period,
        "lost": len(noticed),
        "resumed": len(resumed),
        "noticed_seconds": [round(float(v), 4) for v in np.percentile(noticed, [50, 0, 100])],
        "resumed_seconds": [round(float(v), 4) for v in np.percentile(resumed, [50, 0, 100])],
    }


def loss(repository: Path, keys: Path, callers: int, period: float) -> Figures:
    """One of two servers is killed under callers: when the public client notices, and goes on elsewhere."""
    print("a lost server", file=sys.stderr, flush=True)
    noted = Noted()
    logger = logging.getLogger("tenuto.client")
    level, propagates = logger.level, logger.propagate
    logger.addHandler(noted)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with ExitStack() as stack:
            pods = [stack.enter_context(Pod(repository, "--token-key-file", str(keys))) for _ in range(2)]
            return asyncio.run(_loss(pods, noted, callers, period))
    finally:
        logger.removeHandler(noted)
        logger.setLevel(level)
        logger.propagate = propagates


def connections_of_a_name(pods: list[Pod]) -> int:
    """How many connections a client of one stream has, whose one name stands for two servers."""
    before = [open_sockets(pod.pid) for pod in pods]

    async def stream() -> int:
        target = "ipv4:" + ",".join(f"127.0.0.1:{pod.port}" for pod in pods)
        async with aio.Client(target) as client, client.stream(model.NAME) as stream:
            for _ in range(20):  # the second connection is made while the first is in use
                await stream.send(np.zeros((1, model.INPUTS), np.float32))
                await anext(stream)
                await asyncio.sleep(0.02)
            return sum(open_sockets(p.pid) - b for p, b in zip(pods, before, strict=True))

    return asyncio.run(stream())


def open_sockets(pid: int) -> int:
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(link).startswith("socket:")
        except OSError:  # closed meanwhile
            continue
    return count


# -- all of it -----------------------------------------------------------------------------------------


def repository(folder: Path) -> model.Repository:
    """The benchmark's models and the spoken digits, in a folder below."""
    written = model.write_repository(folder / "repository")
    shutil.copytree(model.EXPORTED / SPOKEN, written.folder / SPOKEN)
    return written


def measure(folder: Path, rounds: int = ROUNDS) -> Figures:
    """All figures, in about two minutes on two cores."""
    served = repository(folder)
    keys = folder / "keys"
    keys.write_text(secrets.token_hex(32) + "\n")
    with Pod(served.folder, "--token-key-file", str(keys)) as pod:
        idle = memory.resident_bytes(pod.pid)
        with Pod(served.folder, "--token-key-file", str(keys)) as other:
            reached = connections_of_a_name([pod, other])
            by_open = opens(pod, other, rounds)
            starts = [pod.start_seconds, other.start_seconds]
        by_load = chunks(pod, folder, rounds)
        on_wire = wire(pod)
        packed = packed_wire(pod)
        samples = series(pod)
    lost = [loss(served.folder, keys, *callers) for callers in CALLERS]
    print("memory", file=sys.stderr, flush=True)
    per_sequence = memory.measure(served)
    every, never = (by_load[model.NAME].pop(f"token every {n}") for n in (1, 1_000_000))
    return {
        "date": str(date.today()),
        "machine": report.machine(),
        "versions": report.versions(),
        "rounds": rounds,
        "chunks": by_load,
        "seal_us": round(every["us_per_chunk"][0] - never["us_per_chunk"][0], 1),
        "opens_us": by_open,
        "wire": on_wire,
        "packed wire": packed,
        "bytes": {
            "process": idle,
            "state": memory.STATE_BYTES,
            "connection": round(bytes_per_connection(served.folder, keys)),
            **{name: round(value) for name, value in per_sequence.items()},
        },
        "series": samples,
        "start_seconds": round(max(starts), 1),
        "loss": lost,
        "connections of a name of two servers": reached,
    }


def write(figures: Figures, path: Path = FILE) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n")


def read(path: Path = FILE) -> Figures:
    found: Figures = json.loads(path.read_text())
    return found
