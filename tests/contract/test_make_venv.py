"""What stops `make` on an unfit machine is one line with a name, not a traceback."""

import builtins
import importlib.util
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_venv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / ".ci/make_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        module.check_this_python()
    assert stopped.value.code == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_this_machine_will_do(make_venv: ModuleType) -> None:
    make_venv.check_this_python()


@pytest.mark.parametrize(
    "system,machine,libc",
    [
        ("Windows", "AMD64", ""),
        ("Darwin", "x86_64", ""),
        ("Linux", "armv7l", "glibc"),
        ("Linux", "x86_64", ""),  # musl
    ],
)
def test_an_unsupported_platform_is_named(
    make_venv: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    system: str,
    machine: str,
    libc: str,
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    assert refusal(make_venv, capsys).startswith("error: UNSUPPORTED_PLATFORM: this ")


def test_an_old_python_is_named(
    make_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    line = refusal(make_venv, capsys)
    assert line.startswith("error: PYTHON_TOO_OLD: ")
    assert "needs 3.11 or newer" in line


def test_a_missing_venv_module_is_named_with_its_package(
    make_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = builtins.__import__

    def without_ensurepip(name: str, *rest: Any) -> Any:
        if name == "ensurepip":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_ensurepip)
    line = refusal(make_venv, capsys)
    assert line.startswith("error: VENV_MISSING: ")
    assert "apt-get install python3" in line
