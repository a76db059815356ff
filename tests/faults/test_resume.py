"""A sequence outlives its server: real processes are killed, frozen, drained, and cut off.

Each test prints its figures: what the promise costs in time is read there, and never asserted.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tenuto import Sampling, aio
from tests import toys

from .crowd import Crowd, Figures
from .process import ServerProcess, server_process
from .proxy import Proxy


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    toys.write(root, "accumulator", toys.accumulator())
    toys.write(root, "speaker", toys.speaker())
    return root


Start = Callable[[str], ServerProcess]


@pytest.fixture
def start(repository: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts servers of one fleet: the same models, the same keys."""
    keys = tmp_path / "keys"
    keys.write_text("5a" * 32)
    with ExitStack() as stack:

        def one(name: str) -> ServerProcess:
            folder = tmp_path / name
            folder.mkdir()
            settings = {"token_key_file": keys, "checkpoint_every": 10}
            return stack.enter_context(server_process(repository, folder, **settings))

        yield one


def targets(*ports: int) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in ports)


@contextmanager
def told(capsys: pytest.CaptureFixture[str], what: str, crowd: Crowd) -> Iterator[Figures]:
    figures = crowd.run()
    with capsys.disabled():
        print(f"\n  {what}: {figures}")
    yield figures


def test_a_thousand_sequences_outlive_the_kill_of_their_server(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = start("one"), start("two")
    crowd = Crowd(
        targets(one.port, two.port), 1000, 30, at={0.5: lambda: one.terminate(signal.SIGKILL)},
        timeout_seconds=40,
    )  # fmt: skip
    with told(capsys, "kill -9", crowd) as figures:
        assert figures.whole == (0, 0, 0)
        assert figures.chunks == 30_000
        assert figures.resumes >= 400


def test_sequences_that_are_sent_elsewhere_lose_nothing(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is fuller than a quarter and one that may be full, again and again."""
    keys = tmp_path / "keys"
    keys.write_text("5a" * 32)
    settings = {"token_key_file": keys, "max_sequences": 16, "resume_reserve": 0.0}
    moving = {"rebalance_above": 0.25, "rebalance_per_second": 8, "rebalance_age_seconds": 0.2}
    with ExitStack() as stack:
        servers = []
        for name, more in (("full", moving), ("other", {})):
            (tmp_path / name).mkdir()
            servers.append(
                stack.enter_context(server_process(repository, tmp_path / name, **settings, **more))
            )
        crowd = Crowd(targets(*(server.port for server in servers)), 14, 2_000, timeout_seconds=40)
        with told(capsys, "rebalanced", crowd) as figures:
            assert figures.whole == (0, 0, 0)
            assert figures.resumes >= 1


def test_who_generates_says_the_same_whether_its_server_is_killed_or_drained(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred texts at once: each part once and in order, each word what it would have been."""
    servers = [start("one"), start("two"), start("three")]
    steps = [("abc", 40), ("", 100), ("€", 160)]
    ends = {500: signal.SIGKILL, 3_000: signal.SIGTERM}  # parts heard -> what befalls the next server
    heard = resumes = 0

    async def listens(client: aio.Client, seed: int) -> None:
        nonlocal heard, resumes
        said: list[tuple[int, int, int]] = []
        async with client.stream("speaker", sampling=Sampling(seed=seed)) as stream:
            for words, count in steps:
                await stream.send(words or None, generate=count)
            await stream.end()
            async for output in stream:
                if output.part:
                    said.append((output.step, output.part, int(output["id"][0])))
                    heard += 1
                if heard in ends:
                    servers.pop(0).terminate(ends.pop(heard))
            resumes += stream.resumes
        places = [(step, part + 1) for step, (_, count) in enumerate(steps, 1) for part in range(count)]
        assert [place[:2] for place in said] == places
        assert [word for _, _, word in said] == toys.spoken(steps, seed=seed)

    async def crowd() -> None:
        ports = [server.port for server in servers]
        async with aio.Client(targets(*ports), timeout_seconds=40) as client:
            await asyncio.gather(*(listens(client, seed) for seed in range(100)))

    asyncio.run(crowd())
    with capsys.disabled():
        print(f"\n  generating, kill -9 and drain: {heard} parts, {resumes} resumes")
    assert (heard, ends) == (100 * 300, {})
    assert resumes >= 20  # most of the first and some of the second, but for those that had said all by then


def test_a_frozen_server_is_left_for_another(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGSTOP: its kernel still takes bytes, so only the client's own limits notice."""
    one, two = start("one"), start("two")
    crowd = Crowd(
        targets(one.port, two.port), 60, 100, at={0.5: lambda: one.terminate(signal.SIGSTOP)},
        reply_seconds=2.0, timeout_seconds=5.0,
    )  # fmt: skip
    try:
        with told(capsys, "SIGSTOP", crowd) as figures:
            assert figures.whole == (0, 0, 0)
            assert figures.resumes >= 30
    finally:
        one.terminate(signal.SIGCONT)


def test_connections_that_are_cut_again_and_again_lose_nothing(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of whatever the bytes are, every 20 kB."""
    server = start("one")
    with Proxy(server.port) as proxy:
        proxy.cut_after = 20_000
        crowd = Crowd(targets(proxy.port), 50, 60, poison_losses=1000)
        with told(capsys, "cut", crowd) as figures:
            assert figures.whole == (0, 0, 0)
            assert proxy.cuts > 5
            assert figures.resumes > 50


def test_a_network_that_stalls_and_slows_loses_nothing(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = start("one"), start("two")
    with Proxy(one.port) as first, Proxy(two.port) as second:
        second.bytes_per_second = 200_000

        def flow_again() -> None:
            first.flow()
            first.bytes_per_second = 100_000

        crowd = Crowd(
            targets(first.port, second.port), 40, 60, at={0.2: first.stall, 0.9: flow_again},
            reply_seconds=1.0, timeout_seconds=5.0, poison_losses=1000,
        )  # fmt: skip
        with told(capsys, "stall", crowd) as figures:
            assert figures.whole == (0, 0, 0)
            assert figures.resumes >= 20


@pytest.mark.timeout(300)  # twenty servers start one after another: over a minute on a slow machine
def test_servers_that_are_drained_one_after_another_lose_nothing(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty rollouts of a fleet of two under 500 live sequences: each server leaves with status 0."""
    servers = [start("0"), start("1")]
    proxies = [Proxy(s.port) for s in servers]  # the callers' addresses stay what they are

    def replace(turn: int) -> None:
        side = turn % 2
        fresh = start(f"{turn + 2}")
        proxies[side].target = fresh.port
        old, servers[side] = servers[side], fresh
        old.terminate()
        assert old.exit_status() == 0
        assert "Traceback" not in old.log

    with proxies[0], proxies[1]:
        crowd = Crowd(
            targets(*(p.port for p in proxies)), 500, 200,
            at={0.02 + turn * 0.045: partial(replace, turn) for turn in range(20)},
            timeout_seconds=40,
        )  # fmt: skip
        with told(capsys, "20 drains", crowd) as figures:
            assert figures.whole == (0, 0, 0)
            assert figures.chunks == 100_000
