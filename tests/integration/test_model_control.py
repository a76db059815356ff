"""Operators load, unload and reload models, and see what there is; on either transport, by our own client."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tenuto
from tenuto import aio
from tenuto.oip import inference_pb2 as oip_pb
from tenuto.serving import loader
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys

from . import oip_wire
from .running import (
    Gate,
    assert_nothing_is_left,
    engine_of,
    metrics_text,
    number,
    serving,
    unvetted,
    wait_for,
)
from .wire import PATIENCE_SECONDS, Conversation, chunk, connect, ending, opening

ONE = np.ones(1, np.float32)
ALICE, OPS = "alice-" * 4, "ops---" * 4


@pytest.fixture(autouse=True)
def without_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the child process finds is tested elsewhere."""
    monkeypatch.setattr(loader, "vet", unvetted)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    toys.write(tmp_path, "accumulator", toys.accumulator())
    toys.write(tmp_path, "doubler", toys.doubler())
    return tmp_path


@pytest.fixture
def server(root: Path, transport: str) -> Iterator[Server]:
    with serving(root, transport=transport, model_control=True) as server:
        yield server
        assert_nothing_is_left(server)


@pytest.fixture
def client(server: Server) -> Iterator[tenuto.Client]:
    with client_of(server) as client:
        yield client


def client_of(server: Server, token: str = "") -> tenuto.Client:
    return tenuto.Client(f"127.0.0.1:{server.port}", token=token)


def rewrite(root: Path, model: str, made: tuple[bytes, Any], version: int = 1) -> None:
    """As toys.write, also where there was something."""
    shutil.rmtree(root / model / str(version), ignore_errors=True)
    toys.write(root, model, made, version)


def states(client: tenuto.Client, model: str = "accumulator") -> dict[int, str]:
    return {one.version: one.state for one in client.models() if one.name == model}


class Checks:
    """Stands in for the child process: each check waits until it is allowed."""

    def __init__(self) -> None:
        self.begun, self.allowed = threading.Event(), threading.Event()

    def __call__(self, folders: Any, *_: Any) -> Any:
        self.begun.set()
        assert self.allowed.wait(PATIENCE_SECONDS), "nobody allowed the check to end"
        return unvetted(folders)


@contextmanager
def held_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checks]:
    checks = Checks()
    monkeypatch.setattr(loader, "vet", checks)
    try:
        yield checks
    finally:
        checks.allowed.set()


# -- what there is ---------------------------------------------------------------------------------


def test_models_are_listed_with_their_memory_and_checksum(
    client: tenuto.Client, server: Server, root: Path
) -> None:
    """The accumulator's state is one float32; one slot more than there may be sequences is for padding, two
    where the graph keeps the states."""
    onnx = (root / "accumulator/1/model.onnx").read_bytes()
    with client.stream("accumulator"), client.stream("accumulator"):
        one, stateless = client.models()
    slots = server.config.max_sequences
    assert (one.sequences, one.slots) == (2, slots)
    spare = 2 if server.config.pool == "graph" else 1
    assert (one.state_bytes_used, one.state_bytes) == (2 * 4, 4 * (slots + spare))
    assert (stateless.state_bytes_used, stateless.state_bytes) == (0, 0)
    assert (one.file_bytes, one.sha256) == (len(onnx), hashlib.sha256(onnx).hexdigest())
    labels = {"model": "accumulator", "version": "1", "sha256": one.sha256}
    assert number(metrics_text(server), "tenuto_model_info", **labels) == 1


