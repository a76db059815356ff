"""What our own code costs a chunk, on one thread and with nothing else running, in both protocols; and the
least engine's.

python -m benchmarks.own_code [--rounds 400] [--frames 1]

Bytes as a socket would bring them go through the connection, the stream and the engine, and come out as
bytes for a socket that takes all. ONNX Runtime runs in between, and its time is taken off. All have their
rounds in turn, so that a busy machine slows them alike. The difference between ours and the least is the
price of steps, windows, bounds, order, endings, tokens and metrics.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from selectors import EVENT_READ
from statistics import median
from typing import Any, Protocol

import hpack

from tenuto.serving import frame as http
from tenuto.serving.call import Listener
from tenuto.serving.callers import Callers
from tenuto.serving.catalogue import Catalogue, Served
from tenuto.serving.connection import Connection
from tenuto.serving.engine import Engine
from tenuto.serving.http_call import Limits
from tenuto.serving.link import COUNT, Kind, Link, packed
from tenuto.serving.manifest import Manifest
from tenuto.serving.metrics import ServerMetrics
from tenuto.serving.model_runner import ModelRunner, flush_denormals
from tenuto.serving.oip.inference import Inferences, Shared
from tenuto.serving.oip.sequences import Sequences
from tenuto.serving.oip.shared_memory import Regions
from tenuto.serving.pending import PendingBytes
from tenuto.serving.relayed_call import TELL_TAKEN, Parked, Relay
from tenuto.serving.reply import OutputWriter
from tenuto.serving.routed_call import RoutedCall
from tenuto.serving.stream import StreamLimits, Streams
from tenuto.serving.tensor import Reader
from tenuto.v1 import tenuto_pb2 as pb

from . import dialect, least_engine, model
from .report import aligned
from .tracks import Chunk, Tracks

MESSAGE_BYTES, PENDING_BYTES, SEQUENCES = 4 << 20, 1 << 28, 1024
WINDOW = (1 << 31) - 1
ROUNDS = 400
TOLD_ROUNDS = 200  # after which a front end says that 32 KiB of replies were taken
WARM_ROUNDS = 100  # their chunks are not counted: the first of a sequence are parsed


class Wire:
    """A socket that takes everything."""

    def __init__(self) -> None:
        self.taken = 0  # bytes

    def send(self, data: bytes | memoryview) -> int:
        self.taken += len(data)
        return len(data)


class Loop:
    """The reading thread, which is this one: it writes when an engine's batch is done."""

    def __init__(self) -> None:
        self.submitted: list[RoutedCall] = []
        self.errands: list[Callable[[], object]] = []

    def submit(self, call: RoutedCall) -> None:
        self.submitted.append(call)

    def soon(self, what: Callable[[], object]) -> None:
        self.errands.append(what)

    def dirty(self, _: Connection) -> None: ...

    def blocked(self, _: Connection) -> None: ...

    def flush(self, connection: Connection | Relay) -> None:
        submitted, self.submitted = self.submitted, []
        connection.write(submitted)

    def defer(self, what: Callable[[], None]) -> bool:
        self.errands.append(what)
        return True

    def watch(self, _: object, __: int, ready: Callable[[int], None]) -> None:
        self.ready = ready

    def unwatch(self, _: object) -> None: ...

    def run_errands(self) -> None:
        while self.errands:
            self.errands.pop(0)()


