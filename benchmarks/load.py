"""The load generator: one process, one thread, a closed loop.

python -m benchmarks.load JOB

JOB is a `Job` as JSON; it prints its `Measurement` as a line of JSON. It ends with an error when a
reply is not what the sequence would have got alone, and when a server refuses or ends anything.
"""

import gc
import heapq
import json
import select
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tenuto.v1 import tenuto_pb2 as pb

from .http2 import Connection
from .scenario import Measurement, Scenario
from .server_process import cpu_seconds
from .tracks import Tracks

METHOD = "/tenuto.v1.Tenuto/Stream"
CHANNELS = 16
SETUP_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Job:
    """What one process of this module is told."""

    pid: int
    port: int
    model: str
    tracks: str  # a file's path
    check: bool  # compare replies with the tracks
    warmup_seconds: float
    seconds: float
    scenario: Scenario

    @classmethod
    def parse(cls, text: str) -> Self:
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "scenario": Scenario(**fields["scenario"])})


@dataclass(slots=True)
class Sequence:
    number: int  # on its stream
    track: int
    step: int = 0  # the last one sent


class Group:
    """Some sequences of one stream that have one message in flight between them."""

    def __init__(self, sequences: list[Sequence], chunks_per_message: int, tracks: Tracks) -> None:
        self.sequences = sequences
        self.tracks = tracks
        self.next = 0  # the sequence whose turn it is
        self.unanswered = 0  # chunks
        self.sent = 0.0  # perf_counter, in seconds
        self.due = 0.0
        width = len(tracks.chunk(0, 1)) // 4 // tracks.frames
        tensor = pb.Tensor(dtype="float32", shape=[tracks.frames, width])
        event = pb.Event(chunk=pb.Chunk(inputs=[tensor]))
        self.request = pb.StreamRequest(events=[event] * chunks_per_message)
        # event, chunk, tensor: what every message fills in anew
        self.parts = [(e, e.chunk, e.chunk.inputs[0]) for e in self.request.events]

    def message(self) -> bytes:
        """A chunk of each of the sequences whose turn it is."""
        for event, chunk, tensor in self.parts:
            sequence = self.sequences[self.next]
            self.next = (self.next + 1) % len(self.sequences)
            sequence.step += 1
            event.sequence = sequence.number
            chunk.step = sequence.step
            tensor.data = self.tracks.chunk(sequence.track, sequence.step)
        self.unanswered = len(self.parts)
        return self.request.SerializeToString()


class Stream:
    """One call, its sequences, and the group that each belongs to."""

    def __init__(self, connection: Connection, index: int, job: Job, tracks: Tracks) -> None:
        scenario = job.scenario
        self.connection = connection
        self.number = connection.open(METHOD)
        self.unopened = count = scenario.sequences_per_stream
        self.sequences = [Sequence(n, index * count + n) for n in range(count)]
        size, active = scenario.sequences_per_group, count - scenario.idle_per_stream
        self.groups = [
            Group(self.sequences[at : at + size], scenario.chunks_per_message, tracks)
            for at in range(0, active, size)
        ]
        self.idle = Group(self.sequences[active:], scenario.idle_per_stream, tracks)
        self.group_of = {s.number: g for g in [*self.groups, self.idle] for s in g.sequences}
        opens = [pb.Event(sequence=n, open=pb.Open(model=job.model)) for n in range(count)]
        connection.send(self.number, pb.StreamRequest(events=opens).SerializeToString())


