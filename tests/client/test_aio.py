"""The asyncio client: the same promises, awaited."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto import (
    InvalidInput,
    NotFound,
    OutputsUnread,
    Overloaded,
    ProtocolError,
    Refused,
    ReplyTimeout,
    SequenceEnded,
    SequenceFailed,
    Unavailable,
)
from tenuto.aio import Client, Stream
from tenuto.v1 import tenuto_pb2 as pb
from tests.client.fake_server import FakeServer

ONE = np.array([1], np.float32)
BIG = np.ones(500_000, np.float32)  # more than gRPC takes in for one that does not read


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a loop of its own, in debug mode."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs), debug=True)

    return run


async def raised(awaitable: Awaitable[Any]) -> Exception:
    try:
        await awaitable
    except Exception as error:  # noqa: BLE001 - it is what the caller looks at
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@in_loop
async def test_unary_calls(server: FakeServer) -> None:
    async with Client(server.target) as client:
        prediction = await client.predict("brightness", np.zeros((2, 2, 2), np.uint8))
        assert prediction["log_probabilities"].shape == (2, 2)
        assert next(model.name for model in await client.models()) == "accumulator"
        assert (await client.model("accumulator")).manifest["name"] == "accumulator"
        error = await raised(client.model("none"))
        assert isinstance(error, NotFound)
        assert error.reason == "UNKNOWN_MODEL"


@in_loop
async def test_a_call_has_a_deadline(server: FakeServer) -> None:
    server.hang = True
    async with Client(server.target, timeout_seconds=0.05) as client:
        assert isinstance(await raised(client.models()), ReplyTimeout)
        assert isinstance(await raised(client.stream("accumulator").__aenter__()), ReplyTimeout)


@in_loop
async def test_outputs_come_in_the_order_of_steps_and_stop_after_end(server: FakeServer) -> None:
    server.tail = True
    async with Client(server.target) as client, client.stream("accumulator") as stream:
        assert (stream.window, stream.sequence_id, stream.version) == (4, "s-1", 3)
        assert [await stream.send(ONE) for _ in range(50)] == list(range(1, 51))
        await stream.end()
        await stream.end()
        outputs = [output async for output in stream]
    assert [output.step for output in outputs] == [*range(1, 51), 50]
    assert [output["total"][-1] for output in outputs[:-1]] == list(range(1, 51))
    assert server.unanswered_max <= 4
    await asyncio.to_thread(server.left.wait, 10)
    assert not server.cancelled


@in_loop
async def test_end_half_closes(server: FakeServer) -> None:
    async with Client(server.target) as client, client.stream("accumulator") as stream:
        await stream.end()
        assert await asyncio.to_thread(server.half_closed.wait, 10)


@in_loop
async def test_a_call_that_cannot_be_made_is_an_error(server: FakeServer) -> None:
    async with Client(server.target, credentials="none") as client:  # type: ignore[arg-type]
        error = await raised(client.stream("accumulator").__aenter__())
    assert isinstance(error, ProtocolError)
    assert "the stream stopped working" in str(error)


@in_loop
async def test_a_send_that_is_cancelled_while_it_writes_ends_the_sequence(server: FakeServer) -> None:
    """Else nobody could say whether its chunk is part of it."""
    server.reads = 0
    async with Client(server.target) as client, client.stream("accumulator") as stream:
        sending = asyncio.create_task(stream.send(BIG))
        while not stream._conversation._began:
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])
        assert sending.cancelled()
        error = await raised(stream.send(ONE))
    assert isinstance(error, Unavailable)
    assert "its caller has left" in str(error)


@pytest.mark.parametrize("resume_seconds", [0, 0.05])
@in_loop
async def test_a_server_that_reads_nothing_is_a_reply_timeout(
    server: FakeServer, resume_seconds: float
) -> None:
    server.reads = 0
    async with (
        Client(server.target, reply_seconds=0.05, resume_seconds=resume_seconds, poison_losses=99) as client,
        client.stream("accumulator") as stream,
    ):
        sent: list[int] = []
        with pytest.raises(ReplyTimeout, match="no answer to step 1 within"):
            while True:
                sent.append(await stream.send(BIG))
        assert len(sent) <= 4  # the window; what was not taken in is no step
        assert isinstance(await raised(anext(stream)), ReplyTimeout)


@in_loop
async def test_an_end_to_a_server_that_reads_nothing_is_a_reply_timeout(server: FakeServer) -> None:
    server.reads = 0
    async with (
        Client(server.target, reply_seconds=0.05, resume_seconds=0) as client,
        client.stream("accumulator") as stream,
    ):
        for _ in range(4):
            await stream.send(BIG)
        await stream.end()
        assert isinstance(await raised(anext(stream)), ReplyTimeout)


@in_loop
async def test_a_server_that_reads_nothing_while_outputs_wait_unread_does_not_hang_a_send(
    server: FakeServer,
) -> None:
    server.reads = 1
    server.gate = threading.Semaphore(0)

    async def send_all(stream: Stream) -> None:
        while True:
            await stream.send(BIG)

    async with Client(server.target, buffer_bytes=1000) as client, client.stream("accumulator") as stream:
        sending = asyncio.create_task(raised(send_all(stream)))
        while len(stream._conversation._began) < 3:
            await asyncio.sleep(0)
        server.gate.release()  # the output of the first chunk
        assert isinstance(await sending, OutputsUnread)
        assert (await anext(stream)).step == 1


@in_loop
async def test_a_bug_while_writing_is_told(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def outgoing(now: float) -> None:
        raise KeyError("bug")

    async with Client(server.target) as client, client.stream("accumulator") as stream:
        monkeypatch.setattr(stream._conversation, "outgoing", outgoing)
        await stream.send(ONE)
        error = await raised(anext(stream))
    assert isinstance(error, ProtocolError)
    assert "the stream stopped working: KeyError('bug')" in str(error)


@in_loop
async def test_leaving_without_end_cancels(server: FakeServer) -> None:
    async with Client(server.target) as client, client.stream("accumulator") as stream:
        await stream.send(ONE)
        await anext(stream)
    await asyncio.to_thread(server.left.wait, 10)
    assert server.cancelled


@in_loop
async def test_what_is_owed_and_late_is_a_reply_timeout(server: FakeServer) -> None:
    server.window = 1
    server.on_step = {1: None}
    async with (
        Client(server.target, reply_seconds=0.05, resume_seconds=0) as client,
        client.stream("accumulator") as stream,
    ):
        await stream.send(ONE)
        assert isinstance(await raised(anext(stream)), ReplyTimeout)
        assert isinstance(await raised(stream.send(ONE)), ReplyTimeout)


@in_loop
async def test_one_task_may_send_while_another_iterates(server: FakeServer) -> None:
    async with Client(server.target) as client, client.stream("accumulator") as stream:
        first = asyncio.create_task(anext(stream))
        await asyncio.gather(*(stream.send(ONE) for _ in range(10)))
        assert (await first).step == 1
        assert (await anext(stream))["total"].tolist() == [2]


@in_loop
async def test_run_yields_while_its_source_pauses(server: FakeServer) -> None:
    seen = asyncio.Event()

    async def source() -> AsyncIterator[np.ndarray[Any, Any]]:
        yield ONE
        await seen.wait()  # only the first output sets it
        yield ONE

    async with Client(server.target) as client, client.stream("accumulator") as stream:
        totals = []
        async for output in stream.run(source()):
            totals.append(float(output["total"][-1]))
            seen.set()
    assert totals == [1, 2]


@in_loop
async def test_an_exception_of_the_source_is_raised_by_run(server: FakeServer) -> None:
    def source() -> Iterator[np.ndarray[Any, Any]]:
        yield ONE
        raise KeyError("microphone")

    async with Client(server.target) as client, client.stream("accumulator") as stream:
        with pytest.raises(KeyError, match="microphone"):
            async for _ in stream.run(source()):
                pass
    await asyncio.to_thread(server.left.wait, 10)
    assert server.cancelled


@in_loop
async def test_run_waits_for_a_slow_reader(server: FakeServer) -> None:
    """What `send` refuses, `run` waits for: it sends and reads itself."""
    async with (
        Client(server.target, buffer_bytes=1500) as client,
        client.stream("accumulator") as stream,
    ):
        totals = []
        async for output in stream.run([ONE] * 40):
            assert stream._conversation._unread_bytes < 1500 + 5 * 600
            await asyncio.sleep(0)
            totals.append(float(output["total"][-1]))
    assert totals == list(range(1, 41))


@in_loop
async def test_a_closed_client_is_unavailable(server: FakeServer) -> None:
    server.hang = True
    client = Client(server.target)
    call = asyncio.create_task(raised(client.models()))
    await asyncio.to_thread(server.called.wait, 10)
    await client.close()
    assert isinstance(await call, Unavailable)
    assert isinstance(await raised(client.models()), Unavailable)
    assert isinstance(await raised(client.stream("accumulator").__aenter__()), Unavailable)


@in_loop
async def test_leaving_run_early_leaves_no_task(server: FakeServer) -> None:
    async def microphone() -> AsyncIterator[np.ndarray[Any, Any]]:
        while True:
            yield ONE

    async with Client(server.target) as client, client.stream("accumulator") as stream:
        async for output in stream.run(microphone()):
            if output.step == 3:
                break
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("tenuto")]


@in_loop
async def test_a_refused_open_is_raised_on_entering(server: FakeServer) -> None:
    failed = pb.Failed(code=8, reason="POOL_FULL", message="full", retry_after_ms=250)
    server.on_open = pb.Reply(failed=failed)
    async with Client(server.target) as client:
        error = await raised(client.stream("accumulator").__aenter__())
    assert isinstance(error, Overloaded)
    assert error.retry_after_seconds == 0.25


@in_loop
async def test_a_status_maps_to_the_tree(server: FakeServer) -> None:
    metadata = (("tenuto-reason", "DRAINING"), ("tenuto-retry-after-ms", "500"))
    server.abort = (grpc.StatusCode.UNAVAILABLE, "leaving", metadata)
    async with Client(server.target) as client:
        for call in (client.models(), client.stream("accumulator").__aenter__()):
            error = await raised(call)
            assert isinstance(error, Unavailable)
            assert str(error) == "DRAINING: leaving"
            assert error.retry_after_seconds == 0.5


@in_loop
async def test_a_sequence_that_fails_is_raised_after_what_came_before(server: FakeServer) -> None:
    failed = pb.Failed(code=13, reason="STATE_NOT_FINITE", message="NaN")
    server.on_step = {2: pb.Reply(failed=failed)}
    async with Client(server.target) as client, client.stream("accumulator") as stream:
        await stream.send(ONE)
        await stream.send(ONE)
        assert (await anext(stream)).step == 1
        assert isinstance(await raised(anext(stream)), SequenceFailed)
        assert isinstance(await raised(stream.send(ONE)), SequenceFailed)


@in_loop
async def test_an_ending_that_nobody_asked_for_is_raised(server: FakeServer) -> None:
    server.on_step = {1: pb.Reply(closed=pb.Closed(reason=pb.EVICTED))}
    async with Client(server.target) as client, client.stream("accumulator") as stream:
        error = await raised(_all(stream.run([ONE])))
    assert isinstance(error, SequenceEnded)
    assert error.reason == "EVICTED"


@in_loop
async def test_the_end_of_the_stream_is_not_the_end_of_the_sequence(server: FakeServer) -> None:
    server.hang_up = 1
    async with Client(server.target, resume_seconds=0) as client, client.stream("accumulator") as stream:
        await stream.send(ONE)
        assert isinstance(await raised(anext(stream)), Unavailable)
        assert isinstance(await raised(stream.send(ONE)), Unavailable)


@in_loop
async def test_a_server_that_dies_is_unavailable(server: FakeServer) -> None:
    server.gate = threading.Semaphore(0)
    async with Client(server.target, resume_seconds=0) as client, client.stream("accumulator") as stream:
        await stream.send(ONE)
        stop = asyncio.create_task(asyncio.to_thread(server.stop))
        assert isinstance(await raised(anext(stream)), Unavailable)
    server.gate.release()
    await stop


@in_loop
async def test_a_reply_that_makes_no_sense_is_a_protocol_error(server: FakeServer) -> None:
    server.on_step = {1: pb.Reply()}
    async with Client(server.target) as client, client.stream("accumulator") as stream:
        await stream.send(ONE)
        assert isinstance(await raised(anext(stream)), ProtocolError)


@in_loop
async def test_unread_outputs_are_bounded(server: FakeServer) -> None:
    server.window = 1
    async with (
        Client(server.target, buffer_bytes=3000) as client,
        client.stream("accumulator") as stream,
    ):
        with pytest.raises(OutputsUnread):
            for _ in range(100):
                await stream.send(ONE)
        await anext(stream)
        await stream.send(ONE)


@in_loop
async def test_nothing_is_sent_after_end_or_before_entering(server: FakeServer) -> None:
    async with Client(server.target) as client:
        stream = client.stream("accumulator")
        assert isinstance(await raised(stream.send(ONE)), Refused)
        async with stream:
            await stream.end()
            assert isinstance(await raised(stream.send(ONE)), Refused)
        assert isinstance(await raised(stream.__aenter__()), InvalidInput)


async def _all(outputs: AsyncIterator[Any]) -> list[Any]:
    return [output async for output in outputs]