class Packets:
    """A link's socket: it takes everything, and gives what was put into it."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.given: list[bytes] = []

    def setblocking(self, _: bool) -> None: ...

    def send(self, packet: bytes) -> int:
        self.taken.append(packet)
        return len(packet)

    def recv(self, _: int) -> bytes:
        if not self.given:
            raise BlockingIOError
        return self.given.pop(0)


class Session:
    """ONNX Runtime, and the seconds that were spent in it."""

    def __init__(self, run: Callable[..., list[Any]]) -> None:
        self._run = run
        self.seconds = 0.0

    def run(self, *arguments: Any) -> list[Any]:
        began = time.perf_counter()
        found = self._run(*arguments)
        self.seconds += time.perf_counter() - began
        return found

    def enter_thread(self) -> None: ...

    def probe(self) -> None: ...


class Speech(Protocol):
    """What streams say, in one protocol: messages as bytes."""

    def opening(self) -> list[bytes]:
        """What comes first on each stream."""

    def chunk(self, number: int, step: int, samples: Chunk) -> bytes:
        """One step of the sequence of that number."""


class Native:
    """Our own protocol: a sequence of each stream."""

    def opening(self) -> list[bytes]:
        wish = pb.Event(sequence=1, open=pb.Open(model=model.NAME))
        return [pb.StreamRequest(events=[wish]).SerializeToString()]

    def chunk(self, number: int, step: int, samples: Chunk) -> bytes:
        tensor = pb.Tensor(name="x", dtype="float32", shape=samples.shape, data=samples.data)
        event = pb.Event(sequence=1, chunk=pb.Chunk(step=step, inputs=[tensor]))
        return pb.StreamRequest(events=[event]).SerializeToString()


class OpenInference:
    """The Open Inference Protocol: sequences by number, a request with an id for each step."""

    def __init__(self) -> None:
        self._spoken = dialect.OpenInference(Tracks(model.NAME, [], []))

    def opening(self) -> list[bytes]:
        return []

    def chunk(self, number: int, step: int, samples: Chunk) -> bytes:
        self._spoken.asked.id = f"{step}"
        return self._spoken.question(number, samples, first=step == 1, last=False)


class Turning(Protocol):
    """An engine without a thread."""

    session: Session
    speech: Speech

    def open(self, call: RoutedCall) -> Listener: ...

    def turn(self) -> None:
        """Runs what waits, and has the replies written."""


class Ours:
    """The engine that `tenuto serve` has, with its streams."""

    speech: Speech = Native()

    def __init__(self, file: Path, flush: Callable[[], None]) -> None:
        manifest = Manifest.parse(json.dumps(model.manifest()), model.NAME)
        runner = ModelRunner(
            file.read_bytes(), manifest, model.NAME, provider="CPUExecutionProvider", threads=1
        )
        self.session = Session(runner.run)
        pending = PendingBytes(PENDING_BYTES)
        engine = Engine(
            manifest, self.session, version=1, max_sequences=SEQUENCES, pending=pending, flush=flush
        )
        reader, writer = Reader(manifest, MESSAGE_BYTES), OutputWriter(manifest)
        catalogue = Catalogue([Served(engine, reader, writer, "cpu", "", "")], [])
        self.open = self._opener(catalogue, pending)
        self._engine = engine

    def _opener(self, catalogue: Catalogue, pending: PendingBytes) -> Callable[[RoutedCall], Listener]:
        return Streams(catalogue, pending, ServerMetrics(""), StreamLimits(4, 0.0), _no_tokens).open

    def turn(self) -> None:
        while self._engine.turn():
            pass


class OursByOip(Ours):
    """The same engine, with its streams of the Open Inference Protocol."""

    speech: Speech = OpenInference()

    def _opener(self, catalogue: Catalogue, pending: PendingBytes) -> Callable[[RoutedCall], Listener]:
        shared = Shared(
            catalogue=catalogue,
            sequences=Sequences(0.0, pending),
            predicts=None,  # type: ignore[arg-type]  # of images, which nobody asks for here
            regions=Regions("", MESSAGE_BYTES),
            pending=pending,
            refused=_no_refusals,
            is_draining=lambda: False,
        )
        return Inferences(shared, Callers()).open_stream


class Least:
    """The least engine."""

    speech: Speech = Native()

    def __init__(self, file: Path, flush: Callable[[], None]) -> None:
        self._engine = least_engine.Engine(file)
        self.session = Session(self._engine.session.run)
        self._engine.session, self._engine.flush = self.session, flush

    def open(self, call: RoutedCall) -> Listener:
        return least_engine.Stream(call, self._engine)

    def turn(self) -> None:
        while not self._engine.inbox.empty():
            self._engine.step()


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds a chunk, of one round."""

    reading: float  # bytes -> the engine's inbox
    answering: float  # schedule, gather, scatter, reply, write
    runtime: float  # ONNX Runtime

    @property
    def own(self) -> float:
        return self.reading + self.answering


class Harness:
    """One connection with so many streams, each with a sequence; `round` sends a chunk on each."""

    def __init__(self, kind: Callable[[Path, Callable[[], None]], Turning], file: Path, streams: int) -> None:
        self._loop = Loop()
        self._engine = kind(file, lambda: self._loop.flush(self._connection))
        self._wire = Wire()
        self._connection = Connection(self._wire, "", Limits(MESSAGE_BYTES), self._engine.open, self._loop)
        self._numbers = range(1, 2 * streams, 2)
        self._step = 0
        headers = [(":method", "POST"), (":path", "/"), ("content-type", "application/grpc")]
        encoder, opening = hpack.Encoder(), self._engine.speech.opening()
        window = http.SETTING.pack(http.INITIAL_WINDOW_SIZE, WINDOW)  # the client takes what it gets
        begin = [http.PREFACE, http.frame(http.SETTINGS, 0, 0, window), http.widen(0, WINDOW >> 1)]
        for number in self._numbers:
            block = encoder.encode(headers)
            begin.append(http.frame(http.HEADERS, http.END_HEADERS, number, block))
            begin += [_data(number, message) for message in opening]
        self._connection.receive(b"".join(begin))
        self._engine.turn()

    def round(self, frames: int) -> Cost:
        self._step += 1
        samples, say = (
            Chunk((frames, model.INPUTS), bytes(4 * frames * model.INPUTS)),
            self._engine.speech.chunk,
        )
        came = self._as_it_comes({number: say(number, self._step, samples) for number in self._numbers})
        session, began = self._engine.session, time.perf_counter()
        self._receive(came)
        read, before = time.perf_counter(), session.seconds
        self._engine.turn()
        spent, runtime = time.perf_counter() - read, session.seconds - before
        self._loop.run_errands()
        us = 1e6 / len(self._numbers)
        return Cost(us * (read - began), us * (spent - runtime), us * runtime)

    @property
    def taken(self) -> int:
        """Bytes that went out."""
        return self._wire.taken

    def _as_it_comes(self, messages: dict[int, bytes]) -> list[bytes]:
        return [b"".join([_data(number, message) for number, message in messages.items()])]

    def _receive(self, came: list[bytes]) -> None:
        self._connection.receive(came[0])


