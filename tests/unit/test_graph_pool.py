"""States that a graph keeps: the same numbers as outside of it, in the slots that are told and no others."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tenuto.serving.errors import ModelInvalid, NotSupported, RunFailed
from tenuto.serving.extended_graph import FINITE, SLOTS, extend, pool_output
from tenuto.serving.graph_pool import GraphPool, GraphRunner
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU, ModelRunner
from tenuto.serving.state_pool import HostPool
from tests import toys

Array = NDArray[Any]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
CAPACITY = 5


def keeper(**changes: Any) -> tuple[bytes, Manifest]:
    """x [batch, time], summed up in three states of different shapes, rows and dtypes; y tells the sums."""
    nodes = [
        helper.make_node("ReduceSum", ["x", "one"], ["sum"], keepdims=0),
        helper.make_node("Unsqueeze", ["sum", "zero_two"], ["sum3"]),
        helper.make_node("Add", ["h", "sum3"], ["h_next"]),
        helper.make_node("Cast", ["sum"], ["sum64"], to=INT64),
        helper.make_node("Add", ["n", "sum64"], ["n_next"]),
        helper.make_node("Cast", ["sum"], ["double"], to=TensorProto.DOUBLE),
        helper.make_node("Unsqueeze", ["double", "one"], ["column"]),
        helper.make_node("Add", ["c", "column"], ["c_next"]),
        helper.make_node("Cast", ["c_next"], ["c_float"], to=FLOAT),
        helper.make_node("ReduceSum", ["c_float", "one"], ["c_sum"], keepdims=0),
        # An index of 2 or more fails the run, after the states are known.
        helper.make_node("Cast", ["last"], ["index"], to=INT64),
        helper.make_node("Gather", ["table", "index"], ["looked"]),
        helper.make_node("Slice", ["x", "minus", "end", "one"], ["lasts"]),
        helper.make_node("Squeeze", ["lasts", "one"], ["last"]),
        helper.make_node("Add", ["c_sum", "looked"], ["y"]),
    ]
    order = [*nodes[:10], nodes[12], nodes[13], *nodes[10:12], nodes[14]]
    constants = {
        "one": np.array([1]), "zero_two": np.array([0, 2]), "minus": np.array([-1]),
        "end": np.array([2**31]), "table": np.zeros(2, np.float32),
    }  # fmt: skip
    value = toys.value
    inputs, outputs = [value("x", FLOAT, "batch", "time")], [value("y", FLOAT, "batch")]
    for tensors, after in ((inputs, ""), (outputs, "_next")):
        tensors += [
            value(f"h{after}", FLOAT, 2, "batch", 3),
            value(f"n{after}", INT64, "batch"),
            value(f"c{after}", TensorProto.DOUBLE, "batch", 4),
        ]
    states: list[dict[str, Any]] = [
        {"input": "h", "output": "h_next", "dtype": "float32", "shape": [2, "batch", 3], "batch_axis": 1},
        {"input": "n", "output": "n_next", "dtype": "int64", "shape": ["batch"], "init": {"value": 7}},
        {"input": "c", "output": "c_next", "dtype": "float64", "shape": ["batch", 4], "init": [1, 2, 3, 4]},
    ]
    manifest: dict[str, Any] = {
        "format": 1,
        "name": "keeper",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}],
        "states": states,
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
    }
    return toys.model(order, inputs, outputs, constants), Manifest.model_validate(manifest | changes)


class Pair:
    """The same model twice: its states in its graph, and outside."""

    def __init__(self) -> None:
        model, manifest = keeper()
        self.plain = ModelRunner(model, manifest, "keeper/1", provider=CPU, threads=1)
        self.graph = GraphRunner(model, self.plain, CAPACITY)
        self.host = HostPool(manifest.states, CAPACITY)

    @property
    def pools(self) -> tuple[Any, Any]:
        return self.graph.pool, self.host

    def run(self, slots: list[int], x: Array) -> Array:
        """The outputs of both, which are the same."""
        where = np.array(slots, np.intp)
        for pool in self.pools:  # as the engine does before a run with padding
            pool.reset(pool.dump)
        found = self.graph.run({"x": x} | self.graph.pool.gather(where))
        assert self.graph.pool.not_finite(found[1:], len(slots)) == []
        self.graph.pool.scatter(where, found[1:])
        expected = self.plain.run({"x": x} | self.host.gather(where))
        self.host.scatter(where, expected[1:])
        np.testing.assert_array_equal(found[0], expected[0])
        return found[0]

    def assert_same(self) -> None:
        for slot in range(CAPACITY):
            assert self.graph.pool.read(slot) == self.host.read(slot)


@settings(max_examples=25)
@given(st.data())
def test_a_graphs_pool_holds_what_the_hosts_does(data: st.DataObject) -> None:
    """Whatever is allocated, freed, written, reset and run, in any order, with padding rows too."""
    pair = Pair()
    held: list[int] = []
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["allocate", "free", "reset", "move", "run", "run", "run"]))
        if action == "allocate" and len(held) < CAPACITY:
            slots = {pool.allocate("someone") for pool in pair.pools}
            held += slots
            assert len(slots) == 1
        elif not held:
            continue
        elif action == "free":
            slot = held.pop(data.draw(st.integers(0, len(held) - 1)))
            for pool in pair.pools:
                pool.free(slot, "someone")
        elif action == "reset":
            for pool in pair.pools:
                pool.reset(held[0])
        elif action == "move":  # as a sequence that resumes
            values = pair.host.read(held[-1])
            for pool in pair.pools:
                pool.write(held[0], values)
        else:
            rows = data.draw(st.permutations(held))[: data.draw(st.integers(1, len(held)))]
            rows += [pair.host.dump] * data.draw(st.integers(0, 2))
            x = np.random.default_rng(len(rows)).integers(0, 2, (len(rows), 3)).astype(np.float32)
            pair.run(rows, x)
    pair.assert_same()
    for pool in pair.pools:
        pool.check()


def test_a_run_that_fails_has_written_no_state() -> None:
    """Here it fails where the states are known already."""
    pair = Pair()
    slots = [pool.allocate("a") for pool in pair.pools]
    pair.run([slots[0]], np.ones((1, 2), np.float32))
    before = pair.graph.pool.read(slots[0])
    with pytest.raises(RunFailed, match="keeper/1: .*Gather"):
        pair.graph.run(
            {"x": np.full((1, 2), 5, np.float32)} | pair.graph.pool.gather(np.array(slots[:1], np.intp))
        )
    assert pair.graph.pool.read(slots[0]) == before
    pair.assert_same()
    pair.run([slots[0]], np.ones((1, 2), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_whose_state_is_not_finite_is_told_from_the_others(bad: float) -> None:
    model, manifest = keeper()
    runner = GraphRunner(model, ModelRunner(model, manifest, "t", provider=CPU, threads=1), CAPACITY)
    slots = np.array([runner.pool.allocate(f"{n}") for n in range(3)] + [runner.pool.dump], np.intp)
    x = np.array([[1, 1], [bad, 1], [0, 1], [bad, 1]], np.float32)
    results = runner.run({"x": x} | runner.pool.gather(slots))
    assert runner.pool.not_finite(results[1:], 3) == [1]
    results = runner.run({"x": x[:1]} | runner.pool.gather(slots[:1]))
    assert runner.pool.not_finite(results[1:], 1) == []
    runner.pool.free(int(slots[1]), "1")
    again = runner.pool.allocate("next")
    fresh = HostPool(manifest.states, 1)
    assert again == slots[1]
    assert runner.pool.read(again) == fresh.read(fresh.allocate("fresh"))


def test_states_that_may_be_infinite_are_not_watched() -> None:
    model, manifest = keeper()
    states = [s.model_copy(update={"finite": False}) for s in manifest.states]
    manifest = manifest.model_copy(update={"states": tuple(states)})
    runner = GraphRunner(model, ModelRunner(model, manifest, "t", provider=CPU, threads=1), CAPACITY)
    slots = np.array([runner.pool.allocate("a")], np.intp)
    x = np.array([[np.inf, 0]], np.float32)
    results = runner.run({"x": x} | runner.pool.gather(slots))
    assert runner.pool.not_finite(results[1:], 1) == []


def test_values_that_wait_together_go_to_their_own_slots() -> None:
    pair = Pair()
    for pool in pair.pools:
        for n in range(CAPACITY):
            pool.allocate(f"{n}")
    values = [tuple(bytes([n + 1]) * len(part) for part in pair.host.read(0)) for n in range(CAPACITY)]
    for pool in pair.pools:
        for slot in (3, 0, 4):
            pool.write(slot, values[slot])
    pair.assert_same()
    assert pair.graph.pool.read(4) == values[4]


class Counting:
    """A pool's small session that counts its runs, and the slots of each."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.slots: list[list[int]] = []

    def io_binding(self) -> Any:
        counted, binding = self, self.real.io_binding()
        bind = binding.bind_cpu_input

        def bind_cpu_input(name: str, value: Array) -> None:
            if name == SLOTS:
                counted.slots.append(value.tolist())
            bind(name, value)

        binding.bind_cpu_input = bind_cpu_input
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        self.real.run_with_iobinding(binding)


