"""`tenuto train` and `tenuto evaluate`, from the command line."""

import sys
from pathlib import Path

import pytest

from tenuto.training import cli
from tenuto.training.datasets import store

EXPORTED = Path(__file__).resolve().parents[2] / "exported"


def test_unknown_model_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "weather"]) == 2
    assert "spoken-digits" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["digits", "spoken-digits", "oil-temperature"])
def test_missing_data_is_one_line(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    assert cli.main(["evaluate", str(EXPORTED / model / "1")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "put it there (from https://" in said.err
    assert said.err.count("\n") == 1


def test_missing_data_stops_training_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    output = tmp_path / "exported"
    assert cli.main(["train", "oil-temperature", "--output", str(output)]) == 1
    assert "ETTh1.csv" in capsys.readouterr().err
    assert not output.exists()


def test_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("tenuto evaluate: ")


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    assert cli.main(["evaluate", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "model.onnx: " in said
    assert said.count("\n") == 1


def test_missing_torch_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["train", "digits"]) == 2
    assert capsys.readouterr().err.endswith("torch is missing; pip install 'tenuto[training]'\n")
