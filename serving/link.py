"""The socket between a front end and the engine process: frames in packets, both ways.

A packet of the Unix SEQPACKET socket holds many frames, so that a read brings the messages of many calls, and
a write takes the replies of a whole batch. A message that fits into no packet comes in pieces.
"""

from __future__ import annotations

import logging
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Protocol

from .call import Metadata

log = logging.getLogger("tenuto.transport")

_HEAD = struct.Struct("<III")  # kind, call, bytes of the body
_FIELD = struct.Struct("<?II")  # whether the value is text, bytes of the name, and of the value
COUNT = struct.Struct("<Q")
MESSAGE_COST = 64  # bytes that a message counts beyond its own: many empty ones take memory as well
PACKET_BYTES = 32 << 10  # a packet has no more: a socket's buffer holds a few
_MOST_PIECE = PACKET_BYTES - _HEAD.size
# Of its peer a link reads so many packets in a turn, so that connections and other links have theirs.
_PACKETS_AT_ONCE = 16
# Above that much that its peer has not taken, what feeds the link is not read.
_MOST_QUEUED = 4 << 20


class Kind(IntEnum):
    """What a frame says. Of call 0: what concerns no call."""

    READY = 1  # from the front end: it listens
    STOP = 2  # to it: take no more calls; those that are left have so many milliseconds
    OPEN = 3  # from it: a call begins: fields
    HALF_CLOSE = 4  # from it: its client sends no more
    OVER = 5  # from it: the call is over
    MESSAGE = 6  # both ways: a whole one, or the last piece of one
    PIECE = 7  # both ways: a part of a frame that is too long for a packet
    TAKEN = 8  # both ways: so many bytes of messages were taken; as many more may come
    INITIAL = 9  # to it: initial metadata: fields
    FINISH = 10  # to it: the call's status: fields
    CANCEL = 11  # to it
    LEAVE = 12  # to it: tell the client of this call to use another connection
    PING = 13  # to it, and back


Frame = tuple[int, int, bytes]  # kind, call, body


