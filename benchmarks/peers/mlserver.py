"""MLServer 1.7, started from its wheel, for the benchmarks.

python -m benchmarks.peers.mlserver LSTM.onnx IMAGES.onnx

MLSERVER names a folder made so, with a Python below 3.13:

    pip install --target FOLDER mlserver==1.7.1 onnxruntime==1.31.1

One process, in which its handlers run; no access log and no metrics, which would cost more.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from . import launch

RUNTIMES = "benchmarks.peers.mlserver_model"
MAX_BATCH = 64
MAX_BATCH_SECONDS = 0.0002  # that a batch waits for others to join it, while it is not full
START = "from mlserver.cli import main; main()"


def write_models(folder: Path, lstm: Path, images: Path) -> None:
    """Writes the models as MLServer takes them."""
    for name, runtime, file in (("lstm", "Lstm", lstm), ("digits", "Digits", images)):
        (folder / name).mkdir(parents=True)
        model = {
            "name": name,
            "implementation": f"{RUNTIMES}.{runtime}",
            "max_batch_size": MAX_BATCH,
            "max_batch_time": MAX_BATCH_SECONDS,
            "parameters": {"uri": str(file.absolute())},
        }
        (folder / name / "model-settings.json").write_text(json.dumps(model))


def settings(grpc_port: int, http_port: int) -> str:
    """settings.json"""
    return json.dumps(
        {
            "host": "127.0.0.1",
            "grpc_port": grpc_port,
            "http_port": http_port,
            "metrics_endpoint": None,
            "debug": False,
            "parallel_workers": 0,
        }
    )


def main() -> None:
    lstm, images = map(Path, sys.argv[1:])
    installed = Path(os.environ["MLSERVER"]).absolute()
    with tempfile.TemporaryDirectory() as name:
        folder, (grpc_port, http_port) = Path(name), launch.free_ports(2)
        write_models(folder, lstm, images)
        (folder / "settings.json").write_text(settings(grpc_port, http_port))
        # Without `site`, which would put the packages of this environment beside its own.
        command = [sys.executable, "-S", "-c", START, "start", name]
        environment = os.environ | {"PYTHONPATH": f"{installed}:{launch.ROOT}"}
        ready = launch.Ready(grpc_port, f"http://127.0.0.1:{http_port}/v2/health/ready")
        launch.serve("mlserver", command, environment, ready)


if __name__ == "__main__":
    main()
