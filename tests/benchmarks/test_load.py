"""The load generator against a gRPC server in this process: what it counts, and what it refuses."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from benchmarks import tracks
from benchmarks.load import Job, Load, measure
from benchmarks.scenario import Scenario
from benchmarks.server_process import cpu_seconds, parse_stat
from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1 import tenuto_pb2_grpc

Answer = Callable[[pb.Chunk], bytes]


def doubled(chunk: pb.Chunk) -> bytes:
    data: bytes = (2 * np.frombuffer(chunk.inputs[0].data, np.float32)).tobytes()
    return data


class Answering(tenuto_pb2_grpc.TenutoServicer):
    """Opens every sequence, and answers every chunk by itself."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def Stream(self, requests: Iterator[pb.StreamRequest], context: object) -> Iterator[pb.StreamResponse]:
        for request in requests:
            yield pb.StreamResponse(replies=[self.reply(event) for event in request.events])

    def reply(self, event: pb.Event) -> pb.Reply:
        if event.HasField("open"):
            return pb.Reply(sequence=event.sequence, opened=pb.Opened(next_step=1))
        tensor = pb.Tensor(name="y", dtype="float32", data=self.answer(event.chunk))
        output = pb.Output(step=event.chunk.step, last=True, outputs=[tensor])
        return pb.Reply(sequence=event.sequence, output=output)


@contextmanager
def serving(answer: Answer) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(8))
    tenuto_pb2_grpc.add_TenutoServicer_to_server(Answering(answer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Without a port."""
    inputs = np.random.default_rng(0).standard_normal((8, 4, 2, 3), np.float32)
    tracks.save(tmp_path / "tracks.npz", inputs, 2 * inputs)
    file = str(tmp_path / "tracks.npz")
    return Job(os.getpid(), 0, "any", file, True, 0.0, 0.05, Scenario(4, 2))


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(4, 2),
        Scenario(2, 2, groups_per_stream=3),
        Scenario(2, 2, sequences_per_group=3, chunks_per_message=3),
        Scenario(2, 2, sequences_per_group=3, idle_per_stream=2),
        Scenario(2, 2, messages_per_second=400),
    ],
)
def test_every_message_is_answered_checked_and_counted(job: Job, scenario: Scenario) -> None:
    with serving(doubled) as port:
        found = measure(replace(job, port=port, scenario=scenario))
    assert found.messages > 0
    assert found.chunks == found.messages * scenario.chunks_per_message
    assert found.checked >= scenario.streams * scenario.idle_per_stream + 1
    assert 0 < found.p50_ms <= found.p99_ms


def test_a_message_may_be_larger_than_a_frame_and_a_window(job: Job, tmp_path: Path) -> None:
    inputs = np.ones((1, 1, 2, 50_000), np.float32)  # 400 kB
    tracks.save(tmp_path / "large.npz", inputs, 2 * inputs)
    large = replace(job, tracks=str(tmp_path / "large.npz"), scenario=Scenario(1, 2))
    with serving(doubled) as port:
        assert measure(replace(large, port=port)).checked == 1


def test_a_wrong_reply_ends_the_run(job: Job) -> None:
    with serving(lambda chunk: bytes(24)) as port:
        with pytest.raises(RuntimeError, match="differs from the sequence alone"):
            measure(replace(job, port=port))
        measure(replace(job, port=port, check=False))


def test_a_stream_that_the_server_ends_ends_the_run(job: Job) -> None:
    def refuse(chunk: pb.Chunk) -> bytes:
        raise AssertionError

    with serving(refuse) as port, pytest.raises(Exception, match="the server ended stream"):
        measure(replace(job, port=port))


def test_a_pace_is_not_exceeded_and_a_late_message_makes_no_burst(job: Job) -> None:
    paced = Scenario(2, 2, messages_per_second=100)
    with serving(doubled) as port, closing(Load(replace(job, port=port, scenario=paced))) as load:
        load.begin()
        load.run(0.2)
    assert load.period == pytest.approx(0.02)
    assert load.messages <= 22


def test_a_job_survives_its_json(job: Job) -> None:
    assert Job.parse(json.dumps(asdict(job))) == job


def test_a_message_cannot_carry_two_chunks_of_a_sequence() -> None:
    with pytest.raises(ValueError, match="at most one chunk of each"):
        Scenario(1, 1, chunks_per_message=2)


def test_a_track_goes_round_and_its_answers_do_not(job: Job) -> None:
    known = tracks.Tracks.load(Path(job.tracks))
    assert known.chunk(0, 1) == known.chunk(0, 5) != known.chunk(1, 1)
    assert known.answer(0, 4) is not None
    assert known.answer(0, 5) is None


def test_cpu_time_is_read_from_the_right_fields() -> None:
    fields = "R 7 1 1 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 99 0 0"
    assert parse_stat(f"12 (a (b) c) {fields}") == (7, 127)


def test_cpu_time_grows() -> None:
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) == before:
        sum(range(10_000))
