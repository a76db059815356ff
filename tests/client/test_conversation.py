"""A sequence over many calls, without any I/O: what is written, what is resumed, what is an error."""

from typing import Any

import numpy as np
import pytest

from tenuto import (
    NotFound,
    Overloaded,
    PoisonedChunk,
    ProtocolError,
    Refused,
    ReplyTimeout,
    SequenceEnded,
    SequenceFailed,
    TenutoError,
    Unavailable,
    errors,
)
from tenuto.conversation import Conversation
from tenuto.settings import Settings
from tenuto.v1 import tenuto_pb2 as pb

LOST = Unavailable("the connection broke", code="UNAVAILABLE")


class Talk:
    """A conversation at a clock that the test moves, and the server's side of it by hand."""

    def __init__(
        self,
        targets: int = 1,
        version: int = 0,
        resume_token: bytes = b"",
        initial: Any = (),
        **settings: Any,
    ) -> None:
        names = ",".join(f"host-{n}:1" for n in range(targets))
        event = pb.Open(model="accumulator", version=version, label="kitchen", resume_token=resume_token)
        event.initial.extend(initial)
        self.one = Conversation(event, Settings(names, **settings), lambda: 1.0)
        self.now = 100.0

    def call(self) -> pb.Open:
        """Make the call that is due, and return what opens the sequence."""
        due = self.one.call_due()
        assert due is not None
        assert due <= self.now
        self.one.called(self.now)
        (request,) = self.one.outgoing(self.now)
        return request.events[0].open

    def opened(self, next_step: int = 1, window: int = 4) -> list[str]:
        """Open the sequence, and return what is written then."""
        opened = pb.Opened(sequence_id="s", version=3, next_step=next_step, window=window)
        return self.hear(opened=opened)

    def start(self, window: int = 4) -> "Talk":
        self.call()
        self.opened(window=window)
        return self

    def send(self, *values: float) -> list[str]:
        """Send a chunk of these samples, and return what is written then."""
        assert self.one.room()
        self.one.chunk(np.array(values or [1], np.float32), 0, self.now, self.now)
        return self.written()

    def end(self) -> list[str]:
        self.one.end(self.now)
        return self.written()

    def written(self) -> list[str]:
        """What is to be written now: a number for a chunk, else the event's name."""
        expected = self.one.has_outgoing()
        requests = self.one.outgoing(self.now)
        assert bool(requests) is expected
        assert not self.one.has_outgoing()
        events = [event for request in requests for event in request.events]
        kinds = [event.WhichOneof("event") for event in events]
        return [
            str(e.chunk.step) if kind == "chunk" else str(kind) for e, kind in zip(events, kinds, strict=True)
        ]

    def hear(self, **reply: Any) -> list[str]:
        """The server says something; return what is written then."""
        self.one.receive(pb.StreamResponse(replies=[pb.Reply(**reply)]), self.now)
        return self.written()

    def answer(self, *steps: int, part: int = 0, last: bool = True) -> list[str]:
        """Outputs of these steps; return what is written then."""
        outputs = [pb.Output(step=step, part=part, last=last) for step in steps]
        return [event for output in outputs for event in self.hear(output=output)]

    def token(self, step: int) -> list[str]:
        return self.hear(checkpoint=pb.Checkpoint(step=step, resume_token=b"token %d" % step))

    def closed(self, reason: int, step: int = 0, token: bytes = b"") -> list[str]:
        return self.hear(closed=pb.Closed(reason=reason, last_step=step, resume_token=token))  # type: ignore[arg-type]

    def failed(self, code: int, reason: str, token: bytes = b"", retry_after_ms: int = 0) -> list[str]:
        failed = pb.Failed(
            code=code, reason=reason, message="text", resume_token=token, retry_after_ms=retry_after_ms
        )
        return self.hear(failed=failed)

    def lose(self, error: TenutoError | None = LOST) -> None:
        self.one.lost(error, self.now)

    def resume(self, next_step: int, window: int = 4) -> list[str]:
        """Make the next call when it is due, open the sequence; return what is written then."""
        self.now = max(self.now, self.one.call_due() or 0.0)
        self.call()
        return self.opened(next_step, window)

    def taken(self) -> list[tuple[int, int]]:
        """Step and part of every output that the caller has not read yet."""
        outputs = []
        while self.one._unread:
            output = self.one.take(self.now)
            assert output is not None
            outputs.append((output.step, output.part))
        return outputs

    def error(self) -> TenutoError:
        """What the caller is told."""
        with pytest.raises(TenutoError) as caught:
            self.one.room()
        assert not self.one.on_call
        assert self.one.call_due() is None
        return caught.value


# -- one call --------------------------------------------------------------------------------------


def test_nothing_follows_open_before_it_is_answered() -> None:
    talk = Talk()
    assert talk.call() == pb.Open(model="accumulator", label="kitchen")
    assert talk.written() == []
    assert talk.opened() == []
    assert talk.send() == ["1"]


