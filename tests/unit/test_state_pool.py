"""The pool against a dict, and the ways in which a slot could leak into another sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from numpy.typing import NDArray

from tenuto.serving.errors import ModelInvalid, PoolFull, TenutoError
from tenuto.serving.manifest import State
from tenuto.serving.state_pool import HostPool

CAPACITY = 3
STATES: list[dict[str, Any]] = [
    {"input": "h", "output": "h_next", "dtype": "float32", "shape": [2, "batch", 3], "batch_axis": 1},
    {"input": "c", "output": "c_next", "dtype": "float64", "shape": ["batch", 2], "init": {"value": 0.5}},
    {"input": "n", "output": "n_next", "dtype": "int64", "shape": ["batch"]},
    {"input": "k", "output": "k_next", "dtype": "float32", "shape": [2, 2, "batch"], "batch_axis": 2,
     "init": [1, 2, 3, 4]},
]  # fmt: skip
INITIAL: list[Any] = [np.zeros((2, 3)), np.full(2, 0.5), 0, [[1, 2], [3, 4]]]


SLOT_BYTES = 6 * 4 + 2 * 8 + 8 + 4 * 4


def create_pool(
    capacity: int = CAPACITY, states: list[dict[str, Any]] = STATES, *, max_bytes: int = 0
) -> HostPool:
    return HostPool(tuple(State.model_validate(s) for s in states), capacity, max_bytes)


def slots(*numbers: int) -> NDArray[np.intp]:
    return np.array(numbers, np.intp)


def row_of(value: Any, state: dict[str, Any], row: int) -> Any:
    return np.asarray(value).take(row, state.get("batch_axis", 0))


class PoolAgainstDict(RuleBasedStateMachine):
    """Whatever is allocated, freed and written, each holder finds its own values and no others."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = create_pool()
        self.model: dict[int, list[Any]] = {}
        self.names: dict[int, str] = {}
        self.count = 0

    @rule(target=held)
    def allocate(self) -> Any:
        self.count += 1
        name = f"sequence {self.count}"
        if len(self.model) == CAPACITY:
            with pytest.raises(PoolFull):
                self.pool.allocate(name)
            return multiple()
        slot = self.pool.allocate(name)
        assert slot not in self.model
        assert 0 <= slot < CAPACITY
        self.model[slot], self.names[slot] = list(INITIAL), name
        return slot

    @rule(slot=consumes(held))
    def free(self, slot: int) -> None:
        self.pool.free(slot, self.names.pop(slot))
        del self.model[slot]

    @rule(slot=held)
    def reset(self, slot: int) -> None:
        self.pool.reset(slot)
        self.model[slot] = list(INITIAL)

    @rule(data=st.data(), pads=st.integers(0, 2), salt=st.integers(1, 99), broken=st.booleans())
    def write(self, data: st.DataObject, pads: int, salt: int, broken: bool) -> None:
        if not self.model:
            return
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=1))
        where = slots(*chosen, *[self.pool.dump] * pads)
        gathered = list(self.pool.gather(where).values())
        new = [(value + salt).astype(value.dtype) for value in gathered]
        if broken:
            new[0][:] = np.nan
        self.pool.scatter(where, new)
        for row, slot in enumerate(chosen):
            self.model[slot] = [row_of(v, s, row) for v, s in zip(new, STATES, strict=True)]

    @invariant()
    def every_holder_finds_its_own(self) -> None:
        if not self.model:
            return
        order = sorted(self.model)
        gathered = self.pool.gather(slots(*order))
        for position, state in enumerate(STATES):
            value = gathered[state["input"]]
            assert value.dtype == state["dtype"]
            for row, slot in enumerate(order):
                np.testing.assert_array_equal(row_of(value, state, row), self.model[slot][position])

    @invariant()
    def the_count_is_whole(self) -> None:
        self.pool.check()
        assert self.pool.used == len(self.model)


TestPoolAgainstDict = PoolAgainstDict.TestCase


def test_gathers_in_the_models_own_layout() -> None:
    gathered = create_pool().gather(slots(2, 0))
    shapes = {name: value.shape for name, value in gathered.items()}
    assert shapes == {"h": (2, 2, 3), "c": (2, 2), "n": (2,), "k": (2, 2, 2)}


def test_refuses_when_full_and_says_what_to_do() -> None:
    pool = create_pool(1)
    pool.allocate("a")
    with pytest.raises(PoolFull, match="all 1 sequence slots are taken.*--max-sequences") as caught:
        pool.allocate("b")
    assert caught.value.retry_after_ms > 0
    pool.check()


@given(st.integers(1, 20), st.integers(2 * SLOT_BYTES, 30 * SLOT_BYTES))
def test_a_budget_of_bytes_is_used_up_and_never_exceeded(max_sequences: int, max_bytes: int) -> None:
    pool = create_pool(max_sequences, max_bytes=max_bytes)
    arrays = sum(array.nbytes for array in pool._arrays)
    assert pool.nbytes == arrays == (pool.capacity + 1) * SLOT_BYTES <= max_bytes
    assert 1 <= pool.capacity <= max_sequences
    assert pool.capacity == max_sequences or arrays + SLOT_BYTES > max_bytes
    for n in range(pool.capacity):
        pool.allocate(f"sequence {n}")
    with pytest.raises(PoolFull):
        pool.allocate("one more")
    pool.check()


