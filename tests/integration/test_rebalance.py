"""Sequences that are sent elsewhere: their clients are told, and their next calls take another connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto import Client, Stream
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb

from .running import TRANSPORTS, Counting, assert_nothing_is_left, engine_of, serving, wait_for
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


CALLERS = 9
A_SECOND = 2  # sequences that may leave in one
BOUND = 6  # of the twelve slots


@pytest.fixture
def pair(
    toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, Server]]:
    """Two servers of one set of keys, whose seconds go by when a test calls `look`."""
    keys = tmp_path / "keys"
    keys.write_text("5a" * 32)
    settings = SETTINGS | {
        "max_sequences": 12,
        "rebalance_above": BOUND / 12,
        "rebalance_per_second": A_SECOND,
        "token_key_file": keys,
    }
    monkeypatch.setattr(Server, "_rebalance", lambda _: None)  # the housekeeper's own seconds
    with serving(toy_repository, **settings) as a, serving(toy_repository, **settings) as b:
        yield a, b
        assert_nothing_is_left(a)
        assert_nothing_is_left(b)


look = Server._rebalance  # what the housekeeper calls every second


class Caller:
    """One sequence of whole numbers, whose sums are exact, and what is to come back."""

    def __init__(self, stream: Stream, number: int) -> None:
        self.stream = stream
        self._number = number
        self._sum = 0.0
        self._expected: list[tuple[int, list[float]]] = []

    def say(self, chunks: int) -> None:
        for _ in range(chunks):
            values = [float(self._number), 1.0, 2.0]
            sums = [self._sum + part for part in (values[0], values[0] + 1, values[0] + 3)]
            self._sum = sums[-1]
            self._expected.append((self.stream.send(np.array(values, np.float32)), sums))

    def hear(self) -> None:
        """Everything that is owed."""
        for expected in self._expected:
            output = next(self.stream)
            assert (output.step, output["y"].tolist()) == expected
        self._expected.clear()

    def end(self) -> None:
        self.stream.end()
        assert list(self.stream) == []  # no output came twice


def live(server: Server) -> int:
    return engine_of(server, "accumulator").metrics.active_sequences


def callers_at_the_first(client: Client, stack: ExitStack) -> list[Caller]:
    """Streams go to the servers in turn; those at the second end again."""
    callers = [
        Caller(stack.enter_context(client.stream("accumulator")), number) for number in range(CALLERS * 2)
    ]
    for caller in callers:
        caller.say(1)
        caller.hear()
    for caller in callers[1::2]:
        caller.end()
    return callers[::2]


def test_the_client_follows_by_itself_and_no_more_leave_in_a_second_than_may(
    pair: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks under way: the sums show one that is lost or eaten twice, the steps an output that is."""
    a, b = pair
    monkeypatch.setattr("tenuto.servers.first_turn", lambda _: 0)
    target = f"127.0.0.1:{a.port},127.0.0.1:{b.port}"
    with Client(target) as client, ExitStack() as stack:
        callers = callers_at_the_first(client, stack)
        wait_for(lambda: (live(a), live(b)) == (CALLERS, 0), "all to be at the first server")
        sent_away = Counting(a)
        for left in (2, 3, 3):  # at most A_SECOND, as long as there are more than BOUND
            for caller in callers:
                caller.say(2)
            for server in pair:
                look(server)
            for caller in callers:
                caller.say(2)
                caller.hear()
            sent_away.wait_for_rise(left, "tenuto_sequences_ended_total", reason="REBALANCE")
            for caller in callers:  # whoever was told after its last output goes on with the next
                caller.say(4)
                caller.hear()
            assert (live(a), live(b)) == (CALLERS - left, left)
            assert client.resumes == sum(caller.stream.resumes for caller in callers) == left
        assert live(a) == BOUND
        assert sent_away.rise("tenuto_sequences_ended_total") == CALLERS - BOUND
        assert sorted(caller.stream.resumes for caller in callers) == [0] * 6 + [1] * 3
        for caller in callers:
            caller.end()
