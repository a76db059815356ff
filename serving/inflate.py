"""Messages that a client has compressed, as gRPC's `grpc-encoding` says."""

from __future__ import annotations

import zlib

from .errors import NotSupported, TooLarge, WrongEncoding

ENCODINGS = {"gzip": 31, "deflate": 15}  # zlib's wbits
# A message is inflated on the thread that reads for everybody: so many bytes at once are no harm, and more
# than so many for each that was sent are no message but an attack.
_HARMLESS_BYTES, _MOST_RATIO = 1 << 20, 64


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
        most = min(most, max(_HARMLESS_BYTES, _MOST_RATIO * len(data)))
        inflater = zlib.decompressobj(bits)
        try:
            message = inflater.decompress(data, most + 1)
        except zlib.error as error:
            raise WrongEncoding(f"a message is no {self._name}: {error}") from error
        if len(message) > most:
            raise TooLarge(f"a message of {len(data)} bytes inflates to more than {most}; send it as it is")
        if not inflater.eof:
            raise WrongEncoding(f"a message of {self._name} ends too early")
        return message


_KNOWN = {name: Inflater(name) for name in ("identity", *ENCODINGS)}
