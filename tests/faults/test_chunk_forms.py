"""Messages that are taken by their form get the answers that parsed ones get, whatever comes between them."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving import stream as stream_module
from tenuto.serving.chunk_form import ChunkForm
from tenuto.serving.sequence import Ending
from tenuto.serving.stream import Stream
from tenuto.serving.varint import varint
from tenuto.v1 import tenuto_pb2 as pb
from tests.integration.wire import chunk, ending, opening

from .core import Core

# What a client does next on sequence 1 or 2: goes on with so many values, repeats, skips a step, ends, opens,
# sends a chunk without a tensor, or with two.
KINDS = ["one", "one", "one", "two", "again", "gap", "end", "open", "turn", "bare", "pair"]
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 1, 1, 2])), max_size=30)
# Both, in turn: what two events a message are mostly.
TURNS = st.sampled_from([[("one", 1), ("one", 2)] * 8, [("one", 2), ("one", 1)] * 8])


def events(actions: list[tuple[str, int]]) -> list[pb.Event | None]:
    """None: the server takes a turn."""
    step = {1: 0, 2: 0}
    made: list[pb.Event | None] = [opening("accumulator", 1), opening("accumulator", 2)]
    for number, (action, key) in enumerate(actions):
        values = [float(number)] * (2 if action == "two" else 1)
        if action == "turn":
            made.append(None)
        elif action == "end":
            made.append(ending(sequence=key))
        elif action == "open":
            made.append(opening("accumulator", key))
            step[key] = 0
        elif action == "again":
            made.append(chunk(max(step[key], 1), values, sequence=key))
        else:
            step[key] += 2 if action == "gap" else 1
            inputs = {"bare": (), "pair": (values, values)}.get(action, (values,))
            made.append(chunk(step[key], *inputs, sequence=key))
    return made


def answers(made: list[pb.Event | None], together: int = 1) -> list[pb.Reply]:
    """To so many events a message; without what differs from run to run."""
    core = Core()
    stream, call = core.connect()
    for at in range(0, len(made), together):
        batch = made[at : at + together]
        events = [event for event in batch if event is not None]
        stream.received(pb.StreamRequest(events=events).SerializeToString())
        if len(events) < len(batch):
            core.turn()
    core.settle()
    stream.terminated()
    core.assert_nothing_is_left()
    replies = call.replies
    for reply in replies:
        said = getattr(reply, reply.WhichOneof("reply") or "")
        for field in {"sequence_id", "timing", "resume_token"} & set(said.DESCRIPTOR.fields_by_name):
            said.ClearField(field)
    return replies


@given(st.one_of(ACTIONS, TURNS), st.lists(ACTIONS, max_size=1), st.integers(1, 3))
def test_a_form_changes_no_answer(
    first: list[tuple[str, int]], then: list[list[tuple[str, int]]], together: int
) -> None:
    made = events([*first, *(action for actions in then for action in actions)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ChunkForm, "take", lambda *_: None)
        parsed = answers(made, together)
    assert answers(made, together) == parsed


@pytest.mark.parametrize("together, sequences", [(1, 1), (1, 2), (2, 2)])
def test_a_sequences_third_chunk_of_a_kind_is_not_parsed(
    monkeypatch: pytest.MonkeyPatch, together: int, sequences: int
) -> None:
    parsed: list[int] = []
    own = Stream._parse

    def parse(stream: Stream, message: bytes, at: int, taken: int, now: float) -> None:
        parsed.append(len(pb.StreamRequest.FromString(message[at:]).events))
        own(stream, message, at, taken, now)

    monkeypatch.setattr(Stream, "_parse", parse)
    made = events([("one", key) for _ in range(4) for key in range(1, 1 + sequences)])
    outputs = [reply for reply in answers(made, together) if reply.HasField("output")]
    assert len(outputs) == 4 * sequences
    assert sum(parsed) == 2 + 2 * sequences  # the Opens, and the first two chunks of each


def test_a_chunk_for_a_sequence_that_the_server_ended_does_not_reach_the_engine() -> None:
    core = Core()
    stream, call = core.connect()
    *made, last = (event for event in events([("one", 1)] * 4) if event is not None)
    for event in made:
        stream.received(pb.StreamRequest(events=[event]).SerializeToString())
        core.settle()
    engine = core.catalogue.engines[0]
    for sequence in engine.sequences():
        engine.close_by_id(sequence.id, Ending.EVICTED)
    core.settle()
    stream.received(pb.StreamRequest(events=[last]).SerializeToString())
    core.assert_nothing_is_left()
    assert [reply.closed.reason for reply in call.replies[-2:]] == [pb.EVICTED] * 2
    assert engine.metrics.chunks == {"answered": 3}


def sent(monkeypatch: pytest.MonkeyPatch, messages: list[bytes]) -> tuple[list[pb.Reply], int]:
    """The replies, and how many forms were made for it."""
    made: list[ChunkForm] = []
    own = ChunkForm.of

    def of(event: pb.Event) -> ChunkForm:
        made.append(own(event))
        return made[-1]

    monkeypatch.setattr(ChunkForm, "of", of)
    core = Core()
    stream, call = core.connect()
    for message in messages:
        stream.received(message)
        core.settle()
    stream.terminated()
    core.assert_nothing_is_left()
    return call.replies, len(made)


@pytest.mark.parametrize("together", [1, 2, 3, 4])
def test_a_client_that_writes_in_another_way_is_parsed_and_costs_no_more(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    unknown = b"\x98\x06\x01"  # a field that we do not know, in each event
    bodies = [event.SerializeToString() + unknown for event in events([("one", 1)] * 118) if event]
    alone = [b"\x0a" + varint(len(body)) + body for body in bodies]
    messages = [b"".join(alone[at : at + together]) for at in range(0, len(alone), together)]
    replies, forms = sent(monkeypatch, messages)
    outputs = [reply.output.step for reply in replies if reply.HasField("output")]
    assert outputs == list(range(1, 119))
    assert forms <= 8


@pytest.mark.parametrize("together", [1, 2, 3, 4])
def test_a_form_of_use_lasts(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Past the steps where it is made anew, however many chunks a message has."""
    opens, *made = (event for event in events([("one", 1)] * 400) if event is not None)
    groups = [[opens], *(made[at : at + together] for at in range(0, len(made), together))]
    messages = [pb.StreamRequest(events=group).SerializeToString() for group in groups]
    replies, forms = sent(monkeypatch, messages)
    assert len([reply for reply in replies if reply.HasField("output")]) == 400
    assert 2 <= forms <= 4  # at first, and at step 128


