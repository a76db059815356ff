"""How many paced sequences a server carries: who sends what, and when it is said that they were carried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import gpu_paced, tracks
from benchmarks.measured import SPOKEN, record_spoken
from benchmarks.scenario import Measurement, Seen


def test_the_generators_share_all_sequences() -> None:
    found = gpu_paced.parties(1_000, 50, 8)
    assert [party.streams for party in found] == [3, 3, 3, 3, 2, 2, 2, 2]
    assert sum(party.streams * party.sequences_per_stream for party in found) == 1_000
    assert {party.messages_per_second / party.streams for party in found} == {50.0}
    assert len(gpu_paced.parties(3, 1, 8)) == 3


def seen(chunks: int, p99_ms: float) -> Measurement:
    party = Seen(messages=chunks // 10, chunks=chunks, p50_ms=2.0, p99_ms=p99_ms, least=1, most=1, late=1)
    return Measurement(2.0, 1.5, 1.0, 0, (party,))


@pytest.mark.parametrize(
    "chunks, p99_ms, holds", [(5_000, 19.9, "yes"), (5_000, 20.1, "no"), (4_900, 19.9, "no")]
)
def test_a_count_holds_if_all_of_it_was_answered_in_time(chunks: int, p99_ms: float, holds: str) -> None:
    """100 sequences, two generators, two seconds: 10,000 chunks are due."""
    row = gpu_paced.row(100, 10, [seen(5_000, 5.0), seen(chunks, p99_ms)])
    assert row[-1] == holds
    assert row[3:5] == ("2.0", f"{p99_ms:.1f}")
    assert row[-2] == "0.75"  # cores: both read the same server's clock


def test_sound_is_sent_as_what_it_is(tmp_path: Path) -> None:
    record_spoken(tmp_path)
    (file,) = tmp_path.glob("*.npz")
    assert (tracks.Tracks.load(file).dtype, tracks.Tracks.load(file).model) == ("int16", SPOKEN)


def test_it_runs_on_the_cpu_and_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_paced.main(
        "--device cpu --front-ends 1 --sequences 4 --each 2 1 --processes 2 --seconds 0.2".split()  # noqa: SIM905
    )
    printed = capsys.readouterr().out
    assert re.findall(r"^\| (\w+) +\| +(\d|a stream) ", printed, flags=re.MULTILINE) == [
        ("sequences", "a stream"), ("4", "2"), ("4", "1"),
    ]  # fmt: skip
