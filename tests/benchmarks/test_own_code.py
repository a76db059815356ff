"""The harness without a server answers every chunk, with either engine, and loses no microsecond."""

from pathlib import Path

import pytest

from benchmarks import model, own_code
from benchmarks.own_code import HARNESSES, Cost


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write_repository(tmp_path_factory.mktemp("own") / "repository").lstm


@pytest.mark.parametrize("kind", HARNESSES)
@pytest.mark.parametrize("frames", [1, 10])
def test_every_chunk_of_a_round_is_answered(kind: str, frames: int, file: Path) -> None:
    harness = HARNESSES[kind](file, 70)  # more than one batch
    for _ in range(5):
        before = harness.taken
        cost = harness.round(frames)
        assert harness.taken - before > 70 * 4 * frames * model.OUTPUTS
        assert cost.reading > 0
        assert cost.answering > 0
        assert cost.runtime > 0


def test_all_have_as_many_rounds(file: Path) -> None:
    found = own_code.measure(file, streams=2, frames=1, rounds=3)
    assert {name: len(costs) for name, costs in found.items()} == dict.fromkeys(HARNESSES, 3)


def test_a_table_shows_the_least_and_the_median() -> None:
    costs = [Cost(1.0, 10.0, 7.0), Cost(3.0, 5.0, 9.0), Cost(2.0, 20.0, 8.0)]
    *_, row = own_code.table({"tenuto": costs}, "title").splitlines()
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "tenuto", "1.0 (2.0)", "5.0 (10.0)", "8.0 (11.0)", "7.0 (8.0)",
    ]  # fmt: skip
