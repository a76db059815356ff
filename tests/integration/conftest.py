"""Two servers for all tests of this folder, one a transport, with every toy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from tenuto.serving.server import Server

from .running import ALL_TRANSPORTS, TRANSPORTS, assert_nothing_is_left, serving, write_toys
from .wire import Conversation, connect, stub


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def servers(toy_repository: Path) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        yield {
            transport: stack.enter_context(serving(toy_repository, vetted=True, transport=transport))
            for transport in {*ALL_TRANSPORTS, *TRANSPORTS}
        }


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(servers: dict[str, Server], transport: str) -> Iterator[Server]:
    """The shared server; after every test nothing may be left in it."""
    yield servers[transport]
    assert_nothing_is_left(servers[transport])


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with connect(server.port) as channel:
        yield channel


@pytest.fixture
def api(channel: grpc.Channel) -> Any:
    """The unary methods."""
    return stub(channel)


@pytest.fixture
def conversation(channel: grpc.Channel) -> Iterator[Conversation]:
    with Conversation(channel) as conversation:
        yield conversation
