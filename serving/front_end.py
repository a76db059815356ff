"""A front end: a process that receives for the engine process, which started it.

`python -m tenuto.serving.front_end SOCKET SETTINGS PARENT`. It has the connections, and what comes with them:
TLS, HTTP/2, messages that are not whole yet. Whole messages go over the link, and what
comes back goes to the clients. It ends with the engine process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .call import GONE, Listener
from .child import end_with_parent
from .errors import PoolFull
from .http2 import Http2Server
from .http_call import OTHERS_BYTES, Limits
from .link import COUNT, MESSAGE_COST, Kind, Link, Loop, unpacked
from .log_format import formatter
from .relayed_call import MOST_UNTAKEN, TELL_TAKEN, UNADMITTED, opening_of, status_from
from .routed_call import RoutedCall
from .status import code_of, metadata_of
from .tls import Tls, TlsFiles

log = logging.getLogger("tenuto.front_end")

_LOOK_SECONDS = 1.0
_MOST_CALLS = (1 << 32) - 1  # before their numbers come again
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class FrontSettings:
    """What a front end is told."""

    count: int  # of front ends
    services: tuple[str, ...]
    max_message_bytes: int
    max_pending_bytes: int
    calls: int = 9216  # of one connection
    tls: tuple[str, str, str] | None = None  # certificate, key, authorities or ""
    log_format: Any = "console"
    log_level: str = "info"
    host: str = "127.0.0.1"
    port: int = 0

    def written(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> FrontSettings:
        said = json.loads(text)
        tls = said.pop("tls")
        return cls(services=tuple(said.pop("services")), tls=tls and tuple(tls), **said)

    def open_tls(self) -> Tls | None:
        """Raises: ConfigInvalid."""
        if self.tls is None:
            return None
        certificate, key, authorities = self.tls
        return Tls(TlsFiles(Path(certificate), Path(key), Path(authorities) if authorities else None))


class Forward:
    """Hands one call's messages on, and its replies back. A Listener."""

    __slots__ = ("_call", "_link", "_most_queued", "_number", "_over", "_resume", "_spent", "_untaken")

    def __init__(
        self, call: RoutedCall, number: int, link: Link, over: Callable[[int], None], most_queued: int
    ) -> None:
        self._call = call
        self._most_queued = most_queued  # bytes before the engine process, above which nothing large is added
        self._number = number
        self._link = link
        self._over = over
        self._untaken = UNADMITTED  # bytes sent of which the engine process has said nothing
        self._resume = call.pause()
        self._spent = 0  # bytes of replies taken of which it does not know
        call.watch_taken(self._taken)

    def received(self, message: bytes) -> None:
        if len(message) > MOST_UNTAKEN and self._link.queued_bytes > self._most_queued:
            _refuse(self._call)
            return
        self._untaken += len(message) + MESSAGE_COST
        self._link.put(Kind.MESSAGE, self._number, message)

    def half_closed(self) -> None:
        self._link.put(Kind.HALF_CLOSE, self._number)

    def terminated(self) -> None:
        self._link.forget(self._resume)
        self._link.put(Kind.OVER, self._number)
        self._over(self._number)

    def wait(self, resume: Callable[[], None]) -> bool:
        self._resume = resume
        return self._untaken > MOST_UNTAKEN or self._link.wait(resume)

    def take(self, kind: int, body: bytes) -> None:
        """What the engine process says."""
        call = self._call
        if kind == Kind.MESSAGE:
            call.send(body)
        elif kind == Kind.TAKEN:
            self._untaken -= COUNT.unpack(body)[0]
            if self._untaken <= MOST_UNTAKEN:
                self._resume()
        elif kind == Kind.FINISH:
            call.finish(*status_from(body))
        elif kind == Kind.INITIAL:
            call.initial_metadata = unpacked(body)
        elif kind == Kind.CANCEL:
            call.cancel()
        elif kind == Kind.LEAVE:
            call.suggest_leaving()

    def _taken(self, nbytes: int) -> None:
        """Its client, or the socket before it, has taken so much of its replies. On the reading thread, as
        all that is sent here."""
        self._spent += nbytes + MESSAGE_COST
        if self._spent >= TELL_TAKEN:
            self._link.put(Kind.TAKEN, self._number, COUNT.pack(self._spent))
            self._spent = 0


