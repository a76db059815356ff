"""Make a virtual environment and install into it, or say in one line why that cannot be done.

    python3 .ci/make_venv.py .venv -c constraints.txt -e '.[serving]'

The first argument is the folder, the rest goes to `pip install`. The Makefile calls this for every
environment. It uses no syntax that an old Python could not read, so that it can say that it is too old.
"""

import os
import platform
import struct
import subprocess
import sys

OLDEST = (3, 11)


def fail(reason, text):
    sys.stderr.write("error: %s: %s\n" % (reason, text))
    sys.exit(1)


def check_this_python():
    if sys.version_info < OLDEST:
        fail(
            "PYTHON_TOO_OLD",
            "%s is Python %s, and Tenuto needs %d.%d or newer; install one and name it: "
            "make PYTHON=python3.11 ..." % (sys.executable, platform.python_version(), OLDEST[0], OLDEST[1]),
        )
    system, machine, bits = platform.system(), platform.machine(), struct.calcsize("P") * 8
    # ONNX Runtime has no packages for the others.
    supported = {
        "Linux": ("x86_64", "aarch64"),
        "Darwin": ("arm64",),
    }
    if machine not in supported.get(system, ()) or bits != 64:
        fail(
            "UNSUPPORTED_PLATFORM",
            "this is %s on %s with a %d-bit Python; the server runs on 64-bit Linux (x86_64, aarch64) "
            "and macOS (arm64), the client (pip install tenuto) wherever grpcio does"
            % (system, machine, bits),
        )
    if system == "Linux" and platform.libc_ver()[0] != "glibc":
        fail(
            "UNSUPPORTED_PLATFORM",
            "this Linux has a C library other than glibc, for which ONNX Runtime has no packages",
        )
    for module in "venv", "ensurepip":
        try:
            __import__(module)
        except ImportError:
            fail(
                "VENV_MISSING",
                "%s has no module '%s'; on Debian and Ubuntu: apt-get install python%d.%d-venv"
                % ((sys.executable, module) + sys.version_info[:2]),
            )


def make(folder):
    """Make the environment; one of another Python version is made anew."""
    clear = []
    settings = os.path.join(folder, "pyvenv.cfg")
    if os.path.exists(settings):
        with open(settings) as file:
            versions = [line.split("=")[1].strip() for line in file if line.startswith("version")]
        if [version.split(".")[:2] for version in versions] != [
            [str(number) for number in sys.version_info[:2]]
        ]:
            clear = ["--clear"]
    if subprocess.call([sys.executable, "-m", "venv"] + clear + [folder]) != 0:
        fail(
            "VENV_FAILED",
            "%s -m venv %s failed; its own words are above" % (sys.executable, folder),
        )


def install(folder, arguments):
    python = os.path.join(folder, "bin", "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # The pip that a Python brings along may be too old for dependency groups.
    for what in ["--upgrade", "-c", "constraints.txt", "pip"], arguments:
        if subprocess.call(pip + what) != 0:
            fail("INSTALL_FAILED", "%s could not be filled; pip's own words are above" % folder)


if __name__ == "__main__":
    check_this_python()
    print("%s: installing %s" % (sys.argv[1], " ".join(sys.argv[2:])))
    sys.stdout.flush()
    make(sys.argv[1])
    install(sys.argv[1], sys.argv[2:])
