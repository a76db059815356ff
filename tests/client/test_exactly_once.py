"""Whatever happens to its calls, a sequence's outputs are those of one call: each once, and in order."""

from collections import deque

import numpy as np
import pytest

from tenuto import Unavailable
from tenuto.conversation import Conversation
from tenuto.settings import Settings
from tenuto.v1 import tenuto_pb2 as pb

pytest.importorskip("hypothesis")  # not there in the environments of `make test-oldest`

from hypothesis import given
from hypothesis import strategies as st

LOST = Unavailable("the connection broke", code="UNAVAILABLE")
ENDINGS = [pb.STREAM_ENDED, pb.IDLE_EXPIRED, pb.EVICTED, pb.DRAINING, pb.REBALANCE, pb.MAX_AGE]
REPLAY_BYTES = 4000  # three chunks or so ask for a token, seven fill it

Event = tuple[str, int]  # what happens, and how much of it
HAPPENINGS = {
    "send": st.integers(0, 5),  # a chunk that is answered in 1, 2 or 3 parts
    "serve": st.integers(1, 6),  # events that the server handles
    "hear": st.integers(1, 6),  # replies that arrive
    "cut": st.just(0),
    "refuse": st.integers(1, 3),  # of the next openings
    "close": st.integers(0, len(ENDINGS) - 1),
    "checkpoint": st.just(0),
    "repeat": st.just(0),  # the server's last reply
    "window": st.integers(1, 4),  # of the next calls
    "pause": st.integers(0, 3),  # seconds
    "read": st.integers(1, 3),  # outputs that the caller reads
    "end": st.just(0),
}
events = st.one_of(*(st.tuples(st.just(name), amount) for name, amount in HAPPENINGS.items()))


class Network:
    """A caller, its conversation, and servers; what is on the way between them is lost with the call.

    The model sums up. `generate` asks for that many further parts of a step; the tail is one more.
    """

    def __init__(self) -> None:
        settings = Settings(
            "a:1,b:1",
            replay_bytes=REPLAY_BYTES,
            poison_losses=1000,
            reply_seconds=None,
            resume_seconds=1e6,
        )
        self.one = Conversation(pb.Open(model="sum"), settings, lambda: 1.0)
        self.now = 0.0
        self.window = 4
        self.refusals = 0
        self.expected: list[tuple[int, int, int]] = []  # step, part, total
        self.got: list[tuple[int, int, int]] = []
        self.sent = 0
        self.ended = False
        self._hang_up()
        for name in ("pause", "serve", "hear"):
            self.happen(name, 1)
        assert self.one.is_open()

    def _hang_up(self) -> None:
        self.requests: deque[pb.Event] = deque()
        self.replies: deque[pb.Reply] = deque()
        self.last: pb.Reply | None = None
        self.live = False  # the server holds the sequence
        self.step = self.total = 0

    def happen(self, name: str, amount: int) -> None:
        getattr(self, name)(amount)
        due = self.one.call_due()
        if due is not None and due <= self.now:
            self._hang_up()
            self.one.called(self.now)
        for request in self.one.outgoing(self.now):
            self.requests.extend(request.events)
        assert self.one.error is None
        assert self.one._replay.nbytes < REPLAY_BYTES + 1000

    # The caller.

    def send(self, amount: int) -> None:
        if self.ended or self.one.opened is None or not self.one.room():
            return
        self.sent += 1
        total = sum(range(self.sent + 1))
        parts = amount % 3
        self.expected += [(self.sent, part, total) for part in range(parts + 1)]
        self.one.chunk(np.array([self.sent], np.int64), parts, self.now, self.now)

    def end(self, _: int) -> None:
        if not self.ended and self.sent:
            self.ended = True
            self.expected.append((*self.expected[-1][:1], self.expected[-1][1] + 1, self.expected[-1][2]))
            self.one.end(self.now)

    def read(self, amount: int) -> None:
        for _ in range(amount):
            if self.one._unread:
                output = self.one.take(self.now)
                assert output is not None
                self.got.append((output.step, output.part, int(output["total"])))

    def pause(self, amount: int) -> None:
        self.now += amount

    # The network.

    def hear(self, amount: int) -> None:
        for _ in range(min(amount, len(self.replies))):
            if self.one.on_call:
                self.one.receive(pb.StreamResponse(replies=[self.replies.popleft()]), self.now)

    def cut(self, _: int) -> None:
        if self.one.on_call:
            self.one.lost(LOST, self.now)
        self._hang_up()

    # The server.

    def refuse(self, amount: int) -> None:
        self.refusals = amount

    def repeat(self, _: int) -> None:
        if self.last is not None:
            self.replies.append(self.last)

    def checkpoint(self, _: int) -> None:
        if self.live:
            self.replies.append(
                pb.Reply(checkpoint=pb.Checkpoint(step=self.step, resume_token=self._token()))
            )

    def close(self, amount: int) -> None:
        if self.live:
            closed = pb.Closed(reason=ENDINGS[amount], last_step=self.step, resume_token=self._token())
            self.replies.append(pb.Reply(closed=closed))
            self.live = False

    def serve(self, amount: int) -> None:
        for _ in range(min(amount, len(self.requests))):
            event = self.requests.popleft()
            kind = event.WhichOneof("event")
            if kind == "open":
                self._open(event.open)
            elif self.live and kind == "chunk":
                self._run(event.chunk)
            elif self.live and kind == "checkpoint":
                self.checkpoint(0)
            elif self.live:
                self._output(self.parts)
                self.replies.append(pb.Reply(closed=pb.Closed(reason=pb.END, last_step=self.step)))
                self.live = False

    def _open(self, event: pb.Open) -> None:
        if self.refusals:
            self.refusals -= 1
            self.replies.append(pb.Reply(failed=pb.Failed(code=8, reason="POOL_FULL", message="full")))
            return
        self.live = True
        if event.resume_token:
            self.step, self.total, self.parts = map(int, event.resume_token.split())
        opened = pb.Opened(sequence_id="s", version=1, next_step=self.step + 1, window=self.window)
        self.replies.append(pb.Reply(opened=opened))

    def _run(self, chunk: pb.Chunk) -> None:
        assert chunk.step == self.step + 1
        self.step = chunk.step
        self.total += int(np.frombuffer(chunk.inputs[0].data, np.int64)[0])
        self.parts = chunk.generate + 1
        for part in range(self.parts):
            self._output(part)

    def _output(self, part: int) -> None:
        data = np.array(self.total, np.int64).tobytes()
        total = pb.Tensor(name="total", dtype="int64", data=data)
        last = part >= self.parts - 1
        self.last = pb.Reply(output=pb.Output(step=self.step, part=part, last=last, outputs=[total]))
        self.replies.append(self.last)

    def _token(self) -> bytes:
        return b"%d %d %d" % (self.step, self.total, self.parts if self.step else 1)


@given(st.lists(events, min_size=40, max_size=150))  # without a least length, most would be five
def test_outputs_come_once_and_in_order_whatever_happens(story: list[Event]) -> None:
    network = Network()
    for name, amount in story:
        if name == "window":
            network.window = amount
            continue
        network.happen(name, amount)
        assert network.got == network.expected[: len(network.got)]
    network.refusals = 0
    for _ in range(200):  # no more trouble
        for name in ("send", "end", "pause", "serve", "hear", "read"):
            network.happen(name, 3)
    assert network.one.closed
    assert network.got == network.expected