def test_no_more_chunks_than_the_window_are_unanswered_on_a_call() -> None:
    talk = Talk().start(window=2)
    assert (talk.send(), talk.send()) == (["1"], ["2"])
    assert not talk.one.room()
    talk.answer(1)
    assert talk.one.room()


def test_a_repeated_output_is_dropped() -> None:
    talk = Talk().start()
    talk.send()
    talk.send()
    talk.answer(1, 1, 2, 1, 2)
    assert talk.taken() == [(1, 0), (2, 0)]


@pytest.mark.parametrize("step", [2, 3], ids=["skips_one", "not_sent"])
def test_an_output_out_of_order_is_a_protocol_error(step: int) -> None:
    talk = Talk().start()
    talk.send()
    talk.send()
    with pytest.raises(ProtocolError, match=rf"step {step}; unanswered are \[1, 2\]"):
        talk.answer(step)


def test_end_follows_the_last_chunk() -> None:
    talk = Talk().start(window=1)
    talk.send()
    assert talk.end() == ["end"]
    talk.answer(1)
    talk.closed(pb.END, 1)
    assert talk.one.closed


def test_a_sequence_closed_before_its_last_answer_is_a_protocol_error() -> None:
    talk = Talk().start()
    talk.send()
    talk.end()
    with pytest.raises(ProtocolError, match="closed before step 1 was answered"):
        talk.closed(pb.END, 1)


def test_an_opening_that_comes_twice_is_a_protocol_error() -> None:
    talk = Talk().start()
    with pytest.raises(ProtocolError, match="once a call"):
        talk.opened()


# -- replay ----------------------------------------------------------------------------------------


def test_without_a_token_a_lost_sequence_is_opened_anew_and_replayed_whole() -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.send()
    talk.lose()
    # The same version: with another model the replay would give another sequence.
    assert talk.call() == pb.Open(model="accumulator", label="kitchen", version=3)
    assert talk.opened() == ["1", "2"]
    talk.answer(1, 2)
    assert talk.taken() == [(1, 0), (2, 0)]
    assert talk.one.resumes == 1


@pytest.mark.parametrize("wish", [0, 2])
def test_a_sequence_without_an_output_yet_may_go_on_with_any_version_that_fits_the_wish(wish: int) -> None:
    talk = Talk(version=wish).start()
    talk.send()
    talk.lose()
    assert talk.call() == pb.Open(model="accumulator", label="kitchen", version=wish)
    assert talk.opened() == ["1"]
    talk.answer(1, last=False)  # from here on it stays with that one
    talk.lose()
    assert talk.call().version == 3


def test_with_a_token_the_chunks_after_it_are_sent_again() -> None:
    talk = Talk().start()
    for _ in range(3):
        talk.send()
    talk.answer(1, 2)
    talk.token(1)
    talk.lose()
    assert talk.call() == pb.Open(model="accumulator", label="kitchen", resume_token=b"token 1")
    assert talk.opened(next_step=2) == ["2", "3"]
    talk.answer(2, 3)
    assert talk.taken() == [(1, 0), (2, 0), (3, 0)]
    assert talk.send() == ["4"]


def test_where_the_states_begin_is_said_until_there_is_a_token() -> None:
    """Which has them; and which is smaller with the next Open."""
    state = pb.Tensor(name="h", dtype="float32", shape=[1], data=bytes(4))
    talk = Talk(initial=[state]).start()
    talk.send()
    talk.lose()
    assert list(talk.call().initial) == [state]
    talk.opened()
    talk.answer(1)
    talk.token(1)
    talk.send()
    talk.lose()
    assert list(talk.call().initial) == []


def test_the_last_samples_are_said_to_be_so_again_after_a_resume() -> None:
    talk = Talk().start()
    talk.one.chunk(np.ones(1, np.float32), 0, talk.now, talk.now, last=True)
    assert [request.events[0].chunk.last for request in talk.one.outgoing(talk.now)] == [True]
    talk.lose()
    talk.call()
    opened = pb.Opened(sequence_id="s", version=3, next_step=1, window=4)
    talk.one.receive(pb.StreamResponse(replies=[pb.Reply(opened=opened)]), talk.now)
    assert [request.events[0].chunk.last for request in talk.one.outgoing(talk.now)] == [True]


def test_a_replay_keeps_to_the_window_of_the_new_call() -> None:
    talk = Talk().start()
    for step in range(1, 7):
        talk.send()
        talk.answer(step)
    talk.send()
    talk.lose()
    assert talk.resume(1, window=2) == ["1", "2"]
    assert talk.answer(1) == ["3"]
    assert talk.answer(2, 3, 4, 5, 6) == ["4", "5", "6", "7"]
    talk.answer(7)
    assert talk.taken() == [(step, 0) for step in range(1, 8)]


