"""Stacking rows into the graph's tensors and cutting its outputs into rows again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tenuto.serving.errors import NotFinite, OutOfRangeValue
from tenuto.serving.layout import Layout, one_a_row
from tenuto.serving.manifest import Control, Manifest

from .fakes import accumulator, doubler, f32

SIZES: dict[str, Any] = {"batch": "batch", "time": "time", "a": 2, "b": 3}


def create_manifest(axes: list[str], *, ragged: bool = True, **changes: Any) -> Manifest:
    """A model whose one input and one output have these axes, among them perhaps batch and time."""
    tensor: dict[str, Any] = {
        "dtype": "float32",
        "shape": [SIZES[axis] for axis in axes],
        "batch_axis": axes.index("batch") if "batch" in axes else None,
        "time_axis": axes.index("time") if "time" in axes else None,
    }
    state = {"input": "s", "output": "t", "dtype": "float32", "shape": ["batch"]}
    alone: dict[str, Any] = {"shape": [], "batch_axis": None} if "batch" not in axes else {}
    x = {"name": "x"} | tensor | ({"lengths": "n"} if ragged and "time" in axes else {})
    whole = {"name": "m", "inputs": [x], "outputs": [{"name": "y"} | tensor], "states": [state | alone]}
    return Manifest.model_validate(whole | changes)


def floats(row: bytes) -> list[float]:
    return np.frombuffer(row, np.float32).tolist()


def ramp(*shape: int, start: int = 1) -> NDArray[np.float32]:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


AXES = st.permutations(["batch", "time", "a", "b"]).flatmap(
    lambda order: st.sets(st.sampled_from(["time", "a", "b"])).map(
        lambda left_out: [axis for axis in order if axis not in left_out]
    )
)


@given(axes=AXES, lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), extra=st.integers(0, 2))
def test_cut_gives_back_what_was_stacked(axes: list[str], lengths: list[int], extra: int) -> None:
    """For every order of the axes, ragged rows, with and without time, padded to a fixed batch or not."""
    timed = "time" in axes
    fixed: dict[str, Any] = {"fixed_batch": len(lengths) + extra} if extra else {}
    layout = Layout(create_manifest(axes, **fixed))
    lengths = lengths if timed else [1] * len(lengths)
    inner = int(np.prod([SIZES[a] for a in axes if a in ("a", "b")], dtype=int))
    rows = [ramp(n * inner, start=100 * i).tobytes() for i, n in enumerate(lengths)]
    size = layout.batch_size(lengths)
    feeds, refused = layout.stack([rows], size)
    sizes = {"batch": len(lengths) + extra, "time": max(lengths), "a": 2, "b": 3}
    assert feeds["x"].shape == tuple(sizes[axis] for axis in axes)
    assert feeds["x"].flags.c_contiguous
    assert refused == {}
    assert layout.cut([feeds["x"]], lengths) == [(row,) for row in rows]


@given(rows=st.lists(st.integers(1, 4), min_size=1, max_size=4), batch_axis=st.integers(0, 1))
def test_stateless_requests_are_joined_and_taken_apart(rows: list[int], batch_axis: int) -> None:
    shape: list[Any] = [2, 2]
    shape[batch_axis] = "batch"
    tensor = {"dtype": "float32", "shape": shape, "batch_axis": batch_axis}
    layout = Layout(doubler(inputs=[{"name": "x"} | tensor], outputs=[{"name": "y"} | tensor]))
    requests = [ramp(n, 2, start=10 * i).tobytes() for i, n in enumerate(rows)]
    feeds, _ = layout.stack([requests], layout.batch_size(rows))
    assert feeds["x"].shape[batch_axis] == sum(rows)
    assert layout.cut([feeds["x"]], rows) == [(request,) for request in requests]


def test_every_axis_lands_where_the_graph_has_it() -> None:
    """Written out once, so that stack and cut cannot be wrong in the same way."""
    layout = Layout(create_manifest(["time", "a", "batch"]))
    first = f32([[1, 2], [3, 4]])  # two samples of `a`
    second = f32([[5, 6]])
    feeds, _ = layout.stack([[first.tobytes(), second.tobytes()]], 2)
    assert feeds["x"].tolist() == [[[1, 5], [2, 6]], [[3, 0], [4, 0]]]


def test_a_model_without_a_batch_axis_eats_one_row_as_it_is() -> None:
    layout = Layout(create_manifest(["time", "a"]))
    row = ramp(3, 2)
    feeds, _ = layout.stack([[row.tobytes()]], 1)
    np.testing.assert_array_equal(feeds["x"], row)
    assert layout.cut([row], [3]) == [(row.tobytes(),)]


def test_a_stateless_model_without_a_batch_axis_eats_one_row_as_it_is() -> None:
    tensor = {"dtype": "float32", "shape": [2, 3], "batch_axis": None}
    layout = Layout(doubler(inputs=[{"name": "x"} | tensor], outputs=[{"name": "y"} | tensor]))
    row = ramp(2, 3)
    feeds, _ = layout.stack([[row.tobytes()]], layout.batch_size([1]))
    assert feeds["x"].shape == (2, 3)
    assert layout.cut([row], [1]) == [(row.tobytes(),)]
    assert layout.join(((row.tobytes(),),)) == (((2, 3), row.tobytes()),)


def test_lengths_count_the_left_context_and_padding_rows_have_a_legal_one() -> None:
    """A length of 0 would give zero state in ONNX's LSTM."""
    layout = Layout(create_manifest(["batch", "time"], fixed_batch=4))
    feeds, _ = layout.stack([[ramp(3).tobytes(), ramp(1).tobytes()]], 4)
    assert feeds["n"].tolist() == [3, 1, 3, 3]
    assert feeds["n"].dtype == np.int32


