"""What the log holds of a sequence: one line for its end, and nothing of what its caller sent."""

from __future__ import annotations

import json
import logging
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto.serving.log_format import formatter
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb

from .running import Gate, engine_of, wait_for
from .wire import Conversation, chunk, connect, ending, opening, tensor, text

# Each with what would give it away.
VALUE, SNOWMAN = 735_711, "☃"
MARKS = (str(VALUE), f"{VALUE:,}", f"{float(VALUE):e}", np.float32(VALUE).tobytes().hex(), SNOWMAN, "2603")
# By model: the step that is sent, why its sequence ends, and what of it the error quotes.
FAILING: dict[str, tuple[pb.Tensor, str, str]] = {
    "speaker": (text(f"b{SNOWMAN}"), "OUT_OF_RANGE_VALUE", SNOWMAN),
    "reader": (text(b"a\xff\x26\x03"), "WRONG_ENCODING", "0xff"),
    "lookup": (tensor([VALUE], "int64"), "OUT_OF_RANGE_VALUE", str(VALUE)),
    "unchecked": (tensor([VALUE], "int64"), "RUN_FAILED", str(VALUE)),
}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """As both formats have them."""
    kinds: Any = ("console", "json")
    return [formatter(kind).format(record) for kind in kinds for record in list(caplog.records)]


def endings(caplog: pytest.LogCaptureFixture, sequence: str) -> list[dict[str, Any]]:
    read = [json.loads(formatter("json").format(record)) for record in list(caplog.records)]
    return [line for line in read if line.get("sequence") == sequence]


@pytest.mark.parametrize("model", FAILING)
def test_an_error_is_told_its_caller_and_the_log_has_its_reason_alone(
    model: str, conversation: Conversation, caplog: pytest.LogCaptureFixture
) -> None:
    sent, reason, quoted = FAILING[model]
    caplog.set_level(logging.DEBUG)
    conversation.send(opening(model), chunk(1, sent))
    opened = conversation.opened()
    assert quoted in conversation.failed(reason).message
    wait_for(lambda: bool(endings(caplog, opened.sequence_id)), "the line of its end")
    (line,) = endings(caplog, opened.sequence_id)
    assert (line["model"], line["ending"], line["reason"], line["steps"]) == (model, "FAILED", reason, 0)
    assert not [line for line in lines(caplog) if quoted in line or any(mark in line for mark in MARKS)]


def test_a_batch_that_fails_quotes_nobodys_input(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    sent, _, _ = FAILING["unchecked"]
    before = engine_of(server, "unchecked").metrics.ended["FAILED"]
    caplog.set_level(logging.DEBUG)
    with (
        Gate(engine_of(server, "unchecked")) as gate,
        connect(server.port) as channel,
        Conversation(channel) as conversation,
    ):
        conversation.send(opening("unchecked", sequence=3), chunk(1, tensor([1], "int64"), sequence=3))
        gate.wait_for_arrival()  # what comes now is one batch
        for n in (1, 2):
            conversation.send(opening("unchecked", sequence=n), chunk(1, sent, sequence=n))
        wait_for(lambda: len(engine_of(server, "unchecked")._inbox) == 4, "both, and their chunks")
        gate.open()
        wait_for(lambda: engine_of(server, "unchecked").metrics.ended["FAILED"] == before + 2, "both")
    assert "running its rows alone" in caplog.text
    told = [*lines(caplog), *capfd.readouterr()]
    assert not [line for line in told if any(mark in line for mark in MARKS)]


def test_a_sequence_that_does_well_leaves_one_line_and_no_value(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with connect(server.port) as channel, Conversation(channel) as conversation:
        conversation.send(opening("accumulator"), chunk(1, [float(VALUE)]), chunk(2, [1.0]), ending())
        opened = conversation.opened()
        assert conversation.values(1) == [float(VALUE)]
        assert conversation.values(2) == [float(VALUE + 1)]
        assert conversation.closed().reason == pb.END
        conversation.done_sending()
        assert conversation.rest() == []
        assert conversation.call.code() == grpc.StatusCode.OK
    wait_for(lambda: bool(endings(caplog, opened.sequence_id)), "the line of its end")
    (line,) = endings(caplog, opened.sequence_id)
    assert (line["ending"], line["steps"], line["level"]) == ("END", 2, "info")
    assert not [line for line in lines(caplog) if any(mark in line for mark in MARKS)]
