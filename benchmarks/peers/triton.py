"""Triton, started from the binary in the wheel of nvidia-pytriton, for the benchmarks.

python -m benchmarks.peers.triton LSTM.onnx

PYTRITON names a folder made so, of the only Triton (2.51) that PyPI has, and a numpy that its backend knows:

    pip install --no-deps --target FOLDER nvidia-pytriton==0.7.0
    pip install --target FOLDER numpy==1.26.4 onnxruntime==1.31.1

Only the binary is used: without its Python front, which would cost more.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

MODEL = Path(__file__).with_name("triton_model.py")
CONFIGURATION = """
name: "lstm"
backend: "python"
max_batch_size: 64
input [{ name: "x" data_type: TYPE_FP32 dims: [ -1, 40 ] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [ -1, 12 ] }]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  oldest { max_candidate_sequences: 16384 }
}
instance_group [{ kind: KIND_CPU count: 1 }]
"""
READY_SECONDS = 60


def write_repository(folder: Path, lstm: Path) -> None:
    """Writes the model as Triton takes it."""
    version = folder / "lstm" / "1"
    version.mkdir(parents=True)
    (folder / "lstm" / "config.pbtxt").write_text(CONFIGURATION)
    shutil.copy(MODEL, version / "model.py")
    shutil.copy(lstm, version / "lstm.onnx")


def backends(wheel: Path, folder: Path) -> Path:
    """The backends with the stub of this Python, as pytriton itself would lay them out."""
    server = wheel / "pytriton" / "tritonserver"
    shutil.copytree(server / "backends", folder / "backends")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / "backends" / "python" / "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / python / stub.name, stub)
    stub.chmod(0o755)
    return folder / "backends"


def command(binary: Path, models: Path, backend: Path, ports: tuple[int, int]) -> list[str]:
    return [
        str(binary),
        f"--model-repository={models}",
        f"--backend-directory={backend}",
        f"--grpc-port={ports[0]}",
        f"--http-port={ports[1]}",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        "--http-address=127.0.0.1",
        # Without it 2.51 crashes under streams.
        "--grpc-infer-allocation-pool-size=1024",
    ]


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Raises: RuntimeError."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError("triton did not become ready; its own output says why")


def main() -> None:
    lstm, wheel = Path(sys.argv[1]), Path(os.environ["PYTRITON"])
    with tempfile.TemporaryDirectory() as name:
        folder, ports = Path(name), free_ports()
        write_repository(folder / "models", lstm)
        binary = folder / "tritonserver"
        shutil.copy(wheel / "pytriton" / "tritonserver" / "bin" / "tritonserver", binary)
        binary.chmod(0o755)
        libraries = [str(wheel / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
        environment = os.environ | {
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PEER_PACKAGES": str(wheel),
        }
        process = subprocess.Popen(
            command(binary, folder / "models", backends(wheel, folder), ports),
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        wait_until_ready(ports[1], process)
        print(f"serving on 127.0.0.1:{ports[0]}", flush=True)
        process.wait()


if __name__ == "__main__":
    main()
