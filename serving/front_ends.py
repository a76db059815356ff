"""The receiving processes of a server, seen from the engine process: it starts them, and starts another one
for each that dies."""

from __future__ import annotations

import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

from .errors import PlatformError
from .front_end import FrontSettings
from .http2 import Http2Server, bound
from .link import COUNT, Kind, socket_pair
from .relayed_call import Relay
from .routed_call import Route

log = logging.getLogger("tenuto.front_end")

# They import little, and on a busy machine that takes a while all the same.
_READY_SECONDS = 60.0
# Before another one is started for one that died soon after its start: the first time, and at most.
_SOON_SECONDS = 10.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 5.0
# What they may take beyond the grace.
_END_SECONDS = 3.0


class _FrontEnd:
    """One process and its link."""

    def __init__(self, fronts: FrontEnds, server: Http2Server, route: Route, settings: str) -> None:
        self.ready = threading.Event()  # it listens; or it is gone
        self.listens = False
        self.began = time.monotonic()
        self._fronts = fronts
        ours, theirs = socket_pair()
        self.relay = Relay(ours, server, server, route, self._said, self._gone)
        try:
            # By exec, never fork: this process has threads of gRPC and of ONNX Runtime.
            command = [sys.executable, "-m", "tenuto.serving.front_end", str(theirs.fileno()), settings]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.relay.begin()

    def _said(self, kind: int) -> None:
        if kind == Kind.READY:
            self.listens = True
            self.ready.set()

    def _gone(self) -> None:
        self._fronts.gone(self)
        self.listens = False
        self.ready.set()

    def wait(self, seconds: float) -> None:
        """Until the process has ended; it is killed if it has not by then."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class FrontEnds:
    """`settings.count` of them. Their calls are opened by `route`, on the thread of `server`, which
    listens to nobody else."""

    def __init__(
        self,
        settings: FrontSettings,
        server: Http2Server,
        route: Route,
    ) -> None:
        self.lost = 0  # processes that died while they were wanted
        self._settings = settings
        self._server = server
        self._route = route
        self._reserved: list[socket.socket] = []
        self._fronts: list[_FrontEnd] = []
        self._lock = threading.Lock()  # of that list
        self._dead: queue.SimpleQueue[_FrontEnd | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._ended = threading.Event()

    @property
    def alive(self) -> int:
        """How many listen."""
        return sum(front.listens for front in list(self._fronts))

    def bind(self, host: str, port: int) -> int:
        """Keeps the port for them. Returns it. Raises: OSError."""
        self._reserved = bound(host, port, shared=True)
        port = int(self._reserved[0].getsockname()[1])
        self._settings = replace(self._settings, host=host, port=port)
        return port

    def start(self) -> None:
        """Raises: PlatformError if one does not come."""
        self._server.start()
        for _ in range(self._settings.count):
            self._start_one()
        for front in list(self._fronts):
            if not front.ready.wait(_READY_SECONDS) or not front.listens:
                self.stop(0.0)
                raise PlatformError("a front end did not start; its last words are in the log")
        threading.Thread(target=self._revive, name="front-ends", daemon=True).start()

    def _start_one(self) -> None:
        with self._lock:
            if not self._stopping.is_set():
                settings = self._settings.written()
                self._fronts.append(_FrontEnd(self, self._server, self._route, settings))

    def gone(self, front: _FrontEnd) -> None:
        """Its calls have ended. On the reading thread."""
        if not self._stopping.is_set():
            self.lost += 1
            self._dead.put(front)

    def _revive(self) -> None:
        """On a thread of its own: a new one for each that died."""
        wait = _FIRST_WAIT_SECONDS
        while (front := self._dead.get()) is not None:
            front.wait(_END_SECONDS)
            with self._lock:
                self._fronts.remove(front)
            soon = time.monotonic() - front.began < _SOON_SECONDS
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS) if soon else _FIRST_WAIT_SECONDS
            log.error(
                "a front end died (%d); its clients go on elsewhere, another one starts",
                front.process.returncode,
            )
            while not self._stopping.wait(wait):
                try:
                    self._start_one()
                    break
                except OSError as error:  # no process, no descriptor is left, say
                    log.error("no front end can be started: %s", error)
                    wait = _LONGEST_WAIT_SECONDS

    def stop(self, grace_seconds: float) -> threading.Event:
        """They take no more calls; those that are left go on for so long. Returns what is set at the end."""
        if not self._stopping.is_set():
            with self._lock:
                self._stopping.set()
            self._dead.put(None)
            for one in self._reserved:
                one.close()
            threading.Thread(target=self._end, args=(grace_seconds,), name="front-ends", daemon=True).start()
        return self._ended

    def _end(self, grace_seconds: float) -> None:
        until = time.monotonic() + grace_seconds + _END_SECONDS
        for front in self._fronts:
            front.relay.put(Kind.STOP, 0, COUNT.pack(int(1000 * grace_seconds)))
        for front in self._fronts:
            front.wait(until - time.monotonic())
        self._server.stop(0.0).wait()
        self._ended.set()