def test_a_step_of_several_outputs_goes_on_where_it_was() -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1, part=0, last=False)
    talk.answer(1, part=1, last=False)
    talk.lose()
    talk.resume(1)
    for part in range(4):
        talk.answer(1, part=part, last=part == 3)
    assert talk.taken() == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert talk.one.room()


def test_an_older_token_is_ignored() -> None:
    talk = Talk().start()
    for step in (1, 2, 3):
        talk.send()
        talk.answer(step)
    talk.token(2)
    talk.token(1)
    assert talk.one.resume_token == b"token 2"
    talk.lose()
    talk.send()
    assert talk.resume(3) == ["3", "4"]


@pytest.mark.parametrize("step,token", [(2, b"token"), (1, b"")], ids=["ahead", "empty"])
def test_a_token_that_would_lose_outputs_is_a_protocol_error(step: int, token: bytes) -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.send()
    with pytest.raises(ProtocolError, match=f"after step {step}, where 1 is the last one answered"):
        talk.hear(checkpoint=pb.Checkpoint(step=step, resume_token=token))


@pytest.mark.parametrize("next_step", [1, 4])
def test_a_server_that_goes_on_elsewhere_is_a_protocol_error(next_step: int) -> None:
    talk = Talk().start()
    for step in (1, 2):
        talk.send()
        talk.answer(step)
    talk.token(1)
    talk.send()
    talk.lose()
    talk.call()
    with pytest.raises(ProtocolError, match=f"goes on at step {next_step}; expected one from 2 to 3"):
        talk.opened(next_step=next_step)


def test_a_callers_own_token_says_where_its_sequence_goes_on() -> None:
    talk = Talk(resume_token=b"token 7")
    assert talk.call().resume_token == b"token 7"
    talk.opened(next_step=8)
    assert talk.send() == ["8"]
    talk.token(6)
    talk.lose()
    assert talk.call().resume_token == b"token 7"
    assert talk.opened(next_step=8) == ["8"]


def test_end_and_its_tail_are_resumed() -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.end()
    talk.answer(1, part=1)
    talk.lose()
    assert talk.resume(1) == ["1", "end"]
    talk.answer(1)
    talk.answer(1, part=1)
    talk.closed(pb.END, 1)
    assert talk.taken() == [(1, 0), (1, 1)]
    assert talk.one.closed


def test_a_tail_comes_after_a_resume_that_replays_nothing() -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.token(1)
    talk.lose()
    talk.end()
    assert talk.resume(2) == ["end"]
    talk.answer(1, part=1)
    talk.closed(pb.END, 1)
    assert talk.taken() == [(1, 0), (1, 1)]


# -- the bound of the replay -----------------------------------------------------------------------


def test_a_token_is_asked_for_at_half_of_the_bound_and_once() -> None:
    talk = Talk(replay_bytes=4000).start()
    assert talk.send(*[0] * 200) == ["1"]  # 800 bytes, and 512 of overhead
    talk.answer(1)
    assert talk.send(*[0] * 200) == ["2", "checkpoint"]
    assert talk.answer(2) == []
    assert talk.send() == ["3"]
    talk.answer(3)
    assert talk.token(2) == []
    assert talk.one._replay.first == 3
    assert talk.send(*[0] * 400) == ["4", "checkpoint"]


def test_a_full_replay_makes_the_caller_wait_for_a_token() -> None:
    talk = Talk(replay_bytes=2000).start()
    assert talk.send(*[0] * 1000) == ["1", "checkpoint"]  # larger than the bound, and sent
    talk.answer(1)
    assert not talk.one.room()
    assert talk.one.patience(talk.now) == 30  # the token is owed
    talk.token(1)
    assert talk.one.room()
    assert talk.one.patience(talk.now) is None


def test_a_full_replay_is_opened_again_although_no_output_is_owed() -> None:
    """Else the caller, who waits for room, would wait for ever."""
    talk = Talk(replay_bytes=2000).start()
    talk.send(*[0] * 1000)
    talk.answer(1)
    talk.lose()
    assert talk.resume(1) == ["1", "checkpoint"]
    talk.answer(1)
    talk.token(1)
    assert talk.one.room()


def test_no_token_is_asked_for_after_end() -> None:
    talk = Talk(replay_bytes=2000).start()
    talk.send(*[0] * 100)
    talk.lose()
    talk.end()
    talk.one._replay.add(2, pb.StreamRequest())
    assert "checkpoint" not in talk.resume(1)


def test_without_resuming_nothing_is_kept_and_no_token_asked_for() -> None:
    talk = Talk(replay_bytes=1, resume_seconds=0).start()
    assert (talk.send(), talk.send()) == (["1"], ["2"])
    talk.answer(1, 2)
    assert len(talk.one._replay) == 0
    talk.token(2)
    assert talk.one.resume_token == b"token 2"


