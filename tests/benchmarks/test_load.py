"""The load generator against a gRPC server in this process: what it counts, and what it refuses."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from benchmarks import memory, model, recording, tracks
from benchmarks.load import Job, Load, measure
from benchmarks.scenario import Measurement, Party
from benchmarks.server_process import ServerProcess, cpu_seconds, parse_stat
from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1 import tenuto_pb2_grpc
from tests.integration.running import wait_for

Answer = Callable[[pb.Tensor], bytes]
Refuse = Callable[[pb.Event], bool]


def doubled(tensor: pb.Tensor) -> bytes:
    data: bytes = (2 * np.frombuffer(tensor.data, np.float32)).tobytes()
    return data


class Answering(tenuto_pb2_grpc.TenutoServicer):
    """Opens every sequence that it does not refuse, and answers every chunk by itself."""

    def __init__(self, answer: Answer, refuse: Refuse) -> None:
        self.answer = answer
        self.refuse = refuse

    def Stream(self, requests: Iterator[pb.StreamRequest], context: object) -> Iterator[pb.StreamResponse]:
        for request in requests:
            yield pb.StreamResponse(replies=[self.reply(event) for event in request.events])

    def Predict(self, request: pb.PredictRequest, context: object) -> pb.PredictResponse:
        return pb.PredictResponse(outputs=[self.output(request.inputs[0])])

    def reply(self, event: pb.Event) -> pb.Reply:
        if event.HasField("open"):
            if self.refuse(event):
                return pb.Reply(sequence=event.sequence, failed=pb.Failed(reason="POOL_FULL"))
            return pb.Reply(sequence=event.sequence, opened=pb.Opened(next_step=1))
        output = pb.Output(step=event.chunk.step, last=True, outputs=[self.output(event.chunk.inputs[0])])
        return pb.Reply(sequence=event.sequence, output=output)

    def output(self, tensor: pb.Tensor) -> pb.Tensor:
        return pb.Tensor(name="y", dtype="float32", data=self.answer(tensor))


@contextmanager
def serving(answer: Answer = doubled, refuse: Refuse = lambda event: False) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(8))
    tenuto_pb2_grpc.add_TenutoServicer_to_server(Answering(answer, refuse), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Without a port. Eight tracks of four chunks of two frames of three floats; and rows for images."""
    inputs = np.random.default_rng(0).standard_normal((8, 8, 3), np.float32)
    tracks.save(tmp_path / recording.file(Party(1, 2)), "any", inputs, 2 * inputs, [[2] * 4] * 8)
    rows = recording.file(Party(1, 1, tracks="images"))
    tracks.save(tmp_path / rows, "rows", inputs, 2 * inputs, [[1] * 8] * 8, stateless=True)
    return Job(os.getpid(), 0, str(tmp_path), True, 0.0, 0.3, (Party(4, 2),))


@pytest.mark.parametrize(
    "party",
    [
        Party(4, 2),
        Party(2, 2, groups_per_stream=3),
        Party(2, 2, sequences_per_group=3, chunks_per_message=3),
        Party(2, 2, sequences_per_group=3, idle_per_stream=2),
        Party(2, 2, messages_per_second=400),
        Party(2, 2, visits=True),
        Party(2, 2, visits=True, messages_per_second=400),
        Party(2, 1, tracks="images"),
        Party(2, 1, tracks="images", unary=True),
    ],
    ids=str,
)
def test_every_message_is_answered_checked_and_counted(job: Job, party: Party) -> None:
    with serving() as port:
        found = measure(replace(job, port=port, parties=(party,)))
    assert found.first.messages > 0
    assert found.first.chunks == found.first.messages * party.chunks_per_message
    assert found.checked >= party.streams * party.idle_per_stream + 1
    assert 0 < found.first.p50_ms <= found.first.p99_ms
    assert 0 <= found.first.least <= found.first.most <= found.first.messages


