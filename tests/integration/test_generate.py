"""Texts come in any pieces, and a model goes on by itself: the same alone, in a crowd, and elsewhere."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenuto import Client, Output, Sampling, Stream, aio
from tenuto.cli import main
from tenuto.serving import loader
from tenuto.serving.server import Server
from tenuto.serving.text import Words
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys
from tests.toys import spoken

from .running import (
    Counting,
    Gate,
    Throttle,
    assert_nothing_is_left,
    engine_of,
    serving,
    unvetted,
    wait_for,
)
from .wire import Conversation, array, chunk, connect, ending, opening, text

PROMPT = "abc 😀"
STORY = "“Who’s there?”  — nobody; don't   ask… " + "x" * 150 + " ßß 漢字 'n' end'"


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}") as client:
        yield client


def said(outputs: list[Output]) -> list[int]:
    """The samples that were generated."""
    return [int(output["id"][0]) for output in outputs if "id" in output.outputs]


def sums(outputs: list[Output]) -> list[int]:
    return [int(i) for output in outputs if "sum" in output.outputs for i in output["sum"]]


# On the wire.


def test_a_part_tells_its_sample_and_the_opening_how_it_is_drawn(conversation: Conversation) -> None:
    conversation.send(
        opening("speaker", sampling=pb.Sampling(seed=7, top_k=3)), chunk(1, text("ab"), generate=2)
    )
    assert conversation.opened().sampling == pb.Sampling(seed=7, temperature=1.0, top_k=3)
    own = conversation.output(1)
    assert [(o.name, tuple(o.shape)) for o in own.outputs] == [("logits", (2, 8)), ("sum", (2,))]
    parts = [conversation.output(1) for _ in range(2)]
    assert [(o.part, o.last) for o in (own, *parts)] == [(0, False), (1, False), (2, True)]
    for part, expected in zip(parts, spoken([("ab", 2)], seed=7, top_k=3), strict=True):
        (sample,) = part.outputs
        assert (sample.name, sample.dtype, tuple(sample.shape)) == ("id", "int64", (1,))
        assert array(sample).tolist() == [expected]
        assert part.timing.batch_size == 1
    conversation.send(ending())
    assert conversation.closed().reason == pb.END


def test_a_seed_is_drawn_for_who_brings_none_and_said(conversation: Conversation) -> None:
    seeds = set()
    for number in range(3):
        conversation.send(opening("player", number), ending(number))
        sampling = conversation.opened().sampling
        assert (sampling.temperature, sampling.top_k) == (1.0, 0)
        seeds.add(sampling.seed)
        assert conversation.closed().reason == pb.END
    assert len(seeds) == 3
    conversation.send(opening("accumulator"), ending())
    assert not conversation.opened().HasField("sampling")
    assert conversation.closed().reason == pb.END


def test_a_sequence_that_resumes_keeps_its_sampling(conversation: Conversation) -> None:
    conversation.send(
        opening("speaker", sampling=pb.Sampling(seed=7, top_k=3)), chunk(1, text("ab"), generate=5)
    )
    conversation.opened()
    conversation.send(pb.Event(checkpoint=pb.CheckpointNow()))
    for _ in range(6):
        conversation.output(1)
    token = conversation.read().checkpoint.resume_token
    wishes = [
        (pb.Sampling(seed=8), False),
        (pb.Sampling(temperature=0.5), False),
        (pb.Sampling(top_k=2), False),
        (pb.Sampling(seed=7, temperature=1.0, top_k=3), True),
        (pb.Sampling(top_k=3), True),
        (None, True),
    ]
    for number, (wish, accepted) in enumerate(wishes, 1):
        conversation.send(opening("speaker", number, sampling=wish, resume_token=token))
        if not accepted:
            assert "keeps its sampling" in conversation.failed("WRONG_SETTING").message
            continue
        replies = {reply.WhichOneof("reply"): reply for reply in (conversation.read(), conversation.read())}
        assert replies["opened"].opened.sampling == pb.Sampling(seed=7, temperature=1.0, top_k=3)
        assert replies["closed"].closed.reason == pb.SUPERSEDED
    conversation.send(chunk(2, generate=4, sequence=len(wishes)), ending(len(wishes)))
    assert not conversation.output(2).outputs
    got = [int(array(conversation.output(2).outputs[0])[0]) for _ in range(4)]
    assert got == spoken([("ab", 5), ("", 4)], seed=7, top_k=3)[5:]
    assert conversation.closed().reason == pb.END


# Text.


def test_a_text_in_pieces_is_the_text(client: Client) -> None:
    """Characters at the piece, bytes at the wire: words and characters that are cut in two come out whole."""
    chance = random.Random(3)
    words = Words(1000)
    expected = np.cumsum(words.ids(STORY)).tolist()
    for _ in range(10):
        places = sorted(chance.sample(range(len(STORY)), 12))
        pieces = [STORY[a:b] for a, b in zip([0, *places], [*places, len(STORY)], strict=True)]
        with client.stream("reader") as stream:
            assert sums(list(stream.run(pieces))) == expected
    with client.stream("reader") as stream:
        outputs = list(stream.run([STORY]))
        assert sums(outputs) == expected
        assert [(o.step, o.part, o.last) for o in outputs] == [(1, 0, True), (1, 1, True)]


def test_a_character_may_be_cut_in_two(conversation: Conversation) -> None:
    data = "a😀€b".encode()
    conversation.send(opening("speaker"))
    conversation.opened()
    got = []
    for step in range(1, len(data) + 1):
        conversation.send(chunk(step, text(data[step - 1 : step])))
        got.append(conversation.output(step).outputs)
    conversation.send(ending())
    assert conversation.closed().reason == pb.END
    values = [array(tensors[1]).tolist() for tensors in got if tensors]
    assert values == [[2], [9], [15], [18]]


def test_a_text_counts_as_what_it_may_become(server: Server, conversation: Conversation) -> None:
    """Eight bytes an id: what waits is bounded by what it takes, not by what was sent."""
    with Gate(engine_of(server, "speaker")) as gate:
        conversation.send(opening("speaker"), chunk(1, text("a" * 1000)), ending())
        gate.wait_for_arrival()
        wait_for(lambda: server.metrics.pending_bytes() >= 9_000, "the text to be counted")
    conversation.opened()
    assert conversation.output(1).outputs[1].shape == [1000]
    assert conversation.closed().reason == pb.END


# The same words.


def test_python_hears_what_can_be_worked_out(client: Client) -> None:
    with client.stream("speaker", sampling=Sampling(seed=5, temperature=0.6)) as stream:
        assert stream.sampling == Sampling(5, 0.6, None)
        outputs = list(stream.generate(PROMPT, 30))
        outputs += stream.generate(None, 10)
        stream.end()
        assert list(stream) == []
    assert said(outputs) == spoken([(PROMPT, 30), ("", 10)], seed=5, temperature=0.6)
    assert [o.part for o in outputs] == [*range(31), *range(11)]


def test_a_crowd_hears_what_each_would_hear_alone(server: Server) -> None:
    """Those who generate, those who send a text in pieces, and other models, on one server at once."""

    async def speaks(client: aio.Client, seed: int) -> None:
        steps = [(PROMPT, 20 + seed), ("", 1 + seed % 5), ("ab" * (seed % 9), 17)]
        async with client.stream("speaker", sampling=Sampling(seed=seed)) as stream:
            outputs = []
            for words, count in steps:
                outputs += [output async for output in stream.generate(words or None, count)]
        assert said(outputs) == spoken(steps, seed=seed)

    async def listens(client: aio.Client, seed: int) -> None:
        chance = random.Random(seed)
        pieces = ["".join(chance.choices(toys.ALPHABET, k=chance.randint(0, 30))) for _ in range(20)]
        async with client.stream("speaker") as stream:
            outputs = [output async for output in stream.run(pieces)]
        assert sums(outputs) == np.cumsum([toys.ALPHABET.index(c) for c in "".join(pieces)]).tolist()

    async def crowd() -> None:
        async with aio.Client(f"127.0.0.1:{server.port}") as client:
            await asyncio.gather(*(what(client, seed) for seed in range(24) for what in (speaks, listens)))

    counting = Counting(server)
    asyncio.run(crowd())
    parts = sum(20 + seed + 1 + seed % 5 + 17 for seed in range(24))
    assert counting.rise("tenuto_generated_parts_total", model="speaker") == parts
    assert counting.rise("tenuto_chunks_total", model="speaker", outcome="answered") == 24 * (3 + 20)


def test_chords_are_the_same_again(client: Client) -> None:
    tunes = []
    for _ in range(2):
        with client.stream("player", sampling=Sampling(seed=3)) as stream:
            parts = list(stream.generate(np.zeros((1, 6), np.float32), 40))[1:]
        assert {part["keys"].shape for part in parts} == {(1, 6)}
        tunes.append(np.concatenate([part["keys"] for part in parts]))
    assert tunes[0].tolist() == tunes[1].tolist()
    assert 0.2 < tunes[0].mean() < 0.8


def test_the_command_prints_the_same_words_for_the_same_seed(server: Server, capsys: Any) -> None:
    words = ["generate", "speaker", "--server", f"127.0.0.1:{server.port}", "--prompt", PROMPT]
    assert main([*words, "--count", "1500", "--seed", "5", "--top-k", "4"]) == 0
    ids = spoken([(PROMPT, 1024), ("", 476)], seed=5, top_k=4)
    assert capsys.readouterr().out == PROMPT + "".join(toys.ALPHABET[i] for i in ids) + "\n"
    assert main([*words, "--count", "40"]) == 0
    first = capsys.readouterr()
    assert main([*words, "--count", "40", "--seed", first.err.split()[-1]]) == 0
    assert capsys.readouterr().out == first.out


# A caller who does not read, or leaves.


def test_a_slow_reader_is_waited_for_and_holds_nobody_up(toy_repository: Path, transport: str) -> None:
    """Much more than may wait for him; and a neighbour generates all the while."""
    many = 200_000
    # Else gRPC's client takes megabytes that nobody reads.
    small = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536))
    with (
        serving(toy_repository, transport=transport, max_generate=many) as server,
        connect(server.port, *small) as channel,
        Client(f"127.0.0.1:{server.port}") as client,
    ):
        population = engine_of(server, "speaker")._population
        with Conversation(channel) as slow:
            slow.send(opening("speaker", sampling=pb.Sampling(seed=1)), chunk(1, text("a"), generate=many))
            wait_for(lambda: bool(population._paused), "the slow reader to be waited for")
            with client.stream("speaker", sampling=Sampling(seed=2)) as stream:
                assert said(list(stream.generate("a", 200))) == spoken([("a", 200)], seed=2)
            assert engine_of(server, "speaker").metrics.generated_parts < many // 2
            slow.opened()
            read = [slow.output(1) for _ in range(2_000)]
            assert [int(array(o.outputs[0])[0]) for o in read[1:]] == spoken([("a", 1_999)], seed=1)
        assert_nothing_is_left(server)


def test_who_leaves_in_the_middle_leaves_nothing(server: Server, client: Client) -> None:
    counting = Counting(server)
    with client.stream("speaker") as stream:
        stream.send("a", generate=4096)
        next(stream)
    counting.wait_for_rise(1, "tenuto_sequences_ended_total", model="speaker", reason="CANCELLED")


# Elsewhere.


@pytest.fixture
def pair(toy_repository: Path, tmp_path: Path, transport: str) -> Iterator[list[Server]]:
    """Two servers of one fleet."""
    keys = tmp_path / "keys"
    keys.write_text("5a" * 32)
    settings = {"transport": transport, "token_key_file": keys, "checkpoint_every": 2}
    with ExitStack() as stack:
        yield [stack.enter_context(serving(toy_repository, **settings)) for _ in range(2)]


@contextmanager
def generating(servers: list[Server]) -> Iterator[tuple[Stream, Throttle]]:
    """A stream on the first of them, which runs as often as it is allowed to."""
    throttle = Throttle(engine_of(servers[0], "speaker"))
    target = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tenuto.servers.first_turn", lambda count: 0)
        with Client(target) as client, client.stream("speaker") as stream:
            yield stream, throttle
    throttle.allow(10_000)


def drain(server: Server, throttle: Throttle) -> None:
    """Orderly: it says good-bye between two parts."""
    population = engine_of(server, "speaker")._population
    stopping = threading.Thread(target=server.stop, args=(30.0,))
    stopping.start()

    def is_draining() -> bool:
        throttle.allow(1)  # commands are taken between two runs
        return population._draining

    wait_for(is_draining, "the drain")
    throttle.allow(10)
    stopping.join(30)


def cut_off(server: Server, throttle: Throttle) -> None:
    """At once, without any good-bye."""
    throttle.allow(1)
    server.stop(0.0)


@pytest.mark.parametrize("end", [drain, cut_off])
def test_it_goes_on_on_another_server_in_the_middle_of_a_chunk(
    pair: list[Server], end: Callable[[Server, Throttle], None]
) -> None:
    """No part is lost, none comes twice, and every word is what it would have been."""
    steps = [("abc", 5), ("", 12), ("b", 300)]
    with generating(pair) as (stream, throttle):
        for words, count in steps:
            stream.send(words or None, generate=count)
        throttle.allow(60)
        outputs = [next(stream) for _ in range(50)]
        end(pair[0], throttle)
        stream.end()
        outputs += stream
        assert stream.resumes == 1
        seed = stream.sampling.seed if stream.sampling else None
    assert seed is not None
    places = [(o.step, o.part, o.last) for o in outputs]
    assert places == [
        (step, part, part == count) for step, (_, count) in enumerate(steps, 1) for part in range(count + 1)
    ]
    assert said(outputs) == spoken(steps, seed=seed)
    assert_nothing_is_left(pair[1])


def test_a_drain_does_not_wait_for_all_parts(pair: list[Server]) -> None:
    """The first server runs some dozen of them, and not the four thousand."""
    with generating(pair) as (stream, throttle):
        stream.send("a", generate=4000)
        throttle.allow(20)
        for _ in range(10):
            next(stream)
        drain(pair[0], throttle)
        assert engine_of(pair[0], "speaker").metrics.ended == {"DRAINING": 1}
        assert engine_of(pair[0], "speaker").metrics.generated_parts < 100
        outputs = [next(stream) for _ in range(3991)]
    assert outputs[-1].last
    assert (
        engine_of(pair[1], "speaker").metrics.generated_parts < 4000
    )  # those that were said are not said again


def test_the_seed_survives_a_server_that_dies_before_any_token(toy_repository: Path) -> None:
    """Then the sequence begins anew elsewhere: with the seed that its caller was told."""
    with ExitStack() as stack:
        pair = [stack.enter_context(serving(toy_repository)) for _ in range(2)]
        engine_of(pair[0], "speaker")._population._checkpoints = None  # no last token either
        with generating(pair) as (stream, throttle):
            stream.send("abc", generate=60)
            throttle.allow(20)
            outputs = [next(stream) for _ in range(15)]
            sampling = stream.sampling
            cut_off(pair[0], throttle)
            outputs += [next(stream) for _ in range(46)]
            assert (stream.resumes, stream.sampling) == (1, sampling)
    assert sampling is not None
    assert sampling.seed is not None
    assert said(outputs) == spoken([("abc", 60)], seed=sampling.seed)


def test_a_newer_version_goes_on_in_the_middle_of_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sequence is sent away from the old one between two parts, not behind the last of four thousand."""
    monkeypatch.setattr(loader, "vet", unvetted)
    toys.write(tmp_path, "speaker", toys.speaker())
    with (
        serving(tmp_path, max_age_seconds=0.3) as server,
        Client(f"127.0.0.1:{server.port}") as client,
        client.stream("speaker", sampling=Sampling(seed=11)) as stream,
    ):
        old = engine_of(server, "speaker")
        throttle = Throttle(old)
        stream.send("abc", generate=4000)
        throttle.allow(20)
        outputs = [next(stream) for _ in range(15)]
        fingerprint = server.catalogue.find("speaker").fingerprint
        toys.write(tmp_path, "speaker", toys.speaker(resumes_from=[fingerprint]), 2)
        for _ in range(2):
            server.rollout.poll()

        def is_sent_away() -> bool:
            throttle.allow(1)
            return bool(old.metrics.ended)

        wait_for(is_sent_away, "max age to be over")
        outputs += [next(stream) for _ in range(4001 - 15)]
        assert (stream.version, stream.resumes) == (2, 1)
        assert old.metrics.ended == {"MAX_AGE": 1}
        assert engine_of(server, "speaker").metrics.generated_parts + old.metrics.generated_parts == 4000
    assert [o.part for o in outputs] == [*range(4001)]
    assert said(outputs) == spoken([("abc", 4000)], seed=11)
