"""What every test of the client may use."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def clients_begin_at_their_first_target() -> Iterator[None]:
    """So that a test knows which of its servers is called first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tenuto.servers.first_turn", lambda count: 0)
        yield


@pytest.fixture
def sigint() -> Iterator[None]:
    """What is started here does not ignore SIGINT, as it would if a shell had us in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
