"""Compressed messages: taken up to a bound, and refused with a reason."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.errors import NotSupported, TenutoError, TooLarge, WrongEncoding
from tenuto.serving.inflate import ENCODINGS, Inflater

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


def test_every_encoding_is_tested() -> None:
    assert set(COMPRESS) == set(ENCODINGS)


@pytest.mark.parametrize("name", COMPRESS)
@given(message=st.binary(max_size=1000))
def test_a_message_comes_back_whole(name: str, message: bytes) -> None:
    assert Inflater.of(name).inflate(COMPRESS[name](message), max(1, len(message))) == message


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("size", [0, 1, 1000, 65_536])
def test_just_the_limit_is_taken_and_a_byte_more_is_not(name: str, size: int) -> None:
    inflater, message = Inflater.of(name), random.Random(1).randbytes(size + 1)
    assert inflater.inflate(COMPRESS[name](message[:-1]), size) == message[:-1]
    with pytest.raises(TooLarge, match=f"more than {size}"):
        inflater.inflate(COMPRESS[name](message), size)


@pytest.mark.parametrize("name", COMPRESS)
def test_what_inflates_to_many_times_its_size_is_taken_for_a_bomb_unless_it_is_small(name: str) -> None:
    inflater = Inflater.of(name)
    assert inflater.inflate(COMPRESS[name](bytes(1 << 20)), 1 << 30) == bytes(1 << 20)
    with pytest.raises(TooLarge, match="send it as it is"):
        inflater.inflate(COMPRESS[name](bytes(2 << 20)), 1 << 30)


@pytest.mark.parametrize("name", COMPRESS)
def test_a_bomb_takes_no_more_memory_than_a_message_may(name: str) -> None:
    bomb = COMPRESS[name](bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            Inflater.of(name).inflate(bomb, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"?" + data,
        lambda data: data[:-4] + b"\0\0\0\0",
    ],
    ids=["one byte short", "half", "nothing", "shifted", "a wrong checksum"],
)
def test_what_is_spoilt_is_refused(name: str, spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(WrongEncoding, match=name):
        Inflater.of(name).inflate(spoil(COMPRESS[name](b"some message or other")), 1000)


@pytest.mark.parametrize("name", ["identity", "snappy", "GZIP", ""])
def test_another_encoding_is_refused_and_the_known_are_named(name: str) -> None:
    with pytest.raises(NotSupported, match="gzip, deflate") as caught:
        Inflater.of(name).inflate(b"", 1000)
    assert repr(name) in str(caught.value)


@given(st.sampled_from(sorted(COMPRESS)), st.binary(max_size=100))
def test_garbage_is_inflated_within_its_bound_or_refused(name: str, data: bytes) -> None:
    try:
        assert len(Inflater.of(name).inflate(data, 50)) <= 50
    except TenutoError as error:
        assert isinstance(error, TooLarge | WrongEncoding)  # noqa: PT017  nothing is as good
