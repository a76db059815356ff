"""docs/networks.md is what `make networks` wrote: its words, its figures and its pictures."""

import json
import re
from pathlib import Path

from tenuto.training.diagnosis.page import Figures, page

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "networks.md").read_text(encoding="utf-8")


def test_the_page_says_what_was_measured() -> None:
    assert page(Figures.read(DOCS / "networks/figures.json")) == PAGE


def test_every_picture_is_there_and_shown() -> None:
    shown = set(re.findall(r"!\[[^\]]*\]\((networks/[^)]+)\)", PAGE))
    drawn = {f"networks/{path.name}" for path in (DOCS / "networks").iterdir()} - {"networks/figures.json"}
    assert shown == drawn


def test_every_classifier_that_is_passed_on_shows_its_mistakes() -> None:
    metrics = [json.loads(path.read_bytes()) for path in DOCS.parent.glob("exported/*/1/metrics.json")]
    classifiers = [one["model"] for one in metrics if one["test"]["metric"] == "accuracy"]
    assert len(classifiers) == 6
    for model in classifiers:
        assert f"networks/confusion-{model}.svg" in PAGE