@pytest.mark.parametrize(
    "max_sequences, slots_paid, setting",
    [(3, 9, "--max-sequences"), (3, 4, "--max-sequences"), (3, 3, "--max-state-bytes")],
    ids=["sequences", "both", "bytes"],
)
def test_a_full_pool_names_the_setting_that_binds(max_sequences: int, slots_paid: int, setting: str) -> None:
    pool = create_pool(max_sequences, max_bytes=slots_paid * SLOT_BYTES)
    for n in range(pool.capacity):
        pool.allocate(f"sequence {n}")
    with pytest.raises(PoolFull, match=f"all {pool.capacity} sequence slots are taken.* raise {setting}$"):
        pool.allocate("one more")


def test_a_budget_below_one_sequence_says_what_is_needed() -> None:
    text = (
        f"a sequence takes {SLOT_BYTES} bytes of state, and padding 64; "
        f"--max-state-bytes is {2 * SLOT_BYTES - 1}, give it {2 * SLOT_BYTES} at least"
    )
    with pytest.raises(ModelInvalid, match=f"^{text}$"):
        create_pool(max_bytes=2 * SLOT_BYTES - 1)
    assert create_pool(max_bytes=2 * SLOT_BYTES).capacity == 1


def test_a_pool_without_states_needs_no_bytes() -> None:
    """Of a sequence that has left context alone, or of a stateless model."""
    assert create_pool(3, [], max_bytes=1).capacity == 3
    assert create_pool(0, [], max_bytes=1).nbytes == 0


def test_a_slot_left_full_of_nan_is_clean_for_the_next_holder() -> None:
    """A multiplication by zero would leave it NaN."""
    pool = create_pool(1)
    slot = pool.allocate("a")
    broken = [np.full_like(v, np.nan) if v.dtype.kind == "f" else v for v in
              pool.gather(slots(slot)).values()]  # fmt: skip
    pool.scatter(slots(slot), broken)
    pool.free(slot, "a")
    again = pool.allocate("b")
    for value, state, initial in zip(pool.gather(slots(again)).values(), STATES, INITIAL, strict=True):
        np.testing.assert_array_equal(row_of(value, state, 0), initial)


def test_padding_rows_touch_no_sequence() -> None:
    """All padding rows share the dump slot, which nobody can hold."""
    pool = create_pool(2)
    held = [pool.allocate("a"), pool.allocate("b")]
    assert pool.dump not in held
    where = slots(held[0], pool.dump, pool.dump)
    pool.scatter(where, [np.full_like(v, 7) for v in pool.gather(where).values()])
    assert pool.gather(slots(held[1]))["n"] == [0]
    assert pool.gather(slots(held[0]))["n"] == [7]


def test_freeing_twice_is_named_a_bug() -> None:
    pool = create_pool()
    slot = pool.allocate("a")
    pool.free(slot, "a")
    with pytest.raises(TenutoError, match=f"slot {slot} is held by None, not a. This is a bug"):
        pool.free(slot, "a")
    pool.check()


def test_freeing_anothers_slot_is_named_a_bug() -> None:
    pool = create_pool()
    slot = pool.allocate("a")
    with pytest.raises(TenutoError, match="held by a, not b. This is a bug"):
        pool.free(slot, "b")


@pytest.mark.parametrize("break_it", ["lost", "twice", "both"])
def test_check_finds_a_pool_that_lost_count(break_it: str) -> None:
    pool = create_pool()
    slot = pool.allocate("a")
    if break_it == "lost":
        pool._free.pop()
    else:
        pool._free.append(slot if break_it == "both" else pool._free[0])
    with pytest.raises(TenutoError, match="lost count.*This is a bug"):
        pool.check()


def test_not_finite_names_the_rows_and_no_padding() -> None:
    pool = create_pool()
    values = [v.copy() for v in pool.gather(slots(0, 1, 2, pool.dump)).values()]
    values[0][1, 2, 0] = np.nan  # batch axis 1: row 2
    values[3][0, 1, 0] = -np.inf  # batch axis 2: row 0
    values[1][3] = np.nan  # a padding row
    assert pool.not_finite(values, 3) == [0, 2]
    assert pool.not_finite(values, 2) == [0]


def test_inf_is_legal_where_the_manifest_says_so() -> None:
    pool = create_pool(states=[STATES[1] | {"finite": False}])
    assert pool.not_finite([np.full((2, 2), np.inf)], 2) == []


def test_a_state_without_a_batch_axis_is_one_sequences_own() -> None:
    states = [{"input": "h", "output": "o", "dtype": "float32", "shape": [2, 3], "batch_axis": None}]
    pool = create_pool(2, states)
    first, second = pool.allocate("a"), pool.allocate("b")
    assert pool.gather(slots(first))["h"].shape == (2, 3)
    pool.scatter(slots(first), [np.ones((2, 3), np.float32)])
    assert pool.gather(slots(first))["h"].sum() == 6
    assert pool.gather(slots(second))["h"].sum() == 0
    assert pool.not_finite([np.full((2, 3), np.nan, np.float32)], 1) == [0]


def test_a_model_without_states_has_an_empty_pool() -> None:
    pool = create_pool(2, [])
    pool.allocate("a")
    assert pool.gather(slots(0)) == {}
    pool.check()
