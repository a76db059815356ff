"""The load generator: one process, one thread.

python -m benchmarks.load JOB

JOB is a `Job` as JSON; it prints its `Measurement` as a line of JSON. It ends with an error when a
reply is not what the sequence would have got alone, and when a server refuses or ends anything that the
scenario does not let it refuse.
"""

import gc
import heapq
import json
import random
import select
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tenuto.v1 import tenuto_pb2 as pb

from . import dialect, recording
from .http2 import Connection
from .scenario import Measurement, Party, Seen
from .server_process import cpu_seconds, own_cpu_seconds
from .tracks import Tracks

STREAM, PREDICT = "/tenuto.v1.Tenuto/Stream", "/tenuto.v1.Tenuto/Predict"
SETUP_SECONDS = 60
LONGEST_WAIT_SECONDS = 0.1
PHASES_SEED = 0  # when in their period paced groups begin
FULL = ("POOL_FULL", "OVERLOADED")  # what a party that ramps may be told


@dataclass(frozen=True, slots=True)
class Job:
    """What one process of this module is told."""

    pid: int
    port: int
    tracks: str  # a folder
    check: bool  # compare replies with the tracks
    warmup_seconds: float
    seconds: float
    parties: tuple[Party, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "parties": tuple(Party(**party) for party in fields["parties"])})


@dataclass(slots=True)
class Sequence:
    number: int  # on its stream
    track: int
    step: int = 0  # the last one sent


class Group:
    """Some sequences of one stream that have one message in flight between them."""

    def __init__(self, sequences: list[Sequence], chunks_per_message: int, crowd: "Crowd") -> None:
        self.sequences = sequences
        self.tracks = crowd.tracks
        self.dialect = dialect.of(crowd.party.dialect, crowd.tracks)
        self.ended = False  # its last message was sent
        self.next = 0  # the sequence whose turn it is
        self.unanswered = 0  # chunks
        self.since = 0.0  # perf_counter, in seconds: sent, or due
        self.due = 0.0
        self.messages = 0  # answered
        tensor = pb.Tensor(dtype=crowd.tracks.dtype)
        event = pb.Event(chunk=pb.Chunk(inputs=[tensor]))
        self.request = pb.StreamRequest(events=[event] * chunks_per_message)
        # event, chunk, tensor: what every message fills in anew
        self.parts = [(e, e.chunk, e.chunk.inputs[0]) for e in self.request.events]
        self.shapes: list[tuple[int, ...]] = [()] * chunks_per_message

    def message(self) -> bytes:
        """A chunk of each of the sequences whose turn it is."""
        for place, (event, chunk, tensor) in enumerate(self.parts):
            sequence = self.sequences[self.next]
            self.next = (self.next + 1) % len(self.sequences)
            sequence.step += 1
            event.sequence = sequence.number
            chunk.step = sequence.step
            piece = self.tracks.chunk(sequence.track, sequence.step)
            tensor.data = piece.data
            if piece.shape != self.shapes[place]:
                tensor.shape[:] = self.shapes[place] = piece.shape
        self.unanswered = len(self.parts)
        return self.request.SerializeToString()

    def question(self, spoken: dialect.Dialect, *, last: bool) -> bytes:
        """A chunk of its only sequence, in another protocol."""
        sequence = self.sequences[0]
        sequence.step += 1
        self.unanswered = 1
        chunk = self.tracks.chunk(sequence.track, sequence.step)
        return spoken.question(1 + sequence.track, chunk, first=sequence.step == 1, last=last)

    def image(self) -> bytes:
        """The same chunk as a PredictRequest."""
        self.message()
        tensor = self.parts[0][2]
        return pb.PredictRequest(model=self.tracks.model, inputs=[tensor]).SerializeToString()