class BehindFrontEnd(Harness):
    """The engine process's part where a front end receives: packets instead of HTTP/2's frames."""

    def __init__(self, kind: Callable[[Path, Callable[[], None]], Turning], file: Path, streams: int) -> None:
        self._loop = loop = Loop()
        self._engine = kind(file, lambda: self._loop.flush(self._relay))
        self._ours, self._theirs = Packets(), Packets()
        parked = Parked(PENDING_BYTES)
        self._relay = Relay(self._ours, loop, loop, self._engine.open, _no_word, _no_end, parked)
        self._front = Link(self._theirs, loop, _no_frame, _no_end)  # type: ignore[arg-type]
        self._relay.begin()
        loop.run_errands()
        self._numbers = range(1, 2 * streams, 2)
        self._step = 0
        opening = packed(((":path", "/"), (":peer", ""), (":seconds", "inf")))
        for number in self._numbers:
            self._front.put(Kind.OPEN, number, opening)
            for message in self._engine.speech.opening():
                self._front.put(Kind.MESSAGE, number, message)
        self._receive(self._packets())
        self._engine.turn()
        loop.run_errands()

    @property
    def taken(self) -> int:
        return sum(map(len, self._ours.taken))

    def _as_it_comes(self, messages: dict[int, bytes]) -> list[bytes]:
        for number, message in messages.items():
            self._front.put(Kind.MESSAGE, number, message)
            if self._step % TOLD_ROUNDS == 0:
                self._front.put(Kind.TAKEN, number, COUNT.pack(TELL_TAKEN))
        return self._packets()

    def _packets(self) -> list[bytes]:
        self._front.write()
        packets, self._theirs.taken = self._theirs.taken, []
        return packets

    def _receive(self, came: list[bytes]) -> None:
        self._ours.given = came
        self._loop.ready(EVENT_READ)


def _data(number: int, body: bytes) -> bytes:
    return http.frame(http.DATA, 0, number, http.PREFIX.pack(0, len(body)) + body)


def _no_word(kind: int) -> None: ...


def _no_frame(kind: int, call: int, body: bytes) -> None: ...


def _no_end() -> None: ...


def _no_tokens(*_: object) -> Any:
    raise NotImplementedError("nobody resumes here")


def _no_refusals(reason: str) -> None:
    raise RuntimeError(f"a request was refused: {reason}")


HARNESSES: dict[str, Callable[[Path, int], Harness]] = {
    "tenuto": partial(Harness, Ours),
    "tenuto, front ends": partial(BehindFrontEnd, Ours),
    "tenuto, OIP": partial(Harness, OursByOip),
    "least_engine": partial(Harness, Least),
}


def measure(file: Path, streams: int, frames: int, rounds: int) -> dict[str, list[Cost]]:
    """What each round cost, by engine."""
    harnesses = {name: build(file, streams) for name, build in HARNESSES.items()}
    found: dict[str, list[Cost]] = {name: [] for name in harnesses}
    for number in range(WARM_ROUNDS + rounds):
        for name, harness in harnesses.items():
            cost = harness.round(frames)
            if number >= WARM_ROUNDS:
                found[name].append(cost)
    return found


def table(found: dict[str, list[Cost]], title: str) -> str:
    """The least and the median of the rounds."""
    rows = [[title, "reading", "answering", "both", "ONNX Runtime"]]
    figures: tuple[Callable[[Cost], float], ...] = (
        lambda cost: cost.reading,
        lambda cost: cost.answering,
        lambda cost: cost.own,
        lambda cost: cost.runtime,
    )
    for name, costs in found.items():
        cells = [[figure(cost) for cost in costs] for figure in figures]
        rows.append([name, *(f"{min(cell):.1f} ({median(cell):.1f})" for cell in cells)])
    return aligned(rows)


def tables(file: Path, frames: int = 1, rounds: int = ROUNDS) -> str:
    """Of 64 streams and of one."""
    flush_denormals()
    title = "one thread, {}, {} frame{}: µs a chunk, least (median)"
    return "\n\n".join(
        table(measure(file, n, frames, rounds), title.format(name, frames, "s" if frames > 1 else ""))
        for n, name in ((64, "64 streams"), (1, "1 stream"))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_code")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--frames", type=int, default=1, help="a chunk (1)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tenuto-benchmarks-") as folder:
        repository = model.write_repository(Path(folder) / "repository")
        print(tables(repository.lstm, options.frames, options.rounds))
