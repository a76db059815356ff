"""Clients that are killed: their sequences end and their slots come back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import toys
from tests.integration.running import ALL_TRANSPORTS, Counting, assert_nothing_is_left, serving
from tests.integration.wire import Conversation, chunk, connect, opening

from .process import ROOT


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_a_killed_client_ends_its_sequences_and_gives_their_slots_back(
    tmp_path: Path, transport: str
) -> None:
    toys.write(tmp_path, "accumulator", toys.accumulator())
    command = [sys.executable, "-m", "tests.faults.vanishing_client"]
    with (
        serving(tmp_path, transport=transport, max_sequences=4) as server,
        connect(server.port) as channel,
        Conversation(channel) as neighbour,
    ):
        counting = Counting(server)
        neighbour.send(opening("accumulator"), chunk(1, [1.0]))
        neighbour.opened()
        neighbour.output(1)
        client = subprocess.Popen(
            [*command, str(server.port), "3"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        with client:
            assert client.stdout is not None
            assert client.stdout.readline() == "open\n"
            assert counting.rise("tenuto_sequence_slots_used") == 4
            neighbour.send(opening("accumulator", 1))
            neighbour.failed("POOL_FULL")
            client.kill()
        ended = {"model": "accumulator", "reason": "CANCELLED"}
        counting.wait_for_rise(3, "tenuto_sequences_ended_total", **ended)
        assert counting.rise("tenuto_sequence_slots_used") == 1
        # The slots are there for others, and the neighbour lost nothing.
        neighbour.send(*(opening("accumulator", n) for n in (1, 2, 3)))
        for _ in range(3):
            neighbour.opened()
        neighbour.send(chunk(2, [1.0]))
        assert neighbour.values(2) == [2.0]
        neighbour.done_sending()
        neighbour.rest()
        assert_nothing_is_left(server)
