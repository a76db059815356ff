"""docs/manifest.md and its schema are what `make vocabulary` wrote: every key, as the code has it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tenuto.serving.errors import ManifestInvalid
from tenuto.serving.manifest import Manifest
from tenuto.serving.manifest.page import PARTS, main, page
from tests import toys

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/manifest.md").read_text(encoding="utf-8")
SCHEMA = json.loads((ROOT / "docs/manifest.schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
HOLE = re.compile(r"(<!-- written by make vocabulary: \w+ -->).*?(?=<!-- end -->)", re.DOTALL)


def faults(manifest: Any) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(manifest)]


# The page.


def test_both_files_are_what_the_code_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a page without its tables, too."""
    (tmp_path / "manifest.md").write_text(HOLE.sub("\\1\n", PAGE), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["page", str(tmp_path)])
    main()
    for name in ("manifest.md", "manifest.schema.json"):
        written, committed = (folder / name for folder in (tmp_path, ROOT / "docs"))
        assert written.read_bytes() == committed.read_bytes(), f"run: make vocabulary ({name})"


@pytest.mark.parametrize("name", PARTS)
def test_every_key_is_on_the_page_below_the_name_of_its_part(name: str) -> None:
    (section,) = re.findall(rf"^##+ {name}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    keys = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert keys[: len(PARTS[name].model_fields)] == list(PARTS[name].model_fields)


def test_every_key_and_part_says_what_it_means() -> None:
    for part in PARTS.values():
        assert part.__doc__
        assert {key for key, field in part.model_fields.items() if not field.description} == set()


def test_a_row_has_four_cells_and_a_link_a_heading() -> None:
    rows = [line for found in HOLE.finditer(PAGE) for line in found[0].splitlines() if line[:1] == "|"]
    assert len(rows) > len(PARTS) * 3
    assert {row.count("|") for row in rows} == {5}
    headings = {name.lower() for name in re.findall(r"^##+ (\w+)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", PAGE)) - headings == set()


def test_a_place_for_what_the_code_has_not_is_a_mistake() -> None:
    with pytest.raises(KeyError, match="Inputs"):
        page("<!-- written by make vocabulary: Inputs -->\n<!-- end -->")


def test_the_page_s_own_manifest_is_one() -> None:
    (example,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert faults(json.loads(example)) == []
    assert Manifest.parse(example, "docs/manifest.md").inputs[0].multiple == 160


# The schema.


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", sorted(ROOT.glob("exported/*/*/manifest.json")), ids=str)
def test_the_schema_takes_every_exported_manifest(path: Path) -> None:
    assert faults(json.loads(path.read_bytes())) == []


TOYS = {make.__name__: make for make in (
    toys.accumulator, toys.brightness, toys.counter, toys.explosive, toys.player, toys.reader, toys.single,
    toys.speaker, toys.teller,
)}  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
def test_the_schema_takes_what_the_server_takes(name: str) -> None:
    """Controls, counted frames, text, wire formats, how a sequence goes on."""
    _, manifest = TOYS[name]()
    assert faults(manifest) == []
    assert faults(json.loads(Manifest.parse(json.dumps(manifest), name).to_json())) == []


X: dict[str, Any] = {"name": "x", "dtype": "float32", "shape": ["batch"]}
Y: dict[str, Any] = {"name": "y", "dtype": "float32", "shape": ["batch"]}
WHOLE: dict[str, Any] = {"name": "toy", "inputs": [X], "outputs": [Y]}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (WHOLE | {"max_bach": 1}, "$"),
    "unknown key of an input": (WHOLE | {"inputs": [X | {"timeaxis": 1}]}, "$.inputs[0]"),
    "no input": (WHOLE | {"inputs": []}, "$.inputs"),
    "another format": (WHOLE | {"format": 2}, "$.format"),
    "a name that is no folder": (WHOLE | {"name": "../x"}, "$.name"),
    "a dtype that is none": (WHOLE | {"outputs": [Y | {"dtype": "float31"}]}, "$.outputs[0].dtype"),
    "another activation": (WHOLE | {"outputs": [Y | {"activation": "relu"}]}, "$.outputs[0].activation"),
    "a chunk of two kinds": (
        WHOLE | {"inputs": [X | {"chunk": {"multiple": 1, "exact": 1}}]}, "$.inputs[0].chunk"),
    "a rate of nothing": (WHOLE | {"inputs": [X | {"rate_hz": 0}]}, "$.inputs[0].rate_hz"),
    "more rows than may be": (WHOLE | {"max_batch": 5000}, "$.max_batch"),
    "another control": (
        WHOLE | {"controls": [{"name": "c", "dtype": "bool", "kind": "begin"}]}, "$.controls[0].kind"),
}  # fmt: skip


@pytest.mark.parametrize("manifest, place", WRONG.values(), ids=WRONG.keys())
def test_what_the_schema_refuses_the_server_refuses(manifest: dict[str, Any], place: str) -> None:
    assert faults(WHOLE) == []
    assert faults(manifest) == [place]
    with pytest.raises(ManifestInvalid):
        Manifest.parse(json.dumps(manifest), "toy/1")


def test_an_editor_shows_what_a_key_means_and_what_it_is_by_itself() -> None:
    tail = SCHEMA["$defs"]["Input"]["properties"]["tail"]
    assert (tail["enum"], tail["default"]) == (["drop", "pad"], "drop")
    assert "zeros are put behind them" in tail["description"]
    assert SCHEMA["$id"] == "urn:tenuto:manifest:1"
