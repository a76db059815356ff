"""Messages that a client has compressed, as gRPC's `grpc-encoding` says."""

from __future__ import annotations

import zlib

from .errors import NotSupported, TooLarge, WrongEncoding

ENCODINGS = {"gzip": 31, "deflate": 15}  # zlib's wbits


class Inflater:
    """One call's encoding."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    @classmethod
    def of(cls, name: str) -> Inflater:
        return _KNOWN.get(name) or cls(name)

    def inflate(self, data: bytes, most: int) -> bytes:
        """The message, of `most` bytes at most.

        Raises: NotSupported, TooLarge, WrongEncoding.
        """
        bits = ENCODINGS.get(self._name)
        if bits is None:
            raise NotSupported(
                f"a message is compressed as {self._name!r}; known are {', '.join(ENCODINGS)}, and none"
            )
        inflater = zlib.decompressobj(bits)
        try:
            message = inflater.decompress(data, most + 1)
        except zlib.error as error:
            raise WrongEncoding(f"a message is no {self._name}: {error}") from error
        if len(message) > most:
            raise TooLarge(f"a message inflates to more than {most} bytes (--max-message-bytes)")
        if not inflater.eof:
            raise WrongEncoding(f"a message of {self._name} ends too early")
        return message


_KNOWN = {name: Inflater(name) for name in ("identity", *ENCODINGS)}
