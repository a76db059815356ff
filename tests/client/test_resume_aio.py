"""A lost stream goes on by itself, over the asyncio client: the same promises, awaited."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto import NotFound, OutputsUnread, Overloaded, PoisonedChunk, Refused, ReplyTimeout, Unavailable
from tenuto.aio import Client, Stream
from tenuto.v1 import tenuto_pb2 as pb
from tests.client.fake_server import FakeServer, closed, token
from tests.client.test_aio import BIG, in_loop, raised

ONE = np.array([1], np.float32)
DEATH = grpc.StatusCode.UNAVAILABLE
FULL = pb.Failed(code=8, reason="POOL_FULL", message="full", retry_after_ms=1)


@pytest.fixture
def first() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def second() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


def client_of(*servers: FakeServer, **settings: Any) -> Client:
    return Client(",".join(server.target for server in servers), **settings)


async def totals(stream: Stream, chunks: int) -> list[float]:
    """Send that many ones and end; each output's total is the number of the chunk if all is well."""
    outputs = [output async for output in stream.run([ONE] * chunks)]
    assert [output.step for output in outputs] == list(range(1, chunks + 1))
    return [float(output["total"][-1]) for output in outputs]


@pytest.mark.parametrize("checkpoint_every", [0, 3])
@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "CANCELLED"])
@in_loop
async def test_a_lost_stream_goes_on_at_the_next_server(
    first: FakeServer, second: FakeServer, code: str, checkpoint_every: int
) -> None:
    first.checkpoint_every = checkpoint_every
    first.accidents = {8: [grpc.StatusCode[code]]}
    async with client_of(first, second) as client, client.stream("accumulator") as stream:
        assert await totals(stream, 20) == list(range(1, 21))
    assert (stream.resumes, client.resumes) == (1, 1)
    assert second.opens[0].resume_token == (token(6, 6) if checkpoint_every else b"")


@in_loop
async def test_a_server_that_is_gone_is_survived(first: FakeServer, second: FakeServer) -> None:
    first.gate = threading.Semaphore(1)
    async with client_of(first, second) as client, client.stream("accumulator") as stream:
        await stream.send(ONE)
        assert (await anext(stream)).step == 1
        await stream.send(ONE)
        stop = asyncio.create_task(asyncio.to_thread(first.stop))
        assert (await anext(stream))["total"].tolist() == [2]
        first.gate.release()
        await stop


@in_loop
async def test_a_drained_sequence_goes_on_elsewhere(first: FakeServer, second: FakeServer) -> None:
    first.accidents = {5: [closed("DRAINING", 4, 4)]}
    async with client_of(first, second) as client, client.stream("accumulator") as stream:
        assert await totals(stream, 10) == list(range(1, 11))
    assert second.opens[0].resume_token == token(4, 4)
    assert len(second.inputs) == 6


@in_loop
async def test_a_caller_that_pauses_is_opened_again_by_its_next_send(
    first: FakeServer, second: FakeServer
) -> None:
    second.tail = True
    async with client_of(first, second) as client, client.stream("accumulator") as stream:
        await stream.send(ONE)
        await anext(stream)
        await asyncio.to_thread(first.stop)
        while stream._conversation.on_call:
            await stream._changed.wait()
        assert second.opens == []
        assert await stream.send(ONE) == 2
        assert (await anext(stream))["total"].tolist() == [2]
        await stream.end()
        assert [(output.step, output.part) async for output in stream] == [(2, 1)]


@in_loop
async def test_a_full_replay_waits_for_a_token(first: FakeServer) -> None:
    big = np.zeros(1000, np.float32)
    async with (
        client_of(first, replay_bytes=10_000) as client,
        client.stream("accumulator") as stream,
    ):
        for _ in range(20):
            await stream.send(big)
            assert stream._conversation._replay.nbytes < 15_000
        assert first.tokens_asked >= 6
        await stream.end()
        assert len([output async for output in stream]) == 20


