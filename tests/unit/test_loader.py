"""From folders to engines: the very bytes that were checked, the newest that passes, and why not else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenuto.serving import loader
from tenuto.serving.catalogue import Catalogue
from tenuto.serving.config import ServerConfig
from tenuto.serving.errors import ModelInvalid, RunFailed
from tenuto.serving.metrics import ServerMetrics
from tenuto.serving.model_runner import CPU, ModelRunner
from tenuto.serving.pending import PendingBytes
from tenuto.serving.repository import ModelFolder, ModelRepository
from tenuto.serving.resume_token import TokenSealer
from tenuto.serving.rollout import Rollout
from tenuto.serving.vetting import Verdict
from tests import toys


class FakeVetting:
    """Passes every model but those named; the child process is vetting's own test."""

    def __init__(self, **refused: str) -> None:
        self.refused = refused  # "model_version" -> why
        self.changes: Path | None = None  # a file that changes after the check
        self.asked: list[list[str]] = []

    def __call__(self, folders: list[ModelFolder], *_: object) -> dict[ModelFolder, Verdict]:
        self.asked.append([f.where for f in folders])
        verdicts = {}
        for folder in folders:
            why = self.refused.get(f"{folder.model}_{folder.version}", "")
            verdicts[folder] = Verdict(why=why) if why else Verdict(folder.read().fingerprint)
        if self.changes:
            self.changes.write_text(self.changes.read_text() + "\n")
        return verdicts


def load(
    root: Path, monkeypatch: pytest.MonkeyPatch, vetting: FakeVetting, **settings: int
) -> tuple[Catalogue, ServerMetrics]:
    monkeypatch.setattr(loader, "vet", vetting)
    metrics = ServerMetrics("1")
    config = ServerConfig.build({"repository": root, "max_sequences": 5} | settings, {})
    made = loader.Loader(config, CPU, PendingBytes(1 << 20), TokenSealer())
    rollout = Rollout(ModelRepository(root), made, metrics, max_age_seconds=0)
    rollout.load_newest()
    return rollout.catalogue, metrics


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for version in (1, 2, 3):
        toys.write(tmp_path, "doubler", toys.doubler(), version)
    toys.write(tmp_path, "accumulator", toys.accumulator())
    return tmp_path


def test_the_newest_version_of_each_model_serves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vetting = FakeVetting()
    catalogue, metrics = load(root, monkeypatch, vetting)
    assert [(s.manifest.name, s.engine.version) for s in catalogue.served] == [
        ("accumulator", 1),
        ("doubler", 3),
    ]
    assert vetting.asked == [["accumulator/1", "doubler/3"]]  # one child for all
    assert [(m.model, m.version, m.provider, m.slots) for m in metrics.models] == [
        ("accumulator", 1, CPU, 5),
        ("doubler", 3, CPU, 5),
    ]


