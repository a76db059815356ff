"""docs/manifest.md and docs/manifest.schema.json from the code: python -m tenuto.serving.manifest.page docs

What stands between two marks of the page is written from here, all else by hand.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args

from pydantic.json_schema import GenerateJsonSchema

from .manifest import FORMAT, Manifest
from .part import Dtype, Part, parts

_BLOCK = re.compile(r"(<!-- written by make vocabulary: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PARTS = {part.__name__: part for part in parts(Manifest)}


def page(text: str) -> str:
    """The page with what the code says of each part that has a place on it.

    Raises: KeyError for a place of something else.
    """
    blocks = {name: f"{_told(part)}\n\n{table(part)}" for name, part in PARTS.items()}
    blocks["Dtype"] = (
        f"One of {', '.join(f'`{json.dumps(name)}`' for name in get_args(Dtype))}: numpy's names."
    )
    return _BLOCK.sub(lambda found: f"{found[1]}\n{blocks[found[2]]}\n\n{found[3]}", text)


def schema() -> dict[str, Any]:
    """For editors, and for those who write manifests with a program."""
    head = {"$schema": GenerateJsonSchema.schema_dialect, "$id": f"urn:tenuto:manifest:{FORMAT}"}
    return head | Manifest.model_json_schema() | {"title": "A Tenuto model's manifest"}


def table(part: type[Part]) -> str:
    """A row for each key."""
    whole = part.model_json_schema()
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in whole["properties"].items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
        meaning = " ".join(field["description"].split())
        rows.append(f"| `{key}` | {_value(field)} | {default} | {meaning} |")
    return "\n".join(rows)


def _told(part: type[Part]) -> str:
    return inspect.cleandoc(part.__doc__ or "")


def _value(field: dict[str, Any]) -> str:
    """What a field may be, in words. Null needs none where it is the default."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        needless = {"type": "null"} if field.get("default", ...) is None else None
        return " or ".join(_value(choice) for choice in field["anyOf"] if choice != needless)
    if field.get("enum") == list(get_args(Dtype)):
        return "[dtype](#dtype)"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{json.dumps(c)}`" for c in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return f"[{', '.join(map(_value, field['prefixItems']))}]"
    if field["type"] == "array":
        return f"[{_value(field['items'])}, …]"
    return str(field["type"]) + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    """Of a number, or of a string's length."""
    if "pattern" in field:
        return f" like `{field['pattern']}`"
    low, high = field.get("minimum", field.get("minLength")), field.get("maximum", field.get("maxLength"))
    unit = " characters" if "minLength" in field else ""
    if "exclusiveMinimum" in field:
        return f" (above {_number(field['exclusiveMinimum'])})"
    if low is None:
        return ""
    return f" ({_number(low)} {'or more' if high is None else f'to {_number(high)}'}{unit})"


def _number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tenuto.serving.manifest.page", description=__doc__)
    parser.add_argument("docs", type=Path, help="the folder of both files")
    docs = parser.parse_args().docs
    path = docs / "manifest.md"
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
    text = json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    (docs / "manifest.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