# -- endings that are not the end ------------------------------------------------------------------

RESUMABLE = ["STREAM_ENDED", "IDLE_EXPIRED", "EVICTED", "DRAINING", "REBALANCE", "MAX_AGE"]


@pytest.mark.parametrize("reason", RESUMABLE)
def test_a_sequence_closed_with_a_token_goes_on_at_once_where_something_is_owed(reason: str) -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.send()
    talk.closed(pb.Ending.Value(reason), 1, b"token 1")
    assert not talk.one.on_call
    assert talk.one.call_due() == talk.now
    assert talk.call().resume_token == b"token 1"
    assert talk.opened(next_step=2) == ["2"]
    talk.answer(2)
    assert talk.taken() == [(1, 0), (2, 0)]


@pytest.mark.parametrize("reason", RESUMABLE)
def test_a_sequence_closed_with_a_token_goes_on_with_the_next_send(reason: str) -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.closed(pb.Ending.Value(reason), 1, b"token 1")
    assert talk.one.call_due() is None
    assert talk.one.patience(talk.now) is None
    talk.now += 3600
    assert talk.send() == []
    assert talk.resume(2) == ["2"]


def test_a_drained_sequence_without_a_token_is_replayed_whole() -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.closed(pb.DRAINING, 1)
    talk.send()
    assert talk.call().resume_token == b""
    assert talk.opened() == ["1", "2"]


@pytest.mark.parametrize(
    "reason,token",
    [
        ("IDLE_EXPIRED", b""),
        ("EVICTED", b""),
        ("SUPERSEDED", b"token 0"),
        ("WINDOW_EXCEEDED", b"token 0"),
        ("END", b"token 0"),
    ],
)
def test_other_endings_are_the_end(reason: str, token: bytes) -> None:
    talk = Talk().start()
    talk.send()
    talk.closed(pb.Ending.Value(reason), 0, token)
    error = talk.error()
    assert isinstance(error, SequenceEnded)
    assert (error.reason, error.resume_token) == (reason, token)


def test_an_ending_with_a_token_that_would_lose_outputs_is_a_protocol_error() -> None:
    talk = Talk().start()
    talk.send()
    with pytest.raises(ProtocolError) as caught:
        talk.closed(pb.REBALANCE, 1, b"token 1")
    talk.lose(caught.value)  # as the clients do
    assert talk.error() is caught.value


def test_a_server_that_keeps_closing_is_not_called_without_a_pause() -> None:
    talk = Talk().start()
    talk.send()
    pauses = []
    for _ in range(4):
        talk.closed(pb.REBALANCE, 0, b"token 0")
        pauses.append((talk.one.call_due() or 0) - talk.now)
        talk.resume(1)
    assert pauses == pytest.approx([0, 0.05, 0.1, 0.2])


# -- lost calls ------------------------------------------------------------------------------------

LOSSES = [
    None,  # the call ended in order, the sequence did not
    LOST,
    Unavailable("reset", code="CANCELLED"),  # by a proxy
    errors.ServerError("reset", code="INTERNAL"),
    Overloaded("too many pings", code="RESOURCE_EXHAUSTED"),
]


@pytest.mark.parametrize("error", LOSSES, ids=lambda error: getattr(error, "code", "OK"))
def test_a_lost_call_is_made_again(error: TenutoError | None) -> None:
    talk = Talk().start()
    talk.send()
    talk.lose(error)
    assert talk.resume(1) == ["1"]


@pytest.mark.parametrize("error", LOSSES, ids=lambda error: getattr(error, "code", "OK"))
def test_without_resuming_a_lost_call_is_an_error(error: TenutoError | None) -> None:
    talk = Talk(resume_seconds=0).start()
    talk.send()
    talk.lose(error)
    assert talk.error() is error or "after step 0" in str(talk.error())


@pytest.mark.parametrize(
    "error",
    [
        Refused("no", code="PERMISSION_DENIED"),
        errors.InvalidInput("no", code="RESOURCE_EXHAUSTED", reason="TOO_LARGE"),
        errors.ServerError("no", code="UNKNOWN"),
        ProtocolError("no"),
        Unavailable("no", code="CANCELLED", reason="CLIENT_CLOSED"),
    ],
    ids=["refused", "too_large", "unknown", "protocol", "client_closed"],
)
def test_a_call_that_ends_by_any_other_error_ends_the_sequence(error: TenutoError) -> None:
    talk = Talk().start()
    talk.send()
    talk.lose(error)
    assert talk.error() is error


def test_a_call_lost_while_nothing_is_owed_is_made_with_the_next_send() -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.lose()
    assert talk.one.call_due() is None
    talk.now += 3600
    assert not talk.one.overdue(talk.now)
    assert talk.one.room()
    talk.send()
    assert talk.one.patience(talk.now) == 60
    assert talk.resume(1) == ["1", "2"]


