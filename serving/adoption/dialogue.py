"""A child process that is told one job after the other, and answers each before the next: `vetting`'s kind of
child, for who has to look at an answer before he knows what to ask.

It is started with what to work on, and again after a job that it did not survive.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tenuto.serving.child import Child, confine
from tenuto.serving.errors import ModelInvalid, TenutoError
from tenuto.serving.vetting import Limits

Job = dict[str, Any]

_POLL_SECONDS = 0.1
_START_SECONDS = 120.0  # for what is no file's fault: an interpreter and its libraries


class _Listener(Child):
    """It is not told everything at once."""

    def __init__(self, command: list[str]) -> None:
        super().__init__(command, "")

    def _tell(self, text: str) -> None:
        return

    def say(self, job: Job) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the end of its answers says so as well
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        super().end()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


class Dialogue:
    """With a child that runs `module`, which calls `work`. Not for several threads."""

    def __init__(self, module: str, subject: Job, limits: Limits) -> None:
        self._command = [sys.executable, "-m", module, str(os.getpid()), str(limits.memory_bytes)]
        self._subject = subject
        self._limits = limits
        self._child: _Listener | None = None

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def lives(self) -> bool:
        return self._child is not None

    def start(self) -> None:
        """Raises: ModelInvalid if it cannot begin with its subject."""
        self._child = _Listener(self._command)
        try:
            self._line(self._child, _START_SECONDS)
            self._exchange(self._child, self._subject)
        except ModelInvalid:
            self.close()
            raise

    def ask(self, job: Job) -> Job:
        """The answer to one job.

        Raises: ModelInvalid if there is none: the job was refused, or ended the process, or took too much.
        """
        if self._child is None:
            self.start()
        assert self._child is not None
        return self._exchange(self._child, job)

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _exchange(self, child: _Listener, job: Job) -> Job:
        child.say(job)
        try:
            answer: Job = json.loads(self._line(child, self._limits.seconds))
        except ModelInvalid:
            self.close()
            raise
        if "refused" in answer:
            raise ModelInvalid(answer["refused"])
        return answer

    def _line(self, child: _Listener, seconds: float) -> bytes:
        """Raises: ModelInvalid if none comes."""
        limits, deadline = self._limits, time.monotonic() + seconds
        while True:
            line = child.lines.next(_POLL_SECONDS)
            if line:
                return line
            if line == b"":
                raise ModelInvalid(f"it ends the process that runs it ({child.fate()})")
            if time.monotonic() > deadline:
                raise ModelInvalid(f"it took more than {seconds:g} s (--seconds)")
            if child.resident_bytes() > limits.memory_bytes:
                raise ModelInvalid(
                    f"it took more than {limits.memory_bytes >> 20} MiB of memory (--memory-bytes)"
                )


def work(begin: Callable[[Job], Callable[[Job], Job]], arguments: list[str]) -> None:
    """The child's side. `begin` gets the first line, and returns what answers all others."""
    parent, memory_bytes, answers = map(int, arguments)
    confine(parent, memory_bytes)
    answer: Callable[[Job], Job] | None = None
    with os.fdopen(answers, "w") as pipe:
        print("{}", file=pipe, flush=True)  # it is there
        for line in sys.stdin:
            said: Job = {}
            try:
                if answer is None:
                    answer = begin(json.loads(line))
                else:
                    said = answer(json.loads(line))
            except TenutoError as error:
                said = {"refused": str(error)}
            print(json.dumps(said), file=pipe, flush=True)
