"""The receiving processes of a server, seen from the engine process: it starts them, and another one for each
that dies or hangs."""

from __future__ import annotations

import contextlib
import logging
import os
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
from .relayed_call import Parked, Relay
from .routed_call import Route

log = logging.getLogger("tenuto.front_end")

# They import little, and on a busy machine that takes a while all the same.
_READY_SECONDS = 60.0
# Before another one is started for one that died soon after its start: the first time, and at most.
_SOON_SECONDS = 10.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 5.0
# What they may take beyond the grace.
_END_SECONDS = 3.0
# How often to look, and after how many looks without an answer one is taken to hang. Looks and not seconds:
# where all processes of a server stood still, none of them hangs.
_LOOK_SECONDS, _MOST_UNANSWERED = 1.0, 10


class _FrontEnd:
    """One process and its link."""

    def __init__(self, fronts: FrontEnds, settings: str, parked: Parked) -> None:
        self.ready = threading.Event()  # it listens; or it is gone
        self.listens = False
        self.began = time.monotonic()
        self._unanswered = 0  # looks since it was asked
        self._fronts = fronts
        server = fronts.server
        ours, theirs = socket_pair()
        self.relay = Relay(ours, server, server, fronts.route, self._said, self._gone, parked)
        # By exec, never fork: this process has threads of gRPC and of ONNX Runtime. In a session of its own:
        # a terminal's signals are for this process, which ends it in order.
        own = [str(theirs.fileno()), settings, str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tenuto.serving.front_end", *own],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
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
        elif kind == Kind.PING:
            self._unanswered = 0

    def _gone(self) -> None:
        self._fronts.gone(self)
        self.listens = False
        self.ready.set()

    def look(self, now: float) -> None:
        """Ends it if it does not answer, or does not get ready."""
        relay = self.relay
        self._fronts.server.soon(lambda: relay.look(now))
        if not self.ready.is_set():
            if now - self.began > _READY_SECONDS:
                log.error("a front end does not get ready; it is ended")
                self.process.kill()
            return
        self._unanswered += 1  # before it is asked: the answer comes on another thread
        if self._unanswered == 1:
            relay.put(Kind.PING, 0)
        elif self._unanswered > _MOST_UNANSWERED:
            log.error("a front end does not answer; it is ended")
            self.process.kill()

    def wait(self, seconds: float) -> None:
        """Until the process has ended; it is killed if it has not by then."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class FrontEnds:
    """`settings.count` of them. Their calls are opened by `route`, on the thread of `server`, which
    listens to nobody else.

    A thread of its own starts them and sees them end: the system ends them with that thread.
    """

    def __init__(self, settings: FrontSettings, server: Http2Server, route: Route) -> None:
        self.server = server
        self.route = route
        self.lost = 0  # processes that died while they were wanted
        self._settings = settings
        self._parked = Parked(settings.max_pending_bytes)
        self._reserved: list[socket.socket] = []
        self._fronts: list[_FrontEnd] = []  # the thread's
        self._begun = threading.Event()  # all are started
        self._failure: Exception | None = None  # why not
        self._dead: queue.SimpleQueue[_FrontEnd | None] = queue.SimpleQueue()
        self._wait_seconds = _FIRST_WAIT_SECONDS  # before another one is started
        self._start_at = self._look_at = 0.0  # when
        self._grace_seconds = 0.0
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="front-ends", daemon=True)

    @property
    def alive(self) -> int:
        """How many listen."""
        return sum(front.listens for front in self._fronts.copy())

    def bind(self, host: str, port: int) -> int:
        """Keeps the port for them. Returns it. Raises: OSError, also if another server keeps it for its."""
        self._reserved = bound(host, port, shared=False)
        for one in self._reserved:  # whoever binds it from here on shares it, as they do
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = int(self._reserved[0].getsockname()[1])
        self._settings = replace(self._settings, host=host, port=port)
        return port

    def start(self) -> None:
        """Raises: PlatformError if one does not come."""
        self.server.start()
        self._thread.start()
        self._begun.wait()
        came = [front.ready.wait(_READY_SECONDS) and front.listens for front in self._fronts.copy()]
        if self._failure is not None or not all(came):
            self.stop(0.0)
            why = f": {self._failure}" if self._failure is not None else "; its last words are in the log"
            raise PlatformError(f"a front end did not start{why}")

    def gone(self, front: _FrontEnd) -> None:
        """Its calls have ended. On the reading thread."""
        if not self._stopping.is_set():
            self.lost += 1
            self._dead.put(front)

    def stop(self, grace_seconds: float) -> threading.Event:
        """They take no more calls; those that are left go on for so long. Returns what is set at the end."""
        if not self._stopping.is_set():
            self._grace_seconds = grace_seconds
            self._stopping.set()
            self._dead.put(None)
            for one in self._reserved:
                one.close()
            if not self._thread.is_alive():  # it was never started
                self._ended.set()
        return self._ended

    # The thread.

    def _run(self) -> None:
        try:
            for _ in range(self._settings.count):
                self._start_one()
        except Exception as error:  # noqa: BLE001  # no process, no descriptor is left, say; `start` says so
            self._failure = error
        finally:
            self._begun.set()
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception:  # the others are to be looked after all the same
                log.exception("a look at the front ends met a bug")
        self._end()

    def _start_one(self) -> None:
        self._fronts.append(_FrontEnd(self, self._settings.written(), self._parked))

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            for front in self._fronts:
                front.look(now)
        is_missing = len(self._fronts) < self._settings.count
        if is_missing and now >= self._start_at:
            self._start_at = now + _LONGEST_WAIT_SECONDS  # should it fail
            self._start_one()
            return
        until = min(self._look_at, self._start_at) if is_missing else self._look_at
        with contextlib.suppress(queue.Empty):
            dead = self._dead.get(timeout=max(0.0, until - time.monotonic()))
            if dead is not None:
                self._bury(dead)

    def _bury(self, front: _FrontEnd) -> None:
        front.wait(_END_SECONDS)
        self._fronts.remove(front)
        status, now = front.process.returncode, time.monotonic()
        log.error("a front end died (%d); its clients go on elsewhere, another one starts", status)
        soon = now - front.began < _SOON_SECONDS
        longer = min(2 * self._wait_seconds, _LONGEST_WAIT_SECONDS)
        self._wait_seconds = longer if soon else _FIRST_WAIT_SECONDS
        self._start_at = now + self._wait_seconds

    def _end(self) -> None:
        until = time.monotonic() + self._grace_seconds + _END_SECONDS
        for front in self._fronts:
            front.relay.put(Kind.STOP, 0, COUNT.pack(int(1000 * self._grace_seconds)))
        for front in self._fronts:
            front.wait(until - time.monotonic())
        self.server.stop(0.0).wait()
        self._ended.set()
