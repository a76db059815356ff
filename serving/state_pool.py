"""All recurrent state of one model version, preallocated, with the slot in the batch axis.

The pool keeps the model's own layout (`h[layers, slots, hidden]`), so a batch is one `take` and one indexed
assignment a state, without transposes. Index `capacity` is the dump slot: padding rows read and write it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelInvalid, PoolFull, TenutoError
from .layout import is_finite
from .manifest import State, Value

Array = NDArray[np.generic]


class StatePool:
    """Slots of `states`. Owned by the engine thread, which runs one batch at a time: a slot that is freed
    between batches is held by none.

    `max_bytes` bounds all of its arrays, the dump slot included; 0: `max_sequences` alone is the bound.

    Raises (when built): ModelInvalid if the bytes do not hold one sequence.
    """

    def __init__(self, states: tuple[State, ...], max_sequences: int, max_bytes: int = 0) -> None:
        capacity, self._setting = max_sequences, "--max-sequences"
        slot_bytes = sum(s.slot_bytes for s in states)
        affordable = max_bytes // slot_bytes - 1 if slot_bytes and max_bytes else capacity
        if affordable < 1 <= capacity:
            raise ModelInvalid(
                f"a sequence takes {slot_bytes} bytes of state, and one more slot is for padding; "
                f"--max-state-bytes is {max_bytes}, give it {2 * slot_bytes} at least"
            )
        if affordable < capacity:
            capacity, self._setting = affordable, "--max-state-bytes"
        self.capacity = capacity
        self.dump = capacity
        self._states = states
        self._axes = [0 if s.batch_axis is None else s.batch_axis for s in states]
        # What stands before the slot in an index.
        self._before: list[tuple[Any, ...]] = [(slice(None),) * axis for axis in self._axes]
        # np.zeros leaves the pages to the first write, so unused slots cost address space alone.
        self._arrays: list[Array] = [np.zeros(_layout(s, capacity + 1), s.dtype) for s in states]
        self._initial: list[Array] = [_initial(s) for s in states]
        self._free = list(range(capacity - 1, -1, -1))
        self._holders: dict[int, str] = {}  # slot -> sequence id
        self.reset(self.dump)

    @property
    def nbytes(self) -> int:
        """What the arrays take once every slot was used."""
        return sum(array.nbytes for array in self._arrays)

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

    def read(self, slot: int) -> tuple[bytes, ...]:
        """The slot's values, state by state, C order."""
        return tuple(
            array[*before, slot].tobytes() for array, before in zip(self._arrays, self._before, strict=True)
        )

    def write(self, slot: int, values: tuple[bytes, ...]) -> None:
        """The inverse of `read`."""
        for s, array, before, value in zip(self._states, self._arrays, self._before, values, strict=True):
            array[*before, slot] = np.frombuffer(value, s.dtype).reshape(s.slot_shape)

    def reset(self, slot: int) -> None:
        """Overwrites: a NaN would survive a multiplication by zero."""
        for array, before, initial in zip(self._arrays, self._before, self._initial, strict=True):
            array[*before, slot] = initial

    def gather(self, slots: NDArray[np.intp]) -> dict[str, Array]:
        """Each state's rows of `slots`, in the model's layout, by the name of the state's input."""
        return {
            s.input: array[slots[0]] if s.batch_axis is None else array.take(slots, axis)
            for s, array, axis in zip(self._states, self._arrays, self._axes, strict=True)
        }

    def scatter(self, slots: NDArray[np.intp], values: list[Array]) -> None:
        """The inverse of `gather`: writes each state's new rows back. A slot may stand in `slots` once."""
        for s, array, before, value in zip(self._states, self._arrays, self._before, values, strict=True):
            array[*before, slots[0] if s.batch_axis is None else slots] = value

    def not_finite(self, values: list[Array], rows: int) -> list[int]:
        """The rows of new state values that hold NaN or Inf where the manifest forbids it."""
        bad: set[int] = set()
        for s, value in zip(self._states, values, strict=True):
            if not s.finite or value.dtype.kind != "f" or is_finite(value):
                continue
            if s.batch_axis is None:
                return [0]
            others = tuple(a for a in range(value.ndim) if a != s.batch_axis)
            bad.update(np.flatnonzero(~np.isfinite(value).all(axis=others)).tolist())
        return sorted(row for row in bad if row < rows)

    def check(self) -> None:
        """Raises TenutoError unless free + used = capacity and no slot is in both."""
        free = set(self._free)
        whole = free | set(self._holders)
        if len(free) != len(self._free) or free & set(self._holders) or whole != set(range(self.capacity)):
            raise TenutoError(
                f"the state pool lost count: {len(self._free)} free, {len(self._holders)} used, "
                f"capacity {self.capacity}. This is a bug."
            )


def _layout(state: State, slots: int) -> tuple[int, ...]:
    if state.batch_axis is None:
        return (slots, *state.slot_shape)
    shape = list(state.slot_shape)
    shape.insert(state.batch_axis, slots)
    return tuple(shape)


def _initial(state: State) -> Array:
    if isinstance(state.init, tuple):
        return np.array(state.init, state.dtype).reshape(state.slot_shape)
    value = state.init.value if isinstance(state.init, Value) else 0
    return np.full(state.slot_shape, value, state.dtype)
