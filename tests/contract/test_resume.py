"""The second promise: a sequence goes on on another server, and gives what it would have given, bit for bit.

Each sequence is cut off at random, and goes on wherever it happens to be opened, from the last token that it
got. What it had after that token is sent again and must be answered the same again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys
from tests.integration.running import ALL_TRANSPORTS, assert_nothing_is_left, serving
from tests.integration.wire import Conversation, array, chunk, connect, ending, opening, tensor

from .test_same_answer import EXPORTED, Array, Outputs, alone, assert_same, cut

KEY = "5a" * 32


@pytest.fixture(scope="module", params=ALL_TRANSPORTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers with the same models and keys."""
    folder = tmp_path_factory.mktemp("pair")
    toys.write(folder / "models", "fours", toys.accumulator(x={"chunk": {"multiple": 4}, "tail": "pad"}))
    for model in ("spoken-digits", "oil-temperature"):
        (folder / "models" / model).symlink_to(EXPORTED / model)
    keys = folder / "keys"
    keys.write_text(KEY)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                serving(folder / "models", threads=0, transport=request.param, token_key_file=keys)
            )
            for _ in range(2)
        ]


class Walker:
    """One sequence that changes servers at random."""

    def __init__(self, servers: list[Server], model: str, pieces: list[Array], seed: int) -> None:
        self.chance = random.Random(seed)
        self.servers, self.model, self.pieces = servers, model, pieces
        self.token, self.token_step = b"", 0
        self.outputs: dict[int, list[pb.Output]] = {}
        self.moves = 0

    def walk(self) -> list[pb.Output]:
        done = False
        while not done:
            server = self.chance.choice(self.servers)
            with connect(server.port) as channel, Conversation(channel) as conversation:
                done = self._stay(conversation)
            self.moves += 1
        return [output for step in sorted(self.outputs) for output in self.outputs[step]]

    def _stay(self, conversation: Conversation) -> bool:
        """Goes on until the sequence is at its end, or it is time to leave. Whether it is at its end."""
        every = self.chance.randint(1, 4)
        conversation.send(opening(self.model, resume_token=self.token, checkpoint_every=every))
        opened = self._until(conversation, "opened").opened
        assert opened.next_step == self.token_step + 1
        for step in range(opened.next_step, len(self.pieces) + 1):
            piece = self.pieces[step - 1]
            conversation.send(chunk(step, tensor(piece, piece.dtype.name)))
            self._note(self._until(conversation, "output").output)
            if self.chance.random() < 0.1:
                return False
        conversation.send(ending())
        while (reply := conversation.read()).WhichOneof("reply") != "closed":
            if reply.HasField("output"):
                self._note(reply.output)
        assert reply.closed.reason == pb.END
        return True

    def _until(self, conversation: Conversation, kind: str) -> pb.Reply:
        while True:
            reply = conversation.read()
            assert not reply.HasField("failed"), reply.failed
            if reply.HasField("checkpoint"):
                self.token, self.token_step = reply.checkpoint.resume_token, reply.checkpoint.step
            if reply.WhichOneof("reply") == kind:
                return reply

    def _note(self, output: pb.Output) -> None:
        known = self.outputs.setdefault(output.step, [])
        if output.part < len(known):  # again: the same again
            assert list(known[output.part].outputs) == list(output.outputs)
        else:
            known.append(output)


def walked(pair: list[Server], model: str, inputs: list[Array], longest: int) -> list[Outputs]:
    """Per input the outputs of its chunks, put together; all inputs at once."""
    walkers = [
        Walker(pair, model, cut(samples, longest, random.Random(i)), seed=i)
        for i, samples in enumerate(inputs)
    ]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(Walker.walk, walkers))
    assert sum(walker.moves for walker in walkers) > 2 * len(walkers), "they hardly moved"
    for server in pair:
        assert_nothing_is_left(server)
    return [_joined(one) for one in outputs]


def _joined(outputs: list[pb.Output]) -> Outputs:
    columns: dict[str, list[Array]] = {}
    for output in outputs:
        for message in output.outputs:
            columns.setdefault(message.name, []).append(array(message))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def test_sound_that_changes_servers_equals_each_alone(pair: list[Server]) -> None:
    """Audio overlap, samples that fill no frame, LSTM states and a running answer are inside of a token."""
    draw = np.random.default_rng(5)
    inputs = [draw.integers(-9000, 9000, draw.integers(8000, 16000)).astype(np.int16) for _ in range(16)]
    assert_same(walked(pair, "spoken-digits", inputs, 400), [alone("spoken-digits", pcm) for pcm in inputs])


def test_sensors_that_change_servers_equal_each_alone(pair: list[Server]) -> None:
    draw = np.random.default_rng(6)
    inputs = [draw.normal(size=(draw.integers(40, 80), 7)).astype(np.float32) for _ in range(8)]
    got = walked(pair, "oil-temperature", inputs, 3)
    assert_same(got, [alone("oil-temperature", values) for values in inputs])


def test_a_tail_is_padded_once_wherever_the_sequence_ends(pair: list[Server]) -> None:
    values = np.arange(1.0, 62.0, dtype=np.float32)  # 61: fifteen fours and one more
    (got,) = walked(pair, "fours", [values], 3)
    np.testing.assert_array_equal(got["y"], np.cumsum(np.append(values, [0, 0, 0])).astype(np.float32))