def test_the_first_call_after_a_loss_is_made_at_once_and_the_next_ones_later_and_later() -> None:
    talk = Talk().start()
    talk.send()
    talk.lose()
    pauses = []
    for _ in range(10):
        due = talk.one.call_due() or 0
        pauses.append(due - talk.now)
        talk.now = due
        talk.call()
        talk.lose()
    assert pauses == pytest.approx([0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2])
    talk.resume(1)
    talk.answer(1)  # only something new makes the next loss a first one
    talk.send()
    talk.lose()
    assert talk.one.call_due() == talk.now


def test_callers_come_back_spread_over_time() -> None:
    talk = Talk().start()
    talk.one._backoff._jitter = lambda: 1.5
    talk.send()
    for _ in range(2):
        talk.lose()
        talk.call() if talk.one.call_due() == talk.now else None
    assert (talk.one.call_due() or 0) - talk.now == pytest.approx(0.075)


@pytest.mark.parametrize(
    "code,reason",
    [(8, "POOL_FULL"), (8, "OVERLOADED"), (14, "DRAINING"), (14, "MODEL_NOT_READY"), (13, "RUN_FAILED")],
)
def test_a_refused_resume_is_tried_again(code: int, reason: str) -> None:
    talk = Talk().start()
    talk.send()
    talk.lose()
    talk.call()
    talk.failed(code, reason)
    assert talk.resume(1) == ["1"]


@pytest.mark.parametrize("targets", [1, 3])
def test_once_every_target_asked_for_a_pause_it_is_made(targets: int) -> None:
    talk = Talk(targets).start()
    talk.send()
    talk.lose()
    pauses = []
    for _ in range(4):
        due = talk.one.call_due() or 0
        pauses.append(due - talk.now)
        talk.now = due
        talk.call()
        talk.failed(8, "OVERLOADED", retry_after_ms=1000)
    spread = {1: [0, 1.05, 1.1, 1.2], 3: [0, 0.05, 0.1, 1.2]}
    assert pauses == pytest.approx(spread[targets])


def test_no_server_may_ask_for_a_pause_that_takes_all_the_time() -> None:
    talk = Talk(resume_seconds=30).start()
    talk.send()
    talk.lose()
    talk.call()
    talk.failed(8, "OVERLOADED", retry_after_ms=3_600_000)
    assert (talk.one.call_due() or 0) - talk.now == pytest.approx(10.05)


def test_after_resume_seconds_the_last_error_is_raised_in_words() -> None:
    talk = Talk(resume_seconds=10).start()
    talk.send()
    talk.answer(1)
    talk.token(1)
    talk.send()
    began = talk.now
    talk.lose()
    while (due := talk.one.call_due()) is not None:
        talk.now = due
        talk.call()
        talk.failed(8, "POOL_FULL")
    assert began + 7 < talk.now < began + 10
    error = talk.error()
    assert isinstance(error, Overloaded)
    assert str(error) == "POOL_FULL: step 2 could not be resumed within 10 s: text"
    assert error.resume_token == b"token 1"


def test_a_refusal_says_more_than_that_another_server_is_dead() -> None:
    talk = Talk(targets=2, resume_seconds=10).start()
    talk.send()
    talk.lose()
    for reason in ("POOL_FULL", "OVERLOADED"):
        talk.now = talk.one.call_due() or 0.0
        talk.call()
        talk.failed(8, reason)
    while (due := talk.one.call_due()) is not None:
        talk.now = due
        talk.call()
        talk.lose()
    error = talk.error()
    assert isinstance(error, Overloaded)
    assert str(error) == "OVERLOADED: step 1 could not be resumed within 10 s: text"


def test_a_refusal_before_the_newest_opening_is_not_the_reason() -> None:
    talk = Talk(targets=2, resume_seconds=10, poison_losses=99).start()
    talk.send()
    talk.lose()
    talk.call()
    talk.failed(8, "POOL_FULL")
    talk.resume(1)
    talk.lose()
    while (due := talk.one.call_due()) is not None:
        talk.now = due
        talk.call()
        talk.lose()
    assert str(talk.error()) == "UNAVAILABLE: step 1 could not be resumed within 10 s: the connection broke"


def test_a_refusal_says_more_than_that_another_server_hangs() -> None:
    talk = Talk(targets=2, reply_seconds=5, resume_seconds=5).start()
    talk.send()
    talk.lose()
    talk.call()
    talk.failed(8, "POOL_FULL")
    talk.now = talk.one.call_due() or 0.0
    talk.call()
    with pytest.raises(Overloaded, match="^POOL_FULL: step 1 could not be resumed within 10 s: text$"):
        for _ in range(3):
            talk.now += talk.one.patience(talk.now) or 0.0
            assert not talk.one.overdue(talk.now)


