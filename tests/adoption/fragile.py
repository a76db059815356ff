"""A child that does what it is told to, harm included: `python -m tests.adoption.fragile`."""

from __future__ import annotations

import os
import sys
import time

from tenuto.serving.adoption.dialogue import Job, work
from tenuto.serving.errors import ModelInvalid

_held: list[bytearray] = []


def answer(job: Job) -> Job:
    if "exit" in job:
        os._exit(job["exit"])
    if "signal" in job:
        os.kill(os.getpid(), job["signal"])
    if "sleep" in job:
        time.sleep(job["sleep"])
    if "bytes" in job:
        _held.append(bytearray(b"x") * job["bytes"])
        time.sleep(60)
    if "refuse" in job:
        raise ModelInvalid(job["refuse"])
    print("what a library says")
    return {"pid": os.getpid(), "said": job.get("say")}


def begin(job: Job) -> object:
    if job.get("bad"):
        raise ModelInvalid("it cannot begin")
    return answer


if __name__ == "__main__":
    work(begin, sys.argv[1:])  # type: ignore[arg-type]
