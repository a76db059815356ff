"""What is written by hand, read back by a library that knows HTTP/2's header blocks."""

from __future__ import annotations

import base64
from urllib.parse import unquote

import grpc
import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving import frame as http
from tenuto.serving.frame import ProtocolError

from .http2_peer import frames_of


def fields(block: bytes) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in hpack.Decoder().decode(block)]


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 256, 16_383, 16_510, 40_000])
def test_values_of_any_length_are_read_back(size: int) -> None:
    assert fields(http.literal("x-long", "v" * size)) == [("x-long", "v" * size)]
    assert fields(http.literal("n" * (size + 1), "v")) == [("n" * (size + 1), "v")]


def test_names_are_written_small() -> None:
    assert fields(http.literal("X-Name", "Value")) == [("x-name", "Value")]


@given(st.binary())
def test_binary_values_go_as_base64_without_padding(value: bytes) -> None:
    ((_, text),) = fields(http.literal("x-bin", value))
    assert "=" not in text
    assert base64.b64decode(text + "=" * (-len(text) % 4)) == value


def test_bytes_of_a_name_that_is_not_binary_go_as_they_are() -> None:
    assert fields(http.literal("x-text", b"as it is")) == [("x-text", "as it is")]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_the_text_of_a_status_survives_whatever_is_in_it(text: str) -> None:
    found = dict(fields(http.status_block(grpc.StatusCode.ABORTED, text, ())))
    assert found["grpc-status"] == "10"
    assert all(" " <= letter <= "~" for letter in found["grpc-message"])
    assert unquote(found["grpc-message"]) == text


def test_a_text_that_is_no_unicode_is_sent_all_the_same() -> None:
    """Names of files may come like that."""
    ((_, code), (_, text)) = fields(http.status_block(grpc.StatusCode.ABORTED, "in /tmp/\udcff", ()))
    assert (code, text[:8]) == ("10", "in /tmp/")


def test_a_status_says_no_more_than_there_is() -> None:
    assert fields(http.status_block(grpc.StatusCode.OK, "", ())) == [("grpc-status", "0")]
    assert fields(http.status_block(grpc.StatusCode.OK, "all ~well", (("a", "b"),))) == [
        ("grpc-status", "0"),
        ("grpc-message", "all ~well"),
        ("a", "b"),
    ]


def test_a_response_begins_with_what_grpc_asks_for() -> None:
    assert fields(http.response_block((("x", "1"),))) == [
        (":status", "200"),
        ("content-type", "application/grpc"),
        ("grpc-accept-encoding", "gzip, deflate"),
        ("x", "1"),
    ]


@given(st.integers(1, 60), st.integers(1, 20))
def test_a_block_is_cut_into_frames_that_join_to_it(size: int, largest: int) -> None:
    block = bytes(range(size))
    frames = frames_of(http.header_frames(5, http.END_STREAM, block, largest))
    assert b"".join(f.payload for f in frames) == block
    assert {f.stream for f in frames} == {5}
    assert all(len(f.payload) <= largest for f in frames)
    assert [f.kind for f in frames] == [http.HEADERS] + [http.CONTINUATION] * (len(frames) - 1)
    assert [bool(f.flags & http.END_HEADERS) for f in frames] == [False] * (len(frames) - 1) + [True]
    assert frames[0].flags & http.END_STREAM
    assert not any(f.flags & http.END_STREAM for f in frames[1:])


def test_frames_are_laid_out_as_http2_says() -> None:
    assert http.frame(0xAB, 0xCD, 7, b"abc") == b"\x00\x00\x03\xab\xcd\x00\x00\x00\x07abc"
    assert http.reset(3, http.CANCEL) == b"\x00\x00\x04\x03\x00\x00\x00\x00\x03\x00\x00\x00\x08"
    assert http.widen(0, 1 << 20) == b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x10\x00\x00"


@pytest.mark.parametrize(
    "data, found",
    [(b"\x00abc", b"abc"), (b"\x02abc", b"a"), (b"\x03abc", b""), (b"\x00", b"")],
)
def test_padding_is_taken_off(data: bytes, found: bytes) -> None:
    start, end = http.unpadded(http.PADDED, b"##" + data + b"##", 2, 2 + len(data))
    assert (b"##" + data)[start:end] == found


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x04abc", b"\xffabc"])
def test_more_padding_than_frame_is_an_error_even_if_bytes_follow(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        http.unpadded(http.PADDED, b"##" + data + bytes(300), 2, 2 + len(data))
    assert caught.value.code == http.PROTOCOL_ERROR


def test_without_the_flag_nothing_is_padding() -> None:
    assert http.unpadded(0, b"\x09abc", 0, 4) == (0, 4)
