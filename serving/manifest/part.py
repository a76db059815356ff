"""What all parts of a manifest have in common, and the words that several of them use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal[
    "float16", "float32", "float64", "bool",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
]  # fmt: skip
Dim = int | str  # a fixed length, or the name of an axis that may vary
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Part(BaseModel):
    """An object of the JSON. What stands below a field is its meaning, for docs/manifest.md and editors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def parts(annotation: Any) -> Iterator[type[Part]]:
    """Those that may stand where a field is annotated so, and those within them."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
        for field in annotation.model_fields.values():
            yield from parts(field.annotation)
    else:
        for inner in get_args(annotation):
            yield from parts(inner)