def test_newcomers_are_written_in_one_run() -> None:
    pool = (pair := Pair()).graph.pool
    pool._writer = counting = Counting(pool._writer)
    slots = [pool.allocate(f"{n}") for n in range(CAPACITY)]
    for _ in range(2):
        pair.graph.run({"x": np.ones((CAPACITY, 1), np.float32)} | pool.gather(np.array(slots, np.intp)))
    assert [sorted(one) for one in counting.slots] == [[*range(CAPACITY), pool.fresh]]


def test_slots_that_are_expected_are_read_in_one_run_and_no_others() -> None:
    pair = Pair()
    pool = pair.graph.pool
    slots, _ = ([each.allocate(f"{n}") for n in range(CAPACITY)] for each in pair.pools)
    pair.run(slots, np.arange(CAPACITY * 2, dtype=np.float32).reshape(CAPACITY, 2) / 100)
    for each in pair.pools:
        each.free(slots[1], "1")
        assert each.allocate("newcomer") == slots[1]  # not written yet: its values are known here
    pool._reader = counting = Counting(pool._reader)
    pool.expect([slots[1], slots[3], slots[0]])
    for slot in (slots[0], slots[1], slots[3]):
        assert pool.read(slot) == pair.host.read(slot)
    assert counting.slots == [[slots[3], slots[0]]]
    assert pool.read(slots[2]) == pair.host.read(slots[2])
    assert counting.slots[1:] == [[slots[2]]]


