"""Sets the peers up from PyPI, each in a folder of its own, as their modules say.

python -m benchmarks.peers.setup FOLDER

What is there already stays as it is. Java is Debian's, see torchserve.py.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import suites

ANALYZER = "perf_analyzer"  # no server, but a load generator


@dataclass(frozen=True, slots=True)
class Peer:
    variable: str  # that names its folder
    installs: tuple[str, ...]  # what pip is told, one run after the other
    program: str = ""  # it needs that as well


PEERS = {
    suites.TRITON: Peer(
        "PYTRITON", ("--no-deps nvidia-pytriton==0.7.0", "numpy==1.26.4 onnxruntime==1.31.1")
    ),
    suites.TORCHSERVE: Peer("TORCHSERVE", ("torchserve==0.12.0 PyYAML==6.0.3",), "java"),
    suites.MLSERVER: Peer("MLSERVER", ("mlserver==1.7.1 onnxruntime==1.31.1",)),
    ANALYZER: Peer("PERF_ANALYZER", ("--no-deps tritonclient==2.51.0 nvidia-cuda-runtime-cu12==12.9.79",)),
}


def find(folder: Path | None) -> list[str]:
    """The peers that can be started: those whose variable is set, which those in the folder get."""
    for name, peer in PEERS.items():
        if folder is not None and (folder / name).is_dir():
            os.environ.setdefault(peer.variable, str((folder / name).absolute()))
    return [
        name
        for name, peer in PEERS.items()
        if peer.variable in os.environ and (not peer.program or shutil.which(peer.program))
    ]


def install(folder: Path, names: Iterable[str] = PEERS) -> None:
    for name in names:
        if not (folder / name).exists():
            unfinished = folder / f"{name}.part"
            shutil.rmtree(unfinished, ignore_errors=True)
            for words in PEERS[name].installs:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts"]
                subprocess.run([*pip, "--target", str(unfinished), *words.split()], check=True)
            unfinished.rename(folder / name)
        print(f"{PEERS[name].variable}={(folder / name).absolute()}", flush=True)
        if (program := PEERS[name].program) and not shutil.which(program):
            print(f"{name} needs {program} as well", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    install(Path(sys.argv[1]))
