"""A process for what may do harm to whoever does it: what it says, what it takes, and its end.

It answers line by line on a pipe of its own. What it prints goes to another one, which is read, so that it
never waits, and of which the end is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LONGEST_LINE = 1 << 16
_KEPT_BYTES = 4096  # of what it prints
_KIN_SECONDS = 1.0  # so often it is looked who its descendants are
_END_SECONDS = 5.0  # that it may take to be gone once its answers have ended
_DATA_FACTOR, _DATA_MORE = 2, 1 << 30  # what may be asked for, where so much memory may be taken


class Lines:
    """What comes on two pipes: answers, and what is printed."""

    def __init__(self, answers: int, printed: int) -> None:
        self._answers, self._printed = answers, printed
        self._begun, self._tail = b"", b""
        self._selector = selectors.DefaultSelector()
        for pipe in (answers, printed):
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ)

    def next(self, timeout_seconds: float) -> bytes | None:
        """A line of the answers, cut where it is too long; b"" at their end; None if none came in time."""
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._begun and len(self._begun) < _LONGEST_LINE:
            ready = [key.fd for key, _ in self._selector.select(max(0.0, deadline - time.monotonic()))]
            if self._printed in ready and not self._take_printed():
                self._selector.unregister(self._printed)
            if self._answers in ready:
                read = os.read(self._answers, _LONGEST_LINE)
                if not read:
                    return b""
                self._begun += read
            elif time.monotonic() >= deadline:
                return None
        line, _, self._begun = self._begun.partition(b"\n")
        return line[:_LONGEST_LINE]

    def last_printed(self) -> str:
        """The last line that was printed."""
        with contextlib.suppress(BlockingIOError):
            self._take_printed()
        lines = self._tail.decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    def _take_printed(self) -> bool:
        read = os.read(self._printed, _LONGEST_LINE)
        self._tail = (self._tail + read)[-_KEPT_BYTES:]
        return bool(read)

    def close(self) -> None:
        self._selector.close()
        for pipe in (self._answers, self._printed):
            os.close(pipe)


class Child:
    """The parent's side. Its command gets one argument more: the number of the pipe for its answers.
    `text` is its standard input."""

    def __init__(self, command: list[str], text: str) -> None:
        answers, answering = os.pipe()
        printed, printing = os.pipe()
        self.lines = Lines(answers, printed)
        try:
            # By exec, never fork: this process may have gRPC and ONNX Runtime threads. In a session of its
            # own: what it starts ends with it.
            self._process = subprocess.Popen(
                [*command, str(answering)],
                stdin=subprocess.PIPE,
                stdout=printing,
                stderr=printing,
                pass_fds=(answering,),
                start_new_session=True,
            )
        except BaseException:
            self.lines.close()
            raise
        finally:
            os.close(answering)
            os.close(printing)
        # A thread of its own: a pipe holds little, and the child reads when it likes.
        self._teller = threading.Thread(target=self._tell, args=(text,), name="child", daemon=True)
        self._teller.start()
        self._kin: list[int] = []
        self._kin_at = -_KIN_SECONDS

    def _tell(self, text: str) -> None:
        pipe = self._process.stdin
        assert pipe
        with contextlib.suppress(BrokenPipeError):  # the end of its answers says so as well
            pipe.write(text.encode())
        with contextlib.suppress(BrokenPipeError):
            pipe.close()

    def fate(self) -> str:
        """How it ended, in words, once its answers have."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its pipe, and stayed"
        died = f"signal {-code}{_name(-code)}" if code < 0 else f"exit status {code}"
        words = self.lines.last_printed()
        return f"{died}; its last words: {words!r}" if words else died

    def resident_bytes(self) -> int:
        """Of it and of its descendants. Where there is no /proc, 0."""
        if time.monotonic() - self._kin_at >= _KIN_SECONDS:
            self._kin, self._kin_at = _descendants(self._process.pid), time.monotonic()
        return sum(map(_resident_bytes, [self._process.pid, *self._kin]))

    def end(self) -> None:
        """At once, and with it what it has started."""
        kin = _descendants(self._process.pid)
        # Its group is its own even where it has gone: numbers of processes are not given anew so soon.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in kin:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._teller.join()
        self.lines.close()


def _name(number: int) -> str:
    try:
        return f", {signal.Signals(number).name}"
    except ValueError:  # a real-time one
        return ""


def _resident_bytes(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:  # gone, or no /proc here: then time alone is watched
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _descendants(pid: int) -> list[int]:
    """Of a process, as far as /proc tells."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # it ended
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = list(children.get(pid, []))
    for one in found:  # which grows
        found += children.get(one, [])
    return found


# The child's side.


def confine(parent: int, memory_bytes: int) -> None:
    """To be called before anything that may do harm. `memory_bytes`: what is watched from outside, a bound on
    what is asked for in here; 0: none, since CUDA asks for far more than it takes."""
    end_with_parent(parent)
    with contextlib.suppress(OSError):  # if memory runs out, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    import resource  # not on every platform

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        # The watch looks now and then: what asks for everything in between is refused.
        most = _DATA_FACTOR * memory_bytes + _DATA_MORE
        with contextlib.suppress(ValueError, OSError):  # somebody allowed less
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def end_with_parent(parent: int) -> None:
    """A server that is killed leaves no child behind; on Linux. Nor does one that was before we said so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(0)
