"""Calls from a client's HTTP/2 through a front end to the engine process, and back.

Links are real; the rest is turned by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest

from tenuto.serving import frame as http
from tenuto.serving import front_end
from tenuto.serving.call import Listener
from tenuto.serving.connection import Connection
from tenuto.serving.front_end import NO_LIMIT, Forwards
from tenuto.serving.http_call import OTHERS_BYTES, WINDOW, Limits
from tenuto.serving.link import COUNT, MESSAGE_COST, Kind, socket_pair
from tenuto.serving.relayed_call import MOST_UNTAKEN, Parked, Relay, RelayedCall
from tenuto.serving.routed_call import RoutedCall

from .http2_peer import (
    PLENTY,
    WIDE,
    Client,
    Ears,
    cut,
    data_frame,
    packed,
)
from .links import HandLoop, settle

Code = grpc.StatusCode
OWN = "/a/"
MOST = 1 << 20  # bytes that may wait for calls that are not read, and before the engine process


class FrontLoop(HandLoop):
    """Of the front end's thread: it writes its one connection at the end of a turn."""

    connection: Connection

    def dirty(self, _: Connection) -> None: ...

    def blocked(self, _: Connection) -> None: ...

    def turn(self, connection: object = None) -> bool:
        busy = super().turn()
        self.connection.write()
        return busy or self.is_busy


class Served(Client):
    """A client of a front end, and what the engine process hears of it."""

    def __init__(self) -> None:
        self.ours, self.theirs = HandLoop(), FrontLoop()
        self.refuses: Callable[[RoutedCall], None] | None = None
        self.said: list[int] = []
        self.stops: list[float] = []
        self.ends: list[str] = []
        mine, end = socket_pair()
        self.parked = Parked(MOST)
        self.relay = Relay(
            mine, self.ours, self.ours, self.route, self.said.append, lambda: self.ends.append("front end"),
            self.parked,
        )  # fmt: skip
        self.forwards = Forwards(
            end, self.theirs, (OWN,), self.stops.append, lambda: self.ends.append("engine process"), MOST
        )
        self.relay.begin()
        self.forwards.begin()
        super().__init__(limits=Limits(PLENTY, outbox_bytes=NO_LIMIT), loop=self.theirs)

    def listen(self, call: RoutedCall) -> Listener:  # type: ignore[override]
        """In the front end."""
        return self.forwards.open(call)

    def route(self, call: RoutedCall) -> Listener:
        """In the engine process."""
        if self.refuses is not None:
            self.refuses(call)
        ears = Ears(call)
        self.ears.append(ears)
        return ears

    def turn(self) -> None:
        self.theirs.connection = self.connection
        settle(self.ours, self.theirs)


@contextmanager
def served() -> Iterator[Served]:
    client = Served()
    try:
        yield client
    finally:
        client.turn()
        client.relay.close()
        client.turn()
        client.ours.close()
        client.theirs.close()


def backed_up(ears: Ears) -> bool:
    return ears.call.backed_up


@pytest.fixture
def client() -> Iterator[Served]:
    with served() as client:
        yield client


def widened(client: Served, stream: int = 1) -> None:
    """The client takes whatever comes."""
    client.say(http.widen(0, WIDE), http.widen(stream, WIDE))


# What comes in.


def test_messages_come_as_they_were_cut_and_then_the_end(client: Served) -> None:
    ears = client.open()
    sent = [b"", b"one", bytes(range(256)) * 200]
    for piece in cut(b"".join(map(packed, sent)), [7, 1000, 16_000]):
        client.say(data_frame(1, piece))
    client.say(data_frame(1, b"", http.END_STREAM))
    assert ears.heard == [*sent, "half-closed"]
    ears.call.finish()
    client.turn()
    assert ears.heard == [*sent, "half-closed", "over"]
    assert client.answer().status is Code.OK


