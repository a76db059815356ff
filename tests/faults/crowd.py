"""Many callers at once, each with a sequence of its own on the toy accumulator, and what they got.

They use the asyncio client as anybody would. A sum shows a chunk that was lost or eaten twice, the steps an
output that was lost or handed over twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from tenuto.aio import Client

VALUES_PER_CHUNK = 5


@dataclass
class Figures:
    """What a crowd saw."""

    sequences: int = 0
    chunks: int = 0
    lost: int = 0
    duplicated: int = 0
    differing: int = 0
    resumes: int = 0
    gaps: list[float] = field(default_factory=list)  # seconds, the longest between two outputs of each caller

    def __str__(self) -> str:
        p50, p99 = np.percentile(self.gaps, [50, 99]) * 1e3
        return (
            f"{self.sequences} sequences, {self.chunks} chunks, lost {self.lost}, duplicated "
            f"{self.duplicated}, differing {self.differing}; {self.resumes} resumed, longest gap "
            f"p50 {p50:.0f} ms, p99 {p99:.0f} ms"
        )

    @property
    def whole(self) -> tuple[int, int, int]:
        return self.lost, self.duplicated, self.differing


class Crowd:
    """`sequences` callers that send `chunks` chunks each, one after another is answered.

    `at` is called once, when so large a part of all answers has come; a function that takes its time is
    run in a thread.
    """

    def __init__(
        self,
        target: str,
        sequences: int,
        chunks: int,
        *,
        at: dict[float, Callable[[], None]] | None = None,
        **settings: float | int | None,
    ) -> None:
        self.target = target
        self.sequences = sequences
        self.chunks = chunks
        self.settings = settings
        self._at = sorted((share * sequences * chunks, call) for share, call in (at or {}).items())
        self._answers = 0
        self._calls: list[asyncio.Future[None]] = []
        self.figures = Figures()

    def run(self) -> Figures:
        """Until every sequence is at its end. Raises what any caller met."""
        asyncio.run(self._run())
        return self.figures

    async def _run(self) -> None:
        # Connections of its own for each hundred, as callers on many machines would have.
        clients = [
            Client(self.target, **self.settings)  # type: ignore[arg-type]
            for _ in range(0, self.sequences, 100)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self.sequences):
                    group.create_task(self._caller(clients[number % len(clients)], number))
            await asyncio.gather(*self._calls)
        finally:
            self.figures.resumes = sum(client.resumes for client in clients)
            for client in clients:
                await client.close()

    async def _caller(self, client: Client, number: int) -> None:
        figures, step, total = self.figures, 0, 0.0
        longest, last = 0.0, monotonic()
        async with client.stream("accumulator") as stream:
            async for output in stream.run(self._pieces(number)):
                now = monotonic()
                longest, last = max(longest, now - last), now
                figures.duplicated += output.step <= step
                figures.lost += max(0, output.step - step - 1)
                step = output.step
                expected = total + np.cumsum(self._piece(number, step))
                total = float(expected[-1])
                figures.differing += not np.array_equal(output.outputs["y"], expected.astype(np.float32))
                self._note()
        figures.lost += self.chunks - step
        figures.sequences += 1
        figures.chunks += step
        figures.gaps.append(longest)

    def _pieces(self, number: int) -> list[np.ndarray]:
        return [self._piece(number, step) for step in range(1, self.chunks + 1)]

    @staticmethod
    def _piece(number: int, step: int) -> np.ndarray:
        """Small whole numbers: float32 sums of them are exact."""
        return np.array([(number * 7 + step * 3 + i) % 11 for i in range(VALUES_PER_CHUNK)], np.float32)

    def _note(self) -> None:
        self._answers += 1
        while self._at and self._answers >= self._at[0][0]:
            _, call = self._at.pop(0)
            self._calls.append(asyncio.get_running_loop().run_in_executor(None, call))
