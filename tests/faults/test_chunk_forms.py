"""Messages that are taken by their form get the answers that parsed ones get, whatever comes between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.chunk_form import ChunkForm
from tenuto.serving.sequence import Ending
from tenuto.v1 import tenuto_pb2 as pb
from tests.integration.wire import chunk, ending, opening

from .core import Core

Send = Callable[[pb.Event], None]
# What a client does next on sequence 1 or 2: goes on with so many values, repeats, skips a step, ends, opens.
ACTIONS = st.tuples(st.sampled_from(["one", "one", "one", "two", "again", "gap", "end", "open", "turn"]),
                    st.sampled_from([1, 1, 1, 2]))  # fmt: skip


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


def answers(made: list[pb.Event | None]) -> list[pb.Reply]:
    """Without what differs from run to run."""
    core = Core()
    stream, call = core.connect()
    for event in made:
        if event is not None:
            stream.received(pb.StreamRequest(events=[event]).SerializeToString())
        else:
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


@given(st.lists(ACTIONS, max_size=30))
def test_a_form_changes_no_answer(actions: list[tuple[str, int]]) -> None:
    made = events(actions)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ChunkForm, "of", lambda *_: None)
        parsed = answers(made)
    assert answers(made) == parsed


def test_the_third_message_of_a_kind_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bytes | None] = []
    own = ChunkForm.take

    def take(form: ChunkForm, message: bytes) -> bytes | None:
        taken.append(own(form, message))
        return taken[-1]

    monkeypatch.setattr(ChunkForm, "take", take)
    answers(events([("one", 1), ("turn", 1)] * 5))
    assert len([samples for samples in taken if samples]) == 3


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