class Forwards:
    """All calls of a front end. `own`: what the paths of the callers' methods begin with; `stop` is told for
    how many seconds what is left may go on; `gone` is called when the engine process is gone."""

    def __init__(
        self,
        end: socket.socket,
        loop: Loop,
        own: tuple[str, ...],
        stop: Callable[[float], object],
        gone: Callable[[], None],
        most_queued: int,
    ) -> None:
        self._most_queued = most_queued
        self._link = Link(end, loop, self._taken, gone)
        self._own = own
        self._stop = stop
        self._calls: dict[int, Forward] = {}
        self._number = 0

    def begin(self) -> None:
        """From here on the engine process is listened to, and knows that there is somebody to be served."""
        self._link.begin()
        self._link.put(Kind.READY, 0)

    def open(self, call: RoutedCall) -> Listener:
        if not call.path.startswith(self._own):
            call.shrink(OTHERS_BYTES)
        if self._link.wait(_nobody):  # the engine process does not keep up with those who come
            self._link.forget(_nobody)
            _refuse(call)
            return GONE
        number = self._number % _MOST_CALLS + 1
        while number in self._calls:
            number = number % _MOST_CALLS + 1
        self._number = number
        forward = Forward(call, number, self._link, self._forget, self._most_queued)
        self._calls[number] = forward
        self._link.put(Kind.OPEN, number, opening_of(call))
        call.metadata = ()
        return forward

    def _forget(self, number: int) -> None:
        self._calls.pop(number, None)

    def _taken(self, kind: int, number: int, body: bytes) -> None:
        call = self._calls.get(number)
        if call is not None:
            call.take(kind, body)
        elif kind == Kind.PING:
            self._link.put(Kind.PING, 0)
        elif kind == Kind.STOP:
            self._stop(COUNT.unpack(body)[0] / 1000)


class FrontEnd:
    """Raises (when built): OSError, ConfigInvalid."""

    def __init__(self, settings: FrontSettings, end: socket.socket) -> None:
        self._tls = settings.open_tls()
        # Replies wait in the engine process, where their sequences are held for it; here, what it may send.
        limits = Limits(settings.max_message_bytes, settings.max_pending_bytes, settings.calls, NO_LIMIT)
        self._server = Http2Server(lambda call: self._forwards.open(call), limits, self._tls)
        own = tuple(f"/{service}/" for service in settings.services)
        most = settings.max_pending_bytes
        self._forwards = Forwards(end, self._server, own, self._server.stop, _engine_gone, most)
        self._server.bind(settings.host, settings.port, shared=True)

    def run(self) -> None:
        """Until the engine process says so, or is gone."""
        self._server.start()
        self._forwards.begin()
        while not self._server.stopped.wait(_LOOK_SECONDS):
            if self._tls is not None:
                try:
                    self._tls.reload()
                except Exception:  # the next look may go well
                    log.exception("a look for certificates met a bug")


def _refuse(call: RoutedCall) -> None:
    error = PoolFull("more comes than the server can take in; retry later, or go to another server")
    call.finish(code_of(error), str(error), metadata_of(error))


def _nobody() -> None:
    """Waits."""


def _engine_gone() -> None:
    """At once: what the clients have here goes on elsewhere, as after a crash."""
    os._exit(0)


def main(arguments: list[str]) -> int:
    descriptor, text, parent = arguments
    for number in (signal.SIGTERM, signal.SIGINT):  # of a whole group: the engine process ends this one
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(int(parent))
    end = socket.socket(fileno=int(descriptor))
    settings = FrontSettings.read(text)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(settings.log_format))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    try:
        front = FrontEnd(settings, end)
    except Exception as error:  # noqa: BLE001  # the engine process says that it did not come
        log.error("a front end cannot serve: %s", error)
        return 1
    front.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
