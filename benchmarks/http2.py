"""As much of HTTP/2 and gRPC's framing as the load generator needs.

grpcio's own client takes 40 to 110 CPU-µs a message on 16 channels, on the cores that the servers
under test run on, and more than some of them. This one takes 18 to 45, most of it in the kernel, and
all servers see the same bytes from it. It is for trusted servers on the loopback: one thread,
blocking writes, no TLS, no compression, and receive windows that are opened once, as wide as they
go (2 GiB a connection).
"""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
INITIAL_WINDOW_SIZE, MAX_WINDOW = 4, 2**31 - 1
DEFAULT_WINDOW, MAX_FRAME = 65_535, 16_384
READ_BYTES = 1 << 16  # larger ones are mapped and unmapped at every read

_head = struct.Struct(">IBI")  # length << 8 | type, flags, stream
_prefix = struct.Struct(">BI")  # compressed, length


class StreamEnded(Exception):
    """The server ended a stream, or the connection, which no server should during a run."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _head.pack(len(payload) << 8 | kind, flags, stream) + payload


def headers(path: str, authority: str) -> bytes:
    """The header block of a gRPC call, in HPACK's literals without Huffman or dynamic table."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()  # below 127 bytes

    return (
        b"\x83\x86"  # :method POST, :scheme http
        + (b"\x04" + text(path))
        + (b"\x01" + text(authority))
        + (b"\x0f\x10" + text("application/grpc"))  # content-type
        + (b"\x00" + text("te") + text("trailers"))
    )


@dataclass(slots=True)
class _Stream:
    window: int  # bytes that the server still lets us send
    unsent: bytearray = field(default_factory=bytearray)
    partial: bytes = b""  # of a message not yet whole
    ending: bool = False  # we send no more, and expect the server to end it
    answered: bool = False


class Connection:
    """One connection to 127.0.0.1; `fileno` is for a poller, `receive` when it says readable.

    `reads` False: the receive windows stay as small as they begin, so that 64 KiB of messages
    come, and no more.
    """

    def __init__(self, port: int, *, reads: bool = True) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.authority = f"127.0.0.1:{port}"
        self._streams: dict[int, _Stream] = {}
        self._next = 1
        self._window = self._stream_window = DEFAULT_WINDOW
        self._in = b""
        widest = struct.pack(">HI", INITIAL_WINDOW_SIZE, MAX_WINDOW)
        more = struct.pack(">I", MAX_WINDOW - DEFAULT_WINDOW)
        self._out = [PREFACE, frame(SETTINGS, 0, 0, widest if reads else b"")]
        if reads:
            self._out.append(frame(WINDOW_UPDATE, 0, 0, more))

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def open(self, path: str) -> int:
        """Begins a call; the number of its stream."""
        number = self._next
        self._next += 2
        self._streams[number] = _Stream(self._stream_window)
        self._out.append(frame(HEADERS, END_HEADERS, number, headers(path, self.authority)))
        return number

    def half_close(self, number: int) -> None:
        """Says that no more comes on a stream whose messages are all sent; the server may end it now."""
        self._streams[number].ending = True
        self._out.append(frame(DATA, END_STREAM, number))
        self._write()

    def send(self, number: int, message: bytes, *, last: bool = False) -> None:
        """Writes a message, by itself as grpc's own clients do, as far as the windows allow.

        A `last` one half-closes; it must fit into one frame and the windows.
        """
        stream = self._streams[number]
        size = len(message) + _prefix.size
        if not stream.unsent and size <= min(MAX_FRAME, self._window, stream.window):
            self._window -= size
            stream.window -= size
            stream.ending = last
            head = _head.pack(size << 8 | DATA, END_STREAM if last else 0, number)
            self._out.append(head + _prefix.pack(0, len(message)) + message)
        elif last:
            raise NotImplementedError("a last message larger than a frame or the window")
        else:
            stream.unsent += _prefix.pack(0, len(message)) + message
            self._send_unsent(number, stream)
        self._write()

    def stuck(self, number: int) -> bool:
        """Whether the windows hold messages of the stream back."""
        return number in self._streams and bool(self._streams[number].unsent)

    def _send_unsent(self, number: int, stream: _Stream) -> None:
        while size := min(len(stream.unsent), MAX_FRAME, self._window, stream.window):
            self._window -= size
            stream.window -= size
            self._out.append(frame(DATA, 0, number, bytes(stream.unsent[:size])))
            del stream.unsent[:size]

    def _write(self) -> None:
        if self._out:
            self.socket.sendall(b"".join(self._out))
            self._out.clear()

    def receive(self) -> Iterator[tuple[int, bytes]]:
        """Reads once, and answers what HTTP/2 itself asks for.

        Yields: the messages that are now whole, each with its stream's number.
        """
        read = self.socket.recv(READ_BYTES)
        if not read:
            raise StreamEnded("the server closed the connection")
        data, at = self._in + read, 0
        while len(data) - at >= _head.size:
            word, flags, number = _head.unpack_from(data, at)
            end = at + _head.size + (word >> 8)
            if end > len(data):
                break
            payload = data[at + _head.size : end]
            at = end
            if word & 0xFF == DATA:
                yield from self._messages(number, flags, payload)
            else:
                self._control(word & 0xFF, flags, number, payload)
        self._in = data[at:]
        self._write()

    def _messages(self, number: int, flags: int, payload: bytes) -> Iterator[tuple[int, bytes]]:
        if flags & PADDED:
            raise NotImplementedError("padded DATA frames")
        stream = self._streams[number]
        stream.answered = True
        data, at = stream.partial + payload if stream.partial else payload, 0
        while len(data) - at >= _prefix.size:
            compressed, size = _prefix.unpack_from(data, at)
            start = at + _prefix.size
            if compressed:
                raise NotImplementedError("compressed messages")
            if start + size > len(data):
                break
            at = start + size
            yield number, data[start:at]
        stream.partial = data[at:]

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == GOAWAY:
            raise StreamEnded(f"the server ended the connection: {payload!r}")
        if kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
            stream = self._streams.pop(number, None)  # None: a reset behind the end
            if stream is not None and not (stream.ending and stream.answered):
                raise StreamEnded(f"the server ended stream {number} (frame {kind}: {payload!r})")
        if kind == SETTINGS and not flags & ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == INITIAL_WINDOW_SIZE:
                    for stream in self._streams.values():
                        stream.window += value - self._stream_window
                    self._stream_window = value
            self._send_all_unsent()
            self._out.append(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self._out.append(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            self._widen(number, struct.unpack(">I", payload)[0])

    def _widen(self, number: int, size: int) -> None:
        if number in self._streams:
            self._streams[number].window += size
        elif not number:
            self._window += size
        self._send_all_unsent()

    def _send_all_unsent(self) -> None:
        for number, stream in self._streams.items():
            if stream.unsent:
                self._send_unsent(number, stream)
