"""Triton, started from the binary in the wheel of nvidia-pytriton, for the benchmarks.

python -m benchmarks.peers.triton LSTM.onnx IMAGES.onnx

PYTRITON names a folder made so, of the only Triton (2.51) that PyPI has, and a numpy that its backend knows:

    pip install --no-deps --target FOLDER nvidia-pytriton==0.7.0
    pip install --target FOLDER numpy==1.26.4 onnxruntime==1.31.1

Only the binary is used: without its Python front, which would cost more.
"""

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from . import launch

HERE = Path(__file__).parent
LSTM = """
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
IMAGES = """
name: "digits"
backend: "python"
max_batch_size: 64
input [{ name: "image" data_type: TYPE_FP32 dims: [ 28, 28 ] }]
output [{ name: "log_probabilities" data_type: TYPE_FP32 dims: [ 10 ] }]
dynamic_batching { }
instance_group [{ kind: KIND_CPU count: 1 }]
"""


def write_repository(folder: Path, lstm: Path, images: Path) -> None:
    """Writes the models as Triton takes them."""
    for name, configuration, code, file in (
        ("lstm", LSTM, "triton_model.py", lstm),
        ("digits", IMAGES, "triton_images.py", images),
    ):
        version = folder / name / "1"
        version.mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(configuration)
        shutil.copy(HERE / code, version / "model.py")
        shutil.copy(file, version / "model.onnx")


def backends(wheel: Path, folder: Path) -> Path:
    """The backends with the stub of this Python, as pytriton itself would lay them out."""
    server = wheel / "pytriton" / "tritonserver"
    shutil.copytree(server / "backends", folder / "backends")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / "backends" / "python" / "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / python / stub.name, stub)
    stub.chmod(0o755)
    return folder / "backends"


def command(binary: Path, models: Path, backend: Path, grpc_port: int, http_port: int) -> list[str]:
    return [
        str(binary),
        f"--model-repository={models}",
        f"--backend-directory={backend}",
        f"--grpc-port={grpc_port}",
        f"--http-port={http_port}",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        "--http-address=127.0.0.1",
        # Without it 2.51 crashes under streams.
        "--grpc-infer-allocation-pool-size=1024",
    ]


def main() -> None:
    lstm, images = map(Path, sys.argv[1:])
    wheel = Path(os.environ["PYTRITON"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_repository(folder / "models", lstm, images)
        binary = folder / "tritonserver"
        shutil.copy(wheel / "pytriton" / "tritonserver" / "bin" / "tritonserver", binary)
        binary.chmod(0o755)
        libraries = [str(wheel / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
        environment = os.environ | {
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PEER_PACKAGES": str(wheel),
            "PEER_ROOT": str(launch.ROOT),
        }
        grpc_port, http_port = launch.free_ports(2)
        words = command(binary, folder / "models", backends(wheel, folder), grpc_port, http_port)
        ready = launch.Ready(grpc_port, f"http://127.0.0.1:{http_port}/v2/health/ready")
        launch.serve("triton", words, environment, ready)


if __name__ == "__main__":
    main()