def test_padding_rows_are_zero() -> None:
    layout = Layout(create_manifest(["batch", "time"], fixed_batch=3))
    feeds, _ = layout.stack([[ramp(2).tobytes()]], 3)
    assert feeds["x"].tolist() == [[1, 2], [0, 0], [0, 0]]
    stateless = Layout(doubler(fixed_batch=3))
    feeds, _ = stateless.stack([[ramp(1, 2).tobytes()]], 3)
    assert feeds["x"].tolist() == [[1, 2], [0, 0], [0, 0]]


def test_the_batch_is_turns_of_sequences_and_rows_of_requests() -> None:
    assert Layout(accumulator()).batch_size([3, 1]) == 2
    assert Layout(doubler()).batch_size([3, 1]) == 4
    assert Layout(doubler(fixed_batch=8)).batch_size([3, 1]) == 8


def test_a_stride_makes_fewer_frames() -> None:
    x, y = {"chunk": {"multiple": 4}}, {"stride": 2}
    layout = Layout(accumulator(x=x, y=y))
    tensor = ramp(2, 6)  # three model frames at most, two output frames each
    parts = layout.cut([tensor], [3, 1])
    assert [floats(row[0]) for row in parts] == [[1, 2, 3, 4, 5, 6], [7, 8]]


def test_non_contiguous_results_are_cut_right() -> None:
    layout = Layout(accumulator())
    backwards = np.asfortranarray(ramp(2, 3))
    assert [floats(row[0]) for row in layout.cut([backwards], [3, 2])] == [[1, 2, 3], [4, 5]]


