"""A model's characters: what its ids mean, read from its manifest."""

from collections.abc import Mapping
from typing import Any

from .reply import Output


def alphabet_of(manifest: Mapping[str, Any]) -> str | None:
    """Return the characters that the ids of the model's first input stand for; None if they are none."""
    for entry in manifest["inputs"][0].get("wire", ()):
        if entry.get("encoding") == "utf8" and entry.get("tokens") == "characters":
            return str(entry["alphabet"])
    return None


def said(output: Output, manifest: Mapping[str, Any], alphabet: str) -> str:
    """Return the characters of a part that was generated; none of a chunk's own output."""
    ids = output.outputs.get(manifest["inputs"][0]["name"])
    return "" if ids is None else "".join(alphabet[i] for i in ids.reshape(-1))