@in_loop
async def test_chunks_larger_than_gRPCs_windows_are_replayed(first: FakeServer, second: FakeServer) -> None:
    """Reading goes on while they are written."""
    big = np.ones(300_000, np.float32)
    first.accidents = {12: [DEATH]}
    async with client_of(first, second) as client, client.stream("accumulator") as stream:
        outputs = [output async for output in stream.run([big] * 13)]
    assert [float(output["total"][-1]) for output in outputs] == [300_000 * step for step in range(1, 14)]


@in_loop
async def test_a_refused_resume_is_tried_again(first: FakeServer, second: FakeServer) -> None:
    first.accidents = {2: [DEATH]}
    second.refusals = [FULL, pb.Failed(code=14, reason="DRAINING", message="leaving")]
    async with client_of(first, second) as client, client.stream("accumulator") as stream:
        first.refusals = [grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert await totals(stream, 3) == [1, 2, 3]
    assert (len(first.opens), len(second.opens)) == (3, 2)


@in_loop
async def test_after_resume_seconds_the_last_error_is_raised(first: FakeServer) -> None:
    first.accidents = {2: [DEATH]}
    async with (
        client_of(first, resume_seconds=0.1) as client,
        client.stream("accumulator") as stream,
    ):
        first.refusals = [FULL] * 99
        error = await raised(totals(stream, 3))
    assert isinstance(error, Overloaded)
    assert str(error) == "POOL_FULL: step 2 could not be resumed within 0.1 s: full"


@in_loop
async def test_where_resuming_is_impossible_the_error_says_why(first: FakeServer) -> None:
    first.accidents = {2: [DEATH]}
    async with client_of(first) as client, client.stream("accumulator") as stream:
        first.refusals = [pb.Failed(code=9, reason="TOKEN_INVALID", message="expired")]
        error = await raised(totals(stream, 3))
    assert isinstance(error, Refused)
    assert str(error) == "TOKEN_INVALID: step 2 could not be resumed: expired"


@in_loop
async def test_a_poisoned_chunk_does_not_walk_through_the_servers(
    first: FakeServer, second: FakeServer
) -> None:
    with FakeServer() as third:
        for server in (first, second, third):
            server.accidents = {3: [DEATH] * 9}
        async with client_of(first, second, third) as client, client.stream("accumulator") as stream:
            error = await raised(totals(stream, 5))
        assert isinstance(error, PoisonedChunk)
        assert error.step == 3
        opens = [len(server.opens) for server in (first, second, third)]
        assert (opens[0], sorted(opens)) == (1, [0, 1, 1])


@in_loop
async def test_a_frozen_server_is_left_for_the_next(first: FakeServer, second: FakeServer) -> None:
    first.on_step = {2: None}
    async with (
        client_of(first, second, reply_seconds=0.05) as client,
        client.stream("accumulator") as stream,
    ):
        await stream.send(ONE)
        await stream.send(ONE)
        assert [(await anext(stream)).step for _ in range(2)] == [1, 2]
    assert len(second.opens) == 1


@in_loop
async def test_a_server_that_does_not_read_on_is_left_for_the_next(
    first: FakeServer, second: FakeServer
) -> None:
    """Although the caller only sends, and so waits until it is written."""
    first.reads = 1
    async with (
        client_of(first, second, reply_seconds=0.3, poison_losses=99) as client,
        client.stream("accumulator") as stream,
    ):
        for _ in range(6):
            await stream.send(BIG)
        await stream.end()
        outputs = [output async for output in stream]
    assert [float(output["total"][-1]) for output in outputs] == [BIG.size * step for step in range(1, 7)]
    assert second.opens


@in_loop
async def test_an_output_that_no_server_gives_is_a_reply_timeout(first: FakeServer) -> None:
    first.on_step = {1: None}
    async with (
        client_of(first, reply_seconds=0.05, resume_seconds=0.05, poison_losses=99) as client,
        client.stream("accumulator") as stream,
    ):
        await stream.send(ONE)
        assert isinstance(await raised(anext(stream)), ReplyTimeout)


@in_loop
async def test_leaving_during_a_resume_is_prompt(first: FakeServer) -> None:
    first.accidents = {2: [DEATH]}
    async with client_of(first) as client:
        async with client.stream("accumulator") as stream:
            first.refusals = [FULL] * 99
            await stream.send(ONE)
            await anext(stream)
            await stream.send(ONE)
            while len(first.opens) < 3:  # at least one resume was refused
                await stream._changed.wait()
        assert len(first.opens) < 20
        error = await raised(stream.send(ONE))
        assert isinstance(error, Unavailable)
        assert "its caller has left the sequence" in str(error)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("tenuto")]