def test_what_was_read_before_a_run_is_not_what_it_is_after_it() -> None:
    pair = Pair()
    slots, _ = ([each.allocate(f"{n}") for n in range(2)] for each in pair.pools)
    for _ in range(2):
        pair.run(slots, np.ones((2, 1), np.float32))
        pair.graph.pool.expect(slots)
        assert [pair.graph.pool.read(slot) for slot in slots] == [pair.host.read(slot) for slot in slots]
    for each in pair.pools:
        each.reset(slots[0])
    assert pair.graph.pool.read(slots[0]) == pair.host.read(slots[0])


def test_what_could_not_be_written_waits_on() -> None:
    """Or those whose batch it is not would go on with the states of whoever had their slots before."""
    pair = Pair()
    pool, writer = pair.graph.pool, pair.graph.pool._writer

    class Full:
        def io_binding(self) -> Any:
            raise RuntimeError("Failed to allocate memory")

    slots, _ = ([each.allocate(f"{n}") for n in range(3)] for each in pair.pools)
    pair.run(slots, np.ones((3, 2), np.float32))
    for each in pair.pools:
        each.free(slots[1], "1")
        assert each.allocate("newcomer") == slots[1]
    pool._writer = Full()
    feeds = {"x": np.ones((1, 1), np.float32)} | pool.gather(np.array(slots[:1], np.intp))
    with pytest.raises(RunFailed, match="its pool: Failed to allocate memory"):
        pair.graph.run(feeds)
    pool._writer = writer
    pair.assert_same()


