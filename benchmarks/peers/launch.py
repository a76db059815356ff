"""Starts another server, waits until it is ready, says where it serves, and ends it with this process."""

import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

READY_SECONDS, LAST_CHARACTERS = 100, 4_000
ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Of 127.0.0.1; they may be taken before they are used."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True, slots=True)
class Ready:
    """When a server is: its gRPC port is open, and that address answers 200, with these words."""

    port: int
    address: str
    words: str = ""


def serve(name: str, command: Sequence[str], environment: Mapping[str, str], ready: Ready) -> None:
    """Until it ends, or this process is asked to.

    Raises: RuntimeError.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            if not becomes_ready(process, ready):
                log.seek(0)
                said = log.read().decode(errors="replace")[-LAST_CHARACTERS:]
                raise RuntimeError(f"{name} did not become ready; it said at last: {said}")
            print(f"serving on 127.0.0.1:{ready.port}", flush=True)
            process.wait()
        finally:
            process.terminate()


def becomes_ready(process: subprocess.Popen[bytes], ready: Ready) -> bool:
    """Waits until it is, or has ended."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(ready.address, timeout=1) as answer:
                said = answer.read().decode()
            with socket.create_connection(("127.0.0.1", ready.port)):
                if ready.words in said:
                    return True
        except (URLError, OSError):
            pass
        time.sleep(0.1)
    return False