class Stream:
    """One call (or, for visits and unary calls, one after the other), its sequences and their groups."""

    def __init__(self, crowd: "Crowd", connection: Connection, index: int) -> None:
        party = crowd.party
        self.crowd = crowd
        self.connection = connection
        self.number = 0  # of the HTTP/2 stream
        self.unopened = count = party.sequences_per_stream
        self.sequences = [Sequence(n, index * count + n) for n in range(count)]
        size, active = party.sequences_per_group, count - party.idle_per_stream
        self.groups = [
            Group(self.sequences[at : at + size], party.chunks_per_message, crowd)
            for at in range(0, active, size)
        ]
        self.idle = Group(self.sequences[active:], party.idle_per_stream, crowd)
        self.group_of = {s.number: g for g in [*self.groups, self.idle] for s in g.sequences}

    def opens(self) -> list[pb.Event]:
        period_ms = round(1e3 * self.crowd.period) if self.crowd.party.declared else 0
        every = self.crowd.party.checkpoint_every
        wish = pb.Open(model=self.crowd.tracks.model, period_ms=period_ms, checkpoint_every=every)
        return [pb.Event(sequence=s.number, open=wish) for s in self.sequences]

    def open(self) -> None:
        """Sends Open for every sequence; visits and unary calls have nothing to open yet."""
        spoken = self.groups[0].dialect
        self.number = self.connection.open(spoken.stream if spoken else STREAM)
        self.crowd.streams[self.connection.fileno(), self.number] = self
        if spoken:  # its first chunk opens the sequence
            self.unopened = 0
            return
        self.connection.send(self.number, pb.StreamRequest(events=self.opens()).SerializeToString())

    def send(self, group: Group) -> None:
        party, spoken = self.crowd.party, group.dialect
        if party.unary:
            self.number = self.connection.open(spoken.unary if spoken else PREDICT)
            message = group.question(spoken, last=False) if spoken else group.image()
            self.connection.send(self.number, message, last=True)
        elif party.visits:
            group.sequences[0].step = 0
            self.number = self.connection.open(STREAM)
            group.message()
            events = [*self.opens(), *group.request.events]
            self.connection.send(self.number, pb.StreamRequest(events=events).SerializeToString())
        else:
            group.ended = self.crowd.ending
            message = group.question(spoken, last=group.ended) if spoken else group.message()
            self.connection.send(self.number, message)
            return
        self.crowd.streams[self.connection.fileno(), self.number] = self

    def leave(self) -> None:
        """Ends one visit, or forgets one unary call."""
        del self.crowd.streams[self.connection.fileno(), self.number]
        if self.crowd.party.visits:
            self.connection.half_close(self.number)


