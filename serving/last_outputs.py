"""The last output of each sequence, kept for a step that is sent again, within a budget."""

from __future__ import annotations

from collections import OrderedDict

from .sequence import Output, Sequence

BUDGET_BYTES = 64 << 20


class LastOutputs:
    """Sets `Sequence.last_output`; the one that was answered longest ago loses its own first."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._sizes: OrderedDict[Sequence, int] = OrderedDict()  # bytes, oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def keep(self, sequence: Sequence, output: Output) -> None:
        nbytes = sum(len(data) for _, data in output.tensors)
        self._bytes += nbytes - self._sizes.pop(sequence, 0)
        self._sizes[sequence] = nbytes
        sequence.last_output = output
        while self._bytes > self._budget_bytes:
            oldest, freed = self._sizes.popitem(last=False)
            oldest.last_output = None
            self._bytes -= freed

    def forget(self, sequence: Sequence) -> None:
        self._bytes -= self._sizes.pop(sequence, 0)
        sequence.last_output = None
