"""Each output once, in order, each state advanced once: whatever is cut, killed, drained, held or repeated.

The client's own conversation talks to two real servers, without gRPC, over a network whose every message is
held here until a rule hands it on. What the caller gets is compared with the sequence alone.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tenuto import errors
from tenuto.conversation import Conversation
from tenuto.reply import Output
from tenuto.serving.manifest import Manifest
from tenuto.serving.sequence import Ending
from tenuto.settings import Settings
from tenuto.v1 import tenuto_pb2 as pb
from tests.integration.wire import opening
from tests.unit.fakes import accumulator

from .core import Core

SERVERS = 2
CHUNKS = st.lists(st.integers(1, 9), max_size=7)
LOST = errors.Unavailable("the connection was reset", code="UNAVAILABLE")


class Link:
    """One call: what is on its way up and down."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.stream, self.call = core.connect()
        self.up: deque[bytes] = deque()
        self.over = False

    @property
    def down(self) -> deque[bytes]:
        return self.call.messages

    def deliver_up(self) -> None:
        if self.up and self.call.code is None:
            self.stream.received(self.up.popleft())

    def break_off(self) -> None:
        """The server learns that the call is gone."""
        if not self.over:
            self.over = True
            self.stream.terminated()


class World(RuleBasedStateMachine):
    """One caller, two servers, and a network that hands on what and when it likes."""

    @initialize(
        multiple=st.integers(1, 3),
        max_frames=st.integers(1, 4),
        every=st.integers(1, 4),
        replay_bytes=st.sampled_from([1, 3000, 1 << 20]),
    )
    def begin(self, multiple: int, max_frames: int, every: int, replay_bytes: int) -> None:
        x = {"chunk": {"multiple": multiple}, "tail": "pad"}
        self.manifest: Manifest = accumulator(max_frames=max_frames, x=x)
        self.cores = [Core(self.manifest) for _ in range(SERVERS)]
        options = Settings(
            "a:1,b:1", resume_seconds=1e6, reply_seconds=1e6, timeout_seconds=1e6,
            replay_bytes=replay_bytes, poison_losses=2**30,
        )  # fmt: skip
        wish = pb.Open(model="accumulator", checkpoint_every=every)
        self.client = Conversation(wish, options, jitter=lambda: 1.0)
        self.now = 0.0
        self.turn = 0
        self.link: Link | None = None
        self.lingering: list[Link] = []  # lost for the client, and not yet for the server
        self.sent: list[list[int]] = []
        self.got: list[Output] = []
        self._opens()

    def _opens(self) -> None:
        """The first opening has to succeed; what happens to later ones is the network's choice."""
        self._call()
        while self.client.opened is None:
            self._flow()

    # -- the caller --------------------------------------------------------------------------------

    @rule(chunks=st.lists(CHUNKS, min_size=1, max_size=8))
    def converse(self, chunks: list[list[int]]) -> None:
        """What happens nearly all the time."""
        for chunk in chunks:
            self._send(chunk)
            self._flow()

    @rule(
        chunks=st.lists(CHUNKS, min_size=1, max_size=4),
        up=st.integers(0, 5),
        turns=st.integers(0, 3),
        down=st.integers(0, 4),
        twice=st.booleans(),
    )
    def begin_to_converse(self, chunks: list[list[int]], up: int, turns: int, down: int, twice: bool) -> None:
        """And stop somewhere in the middle."""
        for chunk in chunks:
            self._send(chunk)
        self._call()
        self._write()
        for _ in range(up):
            self._deliver_up(twice=twice)
        for _ in range(turns):
            for core in self.cores:
                core.turn()
        for _ in range(down):
            self._deliver_down(twice=twice)

    @rule()
    def read(self) -> None:
        while self.client.readable() and (output := self.client.take(self.now)) is not None:
            self.got.append(output)

    @precondition(lambda self: len(self.sent) > 15)
    @rule()
    def end(self) -> None:
        self.client.end(self.now)

    def _send(self, chunk: list[int]) -> None:
        if not self.client.ending and self.client.room():
            self.client.chunk(np.array(chunk, np.float32), 0, self.now, self.now)
            self.sent.append(chunk)

    # -- the network and the servers ---------------------------------------------------------------

    @rule(what=st.sampled_from(["cut", "cut unseen", "kill", "drain", "evict"]), which=st.integers(0, 1))
    def trouble(self, what: str, which: int) -> None:
        match what:
            case "cut" | "cut unseen":
                self._cut(noticed=what == "cut")
            case "kill":
                self._kill(which)
            case "drain":  # it sends its sequences away, and refuses new ones until it is killed
                self.cores[which].drain()
            case "evict":
                for engine in self.cores[which].catalogue.engines:
                    for sequence in engine.sequences():
                        engine.close_by_id(sequence.id, Ending.EVICTED)

    @rule(what=st.sampled_from(["notice", "late bytes", "time", "turn"]), seconds=st.floats(0.0, 10.0))
    def meanwhile(self, what: str, seconds: float) -> None:
        match what:
            case "notice":
                self._servers_notice()
            case "late bytes":  # were on their way up when the client gave the call up
                for link in self.lingering:
                    link.deliver_up()
            case "time":
                self.now += seconds
            case "turn":
                for core in self.cores:
                    core.turn()

    def _call(self) -> None:
        due = self.client.call_due()
        if due is not None and self.link is None:
            self.now = max(self.now, due)
            self.link = Link(self.cores[self.turn % SERVERS])
            self.turn += 1
            self.client.called(self.now)

    def _write(self) -> None:
        for request in self.client.outgoing(self.now):
            assert self.link is not None
            self.link.up.append(request.SerializeToString())

    def _deliver_up(self, *, twice: bool = False) -> None:
        if self.link is not None and self.link.up:
            first = pb.StreamRequest.FromString(self.link.up[0])
            if twice and first.events[0].HasField("chunk"):
                self.link.up.appendleft(self.link.up[0])
            self.link.deliver_up()

    def _deliver_down(self, *, twice: bool = False) -> None:
        if self.link is None or not self.link.down:
            return
        response = pb.StreamResponse.FromString(self.link.down.popleft())
        outputs = [r for r in response.replies if r.HasField("output")]
        self._receive(response)
        if twice and outputs and self.link is not None:
            self._receive(pb.StreamResponse(replies=outputs))

    def _receive(self, response: pb.StreamResponse) -> None:
        self.client.receive(response, self.now)
        if not self.client.on_call and self.link is not None:  # an ending: the client leaves the call
            self._let_go(noticed=True)

    def _cut(self, *, noticed: bool) -> None:
        """All that is on its way is lost. The server may notice later, and work on meanwhile."""
        if self.link is not None:
            self._let_go(noticed=noticed)
            self.client.lost(LOST, self.now)

    def _let_go(self, *, noticed: bool) -> None:
        assert self.link is not None
        link, self.link = self.link, None
        if noticed:
            link.break_off()
        else:
            self.lingering.append(link)

    def _servers_notice(self) -> None:
        for link in self.lingering:
            link.break_off()
        self.lingering.clear()

    def _kill(self, which: int) -> None:
        """With all that it held; another one comes up in its place."""
        dead, self.cores[which] = self.cores[which], Core(self.manifest)
        self.lingering = [link for link in self.lingering if link.core is not dead]
        if self.link is not None and self.link.core is dead:
            self.link = None
            self.client.lost(LOST, self.now)

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def no_error_reaches_the_caller(self) -> None:
        if hasattr(self, "client"):
            assert self.client.error is None

    def _flow(self) -> None:
        """Everything is handed on once, without faults."""
        self._call()
        self._write()
        for _ in range(len(self.link.up) if self.link else 0):
            self._deliver_up()
        for core in self.cores:
            core.settle()
        while self.link is not None and self.link.down:
            self._deliver_down()

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        event(f"resumed {min(self.client.resumes, 5)} times")
        for which in range(SERVERS):
            self._kill(which)
        self.client.end(self.now)
        for _ in range(500):
            if self.client.closed:
                break
            self._flow()
        assert self.client.closed, "the sequence does not come to its end"
        self.read()
        assert [(o.step, o.part) for o in self.got] == [(o[0], o[1]) for o in self._alone()]
        assert [self._values(o) for o in self.got] == [o[2] for o in self._alone()]
        self._servers_notice()
        if self.link is not None:
            self.link.break_off()
        for core in self.cores:
            core.assert_nothing_is_left()

    @staticmethod
    def _values(output: Output) -> list[float]:
        return [float(v) for value in output.outputs.values() for v in value]

    def _alone(self) -> list[tuple[int, int, list[float]]]:
        """Step, part and values of the sequence alone, on a server of its own, without faults."""
        core = Core(self.manifest)
        stream, call = core.connect()
        events = [opening("accumulator")]
        for step, values in enumerate(self.sent, 1):
            data = np.array(values, np.float32)
            tensor = pb.Tensor(dtype="float32", shape=data.shape, data=data.tobytes())
            events.append(pb.Event(chunk=pb.Chunk(step=step, inputs=[tensor])))
        for one in [*events, pb.Event(end=pb.End())]:
            stream.received(pb.StreamRequest(events=[one]).SerializeToString())
            core.settle()
        outputs = [r.output for r in call.replies if r.HasField("output")]
        return [
            (o.step, o.part, [float(v) for t in o.outputs for v in np.frombuffer(t.data, np.float32)])
            for o in outputs
        ]


TestExactlyOnce = World.TestCase
TestExactlyOnce.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)
