"""Writes the locks of the image anew: every wheel by version and SHA-256, as the package index lists them.

    make locks

The versions are those of constraints.txt, the packages those of pyproject.toml; `uv` reads both, and the
index's metadata alone, so that no wheel is downloaded and a lock for another machine can be made here. It is
run without its settings files and without pip's: wheels that were built locally have no place in a lock.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "deploy/image/locks"
# The image's Python. A lock lists the hashes of all wheels of a version, and so fits others too, as long as
# no package needs more there; `pip check` in the Dockerfile finds that out.
PYTHON = "3.11"
# Lock -> extras of pyproject.toml, platform in uv's words. For aarch64, ONNX Runtime has no CUDA wheels.
# Tracing is in all of them: whether to send spans is a setting of whoever runs the image.
SERVERS = {
    "cpu-x86_64": (("serving", "tracing"), "x86_64-manylinux_2_28"),
    "cpu-aarch64": (("serving", "tracing"), "aarch64-manylinux_2_28"),
    "cuda-x86_64": (("gpu", "tracing"), "x86_64-manylinux_2_28"),
}
# What builds Tenuto's own wheel: pure Python, and not in the image.
BUILD = "build"


def compile_lock(name: str, arguments: list[str], requirements: str | None = None) -> None:
    command = [sys.executable, "-m", "uv", "--no-config", "--quiet", "--system-certs", "pip", "compile"]
    command += ["--generate-hashes", "--no-annotate", "--python-version", PYTHON, "-c", "constraints.txt"]
    command += ["--custom-compile-command", "make locks", *arguments]
    text = subprocess.run(
        command, cwd=ROOT, input=requirements, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    (LOCKS / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"{name}: {len(re.findall('==', text))} packages")


def main() -> None:
    LOCKS.mkdir(exist_ok=True)
    for name, (extras, platform) in SERVERS.items():
        named = [word for extra in extras for word in ("--extra", extra)]
        compile_lock(name, ["pyproject.toml", *named, "--python-platform", platform])
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    compile_lock(BUILD, ["-"], "\n".join(pyproject["build-system"]["requires"]))


if __name__ == "__main__":
    main()