def test_padding_and_probes_begin_anew_each_time_and_cost_no_run_more() -> None:
    pair = Pair()
    pool = pair.graph.pool
    fresh = pair.host.read(pair.host.dump)
    pool._writer = counting = Counting(pool._writer)
    said = []
    for _ in range(3):
        pool.reset(pool.dump)
        (y,) = pair.graph.run({"x": np.ones((1, 2), np.float32)} | pool.gather(np.array([pool.dump])))[:1]
        said.append(y.tolist())
        assert pool.read(pool.fresh) == fresh != pool.read(pool.dump)
    assert said == [said[0]] * 3
    assert counting.slots in ([], [[pool.fresh]])  # what waited from the beginning
    pair.graph.probe()
    assert pool.read(pool.fresh) == fresh


@pytest.mark.parametrize("order", [1, -1])
def test_a_state_of_another_shape_fails_the_run_before_any_is_written(order: int) -> None:
    """The graph calls an axis free that the manifest fixes."""
    nodes = [
        helper.make_node("Add", ["h", "x"], ["h_next"]),
        helper.make_node("Slice", ["x", "from", "to", "one"], ["cut"]),
        helper.make_node("Cast", ["cut"], ["g_next"], to=INT64),
        helper.make_node("Identity", ["g"], ["seen"]),
        helper.make_node("Identity", ["x"], ["y"]),
    ]
    constants = {"one": np.array([1]), "from": np.array([0]), "to": np.array([2])}
    value = toys.value
    tensors = [
        [value(f"h{n}", FLOAT, "batch", "k"), value(f"g{n}", INT64, "batch", "k")] for n in ("", "_next")
    ]
    model = toys.model(
        nodes, [value("x", FLOAT, "batch", "k"), *tensors[0]], [value("y", FLOAT, "batch", "k"), *tensors[1]],
        constants,
    )  # fmt: skip
    states = [
        {"input": "h", "output": "h_next", "dtype": "float32", "shape": ["batch", 3]},
        {"input": "g", "output": "g_next", "dtype": "int64", "shape": ["batch", 3]},
    ][::order]
    tensor = {"dtype": "float32", "shape": ["batch", 3]}
    manifest = Manifest.model_validate({
        "format": 1, "name": "cut", "inputs": [{"name": "x"} | tensor], "states": states,
        "outputs": [{"name": "y"} | tensor],
    })  # fmt: skip
    runner = GraphRunner(model, ModelRunner(model, manifest, "cut/1", provider=CPU, threads=1), CAPACITY)
    slots = np.array([runner.pool.allocate("a"), runner.pool.allocate("b")], np.intp)
    before = [runner.pool.read(int(slot)) for slot in slots]
    with pytest.raises(RunFailed):
        runner.run({"x": np.ones((2, 3), np.float32)} | runner.pool.gather(slots))
    assert [runner.pool.read(int(slot)) for slot in slots] == before


def test_the_weights_are_not_kept_twice() -> None:
    model, manifest = keeper()
    plain = ModelRunner(model, manifest, "t", provider=CPU, threads=1)
    runner, weights = GraphRunner(model, plain, CAPACITY), weakref.ref(plain)
    del plain
    gc.collect()
    assert weights() is None
    runner.probe()