def test_a_chunk_without_a_tensor_among_others_ends_its_sequence_alone() -> None:
    core = Core()
    stream, call = core.connect()
    first = [event for event in events([("one", 2)]) if event is not None]
    stream.received(pb.StreamRequest(events=first).SerializeToString())
    core.settle()
    wrong = [chunk(1, sequence=1), chunk(2, [1.0], sequence=1), chunk(2, [1.0], sequence=2)]
    stream.received(pb.StreamRequest(events=wrong).SerializeToString())
    core.settle()
    assert [r.failed.reason for r in call.replies if r.HasField("failed")] == ["WRONG_INPUT"]
    assert [r.sequence for r in call.replies if r.HasField("output")] == [2, 2]
    stream.terminated()
    core.assert_nothing_is_left()


def test_no_form_of_before_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a number that is opened again would meet it."""
    core = Core()
    stream, _ = core.connect()
    made = events([action for _ in range(6) for action in [("one", 1)] * 3 + [("two", 1)] * 3])
    for event in made:
        stream.received(pb.StreamRequest(events=[event] if event else []).SerializeToString())
        core.settle()
    assert len(stream._forms) == 1
    stream.received(pb.StreamRequest(events=[ending(sequence=1)]).SerializeToString())
    core.settle()
    assert not stream._forms
    own = ChunkForm.of

    def of(event: pb.Event) -> ChunkForm:
        stream.terminated()  # as it is learnt
        return own(event)

    monkeypatch.setattr(ChunkForm, "of", of)
    for step in (1, 2):
        stream.received(pb.StreamRequest(events=[chunk(step, [1.0], sequence=2)]).SerializeToString())
    assert not stream._forms
    core.assert_nothing_is_left()


def test_one_that_is_parsed_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sequence's chunks are of all lengths; the first one's form is made once."""
    made: list[pb.Event] = []
    for n in range(40):
        made.append(chunk(n + 1, [1.0], sequence=1))
        made.append(chunk(n + 1, [1.0] * (n % 4 + 1), sequence=2))
    opens = [opening("accumulator", 1), opening("accumulator", 2)]
    messages = [pb.StreamRequest(events=[event]).SerializeToString() for event in opens + made]
    replies, forms = sent(monkeypatch, messages)
    assert len([reply for reply in replies if reply.HasField("output")]) == 80
    assert forms == 1


def test_a_form_that_was_of_use_may_be_made_anew_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    actions = [("one", 1)] * 4 + [("two", 1)] * 4
    made = [event for event in events(actions * 20) if event is not None]
    messages = [pb.StreamRequest(events=[event]).SerializeToString() for event in made]
    replies, forms = sent(monkeypatch, messages)
    outputs = [reply.output.step for reply in replies if reply.HasField("output")]
    assert outputs == list(range(1, 161))
    assert forms >= 40


def test_the_limit_on_events_holds_for_those_that_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_EVENTS", 3)
    core = Core()
    stream, call = core.connect()
    opens, one, two, three = (
        pb.StreamRequest(events=[event for event in pair if event is not None]).SerializeToString()
        for pair in zip(*[iter(events([("one", key) for _ in range(3) for key in (1, 2)]))] * 2, strict=True)
    )
    for message in (opens, one, two):
        stream.received(message)
        core.settle()
    late = pb.StreamRequest(events=[ending(sequence=1), ending(sequence=2)]).SerializeToString()
    stream.received(three + late)
    assert call.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    core.assert_nothing_is_left()


def test_many_sequences_share_a_few_lengths_of_heads() -> None:
    """Each is looked for in turn, so there must be few, however many sequences a stream has."""
    core = Core(max_sequences=1_000)
    stream, _ = core.connect()
    for key in range(600):
        stream.received(pb.StreamRequest(events=[opening("accumulator", key)]).SerializeToString())
    for step in range(1, 4):
        values = [1.0] * 40  # so that an event's length takes two bytes with some keys
        events = [chunk(step, values, sequence=key) for key in range(600)]
        stream.received(pb.StreamRequest(events=events).SerializeToString())
        core.settle()
    assert len(stream._forms) == 600
    assert len(stream._forms.lengths) <= 3
    stream.terminated()
    core.assert_nothing_is_left()


def test_more_chunks_than_a_message_may_have_are_refused_though_none_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "MAX_EVENTS", 3)
    core = Core()
    stream, call = core.connect()
    made = [event for event in events([("one", 1)] * 6) if event is not None]
    for at in (0, 2, 3):
        stream.received(pb.StreamRequest(events=made[at : at + 1 + (at == 0)]).SerializeToString())
        core.settle()
    assert len(stream._forms) == 1
    stream.received(pb.StreamRequest(events=made[4:]).SerializeToString())  # four, and all as expected
    assert call.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    core.assert_nothing_is_left()
