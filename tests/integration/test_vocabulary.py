"""What a manifest can say, from the wire to the graph and back: on both transports and both pools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto import Client, InvalidInput, SequenceFailed, Stream
from tenuto.serving.server import Server
from tests import toys
from tests.unit.fakes import f32

from .oip_wire import InferStream, step, stub
from .running import assert_nothing_is_left, serving, wait_for
from .wire import connect

STATE = {"input": "total", "output": "total_next", "dtype": "float32", "shape": ["batch", 1]}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vocabulary")
    toys.write(root, "teller", toys.teller())
    toys.write(root, "counter", toys.counter())
    toys.write(root, "single", toys.single())
    toys.write(root, "given", toys.accumulator(states=[STATE | {"init": "given"}]))
    return root


@pytest.fixture(scope="module", params=["http2", "threads"])
def told(request: pytest.FixtureRequest, repository: Path) -> Iterator[Server]:
    with serving(repository, vetted=True, transport=request.param, checkpoint_every=1) as server:
        yield server


@pytest.fixture
def client(told: Server) -> Iterator[Client]:
    with Client(f"127.0.0.1:{told.port}") as client:
        yield client
    assert_nothing_is_left(told)


def token_of(stream: Stream) -> bytes:
    """One is sent behind every output."""
    wait_for(lambda: stream.resume_token != b"", "a resume token")
    return stream.resume_token


# Controls.


def test_a_model_is_told_where_each_sequence_stands(client: Client) -> None:
    """Its first run, its last samples, and a number of its own; its own reset wins over the state's init."""
    with client.stream("teller") as one, client.stream("teller") as other:
        for step in range(3):
            one.send(f32(step + 1), last=step == 2)
            other.send(f32(10))
        mine = [next(one)["y"].tolist() for _ in range(3)]
        others = [next(other)["y"].tolist() for _ in range(3)]
    number, its = mine[0][4], others[0][4]
    assert mine == [[1, 1, 0, 1, number], [3, 0, 0, 1, number], [6, 0, 1, 1, number]]
    assert others == [[10, 1, 0, 1, its], [20, 0, 0, 1, its], [30, 0, 0, 1, its]]
    assert number != its


def test_a_resumed_sequence_does_not_start_again(client: Client) -> None:
    """Its number stays its own, too."""
    with client.stream("teller") as stream:
        stream.send(f32(5))
        before = next(stream)["y"].tolist()
        token = token_of(stream)
    with client.stream("teller", resume_token=token) as stream:
        stream.send(f32(6))
        assert next(stream)["y"].tolist() == [11, 0, 0, 1, before[4]]


# Frames that the graph counts.


def test_each_row_has_as_many_frames_as_the_graph_counts(client: Client) -> None:
    with client.stream("counter") as one, client.stream("counter") as other:
        one.send(f32([2, 5, 5]))
        other.send(f32([0, 1, 1]))
        assert next(one)["y"].tolist() == [2, 7]
        assert next(other)["y"].tolist() == []


def test_a_count_that_the_output_does_not_hold_ends_its_sequence_alone(client: Client) -> None:
    with client.stream("counter") as guilty, client.stream("counter") as other:
        other.send(f32([1, 1, 1]))
        guilty.send(f32([9, 5, 5]))
        told = "output 'y' has 3 frames, and the graph counts 9, in step 1"
        with pytest.raises(SequenceFailed, match=told):
            next(guilty)
        assert next(other)["y"].tolist() == [1]


# States.


def test_a_state_without_rows_belongs_to_one_sequence_at_a_time(client: Client) -> None:
    """The graph runs one row; sequences interleave all the same."""
    with client.stream("single") as one, client.stream("single") as other:
        for _ in range(2):
            one.send(f32([1, 2]))
            other.send(f32([10]))
        assert [next(one)["y"].tolist() for _ in range(2)] == [[1, 3], [4, 6]]
        assert [next(other)["y"].tolist() for _ in range(2)] == [[10], [20]]


def test_a_sequence_begins_where_its_client_says(client: Client) -> None:
    with client.stream("given", initial={"total": f32([100])}) as stream:
        stream.send(f32([1, 2]))
        assert next(stream)["y"].tolist() == [101, 103]
        token = token_of(stream)
    with client.stream("given", initial={"total": f32([7])}, resume_token=token) as stream:
        stream.send(f32([1]))
        assert next(stream)["y"].tolist() == [104]


WRONG = {
    "none": ({}, "Open gives no state initial values, model 'given' asks for total"),
    "another name": ({"sum": f32([1])}, "Open gives sum initial values"),
    "one more": ({"total": f32([1]), "y": f32([1])}, "Open gives total, y initial values"),
    "shape": ({"total": f32([[1]])}, r"initial 'total' has shape \[1, 1\]"),
    "dtype": ({"total": np.array([1.0])}, "initial 'total' is float64, expected float32"),
    "NaN": ({"total": f32([np.nan])}, "initial 'total' holds NaN or Inf"),
}


@pytest.mark.parametrize("initial, message", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_a_beginning_is_refused(
    client: Client, initial: dict[str, np.ndarray], message: str
) -> None:
    with (
        pytest.raises((InvalidInput, SequenceFailed), match=message),
        client.stream("given", initial=initial) as s,
    ):
        s.send(f32([1]))
        next(s)


def test_a_model_that_begins_by_itself_takes_no_beginning(client: Client) -> None:
    with (
        pytest.raises(InvalidInput, match="model 'single' asks for none"),
        client.stream("single", initial={"total": f32([1])}) as stream,
    ):
        stream.send(f32([1]))
        next(stream)


# The Open Inference Protocol.


def test_end_of_a_sequence_there_is_what_a_model_is_told(told: Server) -> None:
    with connect(told.port) as channel, InferStream(channel) as stream:
        x: dict[str, Any] = {"model": "teller", "shape": [1]}
        flags_of: list[dict[str, Any]] = [{"start": True}, {}, {"end": True}]
        for number, flags in enumerate(flags_of):
            stream.send(step(9, number + 1.0, **x, **flags))
            (answer,) = stream.totals(1)
            assert answer[:4] == [[1, 1, 0, 1], [3, 0, 0, 1], [6, 0, 1, 1]][number]


def test_that_protocol_has_no_word_for_where_a_state_begins(told: Server) -> None:
    with connect(told.port) as channel, pytest.raises(grpc.RpcError, match="tenuto.v1.Open has") as caught:
        stub(channel).ModelInfer(step(1, 2.0, model="given", start=True))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