def test_bytes_that_are_no_onnx_file_stay_as_they_are() -> None:
    """ONNX Runtime loads a format of its own, too."""
    with pytest.raises(NotSupported, match="no ONNX file"):
        extend(b"\xffORTM", keeper()[1], dump=5, fresh=6)


def test_a_pool_that_finds_no_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("BFCArena: failed to allocate\nmore")

    model, manifest = keeper()
    plain = ModelRunner(model, manifest, "t/1", provider=CPU, threads=1)
    monkeypatch.setattr(GraphPool, "_buffer", full)
    text = r"t/1: its pool of 448 bytes finds no room \(BFCArena: failed to allocate\); lower --max-sequences"
    with pytest.raises(ModelInvalid, match=text):
        GraphRunner(model, plain, CAPACITY)


def test_the_pool_stays_where_it_is() -> None:
    """Input and output are one buffer: a run moves rows, not the pool."""
    pair = Pair()
    before = [buffer.data_ptr() for buffer in pair.graph.pool._buffers]
    slot = pair.graph.pool.allocate("a")
    pair.graph.run({"x": np.ones((1, 1), np.float32)} | pair.graph.pool.gather(np.array([slot], np.intp)))
    assert [buffer.data_ptr() for buffer in pair.graph.pool._buffers] == before
    values = pair.graph.pool._buffers[1].numpy()
    written = {slot: 8, pair.graph.pool.fresh: 7}
    assert values.tolist() == [written.get(place, 0) for place in range(CAPACITY + 2)]


def test_zeros_run_as_a_probe() -> None:
    Pair().graph.probe()


def changed(model: bytes, change: Any) -> bytes:
    proto = onnx.load_from_string(model)
    change(proto)
    return bytes(proto.SerializeToString())


def old(proto: Any) -> None:
    proto.opset_import[0].version = 10


def external(proto: Any) -> None:
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL


def named(proto: Any) -> None:
    proto.graph.node[0].output[0] = "tenuto.mine"


def with_default(proto: Any) -> None:
    proto.graph.initializer.append(helper.make_tensor("h", FLOAT, [2, 1, 3], [0.0] * 6))


def unmade(proto: Any) -> None:
    proto.graph.input.append(toys.value("n_next", INT64, "batch"))


@pytest.mark.parametrize(
    "change, reason",
    [
        (old, "opset 10, and ScatterND came with 11"),
        (external, "its weights lie in other files"),
        (named, "it has names that begin with 'tenuto.'"),
        (with_default, "h has a value of its own"),
        (unmade, "n_next is no node's output"),
    ],
)
def test_a_graph_that_cannot_keep_its_states_says_why(change: Any, reason: str) -> None:
    model, manifest = keeper()
    with pytest.raises(NotSupported, match=f"the states of 'keeper' stay outside of its graph: {reason}"):
        extend(changed(model, change), manifest, dump=5, fresh=6)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"fixed_batch": 4}, "its batch is fixed"),
        ({"batch_axis": 2}, "h has its rows in axis 2"),
    ],
)
def test_a_manifest_whose_states_do_not_fit_says_why(changes: dict[str, Any], reason: str) -> None:
    model, manifest = keeper()
    if "batch_axis" in changes:
        states = list(manifest.states)
        states[0] = states[0].model_copy(update=changes)
        manifest = manifest.model_copy(update={"states": tuple(states)})
    else:
        manifest = manifest.model_copy(update=changes)
    with pytest.raises(NotSupported, match=reason):
        extend(model, manifest, dump=5, fresh=6)


def test_the_graph_keeps_its_own_outputs_and_names_its_new_ones() -> None:
    model, manifest = keeper()
    graph = onnx.load_from_string(extend(model, manifest, dump=5, fresh=6)).graph
    outputs = [tensor.name for tensor in graph.output]
    assert outputs == ["y", FINITE, *(pool_output(s) for s in manifest.states)]
    assert {"x", SLOTS} <= {tensor.name for tensor in graph.input}
    assert not {"h", "n", "c"} & {tensor.name for tensor in graph.input}
