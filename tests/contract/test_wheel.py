"""What lands in other people's environments is `tenuto` alone, with everything that it needs."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INFO = f"tenuto-{PYPROJECT['project']['version']}.dist-info"


def build(source: Path, target: str, folder: Path) -> Path:
    """Build with the backend itself: nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def headers(wheel: Path) -> Message:
    return HeaderParser().parsestr(contents(wheel)[f"{INFO}/METADATA"].decode())


def test_a_wheel_holds_one_top_level_name(wheel: Path) -> None:
    assert {name.split("/")[0] for name in contents(wheel)} == {"tenuto", INFO}


def test_a_wheel_holds_every_source_under_its_import_name(wheel: Path) -> None:
    names = set(contents(wheel))
    sources = {
        (Path("tenuto") / path.relative_to(ROOT)).as_posix()
        for folder in ("serving", "training")
        for path in (ROOT / folder).rglob("*.py")
    } | {path.relative_to(ROOT).as_posix() for path in (ROOT / "tenuto").glob("*.py")}
    assert sources <= names
    assert {"tenuto/py.typed", "tenuto/v1/tenuto_pb2.py", "tenuto/v1/tenuto_pb2.pyi"} <= names


def test_a_wheel_holds_no_models_and_no_caches(wheel: Path) -> None:
    unwanted = (".onnx", ".npz", ".pyc", ".pt", ".part")
    assert [name for name in contents(wheel) if name.endswith(unwanted)] == []


def test_a_wheel_built_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / sdist.name.removesuffix(".tar.gz"), "wheel", tmp_path / "again")
    assert contents(again) == contents(wheel)


def test_the_base_dependencies_are_the_clients(wheel: Path) -> None:
    metadata = headers(wheel)
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    base = {needed.name for needed in requirements if "extra ==" not in str(needed.marker)}
    assert base == {"grpcio", "numpy", "protobuf"}
    extras = {"serving", "gpu", "tracing", "training", "diagnosis", "demo", "midi"}
    assert set(metadata.get_all("Provides-Extra") or []) == extras
    assert b"tenuto = tenuto.cli:main" in contents(wheel)[f"{INFO}/entry_points.txt"]


def test_onnxruntime_comes_once_by_platform(wheel: Path) -> None:
    """Both distributions install the folder `onnxruntime`: whichever came last would win."""
    requirements = [Requirement(line) for line in headers(wheel).get_all("Requires-Dist") or []]
    for platform, machine, expected in [
        ("linux", "x86_64", {"onnxruntime-gpu"}),
        ("linux", "aarch64", {"onnxruntime"}),
        ("darwin", "arm64", {"onnxruntime"}),
    ]:
        environment = {"sys_platform": platform, "platform_machine": machine, "extra": "serving"}
        names = {
            requirement.name
            for requirement in requirements
            if requirement.name.startswith("onnxruntime")
            and requirement.marker is not None
            and requirement.marker.evaluate(environment)
        }
        assert names == expected, (platform, machine)
