"""Text becomes ids by a rule that any program can follow, and however it comes in pieces."""

from __future__ import annotations

import itertools
import re
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.errors import OutOfRangeValue, TenutoError, WrongEncoding
from tenuto.serving.text import LONGEST_REST_BYTES, LONGEST_WORD, Characters, Cutter, Words

LETTERS = "\n !'abcäß€😀"
# Near the boundaries of the rules: apostrophes of both kinds, long runs, spaces, characters of 1 to 4 bytes.
TEXTS = st.lists(
    st.one_of(
        st.text(alphabet="ab'’ _-9ßΣ€😀\u0301\u00a0\n", max_size=12),
        st.integers(LONGEST_WORD - 2, 2 * LONGEST_WORD + 2).map("x".__mul__),
        st.text(max_size=8),
    )
).map("".join)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def in_pieces(cutter: Cutter, data: bytes, cuts: list[int]) -> list[int]:
    """The ids of a text that comes cut at these bytes."""
    ids: list[int] = []
    rest, places = b"", sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for begin, end in itertools.pairwise(places):
        more, rest = cutter.cut(rest, data[begin:end])
        assert len(rest) <= LONGEST_REST_BYTES
        ids += more.tolist()
    more, rest = cutter.cut(rest, b"", final=True)
    assert rest == b""
    return ids + more.tolist()


# Words.


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        (" \n\t\u00a0", []),
        ("A good film .", ["A", "good", "film", "."]),
        ("don't (won’t)", ["don't", "(", "won’t", ")"]),
        ("rock'n'roll", ["rock'n'roll"]),
        ("'tis the boys' 'n'", ["'", "tis", "the", "boys", "'", "'", "n", "'"]),
        ("a''b", ["a", "'", "'", "b"]),
        ("x_1 3.5!?", ["x_1", "3", ".", "5", "!", "?"]),
        ("œuvre 漢字 😀😀", ["œuvre", "漢字", "😀", "😀"]),
        ("x" * 65 + "y", ["x" * 64, "xy"]),
        ("x" * 63 + "'y", ["x" * 63, "'", "y"]),
        ("x" * 62 + "'yz", ["x" * 62 + "'y", "z"]),
    ],
)
def test_words_are_runs_of_letters_and_what_is_none_stands_alone(text: str, words: list[str]) -> None:
    assert Words(8).words(text) == words


def test_lower_case_is_of_the_word_alone() -> None:
    # A sigma at the end of a word has a lower case of its own.
    assert Words(8, lower=True).words("ÄRGER ΌΣΣ Σ") == ["ärger", "όσς", "σ"]
    assert Words(8).words("ÄRGER") == ["ÄRGER"]


def test_an_id_is_the_crc_32_of_the_word_modulo_the_buckets() -> None:
    # The check value of CRC-32 (ISO 3309): 0xCBF43926 for these nine digits.
    assert zlib.crc32(b"123456789") == 0xCBF43926
    assert Words(32768).ids("123456789").tolist() == [0xCBF43926 % 32768]
    ids = Words(1000).ids("ß ß SS")
    assert ids.tolist() == [zlib.crc32("ß".encode()) % 1000] * 2 + [zlib.crc32(b"SS") % 1000]
    assert ids.dtype == np.int64


@given(TEXTS, CUTS)
def test_words_are_the_same_in_any_pieces(text: str, cuts: list[int]) -> None:
    cutter = Words(2**31 - 1)
    assert in_pieces(cutter, text.encode(), cuts) == cutter.ids(text).tolist()


@given(TEXTS)
def test_no_character_but_white_space_is_lost(text: str) -> None:
    assert "".join(Words(8).words(text)) == re.sub(r"\s", "", text)


def test_a_word_is_given_as_soon_as_nothing_can_change_it() -> None:
    cutter = Words(2**31 - 1)
    for rest, data, words, new_rest in (
        (b"", b"a bc", "a", b"bc"),
        (b"bc", b"'", "", b"bc'"),
        (b"bc'", b" ", "bc '", b""),
        (b"bc'", b"d", "", b"bc'd"),
        (b"", b"bc.", "bc .", b""),
        (b"", b"x" * 64, "x" * 64, b""),
    ):
        ids, left = cutter.cut(rest, data)
        assert (ids.tolist(), left) == (cutter.ids(words).tolist(), new_rest)


def test_a_run_without_an_end_is_walked_through_once() -> None:
    # Were each word to walk to the end of the run, this would take longer than a test may.
    assert Words(8).cut(b"", b"x" * 4_000_000)[0].size == 4_000_000 // LONGEST_WORD


# Characters.


def test_a_character_is_its_place_in_the_alphabet() -> None:
    ids = Characters(LETTERS).ids(LETTERS + "ba")
    assert ids.tolist() == [*range(len(LETTERS)), 5, 4]
    assert ids.dtype == np.int64


@given(st.text(alphabet=LETTERS), CUTS)
def test_characters_are_the_same_in_any_pieces(text: str, cuts: list[int]) -> None:
    assert in_pieces(Characters(LETTERS), text.encode(), cuts) == [LETTERS.index(c) for c in text]


@pytest.mark.parametrize(
    "text, message",
    [
        ("abd", r"character 3 of the text is 'd' \(U\+0064\), which is none of the 11"),
        ("😁a", r"character 1 of the text is '😁' \(U\+1F601\)"),
        ("a\0", r"character 2 of the text is '\\x00'"),
    ],
)
def test_a_character_that_is_not_in_it_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(OutOfRangeValue, match=message):
        Characters(LETTERS).ids(text)


# Bytes that are no text.


@pytest.mark.parametrize("cutter", [Words(8), Characters(LETTERS)])
@pytest.mark.parametrize(
    "rest, data, final, message",
    [
        (b"", b"ab\xff", False, r"byte 2 \(0xff\): invalid start byte"),
        (b"", b"\xc3(", False, r"byte 0 \(0xc3\): invalid continuation byte"),
        (b"", b"\xed\xa0\x80", False, "byte 0"),  # half of a surrogate pair
        (b"", b"\xc0\x80", False, "byte 0"),  # longer than need be
        (b"\xe2\x82", b"a", False, "byte 0"),
        (b"a\xe2\x82", b"\xac\xff", False, "byte 1"),
        (b"a\xe2\x82", b"", True, "ends in the middle of a character"),
    ],
)
def test_what_is_no_utf_8_is_refused(
    cutter: Cutter, rest: bytes, data: bytes, final: bool, message: str
) -> None:
    with pytest.raises(WrongEncoding, match=message):
        cutter.cut(rest, data, final=final)


@given(st.binary(max_size=40), CUTS)
def test_pieces_are_refused_if_and_only_if_the_whole_is(data: bytes, cuts: list[int]) -> None:
    cutter = Words(2**31 - 1)
    try:
        whole = cutter.ids(data.decode()).tolist()
    except UnicodeDecodeError:
        with pytest.raises(TenutoError):
            in_pieces(cutter, data, cuts)
    else:
        assert in_pieces(cutter, data, cuts) == whole