def test_every_state_of_a_version_is_told(
    client: tenuto.Client, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(root, "accumulator", (b"no graph", toys.accumulator()[1]), 3)
    with client.stream("accumulator") as stream, ThreadPoolExecutor(1) as pool:
        stream.send(ONE)
        next(stream)
        with pytest.raises(tenuto.Unavailable, match=r"accumulator/1 serves: accumulator/3: ONNX"):
            client.load("accumulator")
        assert states(client) == {1: "READY", 3: "FAILED"}
        rewrite(root, "accumulator", toys.accumulator(scale=10), 3)
        with held_checks(monkeypatch) as checks:
            loading = pool.submit(client.load, "accumulator")
            assert checks.begun.wait(PATIENCE_SECONDS)
            assert states(client) == {1: "READY", 3: "LOADING"}
            stream.send(ONE)  # nobody waits for the check
            assert next(stream)["y"].tolist() == [2.0]
            checks.allowed.set()
            assert loading.result(PATIENCE_SECONDS).model.version == 3
        assert states(client) == {1: "RETIRING", 3: "READY"}
    client.unload("accumulator")
    assert states(client) == {3: "UNLOADED"}


# -- unload ----------------------------------------------------------------------------------------


def test_an_unload_ends_live_sequences_with_tokens_that_are_good_after_a_load(
    client: tenuto.Client, server: Server
) -> None:
    with connect(server.port) as channel, Conversation(channel) as conversation:
        for number_, value in enumerate((3.0, 4.0)):
            conversation.send(opening("accumulator", number_), chunk(1, [value], sequence=number_))
            conversation.opened()
            assert conversation.values(1) == [value]
        unloaded = client.unload("accumulator")
        assert (unloaded.versions, unloaded.sequences) == ((1,), 2)
        tokens = []
        for _ in range(2):
            closed = conversation.closed()
            assert (closed.reason, closed.last_step) == (pb.DRAINING, 1)
            tokens.append(closed.resume_token)
        assert all(tokens)
        for fields in ({}, {"resume_token": tokens[0]}):
            conversation.send(opening("accumulator", 5, **fields))
            conversation.failed("UNKNOWN_MODEL")
        for _ in range(3):
            server.rollout.poll()  # only an operator brings it back
        assert states(client) == {1: "UNLOADED"}
        assert states(client, "doubler") == {1: "READY"}

        loaded = client.load("accumulator")
        assert (loaded.model.version, loaded.model.state, loaded.changed) == (1, "READY", True)
        conversation.send(opening("accumulator", 6, resume_token=tokens[1]), chunk(2, [1.0], sequence=6))
        assert conversation.opened().next_step == 2
        assert conversation.values(2) == [5.0]
        conversation.send(ending(6))
        conversation.closed()


def test_what_takes_too_long_to_answer_is_told_max_age(
    client: tenuto.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenuto.serving.rollout._UNLOAD_SECONDS", 0.01)
    engine = engine_of(server, "accumulator")
    with (
        connect(server.port) as channel,
        Conversation(channel) as conversation,
        ThreadPoolExecutor(1) as pool,
        Gate(engine) as gate,
    ):
        conversation.send(opening("accumulator"), chunk(1, [3.0]))
        conversation.opened()
        gate.wait_for_arrival()
        unloading = pool.submit(client.unload, "accumulator")
        wait_for(lambda: len(server.catalogue.engines) == 1, "the patience to be over")
        wait_for(lambda: len(engine._inbox) == 2, "what it is told")
        gate.open()
        assert conversation.values(1) == [3.0]  # what was accepted is answered all the same
        closed = conversation.closed()
        assert (closed.reason, closed.last_step, bool(closed.resume_token)) == (pb.MAX_AGE, 1, True)
        assert unloading.result(PATIENCE_SECONDS).sequences == 1


def test_the_open_inference_protocol_shares_it(client: tenuto.Client, server: Server) -> None:
    client.unload("doubler")
    with connect(server.port) as channel:
        oip = oip_wire.stub(channel)
        models = oip.RepositoryIndex(oip_pb.RepositoryIndexRequest()).models
        assert [(m.name, m.state, m.reason) for m in models][-1] == ("doubler", "UNAVAILABLE", "unloaded")
        oip.RepositoryModelLoad(oip_pb.RepositoryModelLoadRequest(model_name="doubler"))
        assert not client.load("doubler").changed
        oip.RepositoryModelUnload(oip_pb.RepositoryModelUnloadRequest(model_name="doubler"))
    assert states(client, "doubler") == {1: "UNLOADED"}


# -- load and reload -------------------------------------------------------------------------------


def test_what_is_not_there_or_refused_is_an_error_that_says_why(client: tenuto.Client, root: Path) -> None:
    for call in (client.load, client.reload, client.unload):
        with pytest.raises(tenuto.NotFound, match="UNKNOWN_MODEL: failed to (un)?load 'nobody'"):
            call("nobody")
    rewrite(root, "broken", (b"no graph", toys.doubler()[1]))
    for call in (client.load, client.reload):
        with pytest.raises(tenuto.Unavailable, match="broken/1: .*does not load it") as refused:
            call("broken")
        assert refused.value.reason == "MODEL_NOT_READY"
    assert states(client, "broken") == {1: "FAILED"}
    rewrite(root, "broken", (toys.doubler()[0], toys.doubler()[1] | {"name": "broken"}))
    assert client.reload("broken").changed
    assert states(client, "broken") == {1: "READY"}


@pytest.mark.parametrize("allowed", [True, False], ids=["resumes_from", "not named"])
def test_a_reload_puts_changed_files_in_their_versions_place(
    client: tenuto.Client, server: Server, root: Path, allowed: bool
) -> None:
    before = client.models()[0]
    with connect(server.port) as channel, Conversation(channel) as conversation:
        conversation.send(opening("accumulator"), chunk(1, [3.0]))
        conversation.opened()
        assert conversation.values(1) == [3.0]
        assert not client.reload("accumulator").changed
        rewrite(root, "accumulator", (b"no graph", toys.accumulator()[1]))
        with pytest.raises(
            tenuto.Unavailable, match="'accumulator', accumulator/1 serves: accumulator/1: ONNX"
        ):
            client.reload("accumulator")
        assert states(client) == {1: "READY"}
        conversation.send(chunk(2, [1.0]))  # it is untouched
        assert conversation.values(2) == [4.0]

        names = [before.fingerprint] if allowed else []
        rewrite(root, "accumulator", toys.accumulator(scale=10, resumes_from=names))
        loaded = client.reload("accumulator")
        assert (loaded.model.version, loaded.changed, loaded.sequences) == (1, True, 1)
        assert loaded.model.sha256 != before.sha256
        assert states(client) == {1: "READY"}
        closed = conversation.closed()
        assert (closed.reason, closed.last_step) == (pb.DRAINING, 2)
        conversation.send(opening("accumulator", 1, resume_token=closed.resume_token))
        if allowed:
            assert conversation.opened().next_step == 3
            conversation.send(chunk(3, [1.0], sequence=1), ending(1))
            assert conversation.values(3) == [50.0]  # the sum of all, by the new files
            conversation.closed()
        else:
            conversation.failed("TOKEN_INVALID")
    assert number(metrics_text(server), "tenuto_model_info", model="accumulator") == 1


# -- who may, and when -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["load", "unload", "reload"])
def test_only_operators_may(root: Path, tmp_path: Path, transport: str, method: str) -> None:
    file = tmp_path / "callers.toml"
    file.write_text(f'[alice]\ntokens = ["{ALICE}"]\n[ops]\ntokens = ["{OPS}"]\noperator = true\n')
    with (
        serving(root, transport=transport, callers=file, model_control=True) as server,
        client_of(server, ALICE) as alice,
        client_of(server, OPS) as ops,
    ):
        with pytest.raises(tenuto.Refused, match="only operators load and unload models") as refused:
            getattr(alice, method)("doubler")
        assert (refused.value.code, refused.value.reason) == ("PERMISSION_DENIED", "NOT_AN_OPERATOR")
        assert states(alice, "doubler") == {1: "READY"}
        getattr(ops, method)("doubler")
        assert states(alice, "doubler") == {1: "UNLOADED" if method == "unload" else "READY"}


@pytest.mark.parametrize("method", ["load", "unload", "reload"])
def test_a_server_without_the_setting_says_so(root: Path, transport: str, method: str) -> None:
    with serving(root, transport=transport) as server, client_of(server) as client:
        with pytest.raises(tenuto.Refused, match="--model-control") as refused:
            getattr(client, method)("doubler")
        assert (refused.value.code, refused.value.reason) == ("UNIMPLEMENTED", "NOT_SUPPORTED")
        assert states(client, "doubler") == {1: "READY"}


def test_of_two_operators_at_once_one_is_told_to_try_again(
    client: tenuto.Client, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(root, "accumulator", toys.accumulator(scale=10), 2)
    with held_checks(monkeypatch) as checks, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.load, "accumulator")
        assert checks.begun.wait(PATIENCE_SECONDS)
        for call in (client.load, client.unload, client.reload):
            with pytest.raises(tenuto.Unavailable, match="another operator's load of 'accumulator'") as error:
                call("doubler")
            assert error.value.reason == "MODEL_NOT_READY"
        checks.allowed.set()
        assert first.result(PATIENCE_SECONDS).model.version == 2
    assert client.unload("doubler").versions == (1,)


def test_a_load_goes_on_without_its_caller(
    client: tenuto.Client, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(root, "accumulator", toys.accumulator(scale=10), 2)
    with held_checks(monkeypatch) as checks:
        with pytest.raises(tenuto.ReplyTimeout):
            client.load("accumulator", timeout_seconds=0.05)
        assert checks.begun.wait(PATIENCE_SECONDS)
        checks.allowed.set()
        wait_for(lambda: states(client).get(2) == "READY", "the load to come to its end")


def test_the_client_for_asyncio_does_the_same(server: Server, root: Path) -> None:
    async def ask() -> None:
        async with aio.Client(f"127.0.0.1:{server.port}") as client:
            assert not (await client.load("accumulator")).changed
            unloaded = await client.unload("accumulator")
            assert (unloaded.versions, unloaded.sequences) == ((1,), 0)
            with pytest.raises(tenuto.NotFound):
                await client.unload("accumulator")
            rewrite(root, "accumulator", toys.accumulator(scale=10))
            loaded = await client.reload("accumulator")
            assert (loaded.model.version, loaded.changed, loaded.sequences) == (1, True, 0)

    asyncio.run(ask())
