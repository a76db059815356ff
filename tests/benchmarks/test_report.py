"""The page that a run writes: tables with every row, and nothing outside its marks."""

from pathlib import Path

import pytest

from benchmarks import budgets, chart, report, suites
from benchmarks.scenario import Case, Measurement, Seen, Taken
from benchmarks.suites import Settings

SETTINGS = Settings(suites.SERVERS, (1, 64), (1,), capacity=1_000.0)
CASES = [case for name in suites.SUITES for table in suites.SUITES[name](SETTINGS) for case in table]


def measured(case: Case) -> Measurement:
    seen = Seen(100, 100 * case.parties[0].chunks_per_message, 1.0, 2.0, least=9, most=10)
    return Measurement(1.0, 0.01, 0.01, 7, (seen,) * len(case.parties))


@pytest.fixture
def rounds() -> list[Taken]:
    return [{case: measured(case) for case in CASES}] * 2


def test_the_text_has_every_row_of_every_table(rounds: list[Taken]) -> None:
    text = report.text(rounds, budgets.verdicts(rounds), report.head(2, 1.0))
    for case in CASES:
        assert f"| {case.table}" in text
        assert f"| {case.row}" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert f"{2 * 7 * len(CASES):,} replies" in text


def test_a_page_keeps_what_people_wrote(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(page, "new")
    report.write(page, "newer")
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnewer\n\n{report.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="is not there, or has no"):
        report.write(page, "new")


def test_the_chart_is_the_same_for_the_same_figures(rounds: list[Taken], tmp_path: Path) -> None:
    chart.draw(rounds, tmp_path / "one.svg")
    chart.draw(rounds, tmp_path / "two.svg")
    picture = (tmp_path / "one.svg").read_text()
    assert picture == (tmp_path / "two.svg").read_text()
    assert "64 streams" in picture
    chart.draw([{}], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_the_json_has_every_measurement(rounds: list[Taken]) -> None:
    document = report.as_json(rounds, budgets.verdicts(rounds), {"rounds": 2})
    assert len(document["measurements"]) == 2 * len(CASES)  # type: ignore[arg-type]