def test_parties_meet_on_one_server_and_are_counted_apart(job: Job) -> None:
    parties = (Party(2, 2), Party(3, 1, tracks="images", unary=True, messages_per_second=100))
    with serving() as port:
        found = measure(replace(job, port=port, parties=parties))
    assert [seen.messages > 0 for seen in found.parties] == [True, True]
    assert found.parties[0].opened == 2
    assert found.parties[1].opened == 0


def test_a_message_may_be_larger_than_a_frame_and_a_window(job: Job) -> None:
    inputs = np.ones((1, 2, 50_000), np.float32)  # 400 kB
    tracks.save(Path(job.tracks) / recording.file(Party(1, 2)), "any", inputs, 2 * inputs, [[2]])
    with serving() as port:
        assert measure(replace(job, port=port, parties=(Party(1, 2),))).checked == 1


def test_a_wrong_reply_ends_the_run(job: Job) -> None:
    with serving(lambda tensor: bytes(24)) as port:
        with pytest.raises(RuntimeError, match="differs from the sequence alone"):
            measure(replace(job, port=port))
        measure(replace(job, port=port, check=False))


@pytest.mark.parametrize("party", [Party(4, 2), Party(1, 1, tracks="images", unary=True)], ids=str)
def test_a_stream_that_the_server_ends_ends_the_run(job: Job, party: Party) -> None:
    def refuse(tensor: pb.Tensor) -> bytes:
        raise AssertionError

    with serving(refuse) as port, pytest.raises(Exception, match="the server ended stream"):
        measure(replace(job, port=port, parties=(party,)))


def test_a_sequence_refused_ends_the_run_unless_the_party_ramps(job: Job) -> None:
    opened = iter(range(100))

    def half(event: pb.Event) -> bool:
        return next(opened) % 2 == 1

    with serving(refuse=half) as port:
        with pytest.raises(RuntimeError, match="POOL_FULL"):
            measure(replace(job, port=port))
        ramp = Party(6, 2, messages_per_second=600, ramp_seconds=0.01, declared=True)
        found = measure(replace(job, port=port, parties=(ramp,), seconds=1.0)).first
    assert found.opened + found.refused == 6
    assert abs(found.opened - found.refused) <= 1
    assert found.messages > 0


def test_a_pace_is_kept_on_average_and_counted_from_the_due_time(job: Job) -> None:
    paced = Party(2, 2, messages_per_second=100)
    with serving() as port, closing(Load(replace(job, port=port, parties=(paced,)))) as load:
        began = time.perf_counter()
        load.begin()
        load.run(0.2)
        (crowd,) = load.crowds
        assert crowd.period == pytest.approx(0.02)
        assert crowd.messages <= 2 * ((time.perf_counter() - began) / 0.02 + 1)
        for group in [stream.groups[0] for stream in crowd.all]:  # as if the server had stalled
            group.due -= 100.0
        while max(crowd.latencies) < 99.0:
            load.turn()


def test_what_is_not_answered_at_the_end_of_the_window_counts(job: Job) -> None:
    paced = Party(2, 2, messages_per_second=100)
    with serving() as port, closing(Load(replace(job, port=port, parties=(paced,)))) as load:
        load.begin()
        (crowd,) = load.crowds
        waiting, overdue = (stream.groups[0] for stream in crowd.all)
        crowd.forget()
        now = time.perf_counter()
        waiting.unanswered, waiting.since = 1, now - 5.0
        overdue.unanswered, overdue.due = 0, now - 7.0
        found = crowd.seen()
    assert found.p50_ms > 5_000
    assert found.late == 2


def test_a_party_that_never_reads_sends_as_far_as_the_windows_allow(job: Job) -> None:
    lazy = Party(1, 2, messages_per_second=50_000, reads=False)
    parties = (Party(1, 2), lazy)
    with serving() as port, closing(Load(replace(job, port=port, parties=parties))) as load:
        load.begin()
        while not load.crowds[1].seen().held:
            load.turn()
        answered = load.crowds[0].messages
        while load.crowds[0].messages < answered + 100:  # the other one is served on
            load.turn()
        assert load.crowds[1].messages == 0


