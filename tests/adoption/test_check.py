"""`tenuto check`: what holds of a model that keeps its promises, and which row catches one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tenuto.serving.adoption import graph_facts
from tenuto.serving.adoption.adopting import copy
from tenuto.serving.adoption.checking import Table, check
from tenuto.serving.adoption.cli import main
from tenuto.serving.adoption.proposal import propose
from tenuto.serving.adoption.sample_input import cut, drawn
from tenuto.serving.adoption.wishes import Wishes
from tenuto.serving.manifest import Exact, Manifest
from tenuto.serving.repository import ModelFolder
from tenuto.serving.vetting import Limits
from tests import toys

from . import graphs

LIMITS = Limits(50.0, 4 << 30)
CUT = "a sequence cut into chunks gives what it gives whole"
BATCHED = "sequences beside each other get what they get alone"
REMEMBERS = "what came before matters"
NAN = "NaN stays in its row"
SHAPES = "runs give the shapes that are told"
REPEATED = "the same again gives the same"
CHOICES = "all values that a client may choose run"


def checked(folder: Path, model: onnx.ModelProto, manifest: Manifest | None = None, **wishes: Any) -> Table:
    facts = graph_facts.read(graphs.save(folder, model))
    manifest = manifest or propose(facts, Wishes(**wishes), "m", LIMITS).manifest
    assert manifest is not None
    version = folder / "1"
    version.mkdir()
    copy(facts, manifest, version)
    return check(ModelFolder(manifest.name, 1, version), LIMITS)


def toy(folder: Path, made: tuple[bytes, dict[str, Any]]) -> Table:
    return checked(folder, onnx.load_model_from_string(made[0]), Manifest.model_validate(made[1]))


def failed(table: Table) -> list[str]:
    return [row.check for row in table.failed]


def says(table: Table, words: str) -> str:
    return next(row.says for row in table.rows if row.check == words)


def test_a_good_model_keeps_everything_and_the_table_says_how(tmp_path: Path) -> None:
    table = checked(tmp_path, graphs.lstm())
    assert failed(table) == []
    assert says(table, CUT) == "bit for bit, 12 frames in 3 ways"
    assert says(table, BATCHED) == "bit for bit, 5 beside each other, 5 rows a run"
    assert "ends alone" in says(table, NAN)
    assert [row.check for row in table.rows if row.held is None] == [CHOICES]


@pytest.mark.parametrize(
    "model",
    [graphs.gru, graphs.denoiser, graphs.enhancement, graphs.controlled, graphs.convolution],
    ids=lambda model: model.__name__,
)
def test_models_of_other_shapes_keep_everything(tmp_path: Path, model: Any) -> None:
    table = checked(tmp_path, model())
    assert failed(table) == []
    assert says(table, REMEMBERS).startswith("what came before changes")


@pytest.mark.parametrize("model", [graphs.pictures, graphs.mlp], ids=lambda model: model.__name__)
def test_of_a_stateless_model_nothing_is_asked_about_state(tmp_path: Path, model: Any) -> None:
    table = checked(tmp_path, model())
    assert failed(table) == []
    assert {row.says for row in table.rows if row.held is None} == {
        "the model has no state",
        "a client may choose none",
    }


def test_a_ragged_model_runs_rows_of_different_lengths_together(tmp_path: Path) -> None:
    assert failed(toy(tmp_path, toys.accumulator())) == []


def test_a_state_that_is_none_does_not_survive_a_cut(tmp_path: Path) -> None:
    assert failed(checked(tmp_path, graphs.mislabelled())) == [CUT]


def test_a_state_that_nobody_looks_at_is_none(tmp_path: Path) -> None:
    table = checked(tmp_path, graphs.unused_state())
    assert failed(table) == [REMEMBERS]
    assert table.failed[0].may_mend == "--no-state"


def test_nan_that_gets_across_is_seen_where_no_number_does(tmp_path: Path) -> None:
    table = checked(tmp_path, graphs.leaking(0.0))
    assert failed(table) == [NAN]
    assert "a state of NaN ends the one beside it too" in says(table, NAN)


def test_a_mean_over_the_batch_is_seen(tmp_path: Path) -> None:
    table = checked(tmp_path, graphs.leaking(0.5))
    assert BATCHED in failed(table)
    assert says(table, BATCHED).startswith("off by ")


def test_random_answers_are_seen(tmp_path: Path) -> None:
    assert REPEATED in failed(checked(tmp_path, graphs.noisy()))


def test_a_chunk_of_another_length_than_the_model_knows_is_seen(tmp_path: Path) -> None:
    """What it takes for one step depends on how much is sent; with exact chunks there is one length."""
    assert CUT in failed(checked(tmp_path, graphs.rated()))
    again = tmp_path / "again"
    again.mkdir()
    assert failed(checked(again, graphs.rated(), chunks={"input": Exact(exact=4)})) == []


def test_a_choice_that_does_not_run_is_seen(tmp_path: Path) -> None:
    """The constant chooses how much is cut off at the front: more than there is, and nothing runs."""
    nodes = [
        graphs.node("Unsqueeze", ["skip", "axis"], ["rows"]),
        graphs.node("Gather", ["table", "rows"], ["offset"]),
        graphs.node("Add", ["x", "offset"], ["y"]),
    ]
    made = {"axis": np.array([0]), "table": np.ones((2,), np.float32)}
    inputs: graphs.Tensors = {"x": (graphs.FLOAT, ["batch", 1]), "skip": (graphs.INT64, [])}
    model = graphs.build(nodes, inputs, {"y": (graphs.FLOAT, ["batch", 1])}, made)
    table = checked(tmp_path, model, constants={"skip": (0.0, 1.0, 7.0)})
    assert failed(table) == [CHOICES]
    assert says(table, CHOICES).startswith("skip=7: ")


def test_a_manifest_that_tells_another_shape_is_seen_and_nothing_else_is_judged(tmp_path: Path) -> None:
    made, manifest = toys.doubler()
    manifest["outputs"][0]["shape"] = ["batch", 3]
    table = toy(tmp_path, (made, manifest))
    assert failed(table) == [SHAPES]
    assert "tells ['batch', 3], so [1, 3] for 1 rows of 1 samples; the run gave [1, 2]" in says(table, SHAPES)
    assert table.rows[-1].check == SHAPES


def test_a_model_that_does_not_load_has_a_table_of_one_row(tmp_path: Path) -> None:
    made, manifest = toys.doubler()
    manifest["inputs"][0]["name"] = "z"
    table = toy(tmp_path, (made, manifest))
    assert [(row.check, row.held) for row in table.rows] == [("it loads, and runs on zeros", False)]
    assert "input 'z' is not in the graph" in table.rows[0].says


def test_the_command_checks_a_file_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = toys.write(tmp_path, "accumulator", toys.accumulator())
    assert main(["check", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[0] == "held"
    assert main(["check", str(graphs.save(tmp_path, graphs.mislabelled())), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["checks"]
    assert [row["check"] for row in rows if row["held"] is False] == [CUT]
    assert main(["check", str(graphs.save(tmp_path, graphs.growing()))]) == 1
    assert "--length past_key=AXIS:N" in capsys.readouterr().err


def test_the_command_checks_by_the_manifest_that_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, manifest = toys.accumulator()
    path = tmp_path / "sum.onnx"
    path.write_bytes(made)
    wrong = manifest | {"states": [manifest["states"][0] | {"shape": ["batch", 2]}]}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    assert main(["check", str(path), "--manifest", str(tmp_path / "wrong.json")]) == 1
    assert "FAILED" in capsys.readouterr().out
    (tmp_path / "broken.json").write_text("{")
    assert main(["check", str(path), "--manifest", str(tmp_path / "broken.json")]) == 1
    assert "the manifest is no JSON" in capsys.readouterr().err


def test_a_difference_of_bits_is_held_to_the_tolerance(tmp_path: Path) -> None:
    """A sum over the chunk in another order: some bits differ, and the table says by how much."""
    nodes = [
        graphs.node("Concat", ["carry", "x"], ["all"], axis=1),
        graphs.node("CumSum", ["all", "one"], ["sums"]),
        graphs.node("Slice", ["sums", "axis", "end", "axis"], ["y"]),
        graphs.node("Slice", ["sums", "last", "end", "axis"], ["exact"]),
        graphs.node("Mul", ["exact", "about"], ["carry_out"]),
    ]
    made = {"one": np.int64(1), "axis": np.array([1]), "end": np.array([2**31]), "last": np.array([-1])}
    made["about"] = np.float32(1 + 2e-6)
    inputs: graphs.Tensors = {"x": (graphs.FLOAT, ["batch", "time"]), "carry": (graphs.FLOAT, ["batch", 1])}
    outputs: graphs.Tensors = {
        "y": (graphs.FLOAT, ["batch", "time"]),
        "carry_out": (graphs.FLOAT, ["batch", 1]),
    }
    table = checked(tmp_path, graphs.build(nodes, inputs, outputs, made))
    assert failed(table) == []
    assert says(table, CUT).startswith("off by ")
    folder = ModelFolder("m", 1, tmp_path / "1")
    assert failed(check(folder, LIMITS, tolerance=1e-9)) == [CUT]


def test_samples_are_drawn_from_what_a_manifest_allows() -> None:
    _, made = toys.lookup()
    manifest = Manifest.model_validate(made)
    index = drawn(manifest, 200, 1)["index"]
    assert index.shape == (200,)
    assert set(index.tolist()) == {0, 1, 2, 3}
    pieces = cut(manifest, {"index": index}, [50.0, 200.0])
    assert [piece["index"].shape for piece in pieces] == [(50,), (150,)]
    assert drawn(manifest, 5, 2)["index"].tolist() == drawn(manifest, 5, 2)["index"].tolist()