class Load:
    """Sends, takes the replies, checks those that are known, and counts."""

    def __init__(self, job: Job) -> None:
        scenario = job.scenario
        self.tracks = Tracks.load(Path(job.tracks))
        self.check = job.check
        rate = scenario.messages_per_second
        self.period = scenario.groups / rate if rate else 0.0  # seconds between messages of a group
        self.later: list[tuple[float, int, Stream, Group]] = []  # a heap by due time
        self.latencies: list[float] = []  # seconds
        self.messages = self.chunks = self.checked = 0
        connections = [Connection(job.port) for _ in range(min(scenario.streams, CHANNELS))]
        self.connections = {connection.fileno(): connection for connection in connections}
        self.poller = select.epoll()
        for file in self.connections:
            self.poller.register(file, select.EPOLLIN)
        spread = [connections[i % len(connections)] for i in range(scenario.streams)]
        streams = [Stream(conn, index, job, self.tracks) for index, conn in enumerate(spread)]
        self.streams = {(s.connection.fileno(), s.number): s for s in streams}

    def begin(self) -> None:
        """Waits until every sequence is open, sends the idle ones' chunk, starts the others."""
        streams = self.streams.values()
        self._turn_until(lambda: not any(stream.unopened for stream in streams))
        for stream in streams:
            if stream.idle.parts:
                self._send(stream, stream.idle, 0.0)
        self._turn_until(lambda: not any(stream.idle.unanswered for stream in streams))
        groups = [(stream, group) for stream in streams for group in stream.groups]
        now = time.perf_counter()
        for place, (stream, group) in enumerate(groups):
            group.due = now + self.period * place / len(groups)
            self._send_or_wait(stream, group, now)

    def _turn_until(self, done: Callable[[], bool]) -> None:
        limit = time.perf_counter() + SETUP_SECONDS
        while not done():
            self.turn()
            if time.perf_counter() > limit:
                raise TimeoutError("the server did not answer while sequences were opened")

    def run(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self.turn()

    def turn(self) -> None:
        """Waits a little for replies, and sends what they and the clock allow."""
        now = time.perf_counter()
        wait = min(0.1, max(0.0, self.later[0][0] - now)) if self.later else 0.1
        for file, _ in self.poller.poll(wait):
            connection = self.connections[file]
            for number, message in connection.receive():
                self._take(self.streams[file, number], message)
        now = time.perf_counter()
        while self.later and self.later[0][0] <= now:
            _, _, stream, group = heapq.heappop(self.later)
            self._send(stream, group, now)

    def _take(self, stream: Stream, message: bytes) -> None:
        now = time.perf_counter()
        for reply in pb.StreamResponse.FromString(message).replies:
            kind = reply.WhichOneof("reply")
            if kind == "output":
                self._check(stream.sequences[reply.sequence], reply.output)
                group = stream.group_of[reply.sequence]
                group.unanswered -= 1
                if not group.unanswered and group is not stream.idle:
                    self.latencies.append(now - group.sent)
                    self.messages += 1
                    self.chunks += len(group.parts)
                    self._send_or_wait(stream, group, now)
            elif kind == "opened":
                stream.unopened -= 1
            elif kind != "checkpoint":
                raise RuntimeError(f"sequence {reply.sequence} ended: {reply}")

    def _check(self, sequence: Sequence, output: pb.Output) -> None:
        if output.step != sequence.step or not output.last:
            raise RuntimeError(f"expected the whole of step {sequence.step}, got {output}")
        answer = self.tracks.answer(sequence.track, output.step) if self.check else None
        if answer is not None:
            if output.outputs[0].data != answer:
                raise RuntimeError(f"step {output.step} differs from the sequence alone")
            self.checked += 1

    def _send_or_wait(self, stream: Stream, group: Group, now: float) -> None:
        if group.due > now:
            heapq.heappush(self.later, (group.due, id(group), stream, group))
        else:
            self._send(stream, group, now)

    def _send(self, stream: Stream, group: Group, now: float) -> None:
        group.sent = now
        group.due = max(group.due, now - self.period) + self.period  # a late one makes no burst
        stream.connection.send(stream.number, group.message())

    def close(self) -> None:
        self.poller.close()
        for connection in self.connections.values():
            connection.close()


def measure(job: Job) -> Measurement:
    """Opens, warms up, and measures; both processes' clocks are read around one window."""
    with closing(Load(job)) as load:
        load.begin()
        gc.freeze()
        load.run(job.warmup_seconds)
        load.latencies.clear()
        messages, chunks = load.messages, load.chunks
        server, client, began = cpu_seconds(job.pid), time.process_time(), time.perf_counter()
        load.run(job.seconds)
        ended = time.perf_counter()
        client, server = time.process_time() - client, cpu_seconds(job.pid) - server
    latencies = sorted(load.latencies)
    return Measurement(
        messages=load.messages - messages,
        chunks=load.chunks - chunks,
        checked=load.checked,
        seconds=ended - began,
        server_cpu_seconds=server,
        client_cpu_seconds=client,
        p50_ms=1e3 * latencies[len(latencies) // 2],
        p99_ms=1e3 * latencies[len(latencies) * 99 // 100],
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Job.parse(sys.argv[1])))))
