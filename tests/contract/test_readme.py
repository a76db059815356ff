"""The README cannot lie: its Python runs, its commands exist, its links lead somewhere."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TENUTO = str(Path(sys.executable).parent / "tenuto")  # the command as users type it

ADDRESS = "127.0.0.1:8001"  # the one that the README uses
READY = re.compile(r"tenuto serving on (\S+), metrics on (\S+), (\w+): (.+)")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def ready_line(output: str) -> re.Match[str]:
    found = READY.search(output)
    assert found, f"no ready line in {output!r}"
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[re.Match[str]]:
    """A server on exported/, as in the README, but on free ports; the ready line that it printed."""
    command = [TENUTO, "serve", "exported", "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield ready_line(process.stdout.readline())
        finally:
            process.terminate()
        assert process.wait() == 0


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_runs(number: int, server: re.Match[str], capsys: pytest.CaptureFixture[str]) -> None:
    source = blocks("python")[number]
    assert ADDRESS in source
    code = compile(source.replace(ADDRESS, server[1]), f"README.md, block {number + 1}", "exec")
    exec(code, {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_the_ready_line_is_the_one_shown(server: re.Match[str]) -> None:
    def shape(line: str) -> str:
        return re.sub(r":\d+", ":PORT", line.replace(" sentiment/1", ""))  # there if it was trained here

    assert shape(ready_line(README)[0]) == shape(server[0].strip())


def test_the_commands_for_a_running_server_run(server: re.Match[str]) -> None:
    assert "tenuto models" in commands()
    listed = subprocess.run(
        [TENUTO, "models", "--server", server[1]], capture_output=True, text=True, check=True
    )
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [
        [model, "READY"] for model in server[4].split()
    ]


def test_the_metrics_exist(server: re.Match[str]) -> None:
    named = set(re.findall(r"`(tenuto_\w+)`", README))
    with urlopen(server[2]) as response:
        page = response.read().decode()
    families = set(re.findall(r"^# TYPE (\w+)", page, flags=re.MULTILINE))
    assert named
    assert named - families == set()


def problem(command: str) -> str | None:
    """What is wrong with a command line of the README, or None. Runs nothing but --help."""
    words = command.split()
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
        missing = set(words[1:]) - targets
        return f"no target {missing}" if missing else None
    if words[:2] == ["pip", "install"]:
        found = re.fullmatch(r"'?tenuto(?:\[([a-z,]+)\])?'?", words[2])
        extras = set((found[1] or "").split(",")) - {""} if found else {words[2]}
        missing = extras - set(PYPROJECT["project"]["optional-dependencies"])
        return f"nothing to install called {missing}" if missing else None
    if words[0] == "tenuto":
        subcommand = [word for word in words[1:2] if not word.startswith("-")]
        done = subprocess.run(
            [TENUTO, *subcommand, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
        )
        if done.returncode != 0:
            return f"it says {done.stderr}"
        unknown = {word for word in words if word.startswith("--") and word not in done.stdout}
        return f"no option {unknown}" if unknown else None
    return "not one of make, pip install, tenuto"


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_a_command_exists(command: str) -> None:
    assert problem(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "make coffee",
        "pip install 'tenuto[cuda]'",
        "pip install tenutoo",
        "tenuto brew exported",
        "tenuto serve exported --prot 8001",
        "rm -rf exported",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    assert problem(command) is not None


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert "make test" in commands()
    assert "make test" in script


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_model_of_the_table_is_there() -> None:
    named = re.findall(r"^\| `([a-z-]+)` \|", README, flags=re.MULTILINE)
    cards = [*ROOT.glob("exported/*/1/MODEL_CARD.md"), *ROOT.glob("exported/not-passed-on/*/MODEL_CARD.md")]
    found = {str(card.parent.relative_to(ROOT / "exported")).removesuffix("/1") for card in cards}
    assert {name.removeprefix("not-passed-on/") for name in found} == set(named)