def test_what_a_call_is_comes_with_it(client: Served) -> None:
    client.say(
        client.headers(1, more={"x-name": "Ann", "key-bin": "AAH/"}, grpc_timeout="20S"),
    )
    call = client.ears[0].call
    assert (call.path, call.peer()) == ("/a/b", "ipv4:127.0.0.1:1")
    assert {"x-name": "Ann", "key-bin": b"\0\1\xff"}.items() <= dict(call.metadata).items()
    assert 0 < call.seconds_left <= 20
    client.open(3)
    assert client.ears[1].call.seconds_left == float("inf")


def test_calls_do_not_meet(client: Served) -> None:
    ears = [client.open(stream) for stream in (1, 3, 5)]
    client.say(*(data_frame(stream, packed(b"%d" % stream)) for stream in (5, 1, 3)))
    for one in ears:
        one.call.send(b"back to " + one.heard[0])  # type: ignore[operator]
    client.turn()
    assert [client.answer(stream).messages for stream in (1, 3, 5)] == [
        [b"back to 1"], [b"back to 3"], [b"back to 5"]
    ]  # fmt: skip


def test_nothing_of_who_is_refused_leaves_the_front_end(client: Served) -> None:
    client.refuses = lambda call: call.finish(Code.UNAUTHENTICATED, "who?", (("reason-bin", b"\0\xff"),))
    client.say(client.headers(1), data_frame(1, packed(bytes(100_000))[: 16 << 10]), data_frame(1, bytes(9)))
    client.say(data_frame(1, b"", http.END_STREAM))
    answer = client.answer()
    assert (answer.status, answer.fields["grpc-message"]) == (Code.UNAUTHENTICATED, "who?")
    assert answer.fields["reason-bin"] == "AP8"
    assert client.ears[0].heard == ["over"]


def test_other_peoples_methods_take_small_messages(client: Served) -> None:
    client.say(client.headers(1, more={":path": "/grpc.health.v1.Health/Check"}))
    (ears,) = client.ears
    client.say(data_frame(1, packed(bytes(OTHERS_BYTES + 1))[: 16 << 10]))
    assert client.answer().status is Code.RESOURCE_EXHAUSTED
    assert ears.heard == ["over"]


def test_a_listener_that_pauses_holds_its_client_back_and_loses_nothing(client: Served) -> None:
    ears, sent, message = client.open(), 0, bytes(1000)
    ears.pauses = True
    size = len(packed(message)) + 4
    while (sent + 1) * size <= WINDOW + client.answer().granted:  # what the client may send
        client.say(data_frame(1, packed(sent.to_bytes(4, "big") + message)))
        sent += 1
    assert ears.heard == [(0).to_bytes(4, "big") + message]
    assert isinstance(ears.call, RelayedCall)
    assert client.parked.bytes == sum(len(parked) + MESSAGE_COST for parked in ears.call._parked)
    assert client.parked.bytes <= MOST_UNTAKEN + len(message) + MESSAGE_COST
    client.say(data_frame(1, b"", http.END_STREAM))
    assert sent * size <= 2 * WINDOW + MOST_UNTAKEN
    ears.go_on()
    client.turn()
    assert ears.heard == [*(n.to_bytes(4, "big") + message for n in range(sent)), "half-closed"]
    assert client.parked.bytes == 0


def test_empty_messages_count_as_well(client: Served) -> None:
    ears = client.open()
    ears.pauses = True
    for _ in range(200):
        client.say(data_frame(1, packed(b"") * 100))
    assert isinstance(ears.call, RelayedCall)
    assert len(ears.call._parked) <= 1 + MOST_UNTAKEN // MESSAGE_COST
    client.say(http.reset(1, http.CANCEL))
    assert client.parked.bytes == 0


@pytest.mark.parametrize("pauses", [False, True])
def test_what_comes_for_a_call_that_is_cancelled_is_not_counted(client: Served, pauses: bool) -> None:
    """It was on its way when the engine process cancelled."""
    ears = client.open()
    ears.pauses = pauses
    client.say(data_frame(1, packed(b"the first")))
    ears.call.cancel()
    assert isinstance(ears.call, RelayedCall)
    for _ in range(5):
        ears.call.take(bytes(5_000))
    client.turn()
    assert ears.heard == [b"the first", "over"]
    assert client.parked.bytes == 0


