"""New versions under load: nobody notices but by the version's number, and the bad ones not even by that."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto.serving import loader
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys

from .running import (
    Counting,
    assert_nothing_is_left,
    engine_of,
    metrics_text,
    number,
    serving,
    unvetted,
    wait_for,
)
from .wire import (
    PATIENCE_SECONDS,
    Conversation,
    array,
    checkpoint,
    chunk,
    connect,
    ending,
    opening,
    refused,
    stub,
    tensor,
)

READY, FAILED, RETIRING = pb.Model.READY, pb.Model.FAILED, pb.Model.RETIRING


@pytest.fixture(autouse=True)
def without_child(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are not checked by the real child process, but where a test asks for it."""
    if "with_child" not in request.fixturenames:
        monkeypatch.setattr(loader, "vet", unvetted)


@pytest.fixture
def with_child() -> None:
    """Versions are checked as in real life."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    toys.write(tmp_path, "accumulator", toys.accumulator())
    toys.write(tmp_path, "doubler", toys.doubler())
    return tmp_path


@pytest.fixture
def own_server(repository: Path, transport: str) -> Iterator[Server]:
    with serving(repository, transport=transport, checkpoint_every=0) as server:
        yield server
        assert_nothing_is_left(server)


def poll(server: Server, times: int = 2) -> None:
    for _ in range(times):
        server.rollout.poll()


def add_version(server: Server, version: int, made: tuple[bytes, Any], model: str = "accumulator") -> None:
    """It serves when this returns."""
    toys.write(server.config.repository, model, made, version)
    poll(server)
    assert engine_of(server, model).version == version


def states(api: Any, model: str) -> dict[int, int]:
    models = api.ListModels(pb.ListModelsRequest()).models
    return {m.version: m.state for m in models if m.name == model}


class Talker:
    """One sequence that streams random numbers until it is told to end, and keeps what it sent and got."""

    def __init__(self, channel: grpc.Channel, seed: int) -> None:
        self.conversation = Conversation(channel)
        self.random = np.random.default_rng(seed)
        self.sent: list[Any] = []
        self.got: list[bytes] = []
        self.conversation.send(opening("accumulator"))
        self.version = self.conversation.opened().version

    def step(self) -> None:
        values = self.random.normal(size=self.random.integers(1, 20)).astype(np.float32)
        self.sent.append(values)
        self.conversation.send(chunk(len(self.sent), tensor(values)))
        (y,) = self.conversation.output(len(self.sent)).outputs
        self.got.append(y.data)

    def end(self) -> None:
        self.conversation.send(ending())
        assert self.conversation.closed().reason == pb.END
        self.conversation.__exit__(None, None, None)


def alone(root: Path, scale: float, sent: list[list[Any]]) -> list[list[bytes]]:
    """What each sequence gets when it is the only one, on a server that never had another version."""
    toys.write(root, "accumulator", toys.accumulator(scale=scale))
    got: list[list[bytes]] = []
    with serving(root, checkpoint_every=0) as server, connect(server.port) as channel:
        for chunks in sent:
            with Conversation(channel) as conversation:
                conversation.send(opening("accumulator"))
                conversation.opened()
                got.append([])
                for step, values in enumerate(chunks, 1):
                    conversation.send(chunk(step, tensor(values)))
                    got[-1].append(conversation.output(step).outputs[0].data)
    return got


class Crowd:
    """Talkers, each on a thread, that go on until `stop`."""

    def __init__(self, channel: grpc.Channel, seeds: range) -> None:
        self.talkers = [Talker(channel, seed) for seed in seeds]
        self._stopping = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._talk, args=(t,)) for t in self.talkers]
        for thread in self._threads:
            thread.start()

    def _talk(self, talker: Talker) -> None:
        try:
            while not self._stopping.is_set():
                talker.step()
            talker.end()
        except BaseException as error:
            self._errors.append(error)
            raise

    def wait_for_steps(self, more: int) -> None:
        """Every one of them has taken so many more."""
        goals = [len(t.got) + more for t in self.talkers]
        wait_for(
            lambda: (
                bool(self._errors) or all(len(t.got) >= g for t, g in zip(self.talkers, goals, strict=True))
            ),
            "the crowd to go on",
        )
        assert not self._errors

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        assert not self._errors


def test_under_load_old_sequences_stay_and_new_ones_start_on_the_new_version(
    own_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with connect(own_server.port) as channel:
        old = Crowd(channel, range(6))
        old.wait_for_steps(5)
        add_version(own_server, 2, toys.accumulator(scale=10))
        new = Crowd(channel, range(6, 12))
        for crowd in (old, new):
            crowd.wait_for_steps(20)
            poll(own_server)
        assert states(stub(channel), "accumulator") == {1: RETIRING, 2: READY}
        for crowd in (old, new):
            crowd.stop()
        poll(own_server)
        assert states(stub(channel), "accumulator") == {2: READY}
    for crowd, version, scale in ((old, 1, 1), (new, 2, 10)):
        assert [t.version for t in crowd.talkers] == [version] * 6
        expected = alone(tmp_path_factory.mktemp("alone"), scale, [t.sent for t in crowd.talkers])
        assert [t.got for t in crowd.talkers] == expected


def repeat(
    call: Callable[[], int], stopping: threading.Event, versions: list[int], errors: list[Any]
) -> None:
    try:
        while not stopping.is_set():
            versions.append(call())
    except Exception as error:
        errors.append(error)
        raise


def test_no_call_and_no_open_is_refused_while_versions_come_and_go(own_server: Server) -> None:
    """Each of them finds a version, puts its work there, and has it done, whatever is unloaded meanwhile."""
    stopping, errors = threading.Event(), list[Any]()
    predicted, opened = list[int](), list[int]()
    with connect(own_server.port) as channel, Conversation(channel) as conversation:
        api = stub(channel)

        def predict() -> int:
            request = pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])])
            answer = api.Predict(request, timeout=PATIENCE_SECONDS)
            assert array(answer.outputs[0]).tolist() == [[2, 4]]
            return int(answer.version)

        def open_and_end() -> int:
            conversation.send(opening("accumulator"), chunk(1, [1.0]), ending())
            version = conversation.opened().version
            assert conversation.values(1) == [float(version)]
            assert conversation.closed().reason == pb.END
            return version

        threads = [
            threading.Thread(target=repeat, args=(call, stopping, versions, errors))
            for call, versions in ((predict, predicted), (open_and_end, opened))
        ]
        for thread in threads:
            thread.start()
        for version in range(2, 9):
            goals = len(predicted) + 5, len(opened) + 5
            wait_for(lambda: bool(errors) or (len(predicted), len(opened)) >= goals, "calls")  # noqa: B023
            toys.write(own_server.config.repository, "doubler", toys.doubler(), version)
            add_version(own_server, version, toys.accumulator(scale=version))
        wait_for(lambda: bool(errors) or (predicted[-1], opened[-1]) == (8, 8), "the last version")
        stopping.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert not errors
        for versions in (predicted, opened):
            assert versions == sorted(versions)  # never back to an older one
        poll(own_server)
        assert states(api, "doubler") == {8: READY}
        assert states(api, "accumulator") == {8: READY}


def test_a_version_that_retires_is_shown_and_takes_nobody(own_server: Server) -> None:
    with connect(own_server.port) as channel, Conversation(channel) as conversation:
        api = stub(channel)
        conversation.send(opening("accumulator", label="old"))
        conversation.opened()
        add_version(own_server, 2, toys.accumulator(scale=10))

        retiring = api.GetModel(pb.GetModelRequest(model="accumulator", version=1))
        assert (retiring.model.state, retiring.model.sequences) == (RETIRING, 1)
        assert retiring.manifest_json
        old = own_server.catalogue.retired("accumulator", 1)
        assert old is not None
        assert retiring.model.fingerprint == old.fingerprint != ""
        del old
        assert api.GetModel(pb.GetModelRequest(model="accumulator")).model.version == 2
        model = {"model": "accumulator"}
        text = metrics_text(own_server)
        assert number(text, "tenuto_model_retiring", version="1", **model) == 1
        assert number(text, "tenuto_model_retiring", version="2", **model) == 0
        assert number(text, "tenuto_model_loads_total", result="loaded", **model) == 2

        with Conversation(channel) as other:
            other.send(opening("accumulator", version=1))
            assert "was replaced by 2" in other.failed("UNKNOWN_MODEL").message
        refusal = refused(api.Predict, pb.PredictRequest(model="accumulator", version=1))
        assert refusal.reason == "UNKNOWN_MODEL"

        (listed,) = api.ListSequences(pb.ListSequencesRequest(model="accumulator")).sequences
        assert (listed.version, listed.label) == (1, "old")
        api.EndSequence(pb.EndSequenceRequest(sequence_id=listed.sequence_id))
        assert conversation.closed().reason == pb.EVICTED
        poll(own_server)
        assert states(api, "accumulator") == {2: READY}
        assert 'version="1"' not in "".join(
            line for line in metrics_text(own_server).splitlines() if 'model="accumulator"' in line
        )


def test_at_max_age_accepted_chunks_are_answered_and_the_sequence_is_told(
    repository: Path, transport: str
) -> None:
    with (
        serving(repository, transport=transport, max_age_seconds=0.05) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        conversation.send(opening("accumulator", 1), chunk(1, [1.0], sequence=1))
        conversation.opened()
        assert conversation.values(1) == [1.0]
        add_version(server, 2, toys.accumulator(scale=10))
        closed = conversation.closed()
        assert (closed.reason, closed.last_step) == (pb.MAX_AGE, 1)
        conversation.send(opening("accumulator", 1), chunk(1, [1.0], sequence=1), ending(1))
        assert conversation.opened().version == 2
        assert conversation.values(1) == [10.0]
        assert conversation.closed().reason == pb.END
        poll(server)
        assert states(stub(channel), "accumulator") == {2: READY}


@pytest.mark.parametrize("allowed", [True, False], ids=["resumes_from", "not named"])
def test_past_max_age_a_sequence_goes_on_where_the_manifest_of_the_new_version_allows_it(
    repository: Path, allowed: bool
) -> None:
    with (
        serving(repository, max_age_seconds=0.05) as server,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        conversation.send(opening("accumulator"), chunk(1, [1.0, 2.0]))
        conversation.opened()
        assert conversation.values(1) == [1.0, 3.0]
        old = server.catalogue.find("accumulator").fingerprint
        add_version(server, 2, toys.accumulator(scale=10, resumes_from=[old] if allowed else []))
        closed = conversation.closed()
        assert (closed.reason, closed.last_step) == (pb.MAX_AGE, 1)
        assert closed.resume_token
        conversation.send(opening("accumulator", 1, resume_token=closed.resume_token))
        if allowed:
            opened = conversation.opened()
            assert (opened.version, opened.next_step) == (2, 2)
            conversation.send(chunk(2, [4.0], sequence=1), ending(1))
            assert conversation.values(2) == [70.0]  # the sum of all, on the new version
            assert conversation.closed().reason == pb.END
        else:
            message = conversation.failed("TOKEN_INVALID").message
            assert "version 2 does not take it over (manifest: resumes_from)" in message


def test_a_sequence_whose_connection_broke_comes_back_to_the_version_that_retires(
    own_server: Server,
) -> None:
    with connect(own_server.port) as channel:
        api = stub(channel)
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator"), chunk(1, [1.0]), checkpoint())
            conversation.opened()
            assert conversation.values(1) == [1.0]
            token = conversation.read().checkpoint.resume_token
            add_version(own_server, 2, toys.accumulator(scale=10))
        wait_for(lambda: own_server.catalogue.retiring[0].engine.emptied.is_set(), "the end of the call")
        poll(own_server, 5)
        with Conversation(channel) as conversation:
            conversation.send(opening("accumulator", resume_token=token), chunk(2, [1.0]), ending())
            opened = conversation.opened()
            assert (opened.version, opened.next_step) == (1, 2)
            assert conversation.values(2) == [2.0]
            assert conversation.closed().reason == pb.END
        assert states(api, "accumulator") == {1: RETIRING, 2: READY}


@pytest.mark.usefixtures("with_child")
def test_a_bad_version_replaces_nothing_and_the_log_a_metric_and_the_list_say_why(
    own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    counting = Counting(own_server)
    made, manifest = toys.accumulator()
    toys.write(own_server.config.repository, "accumulator", (made[: len(made) // 2], manifest), 2)
    poll(own_server, 4)
    with connect(own_server.port) as channel, Conversation(channel) as conversation:
        api = stub(channel)
        assert states(api, "accumulator") == {1: READY, 2: FAILED}
        failed = api.GetModel(pb.GetModelRequest(model="accumulator", version=2)).model
        assert "ONNX Runtime does not load it" in failed.why
        assert f"accumulator/2 is not served: {failed.why}" in caplog.text
        assert counting.rise("tenuto_model_loads_total", model="accumulator", result="failed") == 1
        conversation.send(opening("accumulator"), chunk(1, [1.0]), ending())
        assert conversation.opened().version == 1
        assert conversation.values(1) == [1.0]
        conversation.closed()
    # Repaired, and now it serves.
    folder = own_server.config.repository / "accumulator" / "2"
    (folder / "model.onnx").write_bytes(made)
    poll(own_server)
    assert engine_of(own_server, "accumulator").version == 2


def test_a_half_written_version_is_left_alone_until_it_is_whole(own_server: Server) -> None:
    made, manifest = toys.accumulator(scale=10)
    folder = own_server.config.repository / "accumulator" / "2"
    folder.mkdir()
    poll(own_server)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    poll(own_server)
    with (folder / "model.onnx").open("wb") as file:
        for begin in range(0, len(made), len(made) // 4):
            file.write(made[begin : begin + len(made) // 4])
            file.flush()
            poll(own_server, 1)
    assert list(own_server.catalogue.refused) == []
    assert engine_of(own_server, "accumulator").version == 1
    poll(own_server, 1)
    assert engine_of(own_server, "accumulator").version == 2


def test_a_server_that_stops_ends_the_sequences_of_all_versions(repository: Path) -> None:
    with (
        serving(repository) as server,
        connect(server.port) as channel,
        Conversation(channel) as old,
        Conversation(channel) as new,
    ):
        old.send(opening("accumulator"))
        assert old.opened().version == 1
        add_version(server, 2, toys.accumulator(scale=10))
        new.send(opening("accumulator"))
        assert new.opened().version == 2
        server.stop(0.0)
        assert [c.closed().reason for c in (old, new)] == [pb.DRAINING] * 2


def test_the_watchdog_sees_versions_that_came_later(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = threading.Event()
    monkeypatch.setattr("tenuto.serving.server.os._exit", lambda _: left.set())
    with serving(repository, run_seconds=0.2) as server:
        add_version(server, 2, toys.accumulator(scale=10))
        engine_of(server, "accumulator").running_since = 1e-9  # as if a run had begun long ago
        assert left.wait(PATIENCE_SECONDS)
