"""The image's health check against servers that run: it needs no container, only the server's variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests import toys
from tests.faults.process import ServerProcess, server_process
from tests.integration.authority import DAY, Authority
from tests.integration.running import wait_for

HEALTH = Path(__file__).parents[2] / "deploy/image/health.py"
_SECONDS = 40.0
SERVICES = ("", "liveness", "readiness")


def check(port: int, *service: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Runs it as an engine does, with the variables of a server that listens on all addresses."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TENUTO_", "HEALTH_"))}
    given = {name.upper(): str(value) for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, str(HEALTH), *service],
        env=ours | {"TENUTO_HOST": "0.0.0.0", "TENUTO_PORT": str(port)} | given,
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
    )


def assert_healthy(port: int, *service: str, **settings: object) -> None:
    done = check(port, *service, **settings)
    assert (done.returncode, done.stdout) == (0, f"127.0.0.1:{port}: SERVING\n"), done.stderr


def assert_not(said: str, done: subprocess.CompletedProcess[str]) -> None:
    """It ended with 1, which is unhealthy, and said why; 2 is reserved by Docker."""
    assert done.returncode == 1, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    toys.write(folder, "accumulator", toys.accumulator())
    return folder


def of_server(files: Mapping[str, Path]) -> dict[str, Path]:
    """Flags as the check's variables."""
    return {f"tenuto_{name}": file for name, file in files.items()}


def test_a_server_in_plain_text_is_healthy(repository: Path, tmp_path: Path) -> None:
    """By every name that it answers to, and by none else."""
    with server_process(repository, tmp_path) as server:
        assert_healthy(server.port)
        for service in SERVICES:
            assert_healthy(server.port, service)
        assert_not("NOT_FOUND", check(server.port, "nonsense"))


def test_a_server_with_callers_is_healthy(repository: Path, tmp_path: Path) -> None:
    """The check has no token."""
    callers = tmp_path / "callers.toml"
    callers.write_text('[alice]\ntokens = ["' + "a" * 64 + '"]\n')
    with server_process(repository, tmp_path, callers=callers) as server:
        assert_healthy(server.port, "readiness", tenuto_callers=callers)


def test_a_server_with_tls_is_healthy(repository: Path, tmp_path: Path) -> None:
    """It trusts the server's own certificate, whoever signed that, and asks for nobody else's."""
    certificate, key = Authority("ours").sign().write(tmp_path)
    other, other_key = Authority("strangers").sign().write(tmp_path, "other")
    files = {"tls_cert": certificate, "tls_key": key}
    with server_process(repository, tmp_path, **files) as server:
        for service in SERVICES:
            assert_healthy(server.port, service, **of_server(files))
        assert_not("UNAVAILABLE", check(server.port))  # in plain text
        strange = {"tls_cert": other, "tls_key": other_key}
        assert_not("UNAVAILABLE", check(server.port, **of_server(strange)))


def test_a_server_whose_certificate_has_expired_is_not(repository: Path, tmp_path: Path) -> None:
    certificate, key = Authority("ours").sign(valid=-DAY).write(tmp_path)
    files = {"tls_cert": certificate, "tls_key": key}
    with server_process(repository, tmp_path, **files) as server:
        assert_not("UNAVAILABLE", check(server.port, **of_server(files)))


def test_a_server_that_wants_certificates_is_shown_its_own(repository: Path, tmp_path: Path) -> None:
    """Where its clients' authority is its own as well."""
    ours = Authority("ours")
    certificate, key = ours.sign().write(tmp_path)
    files = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": ours.write(tmp_path)}
    with server_process(repository, tmp_path, **files) as server:
        for service in SERVICES:
            assert_healthy(server.port, service, **of_server(files))


def test_a_server_that_wants_strangers_certificates_is_shown_one(repository: Path, tmp_path: Path) -> None:
    """The one that is named for that; without it the check is refused like anybody else."""
    strangers = Authority("strangers")
    certificate, key = Authority("ours").sign().write(tmp_path)
    shown, shown_key = strangers.sign("visitor").write(tmp_path, "visitor")
    files = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": strangers.write(tmp_path)}
    with server_process(repository, tmp_path, **files) as server:
        visitor = {"health_tls_cert": shown, "health_tls_key": shown_key}
        assert_healthy(server.port, **of_server(files), **visitor)
        assert_not("UNAVAILABLE", check(server.port, **of_server(files)))


def test_nobody_at_the_port_is_not_healthy() -> None:
    """A port that was free a moment ago, and where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        assert_not("UNAVAILABLE", check(taken.getsockname()[1]))


def test_a_server_that_is_gone_is_not_healthy(repository: Path, tmp_path: Path) -> None:
    with server_process(repository, tmp_path) as server:
        assert_healthy(server.port)
        server.terminate()
        assert server.exit_status() == 0
        assert_not("UNAVAILABLE", check(server.port))


def test_a_server_that_does_not_answer_is_not_healthy() -> None:
    """It is given up before the engine's own patience (10 s) ends."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert_not("DEADLINE_EXCEEDED", check(silent.getsockname()[1]))


def test_a_server_that_drains_lives_and_is_not_ready(repository: Path, tmp_path: Path) -> None:
    """Nobody restarts it for that, and nobody sends it anything new."""
    with server_process(repository, tmp_path, drain_notice_seconds=3600) as server:
        assert_healthy(server.port, "readiness")
        server.terminate()
        wait_for(lambda: not is_ready(server), "the end of readiness")
        assert_not("NOT_SERVING", check(server.port, "readiness"))
        assert_healthy(server.port, "liveness")
        assert_healthy(server.port)  # what the image asks for


def is_ready(server: ServerProcess) -> bool:
    """By its other port."""
    try:
        with urlopen(f"http://127.0.0.1:{server.metrics_port}/readyz", timeout=30):
            return True
    except HTTPError as refused:
        with refused:
            return refused.code != 503
