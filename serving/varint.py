"""Protobuf's encoding of numbers, for what is read and written by hand: seven bits a byte, low ones first."""

from __future__ import annotations

# A byte by its seven bits: where it is a number's last one, and where more follow.
LAST = tuple(bytes((low,)) for low in range(128))
MORE = tuple(bytes((low | 0x80,)) for low in range(128))


def varint(number: int) -> bytes:
    """Of a number that is not negative."""
    if number < 0x80:
        return LAST[number]
    if number < 0x4000:
        return MORE[number & 0x7F] + LAST[number >> 7]
    return MORE[number & 0x7F] + varint(number >> 7)
