"""Servers for tests: in this process, on free ports, and what may be asked of them."""

from __future__ import annotations

import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tenuto.serving import loader
from tenuto.serving.config import ServerConfig
from tenuto.serving.engine import Engine
from tenuto.serving.errors import TenutoError
from tenuto.serving.repository import ModelFolder
from tenuto.serving.server import Server
from tenuto.serving.vetting import Verdict
from tests import toys

# Our own server, and gRPC's. And our own with two front ends: for what is promised of calls, sequences and
# equality; for all the rest when `make test-front-ends` asks for it.
TRANSPORTS: tuple[str, ...] = ("http2", "threads")
ALL_TRANSPORTS = (*TRANSPORTS, "relayed")
if os.environ.get("TEST_FRONT_ENDS") == "1":
    TRANSPORTS = ALL_TRANSPORTS = ("relayed",)
# A condition that does not come true within that fails the test. Nothing waits that long when all is well.
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.002
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@pytest.fixture(name="transport", params=ALL_TRANSPORTS)
def every_transport(request: pytest.FixtureRequest) -> str:
    """For modules that take it in place of the folder's own."""
    return str(request.param)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Polls until the condition holds."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(_POLL_SECONDS)


def write_toys(root: Path) -> Path:
    """A repository of every toy."""
    toys.write(root, "accumulator", toys.accumulator())
    toys.write(root, "grouped", toys.accumulator(ragged=False))
    toys.write(root, "fours", toys.accumulator(x={"chunk": {"multiple": 4}, "tail": "pad"}))
    toys.write(root, "doubler", toys.doubler())
    toys.write(root, "brightness", toys.brightness())
    toys.write(root, "lookup", toys.lookup())
    toys.write(root, "unchecked", toys.lookup(checked=False))
    toys.write(root, "explosive", toys.explosive())
    toys.write(root, "gain", toys.gain())
    toys.write(root, "speaker", toys.speaker())
    toys.write(root, "reader", toys.reader())
    toys.write(root, "player", toys.player())
    return root


def unvetted(folders: list[ModelFolder], *_: Any) -> dict[ModelFolder, Verdict]:
    verdicts = {}
    for folder in folders:
        try:
            verdicts[folder] = Verdict(folder.read().fingerprint)
        except TenutoError as error:
            verdicts[folder] = Verdict(why=str(error))
    return verdicts


def build(repository: Path, *, vetted: bool = False, **settings: Any) -> Server:
    """A server that is not started. `vetted`: with the child process that checks models, as in real life.

    It sends no tokens by itself, so that a test reads what it asked for.
    """
    flags = {
        "repository": repository,
        "port": 0,
        "metrics_port": 0,
        "device": "cpu",
        "threads": 1,
        "poll_seconds": 0,
        "checkpoint_every": 0,
    }
    # Whatever is tested on all transports is tested on both pools.
    if (transport := settings.get("transport")) in ("threads", "relayed"):
        flags |= {"pool": "graph", "buffers": "kept"}
    if transport == "relayed":
        flags |= {"front_ends": 2}
        settings = settings | {"transport": "http2"}
    config = ServerConfig.build(flags | settings, {})
    with pytest.MonkeyPatch.context() as patch:
        if not vetted:
            patch.setattr(loader, "vet", unvetted)
        return Server(config, "0")


@contextmanager
def serving(repository: Path, **settings: Any) -> Iterator[Server]:
    """A started server, stopped at the end."""
    server = build(repository, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop(0.0)


def engine_of(server: Server, model: str) -> Engine:
    return server.catalogue.find(model).engine


def metrics_text(server: Server) -> str:
    """What /metrics says."""
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=30) as response:
        return str(response.read().decode())


def number(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of that name that carry these labels."""
    total = 0.0
    for line in text.splitlines():
        if line.startswith((name + "{", name + " ")):
            have, value = line.removeprefix(name).rsplit(" ", 1)
            if set(labels.items()) <= set(_LABEL.findall(have)):
                total += float(value)
    return total


class Counting:
    """How much metrics rose since this object was made."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = metrics_text(server)

    def rise(self, name: str, **labels: str) -> float:
        now = number(metrics_text(self._server), name, **labels)
        return now - number(self._before, name, **labels)

    def wait_for_rise(self, by: float, name: str, **labels: str) -> None:
        wait_for(lambda: self.rise(name, **labels) >= by, f"{name}{labels} to rise by {by}")
        assert self.rise(name, **labels) == by


def assert_nothing_is_left(server: Server) -> None:
    """No sequence, stream, chunk or byte is held any more, and the pools did not lose count."""
    wait_for(lambda: _left(server) == {}, f"nothing to be left of {_left(server)}")
    for engine in server.catalogue.engines:
        engine.check()


def _left(server: Server) -> dict[str, int]:
    metrics = server.metrics
    left = {"pending_bytes": metrics.pending_bytes(), "open_streams": metrics.open_streams()}
    for model in metrics.models:
        left[f"{model.model} sequences"] = model.active_sequences
        left[f"{model.model} slots"] = model.slots_used
        left[f"{model.model} chunks"] = model.pending_chunks
    return {what: n for what, n in left.items() if n}


class Gate:
    """In front of a model's runs: they wait while it is shut.

    `arrived` is set when a run stands before the gate.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._runner: Any = engine._runner
        self._open = threading.Event()
        self.arrived = threading.Event()
        self.runs = 0

    def __enter__(self) -> Gate:
        self._engine._runner = self
        return self

    def __exit__(self, *_: object) -> None:
        self._engine._runner = self._runner
        self.open()

    def open(self) -> None:
        self._open.set()

    def wait_for_arrival(self) -> None:
        assert self.arrived.wait(_PATIENCE_SECONDS), "no run came to the gate"

    # engine.Runner

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        self.runs += 1
        self.arrived.set()
        assert self._open.wait(_PATIENCE_SECONDS), "the gate stayed shut"
        results: list[Any] = self._runner.run(feeds)
        return results

    def enter_thread(self) -> None:
        self._runner.enter_thread()

    def probe(self) -> None:
        self._runner.probe()


class Throttle:
    """In front of a model's runs: each takes a permit."""

    def __init__(self, engine: Engine) -> None:
        self._runner: Any = engine._runner
        self._permits = threading.Semaphore(0)
        engine._runner = self

    def allow(self, runs: int) -> None:
        self._permits.release(runs)

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        assert self._permits.acquire(timeout=_PATIENCE_SECONDS), "a run was not allowed"
        results: list[Any] = self._runner.run(feeds)
        return results

    def enter_thread(self) -> None:
        self._runner.enter_thread()

    def probe(self) -> None:
        self._runner.probe()
