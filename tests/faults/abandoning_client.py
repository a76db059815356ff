"""PORT STREAMS: opens so many streams, prints "open", and waits to be killed. Run by test_abandoned.py."""

import asyncio
import sys
from typing import Any

import grpc.aio

from tenuto.v1 import tenuto_pb2 as pb
from tests.integration.wire import STREAM, chunk, opening

CHANNELS = 10


async def abandon(port: int, streams: int) -> None:
    first = pb.StreamRequest(events=[opening("accumulator"), chunk(1, [1.0])]).SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in range(CHANNELS)]
    methods: list[Any] = [channel.stream_stream(STREAM) for channel in channels]
    calls = [methods[n % CHANNELS]() for n in range(streams)]
    await asyncio.gather(*(call.write(first) for call in calls))
    await asyncio.gather(*(call.read() for call in calls))
    print("open", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(abandon(int(sys.argv[1]), int(sys.argv[2])))