def test_with_progress_the_time_to_resume_begins_anew() -> None:
    talk = Talk(resume_seconds=10, poison_losses=99).start()
    for step in range(1, 11):
        talk.send()
        talk.lose()
        talk.now += 9
        talk.resume(1)
        talk.now += 9
        talk.answer(*range(1, step + 1))
    assert talk.one.error is None


def test_a_newer_token_is_progress() -> None:
    talk = Talk(resume_seconds=10, poison_losses=99).start()
    for step in range(1, 9):
        talk.send()
        talk.answer(step)
    talk.send()
    for step in range(1, 9):
        talk.lose()
        talk.now += 9
        talk.resume(step)
        talk.token(step)
    assert talk.one.error is None


def test_the_token_of_a_failed_run_is_progress_once_a_server_says_for_which_step() -> None:
    talk = Talk(resume_seconds=10, poison_losses=99).start()
    for _ in range(4):
        talk.send()
    talk.answer(1, 2, 3)
    for step in range(1, 4):
        talk.failed(13, "RUN_FAILED", b"token")
        talk.now += 9
        talk.resume(step + 1)
    for _ in range(20):  # and none where it is for the same one
        talk.failed(13, "RUN_FAILED", b"token")
        if talk.one.call_due() is None:
            break
        talk.resume(4)
    assert "step 4 could not be resumed within 10 s" in str(talk.error())


def replayed(repeats: int, **settings: Any) -> Talk:
    """A sequence of a lost stream of which so many outputs are replayed, one by one, before the next."""
    talk = Talk(resume_seconds=10, **settings).start(window=1)
    for step in range(1, repeats + 1):
        talk.send()
        talk.answer(step)
    talk.send()
    talk.lose()
    return talk


@pytest.mark.parametrize("reply_seconds", [None, 30])
@pytest.mark.parametrize("reached", [0, 3, 5])
def test_a_replay_that_is_lost_at_the_same_place_again_and_again_is_given_up(
    reached: int, reply_seconds: float | None
) -> None:
    """Although each time the stream opens, and says what the caller has already."""
    talk = replayed(5, reply_seconds=reply_seconds, poison_losses=99)
    began = talk.now
    while talk.one.error is None and talk.now < began + 100:
        talk.resume(1, window=1)
        talk.answer(*range(1, reached + 1))
        talk.now += 1
        talk.lose()
    error = talk.error()
    assert talk.now < began + 15
    assert isinstance(error, Unavailable)
    assert str(error) == "UNAVAILABLE: step 6 could not be resumed within 10 s: the connection broke"


def test_a_replay_that_falls_silent_at_the_same_place_again_and_again_is_a_timeout() -> None:
    talk = replayed(5, reply_seconds=5)
    began = talk.now
    with pytest.raises(ReplyTimeout, match="no answer to step 6 within 15 s"):
        while talk.now < began + 100:
            talk.resume(1, window=1)
            talk.answer(1, 2, 3)
            talk.now += talk.one.patience(talk.now) or 0.0
            assert talk.one.overdue(talk.now)


def test_a_replay_that_comes_further_each_time_is_not_given_up() -> None:
    talk = replayed(8)
    for reached in range(1, 8):
        talk.resume(1, window=1)
        talk.now += 9
        assert not talk.one.overdue(talk.now)
        talk.answer(*range(1, reached + 1))
        talk.lose()
    assert talk.one.error is None
    talk.resume(1, window=1)
    talk.answer(*range(1, 10))
    assert talk.taken() == [(step, 0) for step in range(1, 10)]


def test_servers_that_close_the_sequence_again_and_again_are_given_up() -> None:
    talk = Talk(resume_seconds=10).start()
    talk.send()
    began = talk.now
    while talk.one.error is None and talk.now < began + 100:
        talk.closed(pb.REBALANCE, 0, b"token 0")
        if talk.one.call_due() is not None:
            talk.resume(1)
    error = talk.error()
    assert talk.now < began + 10
    assert isinstance(error, SequenceEnded)
    assert "step 1 could not be resumed within 10 s: the server ended the sequence: REBALANCE" in str(error)
    assert (error.reason, error.resume_token) == ("REBALANCE", b"token 0")


def test_the_time_in_which_the_caller_does_not_read_is_no_time_to_resume() -> None:
    talk = Talk(resume_seconds=10, buffer_bytes=100, poison_losses=99).start()
    talk.send()
    talk.send()
    talk.answer(1)
    talk.lose()
    talk.resume(1)
    assert talk.one.full
    talk.now += 1000
    talk.taken()
    talk.lose()
    assert talk.resume(1) == ["1", "2"]


