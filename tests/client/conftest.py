"""What every test of the client may use."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def clients_begin_at_their_first_target() -> Iterator[None]:
    """So that a test knows which of its servers is called first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tenuto.servers.first_turn", lambda count: 0)
        yield
