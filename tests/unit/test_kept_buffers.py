"""Buffers that stay: the numbers of fresh ones, whatever the shapes, and no byte copied that need not be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tenuto.serving.device_memory import HostMemory
from tenuto.serving.errors import RunFailed
from tenuto.serving.graph_pool import GraphRunner
from tenuto.serving.kept_buffers import KeptBuffers
from tenuto.serving.layout import Layout, bucket
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU, ModelRunner, session
from tests import toys

from .fakes import Bench
from .test_graph_pool import CAPACITY, keeper

Array = NDArray[Any]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class FarMemory(HostMemory):
    """As if a CPU's sessions had a memory of their own: all inputs are sent, all outputs are fetched, and are
    there once that was waited for. It has room for so many `arrays` on the host."""

    place = "Cpu"

    def __init__(self, arrays: int = 1000) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []
        self.arrays = arrays
        self._queue: list[tuple[int, Array]] = []

    def staging(self, shape: tuple[int, ...], dtype: Any) -> Array:
        if not self.arrays:
            raise RunFailed("CUDA: out of memory")
        self.arrays -= 1
        return super().staging(shape, dtype)

    def send(self, values: Array, address: int) -> None:
        assert address != values.ctypes.data
        super().send(values, address)
        self.log.append(("send", values.nbytes))

    def fetch(self, address: int, values: Array) -> None:
        assert address != values.ctypes.data
        self._queue.append((address, values))
        self.log.append(("fetch", values.nbytes))

    def settle(self) -> None:
        for address, values in self._queue:
            super().fetch(address, values)
        self._queue.clear()
        self.log.append(("settle", 0))


def running_sum() -> onnxruntime.InferenceSession:
    """x [batch, time] to its sums along time, and to half of it."""
    nodes = [
        helper.make_node("CumSum", ["x", "one"], ["sum"]),
        helper.make_node("Mul", ["x", "half"], ["less"]),
    ]
    constants = {"one": np.array(1), "half": np.array(0.5, np.float32)}
    outputs = [toys.value(name, FLOAT, "batch", "time") for name in ("sum", "less")]
    model = toys.model(nodes, [toys.value("x", FLOAT, "batch", "time")], outputs, constants)
    return session(model, "sums", CPU, 1)


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("memory", [HostMemory, FarMemory])
def test_shapes_in_any_order_give_the_numbers_of_fresh_buffers(memory: type[HostMemory]) -> None:
    plain = running_sum()
    kept = KeptBuffers(plain, ["sum", "less"], memory())
    for turn, shape in enumerate([(2, 3), (1, 3), (2, 3), (2, 3), (4, 1), (1, 3), (2, 3), (0, 3)]):
        x = drawn(*shape, seed=turn)
        for found, expected in zip(kept.run({"x": x}), plain.run(["sum", "less"], {"x": x}), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert len(kept) == 4


def test_what_is_read_and_written_stays_where_it_is() -> None:
    kept = KeptBuffers(running_sum(), ["sum", "less"], HostMemory())
    kept.run({"x": drawn(2, 3)})  # shows where the outputs lie
    first = kept.run({"x": drawn(2, 3, seed=1)})
    places = [result.ctypes.data for result in first]
    kept.run({"x": drawn(5, 3)})
    again = kept.run({"x": drawn(2, 3, seed=2)})
    assert [result.ctypes.data for result in again] == places
    np.testing.assert_array_equal(first[1], again[1])  # it is overwritten


def test_the_shape_that_was_not_used_for_longest_gives_way() -> None:
    kept = KeptBuffers(running_sum(), ["less"], HostMemory())
    for rows in range(1, 100):
        kept.run({"x": drawn(rows, 2)})
        (less,) = kept.run({"x": drawn(1, 2)})
        np.testing.assert_array_equal(less, drawn(1, 2) / 2)
    assert len(kept) == 32


def test_no_more_bytes_are_kept_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenuto.serving.kept_buffers._MOST_BYTES", 1000)
    kept = KeptBuffers(running_sum(), ["sum", "less"], HostMemory())
    for rows in (10, 20, 30, 200, 10, 20):
        (_, less) = kept.run({"x": drawn(rows, 1)})
        np.testing.assert_array_equal(less, drawn(rows, 1) / 2)
    assert len(kept) == 2
    assert kept.nbytes == 3 * 4 * (10 + 20)


def test_an_output_whose_shape_is_in_the_values_is_right_each_time() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["places"])]
    model = toys.model(nodes, [toys.value("x", FLOAT, "n")], [toys.value("places", INT64, 1, "found")], {})
    memory = FarMemory()
    kept = KeptBuffers(session(model, "places", CPU, 1), ["places"], memory)
    for x in ([1, 0, 2], [1, 0, 2], [0, 0, 5], [1, 1, 1], [0, 0, 0], [0, 1, 0]):
        (found,) = kept.run({"x": np.array(x, np.float32)})
        assert found.tolist() == [np.flatnonzero(x).tolist()]


def test_a_run_that_fails_is_told_and_the_next_one_is_right() -> None:
    model, manifest = keeper()
    runner = ModelRunner(model, manifest, "keeper/1", provider=CPU, threads=1, kept=True)
    good = runner.zero_feeds()
    expected = [result.copy() for result in runner.run(good)]
    for _ in range(2):
        with pytest.raises(RunFailed, match="keeper/1"):
            runner.run(good | {"x": np.full_like(good["x"], 5)})  # no index of its table
        for found, value in zip(runner.run(good), expected, strict=True):
            np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("arrays", range(7))
def test_where_the_host_has_no_room_nothing_is_lost_or_done_twice(
    monkeypatch: pytest.MonkeyPatch, arrays: int
) -> None:
    """Three inputs and two outputs are to be kept: whichever finds no room."""
    memory = FarMemory()
    monkeypatch.setattr("tenuto.serving.graph_pool.device_memory", lambda cuda: memory)
    model, manifest = keeper()
    plain = ModelRunner(model, manifest, "keeper/1", provider=CPU, threads=1, kept=True)
    runner = GraphRunner(model, plain, CAPACITY)
    slots, x = np.array([0, 3], np.intp), np.array([[2, 0], [3, 1]], np.float32)
    memory.arrays = arrays
    sums = np.zeros(2)  # no slot was taken: all is zero
    for _ in range(3):
        try:
            found = runner.run({"x": x} | runner.pool.gather(slots))
        except RunFailed:
            memory.arrays = 1000  # there is, later
            found = runner.run({"x": x} | runner.pool.gather(slots))
        sums += 4 * x.sum(axis=1)
        assert [result.shape for result in found] == [(2,), (2, 1)]
        np.testing.assert_array_equal(found[0], sums)


def test_an_output_that_is_an_input_is_what_came_in() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    x = toys.value("x", FLOAT, "n")
    same = session(toys.model(nodes, [x], [x, toys.value("y", FLOAT, "n")], {}), "same", CPU, 1)
    kept = KeptBuffers(same, ["x", "y"], HostMemory())
    for turn in range(4):
        for found in kept.run({"x": drawn(3, seed=turn)}):
            np.testing.assert_array_equal(found, drawn(3, seed=turn))


def test_what_fails_for_its_values_does_not_cost_a_shape_its_places() -> None:
    model, manifest = keeper()
    runner = ModelRunner(model, manifest, "keeper/1", provider=CPU, threads=1, kept=True)
    good = runner.zero_feeds()
    runner.run(good)
    with pytest.raises(RunFailed):
        runner.run(good | {"x": np.full_like(good["x"], 5)})
    runner.run(good)
    first, again = runner.run(good), runner.run(good)
    assert [one.ctypes.data for one in first] == [one.ctypes.data for one in again]


def test_inputs_that_are_wanted_on_the_host_are_not_sent() -> None:
    """As the lengths of its rows by an LSTM on a GPU."""
    add = toys.model(
        [helper.make_node("Add", ["x", "more"], ["y"])],
        [toys.value("x", FLOAT, "n"), toys.value("more", FLOAT, "n")], [toys.value("y", FLOAT, "n")], {},
    )  # fmt: skip
    sums: Any = session(add, "add", CPU, 1)
    sums.get_input_memory_infos = lambda: [SimpleNamespace(name="Cpu"), SimpleNamespace(name="Elsewhere")]
    memory = FarMemory()
    kept = KeptBuffers(sums, ["y"], memory)
    for turn in range(3):
        x, more = drawn(5, seed=turn), drawn(5, seed=turn + 9)
        (y,) = kept.run({"x": x, "more": more})
        np.testing.assert_array_equal(y, x + more)
    assert [n for what, n in memory.log if what == "send"] == [20, 20, 20]


def test_with_a_graphs_pool_no_state_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes and goes: the input, the slots, the output and the flags, and it is waited for once."""
    memory = FarMemory()
    monkeypatch.setattr("tenuto.serving.graph_pool.device_memory", lambda cuda: memory)
    model, manifest = keeper()
    plain = ModelRunner(model, manifest, "keeper/1", provider=CPU, threads=1, kept=True)
    runner = GraphRunner(model, plain, CAPACITY)
    slots, x = np.array([0, 3, 1], np.intp), np.zeros((3, 2), np.float32)
    runner.run({"x": x} | runner.pool.gather(slots))
    memory.log.clear()
    runner.run({"x": x} | runner.pool.gather(slots))
    rows = 3
    assert memory.log == [
        ("send", 4 * rows * 2), ("send", 8 * rows), ("fetch", 4 * rows), ("fetch", 4 * rows), ("settle", 0),
    ]  # fmt: skip


