"""Messages that are taken by their form get the answers that parsed ones get, whatever comes between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.chunk_form import ChunkForm
from tenuto.serving.sequence import Ending
from tenuto.serving.stream import Stream
from tenuto.v1 import tenuto_pb2 as pb
from tests.integration.wire import chunk, ending, opening

from .core import Core

# What a client does next on sequence 1 or 2: goes on with so many values, repeats, skips a step, ends, opens;
# and how many events it puts into a message.
KINDS = ["one", "one", "one", "two", "again", "gap", "end", "open", "turn"]
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 1, 1, 2])), max_size=30)
TURNS = st.just([("one", 1), ("one", 2)] * 8)  # both, in turn: what two events a message are mostly


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
            made.append(chunk(step[key], values, sequence=key))
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


@pytest.mark.parametrize("together", [1, 2])
def test_the_third_message_of_a_kind_is_not_parsed(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    parsed: list[int] = []
    own = Stream._parse

    def parse(stream: Stream, message: bytes) -> None:
        parsed.append(len(pb.StreamRequest.FromString(message).events))
        own(stream, message)

    monkeypatch.setattr(Stream, "_parse", parse)
    made = events([("one", key) for _ in range(4) for key in range(1, 1 + together)])
    outputs = [reply for reply in answers(made, together) if reply.HasField("output")]
    assert len(outputs) == 4 * together
    assert sum(parsed) == 2 + 2 * together  # the Opens, and the first two messages


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
