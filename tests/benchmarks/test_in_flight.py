"""The table of two batches in flight has a row for each case, and every engine in it answers."""

import pytest

from benchmarks import in_flight


def test_each_case_has_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--rounds 2 --seconds 0.1 --streams 3 9 --max-batch 4 --device-ms 0 0.5"
    in_flight.main(words.split(" "))
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(in_flight.HEADS)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [
        ["4", streams, run] for streams in ("3", "9") for run in ("on the CPU", "0.5 ms")
    ]
    assert all(int(row[3].replace(",", "")) > 0 and int(row[4].replace(",", "")) > 0 for row in cells)