def test_an_untimed_output_is_its_value_after_the_last_turn() -> None:
    untimed = {"name": "last", "dtype": "float32", "shape": ["batch", 2]}
    timed = {"name": "all", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
    layout = Layout(accumulator(outputs=[timed, untimed]))
    parts = layout.cut([ramp(2, 3), ramp(2, 2, start=50)], [3, 1])
    assert [floats(row[1]) for row in parts] == [[50, 51], [52, 53]]
    joined = layout.join((parts[0], parts[1]))
    assert joined[0] == ((4,), parts[0][0] + parts[1][0])
    assert joined[1] == ((2,), parts[1][1])


def test_parts_of_a_stateless_request_are_joined() -> None:
    layout = Layout(doubler())
    parts = ((ramp(2, 2).tobytes(),), (ramp(1, 2, start=9).tobytes(),))
    assert layout.join(parts) == (((3, 2), parts[0][0] + parts[1][0]),)


def test_a_chunk_that_completed_nothing_has_no_outputs() -> None:
    assert Layout(accumulator()).join(()) == ()


def refused_by(spec: dict[str, Any], *rows: list[Any]) -> dict[int, Any]:
    layout = Layout(accumulator(x=spec))
    dtype = spec.get("dtype", "float32")
    _, refused = layout.stack([[np.array(row, dtype).tobytes() for row in rows]], len(rows))
    return refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_the_row_with_nan_or_inf_is_refused(value: float) -> None:
    refused = refused_by({}, [1.0, 2.0], [3.0, value], [4.0])
    assert list(refused) == [1]
    assert isinstance(refused[1], NotFinite)
    assert "input 'x' holds NaN or Inf" in str(refused[1])


def test_nan_passes_where_the_manifest_allows_it() -> None:
    assert refused_by({"finite": False}, [np.nan]) == {}


@pytest.mark.parametrize("value", [-1, 4])
def test_only_the_row_outside_its_range_is_refused_with_both_ends(value: int) -> None:
    refused = refused_by({"dtype": "int64", "range": [0, 3]}, [0, 3], [1, value], [2])
    assert list(refused) == [1]
    assert isinstance(refused[1], OutOfRangeValue)
    assert f"from {min(1, value)} to {max(1, value)}, allowed are [0, 3]" in str(refused[1])


def test_zeros_of_padding_are_not_the_clients() -> None:
    """0 is outside of the range; a short row beside a long one is still right."""
    assert refused_by({"dtype": "int32", "range": [1, 3]}, [1, 2, 3], [1]) == {}


def test_the_left_context_is_not_the_clients() -> None:
    """Its initial value may lie outside of what a client may send."""
    index = {"dtype": "int64", "range": [1, 3], "left_context": 1}
    assert list(refused_by(index, [0, 1, 2], [0, 3, 9])) == [1]
    assert list(refused_by({"left_context": 1}, [-np.inf, 1], [-np.inf, np.inf])) == [1]


def test_each_input_is_looked_at() -> None:
    x = {"name": "x", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
    layout = Layout(accumulator(inputs=[x, x | {"name": "z"}]))
    good, bad = f32([1]).tobytes(), f32([np.nan]).tobytes()
    _, refused = layout.stack([[bad, good, good], [good, good, bad]], 3)
    assert sorted(refused) == [0, 2]
    assert "'x'" in str(refused[0])
    assert "'z'" in str(refused[2])


def test_constants_are_the_manifests_unless_chosen() -> None:
    constants = [
        {"name": "gain", "dtype": "float32", "value": 1.0, "allowed": [1.0, 2.0]},
        {"name": "fill", "dtype": "int64", "value": 3, "shape": [2]},
        {"name": "table", "dtype": "float32", "value": [1.0, 2.0], "shape": [2, 1]},
    ]
    layout = Layout(accumulator(constants=constants))
    given_ = layout.constants(())
    assert (given_["gain"].shape, float(given_["gain"])) == ((), 1.0)
    assert (given_["fill"].dtype.name, given_["fill"].tolist()) == ("int64", [3, 3])
    assert given_["table"].tolist() == [[1.0], [2.0]]
    assert float(layout.constants((("gain", 2.0),))["gain"]) == 2.0
    assert float(layout.constants(())["gain"]) == 1.0


def test_a_clients_output_has_the_manifests_axes_in_their_order() -> None:
    """As its inputs do, however the rows are held here."""
    layout = Layout(create_manifest(["a", "batch", "time"]))
    time_first = ramp(3, 2)
    ((shape, data),) = layout.join(((time_first.tobytes(),),))
    assert shape == (2, 3)
    np.testing.assert_array_equal(np.frombuffer(data, np.float32).reshape(shape), time_first.T)


def test_a_stateless_output_has_its_batch_axis_where_the_manifest_has_it() -> None:
    tensor = {"dtype": "float32", "shape": [2, "batch"], "batch_axis": 1}
    layout = Layout(doubler(inputs=[{"name": "x"} | tensor], outputs=[{"name": "y"} | tensor]))
    rows = ramp(3, 2)
    ((shape, data),) = layout.join(((rows.tobytes(),),))
    assert shape == (2, 3)
    np.testing.assert_array_equal(np.frombuffer(data, np.float32).reshape(shape), rows.T)


def test_padding_is_a_value_that_the_model_may_see() -> None:
    """A padded row must not bring the graph an index outside its range."""
    x = {"dtype": "int64", "range": [3, 9]}
    layout = Layout(accumulator(x=x, max_batch=4, fixed_batch=4))
    rows = [np.array(values, np.int64).tobytes() for values in ([5, 6, 7], [8])]
    feeds, refused = layout.stack([rows], 4)
    assert feeds["x"].tolist() == [[5, 6, 7], [8, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert refused == {}


# What a run gives is looked at before it is cut: a wrong shape would be another row's numbers.

WRONG_SHAPES = {
    "rank": (3, 4),
    "rows": (2, 4, 2),
    "a fixed axis": (3, 4, 5),
    "too few frames": (3, 3, 2),
}


@pytest.mark.parametrize("shape", WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
def test_a_run_of_another_shape_fails(shape: tuple[int, ...]) -> None:
    layout = Layout(create_manifest(["batch", "time", "a"]))
    unfit = layout.unfit([np.zeros(shape, np.float32)], [4, 2, 1], 3)
    assert list(unfit) == [0, 1, 2]
    assert f"'y' came as {list(shape)} from a run of 3 rows, expected [3, 4 or more, 2]" in str(unfit[0])


def test_a_run_of_the_right_shape_passes_again_and_again() -> None:
    layout = Layout(create_manifest(["batch", "time", "a"]))
    good, bad = np.zeros((3, 4, 2), np.float32), np.zeros((3, 4, 3), np.float32)
    for _ in range(2):
        assert not layout.unfit([good], [4, 2, 1], 3)
        assert not layout.unfit([good], [2, 2, 1], 3)  # more frames than are asked for
        assert layout.unfit([good], [5, 2, 1], 3)
        assert layout.unfit([bad], [4, 2, 1], 3)


COUNTED = {"name": "y", "dtype": "float32", "lengths_output": "n"}


def counted(axes: list[str], **more: Any) -> Layout:
    shape = [SIZES[axis] for axis in axes]
    places: dict[str, Any] = {"time_axis": axes.index("time")}
    places["batch_axis"] = axes.index("batch") if "batch" in axes else None
    return Layout(create_manifest(axes, outputs=[COUNTED | {"shape": shape} | places], **more))


@pytest.mark.parametrize("axes", [["batch", "time", "a"], ["time", "a", "batch"], ["a", "batch", "time"]])
def test_the_graph_counts_each_rows_frames(axes: list[str]) -> None:
    """In any order of the axes; of padding rows nothing is cut."""
    whole = ramp(4, 5, 2)  # rows, time, a
    order = [["batch", "time", "a"].index(axis) for axis in axes]
    counts = np.array([[2], [0], [5], [9]], np.int64)
    layout = counted(axes, fixed_batch=4)
    assert not layout.unfit([whole.transpose(order), counts], [5, 5, 5], 4)
    cut = layout.cut([whole.transpose(order), counts], [5, 5, 5])
    assert [floats(row[0]) for row in cut] == [whole[i, :n].ravel().tolist() for i, n in enumerate((2, 0, 5))]


def test_the_frames_of_a_graph_without_rows_are_counted_too() -> None:
    layout = counted(["time", "a"])
    assert floats(layout.cut([ramp(3, 2), np.array([2], np.int32)], [3])[0][0]) == [1, 2, 3, 4]


@pytest.mark.parametrize("counts", [[6, 0], [-1, 0], [7]], ids=["too many", "negative", "too few rows"])
def test_a_count_that_is_none_is_its_rows_own_fault(counts: list[int]) -> None:
    layout = counted(["batch", "time", "a"])
    unfit = layout.unfit([ramp(2, 5, 2), np.array(counts, np.int32)], [5, 5], 2)
    assert list(unfit) == ([0] if len(counts) == 2 else [0, 1])
    assert str(unfit[0]) == f"output 'y' has 5 frames, and the graph counts {counts[0]}"


def test_a_control_has_one_number_a_row_and_no_for_padding() -> None:
    control = Control(name="start", kind="start", dtype="int32", shape=("batch", 1), values=(-1, 1))
    assert one_a_row(control, [1, -1], 4).tolist() == [[1], [-1], [-1], [-1]]
    number = Control(name="id", kind="sequence_id", dtype="uint64", values=(5, 6))
    assert one_a_row(number, [2**64 - 1], 2).tolist() == [2**64 - 1, 0]
