"""The least that batches on our transport: one queue, one thread, `take`, `session.run`, put, reply.

The goals were drawn from a prototype like this. It checks nothing: no steps, no windows, no limits, no
values, no endings, no metrics, no order but arrival; and it never gives a slot back. So no server in Python
that holds its promises on this transport costs less, and what ours costs above it is their price.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import numpy as np

from tenuto.serving import reply as wire
from tenuto.serving.call import Call
from tenuto.serving.model_runner import flush_denormals
from tenuto.serving.sequence import Output
from tenuto.v1 import tenuto_pb2 as pb

from . import model
from .model import INPUTS, LAYERS, OUTPUTS, STATES, WIDTH
from .null_engine import OPENED, WRITER, our_transport, serve

MAX_BATCH = 64
SLOTS = 16_384

Work = tuple[Call, int, int, int, bytes]  # its stream, the client's number, slot, step, samples


class Session(Protocol):
    """ONNX Runtime's."""

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]: ...


class Engine:
    """Runs what waits, at most `MAX_BATCH` chunks at once, all of one length."""

    def __init__(self, path: Path) -> None:
        self.session: Session = model.session(path)
        self.names = ["y", *(f"{state}_next" for state in STATES)]
        self.inbox: SimpleQueue[Work] = SimpleQueue()
        self.pool = {state: np.zeros((LAYERS, SLOTS, WIDTH), np.float32) for state in STATES}
        self.used = 0
        self.flush: Callable[[], None] = lambda: None

    def run(self) -> None:
        flush_denormals()
        while True:
            self.step()

    def step(self) -> None:
        batch = [self.inbox.get()]
        batch += [self.inbox.get_nowait() for _ in range(min(self.inbox.qsize(), MAX_BATCH - 1))]
        for size in {len(work[4]) for work in batch}:
            self.turn([work for work in batch if len(work[4]) == size])
        self.flush()

    def turn(self, batch: list[Work]) -> None:
        slots = np.array([slot for _, _, slot, _, _ in batch])
        x = np.frombuffer(b"".join([samples for *_, samples in batch]), np.float32)
        x = x.reshape(len(batch), -1, INPUTS)
        feeds = {state: self.pool[state].take(slots, 1) for state in STATES}
        lengths = np.full(len(batch), x.shape[1], np.int32)
        y, *after = self.session.run(self.names, {"x": x, "lengths": lengths, **feeds})
        for state, rows in zip(STATES, after, strict=True):
            self.pool[state][:, slots] = rows
        replies: dict[Call, list[bytes]] = {}
        written, row, shape = y.tobytes(), y[0].nbytes, (x.shape[1], OUTPUTS)
        for i, (call, sequence, _, step, _) in enumerate(batch):
            tensors = ((shape, written[i * row : (i + 1) * row]),)
            message = WRITER.write(sequence, Output(step, 0, True, tensors, 0.0, 0.0, len(batch)))
            replies.setdefault(call, []).append(message)
        for call, messages in replies.items():
            call.send(b"".join(messages))


class Stream:
    """The listener of one stream."""

    def __init__(self, call: Call, engine: Engine) -> None:
        self._call = call
        self._engine = engine
        self._slots: dict[int, int] = {}

    def received(self, message: bytes) -> None:
        for event in pb.StreamRequest.FromString(message).events:
            if event.HasField("open"):
                self._slots[event.sequence] = self._engine.used % SLOTS
                self._engine.used += 1
                self._call.send(wire.opened(event.sequence, OPENED))
            elif event.HasField("chunk"):
                chunk, slot = event.chunk, self._slots[event.sequence]
                work = self._call, event.sequence, slot, chunk.step, chunk.inputs[0].data
                for state in self._engine.pool.values() if chunk.step == 1 else ():
                    state[:, slot] = 0
                self._engine.inbox.put(work)

    def half_closed(self) -> None:
        self._call.finish()

    def terminated(self) -> None:
        pass

    def wait(self, resume: Callable[[], None]) -> bool:
        return False


if __name__ == "__main__":
    engine = Engine(Path(sys.argv[1]))
    transport = our_transport(lambda call: Stream(call, engine))
    engine.flush = transport.flush
    Thread(target=engine.run, daemon=True).start()
    serve(transport)
