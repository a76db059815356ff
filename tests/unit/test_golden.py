"""The self test of a model finds a model that answers otherwise."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenuto.serving.engine import Runner
from tenuto.serving.errors import ModelInvalid, TenutoError
from tenuto.serving.golden import Replayed, replay
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU, ModelRunner
from tests import toys

from .fakes import FAILS, Accumulator, Array, Bench, Doubler, accumulator, doubler, f32

STEPS = {
    "1.in.x": f32([1, 2]),
    "1.out.y": f32([1, 3]),
    "2.in.x": f32([]),
    "3.in.x": f32([3]),
    "3.out.y": f32([6]),
}


def write(folder: Path, arrays: dict[str, Any]) -> Path:
    path = folder / "golden.npz"
    np.savez(path, **arrays)
    return path


def run(
    path: Path, manifest: Manifest | None = None, runner: Runner | None = None, judged: bool = True
) -> Replayed:
    """What was replayed, through the accumulator if nothing else is said."""
    return replay(Bench(manifest, runner).engine, path, "toy/1", judged)


def test_the_steps_are_one_sequence_and_counted(tmp_path: Path) -> None:
    assert run(write(tmp_path, STEPS)) == Replayed(3, 0.0)


def test_a_stateless_model_answers_each_step_alone(tmp_path: Path) -> None:
    ones = np.ones((2, 2), np.float32)
    arrays = {"1.in.x": ones, "1.out.y": ones * 2, "2.in.x": ones[:1], "2.out.y": ones[:1] * 2}
    assert run(write(tmp_path, arrays), doubler(), Doubler()).steps == 2


def test_a_model_that_generates_is_tested_by_what_it_is_sent(tmp_path: Path) -> None:
    model, fields = toys.speaker()
    manifest = Manifest.model_validate(fields)
    runner = ModelRunner(model, manifest, "toy/1", provider=CPU, threads=1)
    ids = np.array([2, 3], np.int64)
    arrays = {
        "1.in.id": ids,
        "1.out.logits": toys.SPEECH[[2, 5]],
        "2.in.id": ids,
        "2.out.sum": np.array([7, 10]),
    }
    assert run(write(tmp_path, arrays), manifest, runner).steps == 2


def test_off_by_more_than_the_tolerance_is_refused_with_how_much(tmp_path: Path) -> None:
    path = write(tmp_path, STEPS | {"3.out.y": f32([6.02]), "tolerance": 0.01})
    with pytest.raises(ModelInvalid, match=r"toy/1: golden step 3: output 'y' is off by 0.02, allowed 0.01"):
        run(path)


def test_off_by_less_than_the_tolerance_passes(tmp_path: Path) -> None:
    off = STEPS | {"1.out.y": f32([1.01, 3]), "3.out.y": f32([6.02]), "tolerance": 0.05}
    found = run(write(tmp_path, off))
    assert (found.steps, round(found.worst, 4)) == (3, 0.02)


def test_where_it_is_not_judged_any_finite_difference_passes_and_is_told(tmp_path: Path) -> None:
    assert run(write(tmp_path, STEPS | {"3.out.y": f32([7])}), judged=False) == Replayed(3, 1.0)
    for bad in (np.nan, np.inf):
        with pytest.raises(ModelInvalid, match="golden step 3: output 'y' is off by (nan|inf)"):
            run(write(tmp_path, STEPS | {"3.out.y": f32([bad])}), judged=False)


def test_without_a_tolerance_a_ten_thousandth_is_allowed(tmp_path: Path) -> None:
    assert run(write(tmp_path, STEPS | {"3.out.y": f32([6.00005])})).steps == 3
    with pytest.raises(ModelInvalid, match="is off by"):
        run(write(tmp_path, STEPS | {"3.out.y": f32([6.0002])}))


def test_nan_is_no_number_within_any_tolerance(tmp_path: Path) -> None:
    class Broken(Accumulator):
        def run(self, feeds: dict[str, Array]) -> list[Array]:
            y, total = super().run(feeds)
            return [y * np.float32(np.nan), total]

    with pytest.raises(ModelInvalid, match="output 'y' is off by nan"):
        run(write(tmp_path, STEPS | {"tolerance": 1e9}), runner=Broken())


def test_what_is_not_finite_on_both_sides_does_not_differ(tmp_path: Path) -> None:
    class Endless(Accumulator):
        def run(self, feeds: dict[str, Array]) -> list[Array]:
            y, total = super().run(feeds)
            return [np.where(y > 2, np.float32(np.inf), y), total]

    path = write(tmp_path, STEPS | {"1.out.y": f32([1, np.inf]), "3.out.y": f32([np.inf])})
    assert run(path, runner=Endless()) == Replayed(3, 0.0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another shape": ({"1.out.y": f32([[1, 3]])}, r"has shape \(2,\), expected \(1, 2\)"),
    "a frame too many": ({"2.out.y": f32([3])}, "step 2: output 'y' is expected and did not come"),
    "an unknown output": ({"1.out.z": f32([1])}, "step 1: output 'z' is expected and did not come"),
    "an unknown input": ({"1.in.z": f32([1])}, "tensor 'z' is not expected"),
    "a wrong dtype": ({"1.in.x": np.array([1], np.float64)}, "input 'x' is float64; accepted: float32"),
    "a failing step": ({"3.in.x": f32([FAILS])}, "golden step 3 failed: step 3: a row fails the run"),
    "a step left out": ({"5.in.x": f32([1]), "5.out.y": f32([0])}, "golden.npz"),
    "a stray key": ({"1.expect.y": f32([1])}, "golden.npz"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused_by_step_and_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TenutoError, match=message):
        run(write(tmp_path, STEPS | changes))


def test_a_golden_file_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalid, match="golden.npz holds no step 1"):
        run(write(tmp_path, {"tolerance": 1.0}))


def damaged_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("1.in.x.npy", bytes(1000))
    data = bytearray(path.read_bytes())
    data[60:70] = bytes(10)
    path.write_bytes(data)


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, f32([1]))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive"),
        lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
        damaged_zip,
        one_array,
        lambda path: np.savez(path, tolerance=f32([1, 2])),
        lambda path: write(path.parent, {"1.in.x": np.array([{}], dtype=object)}),
        lambda path: path.mkdir(),
    ],
    ids=["empty", "text", "truncated", "damaged", "one array", "two tolerances", "objects", "folder"],
)
def test_a_file_that_is_no_golden_file_is_named(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    make(path)
    with pytest.raises(ModelInvalid, match="toy/1: golden.npz cannot be read"):
        run(path)


def test_inputs_are_found_by_name(tmp_path: Path) -> None:
    """Their order in the file means nothing."""

    class Weighted(Accumulator):
        def run(self, feeds: dict[str, Array]) -> list[Array]:
            return super().run(feeds | {"x": feeds["x"] + 10 * feeds["z"]})

    x = {"name": "x", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
    manifest = accumulator(inputs=[x, x | {"name": "z"}])
    arrays = {"1.in.z": f32([2]), "1.in.x": f32([1]), "1.out.y": f32([21])}
    assert run(write(tmp_path, arrays), manifest, Weighted()).steps == 1
