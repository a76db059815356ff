"""docs/networks.md: the sentences of `networks.md` beside this file, with the figures measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = (Path(__file__).parent / "networks.md").read_text(encoding="utf-8")


class Figures(dict[str, Any]):
    """Measured figures by name, written beside the pictures, so that the page can be checked without them."""

    @classmethod
    def read(cls, path: Path) -> "Figures":
        """Read what `write` wrote."""
        return cls(json.loads(path.read_bytes()))

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class _Part:
    """Lets a template say {recall.table}."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)


def page(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return docs/networks.md."""
    return TEMPLATE.format(**{name: _Part(values) for name, values in figures.items()})