def test_a_job_and_a_measurement_survive_their_json(job: Job) -> None:
    assert Job.parse(json.dumps(asdict(job))) == job
    with serving() as port:
        found = measure(replace(job, port=port))
    assert Measurement.parse(json.loads(json.dumps(asdict(found)))) == found


def test_a_track_goes_round_and_its_answers_do_not(job: Job) -> None:
    known = tracks.Tracks.load(Path(job.tracks) / recording.file(Party(1, 2)))
    assert known.chunk(0, 1) == known.chunk(0, 5) != known.chunk(1, 1)
    assert known.chunk(0, 1).shape == (2, 3)
    assert known.answer(0, 4) is not None
    assert known.answer(0, 5) is None


def test_what_is_recorded_is_what_the_models_give(tmp_path: Path) -> None:
    repository = model.write_repository(tmp_path / "repository")
    for party in (Party(1, 3, tracks="ragged"), Party(1, 1, tracks="images"), Party(1, 2, tracks="denormal")):
        recording.record(party, repository, tmp_path)
    ragged = tracks.Tracks.load(tmp_path / "ragged-3.npz")
    assert {chunk.shape[0] for chunk in ragged.chunks[0]} == {1, 2, 3}
    whole = np.concatenate([np.frombuffer(c.data, np.float32) for c in ragged.chunks[5]])
    answer = model.alone(model.session(repository.lstm), whole.reshape(-1, model.INPUTS))
    assert b"".join(ragged.answers[5]) == answer.tobytes()
    images = tracks.Tracks.load(tmp_path / "images-1.npz")
    assert images.answer(3, 1) == images.answer(3, 1 + recording.CHUNKS)
    denormal = tracks.Tracks.load(tmp_path / "denormal-2.npz")
    assert denormal.answer(0, 1) is None
    values = np.frombuffer(denormal.chunk(0, 1).data, np.float32)
    assert np.all((values > 0) & (values < np.finfo(np.float32).tiny))


def test_memory_is_that_of_a_fresh_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SEQUENCES", 200)
    repository = model.write_repository(tmp_path / "repository")
    found = memory.measure(repository)
    assert len(found) == 3
    assert found["empty stream"] > 0


def test_every_baseline_gives_the_same_answers(tmp_path: Path) -> None:
    repository = model.write_repository(tmp_path / "repository")
    recording.record(Party(1, 2), repository, tmp_path)
    for name in ("naive_aio", "tuned_aio", "naive_threads", "micro_batcher"):
        with ServerProcess(name, repository) as server:
            job = Job(server.pid, server.port, str(tmp_path), True, 0.0, 0.1, (Party(3, 2),))
            assert measure(job).checked > 0


def test_cpu_time_is_read_from_the_right_fields() -> None:
    fields = "R 7 1 1 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 99 0 0"
    assert parse_stat(f"12 (a (b) c) {fields}") == (7, 127)


def test_cpu_time_grows() -> None:
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) == before:
        sum(range(10_000))


def test_a_server_that_is_paused_runs_no_more_until_it_is_resumed(tmp_path: Path) -> None:
    repository = model.write_repository(tmp_path / "repository")
    with ServerProcess("micro_batcher", repository) as server:
        state = Path("/proc", str(server.pid), "stat")
        server.pause()
        wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "the server to stop")
        server.resume()
        recording.record(Party(1, 2), repository, tmp_path)
        job = Job(server.pid, server.port, str(tmp_path), True, 0.0, 0.1, (Party(3, 2),))
        assert measure(job).checked > 0
        server.pause()  # and it ends nonetheless
    assert server.process.returncode == -signal.SIGTERM
