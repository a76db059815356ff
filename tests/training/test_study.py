"""From a task's file to its folder: seeds, variants and baselines in metrics.json and on the card."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")

from tenuto.training import cli

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = '''
from dataclasses import replace
from tests.training.toy_task import ToyTask

class FamilyTask(ToyTask):
    """A toy with two seeds, a variant of fewer rows, and something simpler beside it."""

    name = "family"
    recipe = replace(ToyTask.recipe, seeds=(4, 5), epochs=2)

    def variants(self):
        return {} if self.rows == 4 else {"fewer rows": FamilyTask(rows=4)}

    def baselines(self):
        return {"always 0": {"metric": "mse", "value": 0.125}}
'''


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "family.py"
    path.write_text(TASK, encoding="utf-8")
    return path


def _metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_bytes())
    return found


def _card_rows(folder: Path) -> Mapping[str, str]:
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1] for row in rows}


def test_seeds_variants_and_baselines_are_recorded(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(task)]) == 0
    folder = Path("exported/family/1")
    assert capsys.readouterr().out.startswith(f"{folder}\nmetric: mse\nvalue: ")
    metrics = _metrics(folder)
    values = metrics["seeds"]["values"]
    assert list(values) == ["4", "5"]
    assert values["4"] == metrics["test"]["value"] != values["5"]
    assert metrics["seeds"]["mean"] == pytest.approx(sum(values.values()) / 2)
    assert metrics["variants"]["fewer rows"]["value"] == metrics["variants"]["mean"] not in values.values()
    training = metrics["training"]
    assert training["seed"] == 4
    assert training["recipe"]["epochs"] == training["epochs"] == len(training["curve"]) == 2
    assert training["command"] == f"tenuto train {task}"
    assert training["cpu_seconds"] <= training["cpu_seconds_with_other_seeds_and_variants"]
    card = _card_rows(folder)
    assert card["beside it: always 0"] == "0.1250"
    assert card["fewer rows"] == f"{metrics['variants']['mean']:.4f}"
    assert card["mean and standard deviation over 2 seeds"].startswith(f"{metrics['seeds']['mean']:.4f} ± ")


def test_one_seed_alone_has_no_spread_and_no_variants(task: Path) -> None:
    assert cli.main(["train", str(task), "--seed", "5", "--epochs", "1", "--version", "7"]) == 0
    metrics = _metrics(Path("exported/family/7"))
    assert metrics["version"] == 7
    assert metrics["seeds"] == {
        "values": {"5": metrics["test"]["value"]},
        "mean": metrics["test"]["value"],
        "standard_deviation": None,
    }
    assert "variants" not in metrics
    assert metrics["training"]["command"] == f"tenuto train {task} --seed 5 --epochs 1"


def test_the_same_command_writes_the_same_bytes(task: Path) -> None:
    for run in ("one", "two"):
        command = ["train", str(task), "--runs", f"runs-{run}", "--output", run]
        assert cli.main(command) == 0
    one, two = Path("one/family/1"), Path("two/family/1")
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for name in ("model.onnx", "golden.npz", "manifest.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = _metrics(one), _metrics(two)
    for metrics in (first, second):
        for key in ("cpu_seconds", "cpu_seconds_with_other_seeds_and_variants"):
            del metrics["training"][key]
        del metrics["date"]  # midnight may pass
    assert first == second


def test_what_was_trained_can_be_exported_again(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(task)]) == 1
    assert "run tenuto train first" in capsys.readouterr().err
    assert not Path("exported").exists()
    assert cli.main(["train", str(task), "--no-export"]) == 0
    assert not Path("exported").exists()
    assert cli.main(["export", str(task)]) == 0
    folder = Path("exported/family/1")
    model = (folder / "model.onnx").read_bytes()
    assert cli.main(["train", str(task)]) == 0
    assert (folder / "model.onnx").read_bytes() == model
    assert cli.main(["evaluate", str(folder), "--task", str(task)]) == 0
    assert f"value: {_metrics(folder)['test']['value']}" in capsys.readouterr().out


def test_diagnose_draws_what_there_is(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'tenuto[diagnosis]'")
    assert cli.main(["train", str(task), "--diagnose", "--seed", "4"]) == 0
    drawn = Path("runs/family/diagnosis/curve.svg")
    assert str(drawn) in capsys.readouterr().out
    assert "family" in drawn.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "what, text",
    [
        ("weather", "no task is called 'weather'; there are: .*digits-rows.*, or a file"),
        ("./none.py", "none.py: no such file"),
        ("./empty.py", "expected one class made from Task, got 0"),
    ],
)
def test_what_is_no_task_is_one_line(
    what: str, text: str, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.py").write_text("from tenuto.training.task import Task\n", encoding="utf-8")
    assert cli.main(["train", what]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(text, said)