class Crowd:
    """One party on its connections: sends, takes the replies, checks those that are known, counts."""

    def __init__(self, party: Party, job: Job) -> None:
        self.party = party
        self.tracks = Tracks.load(Path(job.tracks) / recording.file(party))
        self.check = job.check
        rate = party.messages_per_second
        self.period = party.groups / rate if rate else 0.0  # seconds between messages of a group
        self.latencies: list[float] = []  # seconds
        self.messages = self.chunks = self.checked = self.late = self.opened = self.refused = 0
        self.later: list[tuple[float, int, Stream, Group]] = []  # a heap by due time
        self.unopened: deque[tuple[float, Stream]] = deque()  # when to open, in order
        channels = min(party.streams, party.channels)
        self.connections = [Connection(job.port, reads=party.reads) for _ in range(channels)]
        self.streams: dict[tuple[int, int], Stream] = {}
        self.all = [Stream(self, self.connections[i % channels], i) for i in range(party.streams)]
        self.on_demand = party.visits or party.unary
        self.ending = False

    def open(self) -> None:
        """Opens what is open before the run."""
        if not self.on_demand and not self.party.ramp_seconds:
            for stream in self.all:
                stream.open()

    @property
    def waiting(self) -> bool:
        """Whether a sequence is not open yet, or an idle one not answered."""
        if self.on_demand or self.party.ramp_seconds or not self.party.reads:
            return False
        return any(stream.unopened or stream.idle.unanswered for stream in self.all)

    def settle(self) -> None:
        """Sends the idle sequences' only chunk."""
        for stream in self.all:
            if stream.idle.parts:
                self._send(stream, stream.idle, 0.0)

    def begin(self) -> None:
        now = time.perf_counter()
        if self.party.ramp_seconds:
            gap = self.party.ramp_seconds / len(self.all)
            self.unopened.extend((now + gap * i, stream) for i, stream in enumerate(self.all))
            return
        phases = random.Random(PHASES_SEED)
        for stream in self.all:
            for group in stream.groups:
                group.due = now + self.period * phases.random()
                self._send_or_wait(stream, group, now)

    def end(self) -> None:
        """Has the next messages be the last, where a sequence outlives its stream."""
        named = not (self.on_demand or self.tracks.stateless)
        self.ending = named and bool(self.party.dialect)

    @property
    def ended(self) -> bool:
        groups = [group for stream in self.all for group in stream.groups]
        return not self.ending or all(group.ended and not group.unanswered for group in groups)

    def next_due(self) -> float:
        """When there is something to do without a reply, perf_counter seconds."""
        due = self.later[0][0] if self.later else float("inf")
        return min(due, self.unopened[0][0]) if self.unopened else due

    def act(self) -> None:
        """Does what is due."""
        now = time.perf_counter()
        while self.unopened and self.unopened[0][0] <= now:
            self.unopened.popleft()[1].open()
        while self.later and self.later[0][0] <= now:
            _, _, stream, group = heapq.heappop(self.later)
            self._send(stream, group, now)

    def receive(self, connection: Connection) -> None:
        file = connection.fileno()
        for number, message in connection.receive():
            stream = self.streams.get((file, number))
            if stream is None or not self.party.reads:  # a visit's Closed
                continue
            if stream.groups[0].dialect:
                self._take_answer(stream, stream.groups[0].dialect, message)
            elif self.party.unary:
                self._take_image(stream, message)
            else:
                self._take(stream, message)

    def _take(self, stream: Stream, message: bytes) -> None:
        now = time.perf_counter()
        for reply in pb.StreamResponse.FromString(message).replies:
            kind = reply.WhichOneof("reply")
            if kind == "output":
                self._check(stream.sequences[reply.sequence], reply.output)
                group = stream.group_of[reply.sequence]
                group.unanswered -= 1
                if not group.unanswered and group is not stream.idle:
                    self._answered(stream, group, now)
            elif kind == "opened":
                stream.unopened -= 1
                self.opened += 1
                if self.party.ramp_seconds:
                    group = stream.group_of[reply.sequence]
                    group.due = now
                    self._send_or_wait(stream, group, now)
            elif kind == "failed" and self.party.ramp_seconds and reply.failed.reason in FULL:
                self.refused += 1
            elif kind != "checkpoint":
                raise RuntimeError(f"sequence {reply.sequence} ended: {reply}")

    def _take_image(self, stream: Stream, message: bytes) -> None:
        outputs = pb.PredictResponse.FromString(message).outputs
        sequence, group = stream.sequences[0], stream.groups[0]
        self._compare(sequence, sequence.step, outputs[0].data)
        group.unanswered = 0
        self._answered(stream, group, time.perf_counter())

    def _take_answer(self, stream: Stream, spoken: dialect.Dialect, message: bytes) -> None:
        sequence, group = stream.sequences[0], stream.groups[0]
        self._compare(sequence, sequence.step, spoken.answer(message, unary=self.party.unary))
        group.unanswered = 0
        self._answered(stream, group, time.perf_counter())

    def _answered(self, stream: Stream, group: Group, now: float) -> None:
        self.latencies.append(now - group.since)
        self.late += now - group.since > self.period > 0
        self.messages += 1
        group.messages += 1
        self.chunks += len(group.parts)
        if self.on_demand:
            stream.leave()
        if not group.ended:
            self._send_or_wait(stream, group, now)

    def _check(self, sequence: Sequence, output: pb.Output) -> None:
        if output.step != sequence.step or not output.last:
            raise RuntimeError(f"expected the whole of step {sequence.step}, got {output}")
        self._compare(sequence, output.step, output.outputs[0].data)

    def _compare(self, sequence: Sequence, step: int, data: bytes) -> None:
        answer = self.tracks.answer(sequence.track, step) if self.check else None
        if answer is not None:
            if data != answer:
                raise RuntimeError(f"step {step} differs from the sequence alone")
            self.checked += 1

    def _send_or_wait(self, stream: Stream, group: Group, now: float) -> None:
        if group.due > now or not self.party.reads:
            heapq.heappush(self.later, (group.due, id(group), stream, group))
        else:
            self._send(stream, group, now)

    def _send(self, stream: Stream, group: Group, now: float) -> None:
        group.since = group.due if self.period else now
        group.due += self.period
        stream.send(group)
        if not self.party.reads:  # the next one does not wait for an answer
            self._send_or_wait(stream, group, now)

    def _count_overdue(self, now: float) -> None:
        """What a server that stalls at the end of the window has not answered yet."""
        if not self.period or not self.party.reads:
            return
        for group in [group for stream in self.all for group in stream.groups]:
            waiting = now - (group.since if group.unanswered else group.due)
            if group.due and waiting > self.period:
                self.latencies.append(waiting)
                self.late += 1

    def forget(self) -> None:
        """The warm-up does not count."""
        self.latencies.clear()
        self.messages = self.chunks = self.late = 0
        for stream in self.all:
            for group in stream.groups:
                group.messages = 0

    def seen(self) -> Seen:
        self._count_overdue(time.perf_counter())
        latencies = sorted(self.latencies) or [0.0]
        served = [group.messages for stream in self.all for group in stream.groups]
        return Seen(
            messages=self.messages,
            chunks=self.chunks,
            p50_ms=1e3 * latencies[len(latencies) // 2],
            p99_ms=1e3 * latencies[len(latencies) * 99 // 100],
            least=min(served),
            most=max(served),
            late=self.late,
            opened=self.opened,
            refused=self.refused,
            held=sum(stream.connection.stuck(stream.number) for stream in self.all),
        )


class Load:
    """All crowds of a job, and the clock that turns them."""

    def __init__(self, job: Job) -> None:
        self.crowds = [Crowd(party, job) for party in job.parties]
        self.readable = {
            connection.fileno(): (crowd, connection)
            for crowd in self.crowds
            for connection in crowd.connections
        }
        self.files = list(self.readable)

    def begin(self) -> None:
        """Waits until every sequence is open, sends the idle ones' chunk, starts the others."""
        for crowd in self.crowds:
            crowd.open()
        self._turn_until(lambda: not any(crowd.waiting for crowd in self.crowds))
        for crowd in self.crowds:
            crowd.settle()
        self._turn_until(lambda: not any(crowd.waiting for crowd in self.crowds))
        for crowd in self.crowds:
            crowd.begin()

    def _turn_until(self, done: Callable[[], bool]) -> None:
        limit = time.perf_counter() + SETUP_SECONDS
        while not done():
            self.turn()
            if time.perf_counter() > limit:
                raise TimeoutError("the server did not answer while sequences were opened or ended")

    def end(self) -> None:
        for crowd in self.crowds:
            crowd.end()
        self._turn_until(lambda: all(crowd.ended for crowd in self.crowds))

    def run(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self.turn()

    def turn(self) -> None:
        """Waits a little for replies, and sends what they and the clock allow."""
        due = min(crowd.next_due() for crowd in self.crowds)
        wait = min(LONGEST_WAIT_SECONDS, max(0.0, due - time.perf_counter()))
        # Not epoll, which waits for whole milliseconds.
        for file in select.select(self.files, (), (), wait)[0]:
            crowd, connection = self.readable[file]
            crowd.receive(connection)
        for crowd in self.crowds:
            crowd.act()

    def close(self) -> None:
        for crowd in self.crowds:
            for connection in crowd.connections:
                connection.close()


def measure(job: Job) -> Measurement:
    """Opens, warms up, and measures; both processes' clocks are read around one window."""
    with closing(Load(job)) as load:
        load.begin()
        gc.freeze()
        load.run(job.warmup_seconds)
        for crowd in load.crowds:
            crowd.forget()
        engine = own_cpu_seconds(job.pid)
        server, client, began = cpu_seconds(job.pid), time.process_time(), time.perf_counter()
        load.run(job.seconds)
        ended = time.perf_counter()
        client, server = time.process_time() - client, cpu_seconds(job.pid) - server
        engine = own_cpu_seconds(job.pid) - engine
        seen = tuple(crowd.seen() for crowd in load.crowds)
        load.end()
    return Measurement(
        seconds=ended - began,
        server_cpu_seconds=server,
        client_cpu_seconds=client,
        checked=sum(crowd.checked for crowd in load.crowds),
        parties=seen,
        engine_cpu_seconds=engine,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Job.parse(sys.argv[1])))))
