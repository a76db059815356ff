"""An error's text is for people: it fits where it goes, and nothing in it passes for anything else."""

from __future__ import annotations

import pytest

from tenuto.serving.errors import ModelInvalid


def test_a_text_stays_as_it_is() -> None:
    text = "speech/1: the manifest disagrees:\n  input 'é' is [1, 2], expected [1, 3] …"
    assert str(ModelInvalid(text)) == text


@pytest.mark.parametrize(
    "strange, told",
    [("\x1b[2J", r"\x1b[2J"), ("\r", r"\r"), ("\0", r"\x00"), ("\u202e", r"\u202e"), ("\u2028", r"\u2028"),
     ("\ud800", r"\ud800"), ("\x85", r"\x85")],
)  # fmt: skip
def test_what_cannot_be_printed_is_written_as_in_python(strange: str, told: str) -> None:
    assert str(ModelInvalid(f"input {strange} is bad")) == f"input {told} is bad"


@pytest.mark.parametrize("filling", ["x", "\x1b", "\U000e0001"])
def test_a_long_text_is_cut(filling: str) -> None:
    text = str(ModelInvalid(filling * (1 << 20)))
    assert text.endswith(" …")
    assert len(text) == 1002
