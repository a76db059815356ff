"""The server as a process of its own, for signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
_READY = re.compile(r"tenuto serving on 127\.0\.0\.1:(\d+), metrics on http://127\.0\.0\.1:(\d+)/")
# How long an orderly end may take at most; a test fails then and never hangs.
PATIENCE_SECONDS = 40.0


class ServerProcess:
    """`python -m tenuto.serving.cli`, ready to serve."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        assert process.stdout is not None
        line = process.stdout.readline()
        match = _READY.search(line)
        assert match, f"instead of the ready line came {line!r}; log:\n{self.log}"
        self.port, self.metrics_port = int(match[1]), int(match[2])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @property
    def resident_bytes(self) -> int:
        words = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(words[1]) * os.sysconf("SC_PAGE_SIZE")

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as response:
            return str(response.read().decode())

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._process.send_signal(number)

    def exit_status(self) -> int:
        """Waits for the end."""
        return self._process.wait(PATIENCE_SECONDS)


@contextmanager
def server_process(repository: Path, folder: Path, **settings: object) -> Iterator[ServerProcess]:
    """A server on free ports; killed at the end if it still runs. Its log goes to a file in `folder`."""
    given = {"port": 0, "metrics_port": 0, "device": "cpu"} | settings
    if given.get("transport") == "relayed":  # as tests/integration/running.py names it
        given |= {"transport": "http2", "front_ends": 2}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "tenuto.serving.cli", str(repository), *flags]
    log = folder / "server.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            yield ServerProcess(process, log)
        finally:
            if process.poll() is None:
                process.kill()
