"""UTF-8 text -> numbers that a model eats: the one way in which training and serving cut text.

Both cutters read a text in any number of pieces and give what they would have given for the whole: what a
later piece may still change, the bytes of a character or of a word, is handed back as the rest, which goes
before the next piece. Nothing here is normalised (NFC, NFKC): `é` in one character and in two are two texts.
Which characters are letters is for Python's Unicode tables to say, so one that was added to Unicode lately
may be cut in two ways by two versions of Python.
"""

from __future__ import annotations

import codecs
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import OutOfRangeValue, WrongEncoding

LONGEST_WORD = 64  # characters; a longer run is cut into several words
# What may wait for the next piece: a word that may go on, its apostrophe, or a part of one character.
LONGEST_REST_BYTES = 4 * LONGEST_WORD

_BLACK = re.compile(r"\S")
_WORD = re.compile(r"\w+(?:['’]\w+)*|\S")

Ids = NDArray[np.int64]


class Text(bytes):
    """UTF-8 that is still to be cut: where ids go, it may go as well."""

    __slots__ = ()


class Cutter(Protocol):
    """Text -> token ids."""

    @property
    def count(self) -> int:
        """How many ids there are: they go from 0 to `count - 1`."""

    def ids(self, text: str) -> Ids:
        """The ids of a whole text, int64 [tokens].

        Raises: OutOfRangeValue for a character that has no id.
        """

    def cut(self, rest: bytes, data: bytes, *, final: bool = False) -> tuple[Ids, bytes]:
        """The ids that `rest + data` completes, and the new rest: at most `LONGEST_REST_BYTES`, none if
        `final`.

        Raises: WrongEncoding for what is no UTF-8, OutOfRangeValue.
        """


@dataclass(frozen=True)
class Words:
    """A text's words, each hashed into one of `buckets`.

    A word is a run of word characters (letters, digits, `_`; `\\w` of Python's `re`), in which single
    apostrophes (`'`, `’`) may stand between two of them: "don't". Every other character that is no white
    space is a word of its own. A word ends after 64 characters in any case, and what follows begins another.
    Its id is the CRC-32 (ISO 3309, as zlib's) of its UTF-8 bytes, in lower case if `lower`, modulo `buckets`.
    """

    buckets: int
    lower: bool = False

    @property
    def count(self) -> int:
        return self.buckets

    def words(self, text: str) -> list[str]:
        """The words of a whole text, in lower case if `lower`."""
        return self._words(text, final=True)[0]

    def ids(self, text: str) -> Ids:
        return self._hashed(self.words(text))

    def cut(self, rest: bytes, data: bytes, *, final: bool = False) -> tuple[Ids, bytes]:
        text, undecoded = _decoded(rest + data, len(rest), final=final)
        words, end = self._words(text, final=final)
        return self._hashed(words), text[end:].encode() + undecoded

    def _words(self, text: str, *, final: bool) -> tuple[list[str], int]:
        """The words that no later text can change, and where what it may change begins."""
        words: list[str] = []
        at, length = 0, len(text)
        while black := _BLACK.search(text, at):
            start = black.start()
            # Within its window: a run without an end must not be walked through for each word.
            found = _WORD.match(text, start, start + LONGEST_WORD)
            assert found is not None
            end = found.end()
            if not final and length - start < LONGEST_WORD and _may_go_on(text, end):
                return words, start
            words.append(found[0].lower() if self.lower else found[0])
            at = end
        return words, length

    def _hashed(self, words: list[str]) -> Ids:
        return np.array([zlib.crc32(word.encode()) % self.buckets for word in words], np.int64)


@dataclass(frozen=True)
class Characters:
    """A text's characters (code points), each its place in `alphabet`."""

    alphabet: str

    @property
    def count(self) -> int:
        return len(self.alphabet)

    def ids(self, text: str) -> Ids:
        codes = _codes(text)
        places = np.minimum(np.searchsorted(self._sorted[0], codes), self.count - 1)
        unknown = np.flatnonzero(self._sorted[0][places] != codes)
        if unknown.size:
            at = int(unknown[0])
            raise OutOfRangeValue(
                f"character {at + 1} of the text is {text[at]!r} (U+{ord(text[at]):04X}), which is none of "
                f"the {self.count} of the model's alphabet; replace it, or leave it out"
            )
        ids: Ids = self._sorted[1][places]
        return ids

    def cut(self, rest: bytes, data: bytes, *, final: bool = False) -> tuple[Ids, bytes]:
        text, undecoded = _decoded(rest + data, len(rest), final=final)
        return self.ids(text), undecoded

    @cached_property
    def _sorted(self) -> tuple[NDArray[Any], Ids]:
        """The alphabet's code points in ascending order, and the id of each."""
        codes = _codes(self.alphabet)
        order = np.argsort(codes).astype(np.int64)
        return codes[order], order


def _codes(text: str) -> NDArray[Any]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _may_go_on(text: str, end: int) -> bool:
    """Whether the word that ends there would be longer if more text came: it touches the end, or there is
    nothing but an apostrophe between."""
    if end == len(text):
        return text[end - 1].isalnum() or text[end - 1] == "_"
    return end == len(text) - 1 and text[end] in "'’" and (text[end - 1].isalnum() or text[end - 1] == "_")


def _decoded(data: bytes, told_bytes: int, *, final: bool) -> tuple[str, bytes]:
    """The text, and the bytes of a character that the next piece goes on with. The first `told_bytes` are of
    pieces before this one."""
    try:
        text, used = codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        where = max(0, error.start - told_bytes)
        what = "ends in the middle of a character" if "end of data" in error.reason else error.reason
        raise WrongEncoding(
            f"the text is no UTF-8: byte {where} (0x{data[error.start]:02x}): {what}; encode it as UTF-8"
        ) from None
    return text, data[used:]