@pytest.mark.parametrize(
    "code,reason,kind",
    [
        (9, "TOKEN_INVALID", Refused),
        (5, "UNKNOWN_MODEL", NotFound),
        (3, "WRONG_SETTING", errors.InvalidInput),
    ],
)
def test_where_resuming_is_impossible_the_error_says_why(
    code: int, reason: str, kind: type[Exception]
) -> None:
    talk = Talk().start()
    talk.send()
    talk.lose()
    talk.call()
    talk.failed(code, reason)
    error = talk.error()
    assert isinstance(error, kind)
    assert str(error) == f"{reason}: step 1 could not be resumed: text"


def test_a_token_that_one_server_does_not_take_is_shown_to_each_other_once() -> None:
    """In the middle of a rollout."""
    talk = Talk(targets=3).start()
    talk.send()
    talk.lose()
    for reason in ("TOKEN_INVALID", "UNKNOWN_MODEL"):
        talk.now = talk.one.call_due() or 0.0
        talk.call()
        talk.failed(9, reason)
    assert talk.resume(1) == ["1"]
    talk.answer(1)
    talk.send()
    talk.lose()
    for _ in range(3):  # the next loss asks all of them again
        talk.now = talk.one.call_due() or 0.0
        talk.call()
        talk.failed(9, "TOKEN_INVALID")
    assert str(talk.error()) == "TOKEN_INVALID: step 2 could not be resumed: text"


def test_a_failed_run_with_a_token_is_a_lost_stream() -> None:
    talk = Talk().start()
    for _ in range(3):
        talk.send()
    talk.answer(1)
    talk.failed(13, "RUN_FAILED", b"token 1")
    assert len(talk.one._replay) == 3  # nothing said which of them the token covers …
    assert talk.call().resume_token == b"token 1"
    assert talk.opened(next_step=2) == ["2", "3"]
    assert len(talk.one._replay) == 2  # … before this


@pytest.mark.parametrize("reason,token", [("RUN_FAILED", b""), ("STATE_NOT_FINITE", b"token 0")])
def test_a_sequence_that_failed_of_its_own_has_ended(reason: str, token: bytes) -> None:
    talk = Talk().start()
    talk.send()
    talk.failed(13, reason, token)
    assert isinstance(talk.error(), SequenceFailed)


def test_a_late_word_about_a_call_that_is_over_changes_nothing() -> None:
    talk = Talk().start()
    talk.send()
    talk.lose()
    talk.lose()
    assert talk.answer(1) == []
    assert talk.taken() == []
    assert talk.resume(1) == ["1"]


# -- the first opening -----------------------------------------------------------------------------


def test_the_first_opening_tries_each_target_once() -> None:
    talk = Talk(targets=3)
    talk.call()
    talk.lose()
    talk.call()
    talk.failed(8, "POOL_FULL")
    talk.call()
    talk.failed(14, "DRAINING")
    with pytest.raises(Unavailable, match="^DRAINING: text$"):
        talk.one.is_open()
    assert talk.one.call_due() is None


def test_behind_the_only_name_another_server_may_stand_than_the_one_that_drains() -> None:
    talk = Talk()
    talk.call()
    for pause in (0, 0.05):
        talk.failed(14, "DRAINING")
        due = talk.one.call_due()
        assert due is not None
        assert due - talk.now == pytest.approx(pause)
        talk.now = due
        talk.call()
    talk.failed(14, "DRAINING")
    with pytest.raises(Unavailable, match="^DRAINING: text$"):
        talk.one.is_open()


def test_a_first_opening_that_finds_no_room_says_so_although_the_last_target_is_dead() -> None:
    talk = Talk(targets=2)
    talk.call()
    talk.failed(8, "POOL_FULL")
    talk.call()
    talk.lose()
    with pytest.raises(Overloaded, match="^POOL_FULL: text$"):
        talk.one.is_open()


def test_a_first_opening_that_finds_no_room_says_so_although_the_last_target_hangs() -> None:
    talk = Talk(targets=2)
    talk.call()
    talk.failed(8, "POOL_FULL")
    talk.call()
    talk.now += 10
    with pytest.raises(Overloaded, match="^POOL_FULL: text$"):
        talk.one.overdue(talk.now)


def test_a_first_opening_that_is_wrong_is_not_tried_elsewhere() -> None:
    talk = Talk(targets=2)
    talk.call()
    talk.failed(5, "UNKNOWN_MODEL")
    with pytest.raises(NotFound):
        talk.one.is_open()


def test_a_first_opening_that_is_wrong_says_so_although_another_target_was_full() -> None:
    talk = Talk(targets=2)
    talk.call()
    talk.failed(8, "POOL_FULL")
    talk.call()
    talk.lose(Refused("not permitted", code="PERMISSION_DENIED"))
    with pytest.raises(Refused, match="^PERMISSION_DENIED: not permitted$"):
        talk.one.is_open()


