"""HTTP/2's frames (RFC 9113) and header blocks (RFC 7541), as far as a gRPC server writes them.

Header blocks are written as literals without a dynamic table, so that each stands by itself and any thread
may write one. They are read by `hpack`.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable
from urllib.parse import quote

import grpc

Metadata = Iterable[tuple[str, str | bytes]]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Types of frames.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
# Flags.
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
# Settings.
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 3, 4, 5
MAX_HEADER_LIST_SIZE = 6
# Error codes.
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED = range(6)
FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM = range(6, 12)

_MOST_DETAILS = 3_000  # bytes of a status' text, as it goes: clients and proxies take headers of 8 KiB
DEFAULT_WINDOW = 65_535  # bytes, of a connection and of each of its streams
MAX_WINDOW = 2**31 - 1
DEFAULT_FRAME = 16_384  # bytes of payload that every peer takes
NUMBER = 0x7FFF_FFFF  # of a stream: the highest bit means nothing

HEAD = struct.Struct(">IBI")  # length << 8 | type, flags, stream
PREFIX = struct.Struct(">BI")  # of a gRPC message: compressed, length
MESSAGE = struct.Struct(">IBIBI")  # the head of a frame, and the prefix of the one message in it
SETTING = struct.Struct(">HI")
WORD = struct.Struct(">I")
TWO_WORDS = struct.Struct(">II")

OPENED = b"\x88"  # :status 200
SHRINK_TABLE = b"\x20"  # the dynamic table that we do not use has no room


class ProtocolError(Exception):
    """The peer broke HTTP/2's rules; the connection ends with that error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def check(holds: bool, code: int, text: str) -> None:
    """Raises: ProtocolError unless it holds."""
    if not holds:
        raise ProtocolError(code, text)


def check_window(size: int) -> None:
    """Raises: ProtocolError for one that is wider than a window may be."""
    check(size <= MAX_WINDOW, FLOW_CONTROL_ERROR, "a window is too wide")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def reset(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, WORD.pack(code))


def widen(stream: int, size: int) -> bytes:
    """A WINDOW_UPDATE."""
    return frame(WINDOW_UPDATE, 0, stream, WORD.pack(size))


def _length(size: int) -> bytes:
    """An integer of seven bits and more (RFC 7541, section 5.1), no Huffman code."""
    if size < 127:
        return bytes((size,))
    rest, out = size - 127, [127]
    while rest >= 128:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes((*out, rest))


def literal(name: str, value: str | bytes) -> bytes:
    """One header field, without indexing. A binary value goes as base64, as gRPC has it."""
    if isinstance(value, bytes):
        value = base64.b64encode(value).rstrip(b"=").decode() if name.endswith("-bin") else value.decode()
    key, text = name.lower().encode("ascii"), value.encode("latin-1", "replace")
    return b"\x00" + _length(len(key)) + key + _length(len(text)) + text


_CONTENT = literal("content-type", "application/grpc") + literal("grpc-accept-encoding", "gzip, deflate")
_OK = literal("grpc-status", "0")


def response_block(metadata: Metadata = ()) -> bytes:
    """The header block that opens a response."""
    return OPENED + _CONTENT + b"".join([literal(name, value) for name, value in metadata])


def status_block(code: grpc.StatusCode, details: str, metadata: Metadata) -> bytes:
    """The header block that ends a response. The text is percent-encoded UTF-8."""
    if code is grpc.StatusCode.OK and not details and not metadata:
        return _OK
    block = literal("grpc-status", str(code.value[0]))
    if details:
        block += literal("grpc-message", _quoted(details[:_MOST_DETAILS]))
    return block + b"".join([literal(name, value) for name, value in metadata])


def _quoted(text: str) -> str:
    """Percent-encoded UTF-8, cut to what a header may hold."""
    quoted = quote(text, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~", errors="replace")
    return quoted if len(quoted) <= _MOST_DETAILS else _quoted(text[: len(text) * 3 // 4])


def header_frames(stream: int, flags: int, block: bytes, largest: int) -> bytes:
    """HEADERS, and CONTINUATION behind it where the block is larger than a frame may be."""
    pieces = [block[at : at + largest] for at in range(0, len(block), largest)]
    frames = []
    for i, piece in enumerate(pieces):
        kind, own = (CONTINUATION, 0) if i else (HEADERS, flags)
        frames.append(frame(kind, own | (END_HEADERS if i + 1 == len(pieces) else 0), stream, piece))
    return b"".join(frames)


def unpadded(flags: int, data: bytes, start: int, end: int) -> tuple[int, int]:
    """Where the payload of a frame that may be padded lies.

    Raises: ProtocolError.
    """
    if not flags & PADDED:
        return start, end
    if start >= end or start + 1 + data[start] > end:
        raise ProtocolError(PROTOCOL_ERROR, "more padding than frame")
    return start + 1, end - data[start]
