"""Calls that a front end has taken, in the engine process: what the link brings is theirs, and what they send
goes back over it."""

from __future__ import annotations

import json
import logging
import time
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from .call import Metadata
from .link import COUNT, Kind, Link, Loop
from .routed_call import Loop as CallLoop
from .routed_call import Route, RoutedCall

log = logging.getLogger("tenuto.transport")

# Bytes of messages that one side sends of a call before the other has taken them, and after how many of them
# that says so.
MOST_UNTAKEN = 64 << 10
TELL_TAKEN = MOST_UNTAKEN // 2
# As if so many bytes were untaken when a call begins: the engine process has to admit it first.
UNADMITTED = MOST_UNTAKEN + 1
_OUTBOX_BYTES = 256 << 10
_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class RelayedCall(RoutedCall):
    """Its messages come whole. What is underlined belongs to its link as well."""

    __slots__ = ("_address", "_parked", "_spent", "_untaken")

    def __init__(self, relay: Relay, number: int, opening: bytes, loop: CallLoop) -> None:
        """`opening`: as `opening_of` writes it."""
        said = json.loads(opening)
        super().__init__(relay, number, said["path"], loop, _OUTBOX_BYTES)
        self.metadata = metadata_from(said["metadata"])
        if said["seconds"] is not None:
            self.deadline = time.monotonic() + said["seconds"]
        self._address = str(said["peer"])
        self._parked: deque[bytes] = deque()  # messages that came while reading paused
        self._spent = 0  # bytes handed on of which the front end does not know
        self._untaken = 0  # bytes sent of which the front end has said nothing; guarded by the link's lock

    def peer(self) -> str:
        return self._address

    def suggest_leaving(self) -> None:
        self._connection.put(Kind.LEAVE, self.number)

    # The reading thread.

    def take(self, message: bytes) -> None:
        if self._outbox.ending is not None:  # nobody wants it
            return
        if self._held or self._paused:
            self._parked.append(message)
            return
        self._spent += len(message)
        self._hand_on(message)
        if self._spent >= TELL_TAKEN:
            self._tell()

    def read_on(self) -> None:
        if self._gone or not (self._held or self._paused):
            return
        self._held = self._paused = False
        if self._holds():
            return
        while self._parked and not (self._held or self._paused):
            message = self._parked.popleft()
            self._spent += len(message)
            self._hand_on(message)
        self._tell()
        if self._ended and not (self._held or self._paused):
            self._half_close()

    def _tell(self) -> None:
        """What was taken, so that as much may follow. While reading pauses, what is here counts as not
        taken."""
        if not (self._held or self._paused):
            self._connection.put(Kind.TAKEN, self.number, COUNT.pack(self._spent))
            self._spent = 0

    def _forget(self) -> None:
        self._parked.clear()


class Relay:
    """All calls of one front end. `said` gets what concerns no call; `lost` is called when it is gone."""

    def __init__(
        self,
        end: Any,
        loop: Loop,
        calls_loop: CallLoop,
        route: Route,
        said: Callable[[int], None],
        lost: Callable[[], None],
    ) -> None:
        self._link = Link(end, loop, self._taken, self._end)
        self._calls_loop = calls_loop
        self._route = route
        self._said = said
        self._lost = lost
        self._calls: dict[int, RelayedCall] = {}
        self.put = self._link.put
        self.begin = self._link.begin
        self.close = self._link.close

    # Any thread.

    def write(self, calls: Iterable[Any] = ()) -> None:
        """Sends what these calls have, as far as their front end has taken what came before."""
        with self._link.lock:
            for call in calls:
                self._send(call)
        self._link.write()

    def abandon(self, call: RelayedCall) -> None:
        self._link.put(Kind.CANCEL, call.number)

    def _send(self, call: RelayedCall) -> None:
        if self._calls.get(call.number) is not call:  # it is over
            return
        box, add, more = call._outbox, self._link.add, True
        while more:
            if call._untaken > MOST_UNTAKEN:
                return
            with box.lock:
                was_full, message = box.full, box.take()
                more = bool(box.messages) or (message is not None and box.ending is not None)
                ending = box.ending if message is None and not box.over else None
                resume = was_full and call._held and not box.full
                if not more and ending is None:
                    call._due = False  # who sends from here on asks anew, and waits for our lock
            if resume:
                self._calls_loop.soon(call.read_on)
            if not call._started and (message is not None or ending is not None):
                call._started = True
                if call.initial_metadata:
                    add(Kind.INITIAL, call.number, json.dumps(metadata_to(call.initial_metadata)).encode())
            if message is not None:
                call._untaken += len(message)
                add(Kind.MESSAGE, call.number, message)
            elif ending is not None:
                add(Kind.FINISH, call.number, status_to(*ending))

    # The reading thread.

    def _taken(self, kind: int, number: int, body: bytes) -> None:
        call = self._calls.get(number)
        if call is not None:
            if kind == Kind.MESSAGE:
                call.take(body)
            elif kind == Kind.TAKEN:
                self._go_on(call, COUNT.unpack(body)[0])
            elif kind == Kind.HALF_CLOSE:
                call.end()
            elif kind == Kind.OVER:
                self._forget(call)
        elif kind == Kind.OPEN:
            call = self._calls[number] = RelayedCall(self, number, body, self._calls_loop)
            call.open(self._route)
            if call._outbox.ending is None:  # it is read from here on; nothing of a stranger's call was
                self.put(Kind.TAKEN, number, COUNT.pack(UNADMITTED))
        elif not number:
            self._said(kind)

    def _go_on(self, call: RelayedCall, taken: int) -> None:
        with self._link.lock:
            waited = call._untaken > MOST_UNTAKEN
            call._untaken -= taken
        if waited and call._due:
            self.write((call,))

    def _forget(self, call: RelayedCall) -> None:
        with self._link.lock:
            self._calls.pop(call.number, None)
        call.terminated()

    def _end(self) -> None:
        for call in list(self._calls.values()):
            self._forget(call)
        self._lost()

    @property
    def calls(self) -> int:
        return len(self._calls)


def opening_of(call: RoutedCall) -> bytes:
    """How a front end says what a call is."""
    seconds = call.seconds_left
    return json.dumps(
        {
            "path": call.path,
            "metadata": metadata_to(call.metadata),
            "peer": call.peer(),
            "seconds": seconds if seconds < float("inf") else None,
        }
    ).encode()


def metadata_to(metadata: Metadata) -> list[list[str]]:
    """JSON's own kinds: the values that are bytes have a third item."""
    return [
        [key, value] if isinstance(value, str) else [key, b64encode(value).decode(), ""]
        for key, value in metadata
    ]


def metadata_from(said: list[list[str]]) -> Metadata:
    return tuple((key, b64decode(value) if binary else value) for key, value, *binary in said)


def status_to(code: grpc.StatusCode, details: str, metadata: Metadata) -> bytes:
    return json.dumps([code.value[0], details, metadata_to(metadata)]).encode()


def status_from(body: bytes) -> tuple[grpc.StatusCode, str, Metadata]:
    code, details, metadata = json.loads(body)
    return _STATUS[code], details, metadata_from(metadata)