class Loop(Protocol):
    """The thread that reads."""

    def defer(self, what: Callable[[], None]) -> bool:
        """Has it done at the end of this thread's turn. Not on other threads: False."""

    def soon(self, what: Callable[[], object]) -> None:
        """Has it done on that thread. Any thread."""

    def watch(self, watched: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        """Calls `ready` with the events. On that thread."""

    def unwatch(self, watched: socket.socket) -> None: ...


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Raises: OSError where there is no such kind of socket."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Link:
    """One end of it. `put` on any thread; the rest on the thread that reads.

    `taken` gets each frame. `lost` is called once, when the other end is gone.
    """

    def __init__(
        self,
        end: socket.socket,
        loop: Loop,
        taken: Callable[[int, int, bytes], None],
        lost: Callable[[], None],
    ) -> None:
        end.setblocking(False)
        self._socket = end
        self._loop = loop
        self._taken = taken
        self._lost = lost
        self.lock = threading.Lock()  # of what goes out
        self._frames: list[bytes] = []  # of the packet that is being filled
        self._size = 0
        self._packets: deque[bytes] = deque()  # full ones
        self._queued = 0  # bytes in them
        self._due = False  # a write will come
        self._watched = False  # somebody waits until the socket takes more
        self._dead = False  # the socket takes nothing any more
        self._closed = False
        self._waiting: dict[Callable[[], None], None] = {}  # until there is room
        self._pieces: dict[int, list[bytes]] = {}  # of messages that are not whole, by call

    def begin(self) -> None:
        """From here on it is read."""
        self._loop.soon(lambda: self._watch(selectors.EVENT_READ))

    # What goes out. Any thread.

    def put(self, kind: Kind, call: int, body: bytes = b"") -> None:
        """Queues a frame; it goes out with this turn of the thread that reads, or at once on another one."""
        with self.lock:
            self.add(kind, call, body)
            if self._due:
                return
            self._due = True
        if not self._loop.defer(self.write):
            self.write()

    def add(self, kind: Kind, call: int, body: bytes) -> None:
        """Queues a frame, cut into pieces where it must be. For who holds `lock` and writes."""
        size = len(body)
        if size > _MOST_PIECE:
            body = self._add_pieces(call, body)
            size = len(body)
        if self._size + _HEAD.size + size > PACKET_BYTES:
            self._seal()
        self._frames.append(_HEAD.pack(kind, call, size))
        self._frames.append(body)
        self._size += _HEAD.size + size

    def _add_pieces(self, call: int, body: bytes) -> bytes:
        """All but the last one, which is returned."""
        at = 0
        while len(body) - at > _MOST_PIECE:
            self._seal()
            self._frames += (_HEAD.pack(Kind.PIECE, call, _MOST_PIECE), body[at : at + _MOST_PIECE])
            self._size = PACKET_BYTES
            at += _MOST_PIECE
        return body[at:]

    def _seal(self) -> None:
        if self._frames:
            self._packets.append(b"".join(self._frames))
            self._queued += self._size
            self._frames.clear()
            self._size = 0

    def write(self) -> None:
        """Sends what there is, as far as the socket takes it."""
        with self.lock:
            self._due = False
            self._seal()
            self._send()
            waits = bool(self._waiting)
        if waits:
            self._wake()

    def _send(self) -> None:
        if self._dead:
            self._packets.clear()
            self._queued = 0
            return
        try:
            while self._packets and not self._watched:
                self._socket.send(self._packets[0])
                self._queued -= len(self._packets.popleft())
        except BlockingIOError:
            self._watched = True
            self._loop.soon(lambda: self._watch(selectors.EVENT_READ | selectors.EVENT_WRITE))
        except OSError:  # its reader finds out
            self._dead = True

    def wait(self, resume: Callable[[], None]) -> bool:
        """Whether too much is queued; then `resume` is called once there is room."""
        with self.lock:
            if self._queued <= _MOST_QUEUED or self._dead:
                return False
            self._waiting[resume] = None
            return True

    @property
    def queued_bytes(self) -> int:
        """What the other end has not taken."""
        return self._queued + self._size

    def forget(self, resume: Callable[[], None]) -> None:
        with self.lock:
            self._waiting.pop(resume, None)

    # What comes in. The thread that reads.

    def _watch(self, events: int) -> None:
        if not self._closed:
            self._loop.watch(self._socket, events, self._ready)

    def _ready(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._watch(selectors.EVENT_READ)
            self._watched = False
            self.write()
        if events & selectors.EVENT_READ:
            self._read()

    def _wake(self) -> None:
        with self.lock:
            if self._queued > _MOST_QUEUED // 2:
                return
            waiting, self._waiting = self._waiting, {}
        for resume in waiting:
            resume()

    def _read(self) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            try:
                packet = self._socket.recv(PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self.close()
                return
            for kind, call, body in frames(packet):
                self._take(kind, call, body)

    def _take(self, kind: int, call: int, body: bytes) -> None:
        if kind == Kind.PIECE:
            self._pieces.setdefault(call, []).append(body)
            return
        if self._pieces and call in self._pieces:
            body = b"".join([*self._pieces.pop(call), body])
        try:
            self._taken(kind, call, body)
        except Exception:  # others' calls go on
            log.exception("what came of another process of this server met a bug")

    def close(self) -> None:
        """The other end is gone, or is to find that this one is."""
        if self._closed:
            return
        with self.lock:  # a thread that writes would else write to whoever gets this file descriptor next
            self._closed = self._dead = True
            self._loop.unwatch(self._socket)
            self._socket.close()
            waiting, self._waiting = self._waiting, {}
        for resume in waiting:
            resume()
        self._lost()


def frames(packet: bytes) -> Iterator[Frame]:
    """What a packet holds."""
    at, end, head = 0, len(packet), _HEAD.size
    while at < end:
        kind, call, size = _HEAD.unpack_from(packet, at)
        start = at + head
        at = start + size
        yield kind, call, packet[start:at]


def packed(fields: Metadata) -> bytes:
    """Names and values, which are text or bytes."""
    parts: list[bytes] = []
    for name, value in fields:
        key = name.encode(errors="surrogatepass")
        is_text = isinstance(value, str)
        data = value.encode(errors="surrogatepass") if isinstance(value, str) else value
        parts += (_FIELD.pack(is_text, len(key), len(data)), key, data)
    return b"".join(parts)


def unpacked(body: bytes) -> Metadata:
    """The inverse of `packed`."""
    fields: list[tuple[str, str | bytes]] = []
    at = 0
    while at < len(body):
        is_text, key, size = _FIELD.unpack_from(body, at)
        at += _FIELD.size
        name, value = body[at : at + key].decode(errors="surrogatepass"), body[at + key : at + key + size]
        at += key + size
        fields.append((name, value.decode(errors="surrogatepass") if is_text else value))
    return tuple(fields)
