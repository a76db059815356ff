"""Slots under stress: opened, ended, superseded and resumed from many threads while batches run.

A slot is handed on only when no running batch holds it, and it is reset or restored after that batch: else
some sum of the accumulator would hold what another sequence sent.
"""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto.serving.engine import Engine
from tenuto.serving.pending import PendingBytes
from tenuto.serving.resume_token import TokenSealer
from tenuto.serving.sequence import Checkpoint, Chunk, Closed, Ending, Failed, Output, Reply, Sequence
from tenuto.serving.snapshot import Checkpoints, Snapshot
from tests.unit.fakes import Accumulator, accumulator

THREADS, LIVES, SLOTS = 8, 60, 6
PATIENCE_SECONDS = 30.0
SEALER = TokenSealer()


class Slow(Accumulator):
    """Lets commands pile up while it runs: each run hands the interpreter to the other threads first."""

    def run(self, feeds: dict[str, Any]) -> list[NDArray[Any]]:
        turned = threading.Event()
        threading.Thread(target=turned.set).start()
        assert turned.wait(PATIENCE_SECONDS)
        return super().run(feeds)


class Caller:
    """The sink of one thread's sequences."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.chance = random.Random(seed)
        self.replies: SimpleQueue[tuple[Sequence, Reply]] = SimpleQueue()
        self.refused = self.answered = self.resumed = 0

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        for reply in replies:
            self.replies.put(reply)

    full = False
    share = None

    def live(self) -> None:
        """Sequences one after another, each with a sum of its own that no other may touch."""
        for _ in range(LIVES):
            self._one(None, total=0.0)

    def _one(self, snapshot: Snapshot | None, total: float) -> None:
        sequence = Sequence(self, accumulator(), checkpoint_every=self.chance.choice([0, 1, 2]))
        first = snapshot.step + 1 if snapshot else 1
        self.engine.open(sequence, snapshot)
        tokens: dict[int, Snapshot] = {}
        totals = {first - 1: total}
        for step in range(first, first + self.chance.randint(1, 6)):
            values = [float(self.chance.randint(1, 9)) for _ in range(self.chance.randint(1, 9))]
            data = np.asarray(values, np.float32).tobytes()
            self.engine.accept(sequence, Chunk(step, (data,), 0.0, len(data)))
            if self.chance.random() < 0.2:  # at once: a batch may hold it now
                self.engine.close(sequence, Ending.CANCELLED)
            totals[step] = totals[step - 1] + sum(values)
            ended = self._read(sequence, step, totals, tokens)
            if ended:
                break
        else:
            self.engine.finish(sequence, self.chance.choice([Ending.END, Ending.DRAINING]))
            self._read(sequence, 0, totals, tokens)
        if tokens and self.chance.random() < 0.5:
            self.resumed += 1
            step = self.chance.choice(list(tokens))
            self._one(tokens[step], totals[step])

    def _read(
        self, sequence: Sequence, step: int, totals: dict[int, float], tokens: dict[int, Snapshot]
    ) -> bool:
        """Reads up to the answer of that step, or the end; step 0: up to the end. Whether it ended."""
        while True:
            owner, reply = self.replies.get(timeout=PATIENCE_SECONDS)
            if owner is not sequence:  # the last words of one that was superseded
                continue
            if isinstance(reply, Checkpoint):
                tokens[reply.step] = SEALER.unseal(reply.token)
            elif isinstance(reply, Closed | Failed):
                if isinstance(reply, Closed) and reply.token:
                    tokens[reply.last_step] = SEALER.unseal(reply.token)
                self.refused += isinstance(reply, Failed)
                return True
            elif isinstance(reply, Output):
                values = np.frombuffer(reply.tensors[0][1], np.float32)
                assert values[-1] == totals[reply.step], "a sum holds what another sequence sent"
                self.answered += 1
                if reply.step == step:
                    return False


def test_no_sum_holds_what_another_sequence_sent() -> None:
    manifest = accumulator()
    pending = PendingBytes(1 << 30)
    checkpoints = Checkpoints(SEALER.seal, "", "", 0)
    engine = Engine(
        manifest, Slow(), version=1, max_sequences=SLOTS, checkpoints=checkpoints, pending=pending
    )
    engine.start()
    callers = [Caller(engine, seed) for seed in range(THREADS)]
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for future in [pool.submit(caller.live) for caller in callers]:
                future.result()
    finally:
        engine.stop(Ending.CANCELLED)
    engine.check()
    assert engine.sequences() == []
    assert sum(c.answered for c in callers) > 500
    assert sum(c.resumed for c in callers) > 50
    assert sum(c.refused for c in callers) > 0, "the pool was never full"