def test_a_target_that_does_not_open_is_left_for_the_next() -> None:
    talk = Talk(targets=2)
    talk.call()
    talk.now += 10
    assert talk.one.overdue(talk.now)
    talk.call()
    talk.now += 10
    with pytest.raises(ReplyTimeout, match="did not open the sequence within 10 s"):
        talk.one.overdue(talk.now)


# -- poison ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [1, 2, 3])
def test_a_chunk_that_kills_its_servers_is_poisoned(losses: int) -> None:
    talk = Talk(poison_losses=losses).start()
    talk.send()
    talk.answer(1)
    for loss in range(losses):
        talk.send() if loss == 0 else None
        talk.lose()
        if loss < losses - 1:
            assert talk.resume(1) == ["1", "2"]
            talk.answer(1)
    error = talk.error()
    assert isinstance(error, PoisonedChunk)
    assert error.step == 2
    assert f"{losses} streams were lost at step 2" in str(error)


def test_an_end_that_kills_its_servers_is_poisoned_as_well() -> None:
    talk = Talk().start()
    talk.send()
    talk.answer(1)
    talk.end()
    talk.lose()
    talk.resume(1)
    talk.lose()
    error = talk.error()
    assert isinstance(error, PoisonedChunk)
    assert error.step == 1
    assert "lost at End" in str(error)


def test_a_new_output_clears_the_suspicion() -> None:
    talk = Talk().start()
    talk.send()
    for step in range(1, 6):
        talk.send()
        talk.lose()
        talk.resume(1)
        talk.answer(*range(1, step + 1))
    assert talk.one.error is None


def test_calls_that_never_had_the_chunk_do_not_count() -> None:
    talk = Talk().start(window=1)
    talk.send()
    talk.answer(1)
    talk.send()
    talk.lose()  # this one counts
    for _ in range(3):
        talk.resume(1, window=1)
        talk.lose()  # while the first chunk was replayed
    talk.resume(1, window=1)
    talk.answer(1)
    talk.closed(pb.DRAINING, 1, b"token 1")
    talk.now += 2
    talk.call()
    talk.failed(14, "DRAINING")
    assert talk.one.error is None
    talk.resume(2)
    talk.lose()
    assert isinstance(talk.error(), PoisonedChunk)


# -- what is overdue -------------------------------------------------------------------------------


def test_a_call_that_falls_silent_is_given_up() -> None:
    talk = Talk(reply_seconds=5).start()
    talk.send()
    assert talk.one.patience(talk.now) == 5
    talk.now += 4
    assert not talk.one.overdue(talk.now)
    talk.now += 1
    assert talk.one.overdue(talk.now)
    assert talk.resume(1) == ["1"]
    talk.answer(1)
    assert talk.one.patience(talk.now) is None


def test_a_reply_that_nobody_sends_is_a_timeout_in_the_end() -> None:
    talk = Talk(reply_seconds=5, resume_seconds=12, poison_losses=99).start()
    talk.send()
    began = talk.now
    with pytest.raises(ReplyTimeout, match="no answer to step 1 within 17 s"):
        for _ in range(20):
            talk.now += talk.one.patience(talk.now) or 0.0
            if talk.one.overdue(talk.now):
                talk.resume(1)
    assert talk.now == began + 17


def test_a_long_replay_is_no_timeout() -> None:
    talk = Talk(reply_seconds=5, resume_seconds=5).start()
    for step in range(1, 6):
        talk.send()
        talk.answer(step)
    for last in range(6, 9):  # each loss is replayed as far
        talk.send()
        talk.lose()
        talk.resume(1)
        for step in range(1, last + 1):
            talk.now += 4
            assert not talk.one.overdue(talk.now)
            talk.answer(step)


def test_a_resume_that_does_not_open_is_given_up_after_timeout_seconds() -> None:
    talk = Talk(timeout_seconds=2).start()
    talk.send()
    talk.lose()
    talk.call()
    assert talk.one.patience(talk.now) == 2
    talk.now += 2
    assert talk.one.overdue(talk.now)
    assert talk.resume(1) == ["1"]


def test_without_resuming_a_late_reply_is_a_timeout_and_the_sequence_lives() -> None:
    talk = Talk(reply_seconds=5, resume_seconds=0).start()
    talk.send()
    talk.now += 5
    with pytest.raises(ReplyTimeout, match="no answer to step 1 within 5 s"):
        talk.one.overdue(talk.now)
    talk.answer(1)
    assert talk.taken() == [(1, 0)]


def test_nothing_is_overdue_while_the_caller_does_not_read() -> None:
    talk = Talk(buffer_bytes=100).start()
    talk.send()
    talk.send()
    talk.answer(1)
    assert talk.one.full
    assert talk.one.patience(talk.now) is None
    talk.now += 1000
    assert not talk.one.overdue(talk.now)
    talk.taken()
    assert talk.one.patience(talk.now) == 30
