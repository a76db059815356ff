"""All recurrent state of one model version, preallocated, with the slot in the batch axis.

Index `capacity` is the dump slot: padding rows read and write it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelInvalid, PoolFull, TenutoError
from .layout import is_finite
from .manifest import State, initial

Array = NDArray[np.generic]


class StatePool(ABC):
    """Slots of `states`. Owned by the engine thread, which frees them when no batch that holds them is on its
    way.

    `max_bytes` bounds all of its memory, the dump slot included; 0: `max_sequences` alone is the bound.

    Raises (when built): ModelInvalid if the bytes do not hold one sequence.
    """

    spares = 1  # slots for padding

    def __init__(self, states: tuple[State, ...], max_sequences: int, max_bytes: int = 0) -> None:
        capacity, self._setting = self.room(states, max_sequences, max_bytes)
        slot_bytes = sum(s.slot_bytes for s in states)
        self.capacity = capacity
        self.dump = capacity
        self.nbytes = slot_bytes * (capacity + self.spares)  # once every slot was used
        self._states = states
        self._initial = [initial(s) for s in states]
        self._free = list(range(capacity - 1, -1, -1))
        self._holders: dict[int, str] = {}  # slot -> sequence id

    @classmethod
    def room(cls, states: tuple[State, ...], max_sequences: int, max_bytes: int = 0) -> tuple[int, str]:
        """Slots for sequences, and the setting that bounds them. Raises: ModelInvalid, if there is none."""
        slot_bytes = sum(s.slot_bytes for s in states)
        if not slot_bytes or not max_bytes:
            return max_sequences, "--max-sequences"
        affordable = max_bytes // slot_bytes - cls.spares
        if affordable < 1 <= max_sequences:
            raise ModelInvalid(
                f"a sequence takes {slot_bytes} bytes of state, and padding {cls.spares * slot_bytes}; "
                f"--max-state-bytes is {max_bytes}, give it {(1 + cls.spares) * slot_bytes} at least"
            )
        if affordable < max_sequences:
            return affordable, "--max-state-bytes"
        return max_sequences, "--max-sequences"

    @property
    def used(self) -> int:
        return len(self._holders)

    def allocate(self, holder: str, spare: int = 0) -> int:
        """Takes a slot, set to the initial state; but leaves `spare` ones free.

        Raises: PoolFull.
        """
        if len(self._free) <= spare:
            kept = f", {spare} of them kept for sequences that resume" if spare else ""
            raise PoolFull(
                f"all {self.capacity} sequence slots are taken{kept}; retry, or raise {self._setting}"
            )
        slot = self._free.pop()
        self._holders[slot] = holder
        self.reset(slot)
        return slot

    def free(self, slot: int, holder: str) -> None:
        if self._holders.get(slot) != holder:
            raise TenutoError(
                f"slot {slot} is held by {self._holders.get(slot)}, not {holder}. This is a bug."
            )
        del self._holders[slot]
        self._free.append(slot)

    reads_together = False  # whether `expect` is worth calling

    def expect(self, slots: list[int]) -> None:
        """They will be read before the next run: a pool that pays for each read reads them at once."""
        return

    @abstractmethod
    def read(self, slot: int) -> tuple[bytes, ...]:
        """The slot's values, state by state, C order."""

    @abstractmethod
    def write(self, slot: int, values: tuple[bytes, ...]) -> None:
        """The inverse of `read`."""

    @abstractmethod
    def reset(self, slot: int) -> None:
        """Overwrites it with the initial state: a NaN would survive a multiplication by zero."""

    @abstractmethod
    def gather(self, slots: NDArray[np.intp]) -> dict[str, Array]:
        """What a run is fed, by the graph's names, so that its rows have the states of `slots`."""

    @abstractmethod
    def scatter(self, slots: NDArray[np.intp], values: list[Array]) -> None:
        """After the run: the states of `slots` are the new ones. A slot may stand in `slots` once.

        `values`: what the run gave behind the model's outputs.
        """

    @abstractmethod
    def not_finite(self, values: list[Array], rows: int) -> list[int]:
        """The rows whose new states hold NaN or Inf where the manifest forbids it."""

    def check(self) -> None:
        """Raises TenutoError unless free + used = capacity and no slot is in both."""
        free = set(self._free)
        whole = free | set(self._holders)
        if len(free) != len(self._free) or free & set(self._holders) or whole != set(range(self.capacity)):
            raise TenutoError(
                f"the state pool lost count: {len(self._free)} free, {len(self._holders)} used, "
                f"capacity {self.capacity}. This is a bug."
            )


class HostPool(StatePool):
    """In the process's own memory: a run is fed copies of the rows, and gives the new ones back.

    It keeps the model's own layout (`h[layers, slots, hidden]`), so a batch is one `take` and one indexed
    assignment a state, without transposes.
    """

    def __init__(self, states: tuple[State, ...], max_sequences: int, max_bytes: int = 0) -> None:
        super().__init__(states, max_sequences, max_bytes)
        self._axes = [0 if s.batch_axis is None else s.batch_axis for s in states]
        # What stands before the slot in an index.
        self._before: list[tuple[Any, ...]] = [(slice(None),) * axis for axis in self._axes]
        # np.zeros leaves the pages to the first write, so unused slots cost address space alone.
        self._arrays: list[Array] = [np.zeros(layout(s, self.capacity + 1), s.dtype) for s in states]
        self.reset(self.dump)

    def read(self, slot: int) -> tuple[bytes, ...]:
        return tuple(
            array[*before, slot].tobytes() for array, before in zip(self._arrays, self._before, strict=True)
        )

    def write(self, slot: int, values: tuple[bytes, ...]) -> None:
        for s, array, before, value in zip(self._states, self._arrays, self._before, values, strict=True):
            array[*before, slot] = np.frombuffer(value, s.dtype).reshape(s.slot_shape)

    def reset(self, slot: int) -> None:
        for array, before, first in zip(self._arrays, self._before, self._initial, strict=True):
            array[*before, slot] = first

    def gather(self, slots: NDArray[np.intp]) -> dict[str, Array]:
        return {
            s.input: array[slots[0]] if s.batch_axis is None else array.take(slots, axis)
            for s, array, axis in zip(self._states, self._arrays, self._axes, strict=True)
        }

    def scatter(self, slots: NDArray[np.intp], values: list[Array]) -> None:
        for s, array, before, value in zip(self._states, self._arrays, self._before, values, strict=True):
            array[*before, slots[0] if s.batch_axis is None else slots] = value

    def not_finite(self, values: list[Array], rows: int) -> list[int]:
        bad: set[int] = set()
        for s, value in zip(self._states, values, strict=True):
            if not s.finite or value.dtype.kind != "f" or is_finite(value):
                continue
            if s.batch_axis is None:
                return [0]
            others = tuple(a for a in range(value.ndim) if a != s.batch_axis)
            bad.update(np.flatnonzero(~np.isfinite(value).all(axis=others)).tolist())
        return sorted(row for row in bad if row < rows)


def layout(state: State, slots: int) -> tuple[int, ...]:
    """The state's shape with so many slots in its batch axis."""
    if state.batch_axis is None:
        return (slots, *state.slot_shape)
    shape = list(state.slot_shape)
    shape.insert(state.batch_axis, slots)
    return tuple(shape)