def test_large_messages_for_calls_that_are_not_read_are_refused_in_the_end(client: Served) -> None:
    """Two of 600 KB each do not fit into a mebibyte; who is read is not touched."""
    ears = [client.open(stream) for stream in (1, 3, 5)]
    for one in ears[:2]:
        one.pauses = True
        client.say(data_frame(one.call.number * 2 - 1, packed(b"it pauses behind this")))
    for stream in (1, 3, 5):
        for piece in cut(packed(bytes(600_000)), [16 << 10]):
            client.say(data_frame(stream, piece))
    assert [client.answer(stream).ended for stream in (1, 3, 5)] == [False, True, False]
    assert client.answer(3).status is Code.RESOURCE_EXHAUSTED
    assert "wait to be read" in client.answer(3).fields["grpc-message"]
    assert ears[2].heard == [bytes(600_000)]
    assert client.parked.bytes == 600_000 + MESSAGE_COST


def test_who_is_read_on_may_send_as_much_as_he_likes(client: Served) -> None:
    ears, message = client.open(), bytes(10_000)
    for _ in range(100):
        client.say(data_frame(1, packed(message)))
    assert ears.heard == [message] * 100


def test_a_client_that_resets_ends_its_call_alone(client: Served) -> None:
    one, other = client.open(1), client.open(3)
    client.say(http.reset(1, http.CANCEL))
    assert (one.heard, other.heard) == (["over"], [])
    one.call.send(b"for nobody")
    one.call.finish()
    client.turn()
    assert not client.answer(1).ended


# What goes out.


def test_replies_initial_metadata_and_status_arrive_in_order(client: Served) -> None:
    call = client.open().call
    call.initial_metadata = (("x-first", "1"), ("x-bin", b"\1"))
    sent = [b"one", bytes(100_000), b"two"]
    widened(client)
    for message in sent:
        call.send(message)
    call.finish(Code.ABORTED, "enough", (("x-last", "2"),))
    call.send(b"behind the end")
    client.turn()
    answer = client.answer()
    assert answer.messages == sent
    assert (answer.status, answer.fields["x-first"], answer.fields["x-bin"], answer.fields["x-last"]) == (
        Code.ABORTED, "1", "AQ", "2"
    )  # fmt: skip


def test_a_client_that_takes_no_replies_is_seen_and_gets_all_when_it_does(client: Served) -> None:
    ears = client.open()
    sent = [n.to_bytes(4, "big") + bytes(5_000) for n in range(200)]
    for message in sent:
        ears.call.send(message)
        client.turn()
    assert backed_up(ears)
    assert len(ears.call._outbox.messages) > 0
    client.say(data_frame(1, packed(b"read no more")))
    client.say(data_frame(1, packed(b"not yet")))
    assert ears.heard == [b"read no more"]
    widened(client)
    assert not backed_up(ears)
    assert client.answer().messages == sent
    assert ears.heard == [b"read no more", b"not yet"]


def test_what_a_front_end_holds_for_a_client_that_does_not_read_is_bounded(client: Served) -> None:
    ears = client.open()
    for _ in range(200):
        ears.call.send(bytes(5_000))
    client.turn()
    (held,) = client.connection._calls.values()
    assert held._outbox.bytes <= MOST_UNTAKEN + 5_000


def test_a_status_that_its_client_does_not_take_ends_the_call_in_the_end(client: Served) -> None:
    ears = client.open()
    for _ in range(100):
        ears.call.send(bytes(5_000))
    ears.call.finish()
    client.turn()
    now = time.monotonic()
    for later in (0, 59, 61):
        assert ears.heard == []
        client.relay.look(now + later)
        client.turn()
    assert ears.heard == ["over"]
    assert client.answer().reset == http.CANCEL