@in_loop
async def test_leaving_while_a_resume_hangs_is_prompt(first: FakeServer) -> None:
    first.accidents = {2: [DEATH]}
    async with client_of(first, timeout_seconds=1000) as client, client.stream("accumulator") as stream:
        first.called.clear()
        first.hang = True
        await stream.send(ONE)
        await anext(stream)
        await stream.send(ONE)
        assert await asyncio.to_thread(first.called.wait, 10)


@in_loop
async def test_a_closed_client_resumes_nothing(first: FakeServer) -> None:
    first.gate = threading.Semaphore(0)
    client = client_of(first)
    async with client.stream("accumulator") as stream:
        await stream.send(ONE)
        await client.close()
        error = await raised(anext(stream))
    assert isinstance(error, Unavailable)
    assert error.reason == "CLIENT_CLOSED"


@in_loop
async def test_a_live_source_goes_on_through_losses(first: FakeServer, second: FakeServer) -> None:
    for server, began in ((first, 7), (second, 13)):
        server.checkpoint_every = 5
        server.accidents = {step: [DEATH] for step in range(began, 200, 12)}

    async def source() -> AsyncIterator[np.ndarray[Any, Any]]:
        for _ in range(200):
            yield ONE

    async with client_of(first, second) as client, client.stream("accumulator") as stream:
        values = [float(output["total"][-1]) async for output in stream.run(source())]
        assert stream.resumes >= 15
    assert values == list(range(1, 201))


@in_loop
async def test_what_waits_unread_stays_bounded_through_a_loss(first: FakeServer) -> None:
    first.accidents = {3: [DEATH]}
    async with (
        client_of(first, buffer_bytes=1500) as client,
        client.stream("accumulator") as stream,
    ):
        sent: list[int] = []
        with pytest.raises(OutputsUnread):
            while True:
                sent.append(await stream.send(ONE))
        await stream.end()
        assert [output.step async for output in stream] == sent


@in_loop
async def test_a_send_that_is_cancelled_while_it_waits_ends_nothing(first: FakeServer) -> None:
    first.gate = threading.Semaphore(0)
    first.window = 1
    async with client_of(first) as client, client.stream("accumulator") as stream:
        await stream.send(ONE)
        waiting = asyncio.create_task(stream.send(ONE))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        first.gate.release(2)
        assert await stream.send(ONE) == 2
        await stream.end()
        assert [output.step async for output in stream] == [1, 2]


# -- which server ----------------------------------------------------------------------------------


@in_loop
async def test_streams_and_calls_find_the_server_that_answers(first: FakeServer, second: FakeServer) -> None:
    first.refusals = [FULL]
    second.sequences = [pb.Sequence(sequence_id="b", label="kitchen")]
    async with client_of(first, second) as client:
        async with client.stream("accumulator") as stream:
            assert await totals(stream, 2) == [1, 2]
        assert (len(first.opens), len(second.opens), client.resumes) == (1, 1, 0)
        assert [one.label for one in await client.sequences()] == ["kitchen"]
        await client.end_sequence("b")
        assert isinstance(await raised(client.end_sequence("b")), NotFound)
        await asyncio.to_thread(first.stop)
        for _ in range(3):
            assert await client.models()
        await asyncio.to_thread(second.stop)
        assert isinstance(await raised(client.models()), Unavailable)