def test_a_version_that_fails_never_replaces_one_that_works(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vetting = FakeVetting(doubler_3="it crashes", doubler_2="it is slow")
    catalogue, _ = load(root, monkeypatch, vetting)
    assert catalogue.find("doubler").engine.version == 1
    assert [(r.version, r.why) for r in catalogue.refused] == [(3, "it crashes"), (2, "it is slow")]
    assert vetting.asked == [["accumulator/1", "doubler/3"], ["doubler/2"], ["doubler/1"]]


def test_files_that_changed_after_their_check_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vetting = FakeVetting(doubler_2="no", doubler_1="no")
    vetting.changes = root / "doubler" / "3" / "manifest.json"
    catalogue, metrics = load(root, monkeypatch, vetting)
    assert catalogue.refused[0].why.startswith("doubler/3: its files changed while they were checked")
    assert [s.manifest.name for s in catalogue.served] == ["accumulator"]
    assert [m.model for m in metrics.models] == ["accumulator"]


def test_a_repository_in_which_nothing_serves_says_why(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vetting = FakeVetting(accumulator_1="A", doubler_3="B", doubler_2="C", doubler_1="D")
    with pytest.raises(ModelInvalid, match="accumulator/1: A; doubler/3: B; doubler/2: C; doubler/1: D"):
        load(root, monkeypatch, vetting)


def test_a_budget_of_bytes_bounds_the_sequences_and_is_told_at_start(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The accumulator's state is one float. A stateless model needs none."""
    toys.write(root, "large", (toys.accumulator()[0], toys.accumulator()[1] | {"name": "large"}))
    with caplog.at_level("INFO"):
        catalogue, metrics = load(root, monkeypatch, FakeVetting(), max_state_bytes=4 * 4)
    slots = {s.manifest.name: s.engine.max_sequences for s in catalogue.served}
    assert slots == {"accumulator": 3, "doubler": 5, "large": 3}  # each model has its own
    assert {m.model: m.slots for m in metrics.models} == slots
    assert catalogue.find("accumulator").engine.state_bytes == 4 * 4
    assert (
        f"accumulator/1 serves on {CPU} in float32: 3 sequences, 0.0 MiB of state at most, no golden.npz"
        in caplog.text
    )
    for one in catalogue.served:
        (line,) = [m for m in caplog.messages if m.startswith(f"{one.engine.where} serves on")]
        assert line.endswith(f", SHA-256 {one.sha256}")
        assert one.engine.metrics.sha256 == one.sha256
        assert one.file_bytes == (root / one.engine.where / "model.onnx").stat().st_size


def test_the_state_is_told_in_mib(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        load(root, monkeypatch, FakeVetting(), max_sequences=(3 << 20) // 8 - 1)
    assert "393215 sequences, 1.5 MiB of state at most" in caplog.text


def test_a_model_whose_state_is_over_the_budget_does_not_serve(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue, metrics = load(root, monkeypatch, FakeVetting(), max_state_bytes=7)
    (refused,) = catalogue.refused
    assert refused.model == "accumulator"
    assert refused.why.endswith("--max-state-bytes is 7, give it 8 at least")
    assert [m.model for m in metrics.models] == ["doubler"]


def test_an_empty_repository_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelInvalid, match="it holds no <model>/<version>/ folder"):
        load(tmp_path, monkeypatch, FakeVetting())


def test_a_version_makes_its_first_run_before_it_serves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passed in the child, and here it fails: on zeros, and not on a client's chunk."""
    runs: list[str] = []

    def run(runner: ModelRunner, feeds: dict[str, Any]) -> list[Any]:
        runs.append(runner.where)
        assert not any(array.any() for name, array in feeds.items() if name != "lengths")
        if runner.where == "doubler/3":
            raise RunFailed("no memory for its first run")
        return []

    monkeypatch.setattr(ModelRunner, "run", run)
    catalogue, metrics = load(root, monkeypatch, FakeVetting())
    assert runs == ["accumulator/1", "doubler/3", "doubler/2"]
    assert catalogue.find("doubler").engine.version == 2
    assert [r.why for r in catalogue.refused] == ["no memory for its first run"]
    assert metrics.loads == {("accumulator", "loaded"): 1, ("doubler", "failed"): 1, ("doubler", "loaded"): 1}


def test_a_served_version_tells_the_fingerprint_that_a_newer_one_may_name(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue, _ = load(root, monkeypatch, FakeVetting())
    (folder,) = [f for f in ModelRepository(root).folders()["doubler"] if f.version == 3]
    assert catalogue.find("doubler").fingerprint == folder.read().fingerprint


@pytest.mark.parametrize("large_states, rarer", [("refuse", 0), ("rarer", 3)])
def test_a_model_of_large_state_is_refused_or_sealed_rarer(
    root: Path, monkeypatch: pytest.MonkeyPatch, large_states: str, rarer: int
) -> None:
    """Its tokens are 1,024 bytes and 8 more at most; the doubler's 8 fewer."""
    settings: dict[str, Any] = {"max_token_bytes": 400, "large_states": large_states}
    if not rarer:
        with pytest.raises(ModelInvalid, match="a resume token of it takes up to .* --large-states rarer"):
            load(root, monkeypatch, FakeVetting(), **settings)
        return
    catalogue, _ = load(root, monkeypatch, FakeVetting(), **settings)
    checkpoints = catalogue.find("accumulator").engine._population._checkpoints
    assert checkpoints is not None
    assert checkpoints.rarer == rarer
    assert checkpoints.interval(0) == 50 * rarer
