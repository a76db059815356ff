"""docs/operations.md cannot lie: its settings, metrics, endings and commands exist."""

import re
import subprocess
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

from tenuto import cli
from tenuto.serving.config import ServerConfig, flag_of
from tenuto.serving.sequence import Ending
from tenuto.serving.server import BROKEN, HUNG

from .test_readme import ROOT, TENUTO, problem, ready_line

PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def server() -> Iterator[re.Match[str]]:
    """A server on exported/, on free ports, whose models operators control; its ready line."""
    command = [TENUTO, "serve", "exported", "--port", "0", "--metrics-port", "0", "--model-control"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield ready_line(process.stdout.readline())
        finally:
            process.terminate()
        assert process.wait() == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists(command: str) -> None:
    assert problem(command) is None


FLAGS = re.compile(r"--[a-z]+(?:-[a-z]+)+")


def test_the_settings_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the server, or of the commands of a client."""
    with pytest.raises(SystemExit):
        cli.main(["models", "--help"])
    clients = set(FLAGS.findall(capsys.readouterr().out))
    named = set(FLAGS.findall(PAGE))
    assert named
    assert named - {flag_of(name) for name in ServerConfig.model_fields} - clients == set()


@pytest.mark.parametrize(
    "name, shown",
    [("checkpoint_every", "50"), ("drain_seconds", "30"), ("idle_seconds", "300"), ("run_seconds", "30"),
     ("max_age_seconds", "3,600"), ("poll_seconds", "2"), ("max_token_bytes", "1 MiB")],
)  # fmt: skip
def test_the_defaults_are_the_ones_shown(name: str, shown: str) -> None:
    assert f"`{flag_of(name)}` ({shown})" in PAGE or f"`{flag_of(name)}` chunks ({shown})" in PAGE
    value = float(getattr(ServerConfig(), name))
    assert value == (1 << 20 if shown == "1 MiB" else float(shown.replace(",", "")))


def test_every_ending_that_a_caller_may_see_is_explained() -> None:
    unseen = {"FAILED", "WINDOW_EXCEEDED"}  # errors of the client's own
    assert {e.name for e in Ending if not re.search(rf"\b{e.name}\b", PAGE)} <= unseen


def test_the_exit_statuses_are_the_ones_shown() -> None:
    assert f"| {HUNG} | a run did not return |" in PAGE
    assert f"| {BROKEN} | no run succeeds any more |" in PAGE


def test_the_metrics_exist(server: re.Match[str]) -> None:
    named = set(re.findall(r"`(tenuto_\w+)`", PAGE))
    with urlopen(server[2]) as response:
        families = set(re.findall(r"^# TYPE (\w+)", response.read().decode(), flags=re.MULTILINE))
    assert named
    assert named - families == set()


def test_the_commands_for_a_running_server_run(server: re.Match[str]) -> None:
    for command in [c for c in COMMANDS if not c.startswith("tenuto serve")]:
        words = [TENUTO, *command.split()[1:], "--server", server[1]]
        subprocess.run(words, capture_output=True, text=True, check=True)
