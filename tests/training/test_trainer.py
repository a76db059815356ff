"""The trainer: a killed training comes to the same weights, several processes to the same figures."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")

from tenuto.training.optimizer import Optimizer  # noqa: E402
from tenuto.training.recipe import Recipe  # noqa: E402
from tenuto.training.trainer import Fitted, NotTrained, Trainer  # noqa: E402

from .toy_task import Killed, ToyTask  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = {
    "last": Recipe(epochs=4, learning_rate=1e-2),
    "best": Recipe(epochs=4, learning_rate=1e-2, keep="best", patience=2),
    "averaged": Recipe(epochs=4, learning_rate=1e-2, average=0.9),
    "matrices": Recipe(epochs=4, learning_rate=1e-2, matrix_rate=1e-2),
    "half": Recipe(epochs=4, learning_rate=1e-2, precision="bfloat16", clip_norm=None),
}


def _fit(
    folder: Path, recipe: Recipe = RECIPES["last"], task: ToyTask | None = None, seed: int = 3
) -> Fitted:
    task = task or ToyTask()
    task.load()
    return Trainer(task, recipe, seed, folder).run()


def _weights(fitted: Fitted) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in fitted.network.state_dict().items()}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("batches", [3, 8, 21])  # in the first epoch, at its end, in the third
def test_a_killed_training_comes_to_the_same_weights(kind: str, batches: int, tmp_path: Path) -> None:
    whole = _fit(tmp_path / "whole", RECIPES[kind])
    with pytest.raises(Killed):
        _fit(tmp_path / "killed", RECIPES[kind], ToyTask(batches))
    resumed = _fit(tmp_path / "killed", RECIPES[kind], ToyTask(32 - batches // 8 * 8))
    assert _weights(resumed) == _weights(whole)
    assert resumed.curve == whole.curve
    assert (resumed.kept_epoch, resumed.validation) == (whole.kept_epoch, whole.validation)


@pytest.mark.parametrize("capability, half", [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_half_width_is_left_to_processors_that_have_it(
    capability: str, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    class Watching(ToyTask):
        def loss(self, network: Any, batch: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().loss(network, batch)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    _fit(tmp_path, RECIPES["half"], Watching())
    assert (True in seen) is half  # validation is in full width


def test_what_is_finished_is_not_trained_again(tmp_path: Path) -> None:
    first = _fit(tmp_path)
    again = _fit(tmp_path, task=ToyTask(batches_left=0))
    assert _weights(again) == _weights(first)
    assert again.cpu_seconds == first.cpu_seconds


def test_a_checkpoint_with_other_fields_is_begun_anew(tmp_path: Path) -> None:
    """An older version wrote it."""
    first = _fit(tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"schedule": {}}, path)
    task = ToyTask(batches_left=32)
    assert _weights(_fit(tmp_path, task=task)) == _weights(first)
    assert task.batches_left == 0


@pytest.mark.parametrize("change", ["recipe", "seed", "text"])
def test_another_training_does_not_go_on_from_this_one(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _fit(tmp_path)
    recipe = (
        dataclasses.replace(RECIPES["last"], learning_rate=2e-2) if change == "recipe" else RECIPES["last"]
    )
    if change == "text":
        monkeypatch.setattr(ToyTask, "source", lambda self: "another module")
    task = ToyTask(batches_left=32)
    fresh = _fit(tmp_path, recipe, task, seed=4 if change == "seed" else 3)
    assert task.batches_left == 0
    assert (_weights(fresh) == _weights(first)) == (change == "text")


def test_export_of_what_was_not_trained_says_so(tmp_path: Path) -> None:
    task = ToyTask(batches_left=9)
    with pytest.raises(Killed):
        _fit(tmp_path, task=task)
    with pytest.raises(NotTrained, match=r"toy: .*checkpoint\.pt is not the end.*seed 3.*tenuto train"):
        Trainer(task, RECIPES["last"], 3, tmp_path).run(train=False)


def test_patience_ends_a_training_that_no_longer_gains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([5.0, 3.0, 4.0, 3.5, 1.0])
    monkeypatch.setattr(ToyTask, "validate", lambda self, network: next(figures))
    recipe = Recipe(epochs=5, learning_rate=1e-2, keep="best", patience=2)
    fitted = _fit(tmp_path / "patient", recipe)
    assert (fitted.epochs, fitted.kept_epoch, fitted.validation) == (4, 2, 3.0)
    figures = iter([5.0, 3.0])
    # Two epochs of five, of the same cycle: what was kept is what the network was then.
    with pytest.raises(Killed):
        _fit(tmp_path / "cut", recipe, ToyTask(batches_left=16))
    kept = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)["kept"]
    assert _weights(fitted) == {name: value.numpy().tobytes() for name, value in kept.items()}


def test_patience_without_a_best_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="patience needs keep='best'"):
        Recipe(epochs=5, learning_rate=1e-2, patience=2)


def test_an_average_is_nearer_to_where_the_weights_were(tmp_path: Path) -> None:
    slow = dataclasses.replace(RECIPES["averaged"], average=0.9999)
    network = ToyTask()
    network.load()
    torch.manual_seed(3)
    start = network.network().state_dict()["head.weight"]
    plain = _fit(tmp_path / "plain").network.state_dict()["head.weight"]
    averaged = _fit(tmp_path / "slow", slow).network.state_dict()["head.weight"]
    assert (averaged - start).abs().sum() < 0.1 * (plain - start).abs().sum()


def test_the_matrices_of_recurrent_layers_have_a_rate_of_their_own(tmp_path: Path) -> None:
    def moved(matrix_rate: float) -> dict[str, float]:
        fitted = _fit(
            tmp_path / f"{matrix_rate}", dataclasses.replace(RECIPES["last"], matrix_rate=matrix_rate)
        )
        torch.manual_seed(3)
        task = ToyTask()
        task.load()
        start = dict(task.network().named_parameters())
        found = fitted.network.named_parameters()
        return {name: float((value - start[name]).detach().abs().max()) for name, value in found}

    still, fast = moved(1e-9), moved(1e-2)
    recurrent = {name for name in still if "weight_ih" in name or "weight_hh" in name}
    assert recurrent
    for name in still:
        assert fast[name] > 1e-3
        assert (still[name] < 1e-4) == (name in recurrent), name


def test_a_rate_for_recurrent_matrices_needs_some() -> None:
    with pytest.raises(ValueError, match="the network has no recurrent layer"):
        Optimizer(torch.nn.Linear(2, 2), RECIPES["matrices"], 10)


def test_curves_are_written_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is missing: pip install 'tenuto[diagnosis]'")
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    fitted = _fit(tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "validation", "gradient_norm", "learning_rate"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(epoch, pytest.approx(line[name])) for epoch, line in enumerate(fitted.curve, start=1)]
        assert written == expected


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from tenuto.training import processes
from tenuto.training.trainer import Trainer
sys.path.insert(0, sys.argv[1])
from tests.training.toy_task import ToyTask

task = ToyTask(dropout=0.0)
task.load()
with processes.joined(torch.device("cpu")) as joined:
    fitted = Trainer(task, task.recipe, 3, Path(sys.argv[2]), processes=joined).run()
    weights = torch.cat([p.flatten() for p in fitted.network.parameters()])
    (Path(sys.argv[2]) / f"{joined.rank}-of-{joined.count}.json").write_text(
        json.dumps({"validation": fitted.validation, "weights": weights.tolist()})
    )
"""


def _two_processes(folder: Path) -> list[dict[str, Any]]:
    root = Path(__file__).resolve().parents[2]
    program = folder / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*launcher, str(program), str(root), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}-of-2.json").read_bytes()) for rank in range(2)]


def test_two_processes_come_to_the_same_figures_as_one(tmp_path: Path) -> None:
    first, second = _two_processes(tmp_path)
    assert first == second
    one = _fit(tmp_path / "one", task=ToyTask(dropout=0.0))
    assert first["validation"] == pytest.approx(one.validation, rel=1e-3)
    weights = torch.cat([p.flatten() for p in one.network.parameters()]).tolist()
    assert first["weights"] == pytest.approx(weights, abs=1e-3)
    assert one.validation < 0.5 * one.curve[0]["validation"]  # and so the figure is of something learnt
