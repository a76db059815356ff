"""Calls that a front end has taken, in the engine process: what the link brings is theirs, and what they send
goes back over it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from .call import Metadata
from .errors import PoolFull
from .link import COUNT, MESSAGE_COST, Kind, Link, Loop, packed, unpacked
from .routed_call import Loop as CallLoop
from .routed_call import Route, RoutedCall
from .status import code_of, metadata_of

log = logging.getLogger("tenuto.transport")

# Bytes of messages that one side sends of a call before the other has taken them, and after how many of them
# that says so.
MOST_UNTAKEN = 64 << 10
TELL_TAKEN = MOST_UNTAKEN // 2
# As if so many bytes were untaken when a call begins: the engine process has to admit it first.
UNADMITTED = MOST_UNTAKEN + 1
_OUTBOX_BYTES = 256 << 10
# What stands in front of a call's own fields.
_PATH, _PEER, _SECONDS, _CODE, _DETAILS = ":path", ":peer", ":seconds", ":code", ":details"


class RelayedCall(RoutedCall):
    """Its messages come whole. What is underlined belongs to its link as well."""

    __slots__ = ("_address", "_all_parked", "_parked", "_parked_bytes", "_spent", "_untaken")

    def __init__(self, relay: Relay, number: int, opening: bytes, loop: CallLoop) -> None:
        """`opening`: as `opening_of` writes it."""
        (_, path), (_, peer), (_, seconds), *metadata = unpacked(opening)
        super().__init__(relay, number, str(path), loop, _OUTBOX_BYTES)
        self.metadata = tuple(metadata)
        self.deadline = time.monotonic() + float(seconds)
        self._address = str(peer)
        self._parked: deque[bytes] = deque()  # messages that came while reading paused
        self._all_parked = relay.parked
        self._parked_bytes = 0  # what it has in that count
        self._spent = 0  # bytes handed on of which the front end does not know
        self._untaken = 0  # bytes sent of which the front end has said nothing; guarded by the link's lock

    def peer(self) -> str:
        return self._address

    def suggest_leaving(self) -> None:
        self._connection.put(Kind.LEAVE, self.number)

    # The reading thread.

    def take(self, message: bytes) -> None:
        if self._gone or self._outbox.over or self._outbox.ending is not None:  # nobody wants it
            return
        cost = len(message) + MESSAGE_COST
        if self._held or self._paused:
            self._park(message, cost)
            return
        self._spent += cost
        self._hand_on(message)
        if self._spent >= TELL_TAKEN:
            self._tell()

    def _park(self, message: bytes, cost: int) -> None:
        """Its front end did not know that it is not read on."""
        self._parked.append(message)
        self._parked_bytes += cost
        if self._all_parked.add(cost):
            self._forget()
            error = PoolFull("too many large messages wait to be read; retry, or send smaller ones")
            self.finish(code_of(error), str(error), metadata_of(error))

    def read_on(self) -> None:
        if self._gone or not (self._held or self._paused):
            return
        self._held = self._paused = False
        if self._holds():
            return
        while self._parked and not (self._held or self._paused):
            message = self._parked.popleft()
            cost = len(message) + MESSAGE_COST
            self._spent += cost
            self._parked_bytes -= cost
            self._all_parked.add(-cost)
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
        self._all_parked.add(-self._parked_bytes)
        self._parked_bytes = 0


class Parked:
    """How much of messages is held for calls that are not read on. The reading thread's."""

    def __init__(self, limit_bytes: int) -> None:
        self.bytes = 0
        self._limit_bytes = limit_bytes

    def add(self, nbytes: int) -> bool:
        """Whether it is too much now."""
        self.bytes += nbytes
        return self.bytes > self._limit_bytes


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
        parked: Parked,
    ) -> None:
        self.parked = parked
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
                try:
                    self._send(call)
                except Exception:  # the others' replies must not be lost with these
                    log.exception("a reply met a bug; its call is cancelled")
                    self._calls_loop.soon(call.cancel)
        self._link.write()

    def abandon(self, call: RelayedCall) -> None:
        self._link.put(Kind.CANCEL, call.number)

    def _send(self, call: RelayedCall) -> None:
        if self._calls.get(call.number) is not call:  # it is over
            return
        add, more = self._link.add, True
        while more:
            if call._untaken > MOST_UNTAKEN:
                return
            message, ending, more = call.next_out()
            if not call._started and (message is not None or ending is not None):
                call._started = True
                if call.initial_metadata:
                    add(Kind.INITIAL, call.number, packed(call.initial_metadata))
            if message is not None:
                call._untaken += len(message) + MESSAGE_COST
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

    def look(self, now: float) -> None:
        """Ends calls whose clients do not take their endings."""
        for call in list(self._calls.values()):
            call.look(now)


def opening_of(call: RoutedCall) -> bytes:
    """How a front end says what a call is."""
    own = ((_PATH, call.path), (_PEER, call.peer()), (_SECONDS, repr(call.seconds_left)))
    return packed((*own, *call.metadata))


def status_to(code: grpc.StatusCode, details: str, metadata: Metadata) -> bytes:
    return packed(((_CODE, code.name), (_DETAILS, details), *metadata))


def status_from(body: bytes) -> tuple[grpc.StatusCode, str, Metadata]:
    (_, code), (_, details), *metadata = unpacked(body)
    return grpc.StatusCode[str(code)], str(details), tuple(metadata)
