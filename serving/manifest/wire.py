"""What else than the graph's own dtype clients may send."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tenuto.serving.text import Characters, Cutter, Words

from .part import Dtype, Part

Encoding = Literal["png", "jpeg"]


class WireDtype(Part):
    """Numbers in another dtype: value = wire * scale + offset."""

    dtype: Dtype
    """that of the wire"""
    scale: float = 1.0
    """what each number is multiplied by"""
    offset: float = 0.0
    """what is added then"""


class WireEncoding(Part):
    """Encoded images: decoded to the input's [height, width] or [height, width, 3], uint8. Where the input is
    not uint8 itself, an entry of that dtype must say how they scale."""

    encoding: Encoding
    """that of the images"""


class WireWords(Part):
    """UTF-8 text, cut into words."""

    encoding: Literal["utf8"]
    """that of the text"""
    tokens: Literal["words"]
    """how it is cut"""
    buckets: Annotated[int, Field(ge=1, le=2**31 - 1)]
    """how many ids there are: a word's is the CRC-32 of its UTF-8 bytes modulo that"""
    lower: bool = False
    """whether the word is made lower-case before"""

    @cached_property
    def cutter(self) -> Cutter:
        return Words(self.buckets, self.lower)


class WireCharacters(Part):
    """UTF-8 text, cut into characters."""

    encoding: Literal["utf8"]
    """that of the text"""
    tokens: Literal["characters"]
    """how it is cut"""
    alphabet: Annotated[str, Field(min_length=1)]
    """all characters that have an id, each once: its place, from 0"""

    @model_validator(mode="after")
    def _check(self) -> WireCharacters:
        twice = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if twice:
            raise ValueError(f"alphabet holds {', '.join(map(repr, twice))} more than once")
        return self

    @cached_property
    def cutter(self) -> Cutter:
        return Characters(self.alphabet)