def test_a_reply_that_meets_a_bug_ends_its_call_alone(
    client: Served, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = client.open(1), client.open(3)
    one.call.finish(Code.OK, "", (("wrong", 5),))  # type: ignore[arg-type]
    other.call.send(b"comes all the same")
    calls = [one.call, other.call]
    client.ours._calls.clear()
    client.relay.write(calls)
    client.turn()
    assert client.answer(3).messages == [b"comes all the same"]
    assert one.heard == ["over"]
    assert "met a bug" in caplog.text


def test_a_call_that_is_cancelled_is_reset(client: Served) -> None:
    ears = client.open()
    ears.call.cancel()
    ears.call.cancel()
    client.turn()
    assert ears.heard == ["over"]
    assert client.answer().reset == http.CANCEL


def test_closed_is_told_when_the_call_is_over(client: Served) -> None:
    over: list[int] = []
    call = client.open().call
    call.closed = lambda: over.append(1)
    call.finish()
    client.turn()
    client.say(data_frame(1, b"", http.END_STREAM))
    assert over == [1]


def test_a_deadline_ends_the_call_for_both(client: Served) -> None:
    ears = client.open(1, grpc_timeout="1S")
    assert isinstance(ears.call, RelayedCall)
    client.connection.look(time.monotonic() + 2, 1e9, 1e9)
    client.turn()
    assert client.answer().status is Code.DEADLINE_EXCEEDED
    assert ears.heard == ["over"]


def test_who_is_asked_to_leave_is_told_so(client: Served) -> None:
    ears = client.open()
    ears.call.suggest_leaving()
    client.turn()
    assert http.GOAWAY in [kind for kind, *_ in client.fresh()]
    assert ears.heard == []


# The end of either process.


def test_a_front_end_that_is_gone_ends_its_calls(client: Served) -> None:
    ears = [client.open(1), client.open(3)]
    client.forwards._link.close()
    client.turn()
    assert [one.heard for one in ears] == [["over"], ["over"]]
    assert client.ends == ["engine process", "front end"]
    ears[0].call.send(b"for nobody")
    client.turn()


def test_a_front_end_says_when_it_listens_and_hears_when_to_stop(client: Served) -> None:
    assert client.said == [Kind.READY]
    client.relay.put(Kind.STOP, 0, COUNT.pack(1500))
    client.turn()
    assert client.stops == [1.5]


def test_numbers_of_calls_that_live_are_not_given_again(
    client: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_end, "_MOST_CALLS", 3)
    lasting, *_ = [client.open(stream) for stream in (1, 3)]
    for stream in (5, 7, 9):
        client.open(stream).call.finish()
        client.turn()
    assert [ears.call.number for ears in client.ears] == [1, 2, 3, 3, 3]
    lasting.call.send(b"for the first")
    client.turn()
    assert client.answer(1).messages == [b"for the first"]


def test_newcomers_are_refused_while_the_engine_process_does_not_keep_up(client: Served) -> None:
    client.open(1)
    link = client.forwards._link
    while not link.wait(print):
        link.put(Kind.MESSAGE, 999, bytes(1 << 20))  # of a call that is over
        client.theirs.turn()
    client.connection.receive(client.headers(3))
    while client.theirs.turn():
        pass
    assert client.answer(3).status is Code.RESOURCE_EXHAUSTED
    assert "more comes than" in client.answer(3).fields["grpc-message"]
    link.forget(print)
    client.turn()
    assert client.open(5).heard == []
    assert len(client.ears) == 2


def test_large_messages_are_refused_while_the_engine_process_does_not_keep_up(client: Served) -> None:
    client.open(1)
    link = client.forwards._link
    while link.queued_bytes <= MOST:
        link.put(Kind.MESSAGE, 999, bytes(1 << 16))
        client.theirs.turn()
    for piece in cut(packed(bytes(100_000)), [16 << 10]):
        client.connection.receive(data_frame(1, piece))
    while client.theirs.turn():
        pass
    assert client.answer(1).status is Code.RESOURCE_EXHAUSTED
    client.turn()


def test_a_front_end_answers_when_it_is_asked(client: Served) -> None:
    client.relay.put(Kind.PING, 0)
    client.turn()
    assert client.said == [Kind.READY, Kind.PING]
