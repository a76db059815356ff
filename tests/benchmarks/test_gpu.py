"""The GPU's benchmark runs, and counts what it says it counts."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import gpu, model
from tenuto.serving.errors import PlatformError


def test_it_runs_on_the_cpu_and_prints_both_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "IMAGES", (1,))
    arguments = ["--device", "cpu", "--rows", "1", "3", "--seconds", "0.001", "--rounds", "1"]
    with ThreadPoolExecutor(1) as other:  # it changes the floating-point environment of its thread
        other.submit(gpu.main, arguments).result()
    printed = capsys.readouterr().out
    assert re.findall(r"^\| (\w+) ", printed, flags=re.MULTILINE) == ["rows", "1", "3", "images", "1"]
    state = model.LAYERS * model.WIDTH * len(model.STATES) * 4
    row = next(line for line in printed.splitlines() if line.startswith("| 3 "))
    assert f" {3 * (4 * (40 + 12 + 1) + 2 * state):,} |" in row
    assert f" {3 * (4 * (40 + 12 + 1) + 12):,} |" in row


def test_without_a_gpu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenuto.serving.model_runner._missing_for_cuda", lambda: "libcuda.so.1 is not here")
    with pytest.raises(PlatformError, match="libcuda.so.1 is not here"):
        gpu.main([])


def test_the_arithmetic_of_a_row_is_counted() -> None:
    """Four gates a layer, each a product with the input and the last output; then the head."""
    assert gpu.step_flops() == 2 * (4 * 128 * (40 + 128) + 4 * 128 * (128 + 128) + 128 * 12)
