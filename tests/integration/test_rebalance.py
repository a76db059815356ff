"""Sequences that are sent elsewhere: their clients are told, and their next calls take another connection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from tenuto.v1 import tenuto_pb2 as pb

from .running import TRANSPORTS, assert_nothing_is_left, serving
from .wire import Conversation, chunk, connect, opening

SETTINGS: dict[str, Any] = {
    "max_sequences": 4,
    "rebalance_above": 0.25,
    "rebalance_per_second": 100.0,
    "rebalance_age_seconds": 0.0,
}


def open_three(channel: grpc.Channel) -> Conversation:
    conversation = Conversation(channel)
    conversation.send(*(opening("accumulator", number) for number in range(3)))
    for number in range(3):
        conversation.send(chunk(1, [float(number)], sequence=number))
    return conversation


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_of_three_are_sent_away_with_their_tokens_and_go_on(transport: str, toy_repository: Path) -> None:
    with (
        serving(toy_repository, transport=transport, **SETTINGS) as server,
        connect(server.port) as channel,
    ):
        with open_three(channel) as conversation:
            tokens: dict[int, bytes] = {}
            while len(tokens) < 2:
                reply = conversation.read()
                if reply.HasField("closed"):
                    assert reply.closed.reason == pb.REBALANCE
                    tokens[reply.sequence] = reply.closed.resume_token
            assert sorted(tokens) == [0, 1]
            conversation.send(chunk(2, [10.0], sequence=2))  # who stays goes on where it is
            while not ((reply := conversation.read()).HasField("output") and reply.output.step == 2):
                pass
            assert reply.sequence == 2
        with Conversation(channel) as again:
            again.send(opening("accumulator", resume_token=tokens[1]), chunk(2, [10.0]))
            while not (reply := again.read()).HasField("output"):
                pass
            assert again_sum(reply) == 11.0
        assert_nothing_is_left(server)


def again_sum(reply: pb.Reply) -> float:
    import numpy as np

    return float(np.frombuffer(reply.output.outputs[0].data, np.float32)[-1])


def test_the_connection_of_who_is_sent_away_takes_no_more_calls(toy_repository: Path) -> None:
    """So that a client which knows one name asks again which servers it stands for."""
    with (
        serving(toy_repository, transport="http2", **SETTINGS) as server,
        connect(server.port) as channel,
        open_three(channel) as conversation,
    ):
        conversation.read()  # it is connected
        transport: Any = server._transport
        (before,) = transport._server._peers
        while not conversation.read().HasField("closed"):
            pass
        with Conversation(channel) as another:
            another.send(opening("accumulator"))
            another.opened()
            assert before.leaving
            assert len(transport._server._peers) == 2