def test_buckets_waste_less_than_a_third() -> None:
    sizes = [bucket(rows) for rows in range(1, 4097)]
    assert sorted(set(sizes)) == sorted({2**n for n in range(13)} | {3 * 2**n for n in range(11)})
    assert all(rows <= size < 1.5 * rows or rows == size for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("pool", ["numpy", "graph"])
def test_a_crowd_of_any_size_has_the_answers_of_each_alone(pool: str) -> None:
    """Batches are filled up with rows that belong to nobody."""
    model, manifest = keeper(max_batch=7)
    fresh = ModelRunner(model, manifest, "keeper/1", provider=CPU, threads=1)
    runner: Any = ModelRunner(model, manifest, "keeper/1", provider=CPU, threads=1, kept=True)
    runner = GraphRunner(model, runner, 8) if pool == "graph" else runner
    rows: list[int] = []
    run = runner.run

    def counted(feeds: dict[str, Array]) -> list[Array]:
        rows.append(len(feeds["x"]))
        results: list[Array] = run(feeds)
        return results

    runner.run = counted
    bench = Bench(manifest, runner, max_sequences=8, pool=runner.pool, bucketed=True)
    alone = [Bench(manifest, fresh, max_sequences=1) for _ in range(8)]
    every = [(bench.open(), one, one.open()) for one in alone]
    steps = [0] * 8
    for crowd in (1, 5, 7, 3, 8):
        for n, (together, one, itself) in enumerate(every[:crowd]):
            steps[n] += 1
            bench.send(together, steps[n], [n / 8, crowd, 0.0])
            one.send(itself, steps[n], [n / 8, crowd, 0.0])
            one.settle()
        bench.settle()
    assert [bench.outputs(s) for s, _, _ in every] == [one.outputs(s) for _, one, s in every]
    assert rows == [1, 6, 7, 3, 7, 1]
    assert bench.engine.metrics.padding.total == pytest.approx(1 / 6)  # five rows in six
    bench.engine.check()


def test_the_manifest_bounds_the_largest_bucket() -> None:
    manifest: Manifest = keeper(max_batch=7)[1]
    layout = Layout(manifest, bucketed=True)
    assert [layout.batch_size([1] * rows) for rows in (1, 4, 5, 6, 7)] == [1, 4, 6, 6, 7]
