"""TorchServe 0.12, started from the wheel, for the benchmarks.

python -m benchmarks.peers.torchserve lstm LSTM.onnx
python -m benchmarks.peers.torchserve digits IMAGES.onnx

TORCHSERVE names a folder made so, and `java` is Debian's:

    pip install --target FOLDER torchserve==0.12.0 PyYAML==6.0.3
    apt-get install --no-install-recommends openjdk-17-jre-headless

PyTorch, which its worker imports and the handler leaves alone, numpy and ONNX Runtime are those of the
environment that runs the benchmarks. It writes no logs and no metrics, which would cost more.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from . import launch

HANDLER = "benchmarks.peers.torchserve_handler"
# A batch that could grow waits, a millisecond at least.
WORKER = """
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 1
"""
IMAGES = f"{WORKER}batchSize: 64\n"
# A sequence takes a thread while it is silent, and there are as many as a batch may hold. It ends by its idle
# limit alone.
LSTM = f"""{WORKER}batchSize: 256
sequenceBatching: true
sequenceMaxIdleMSec: 1000
maxNumSequence: 16384
maxSequenceJobQueueSize: 4
"""
CONFIGURATIONS = {"lstm": LSTM, "digits": IMAGES}
LOGS = """
<Configuration><Loggers><Root level="off"/></Loggers></Configuration>
"""


def write_store(folder: Path, name: str, file: Path) -> None:
    """Writes the model as TorchServe takes it without an archive."""
    inside = folder / name / "MAR-INF"
    inside.mkdir(parents=True)
    model = {
        "modelName": name,
        "modelVersion": "1.0",
        "handler": f"{HANDLER}:{name}",
        "configFile": "model-config.yaml",
    }
    manifest = {"runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    (inside / "MANIFEST.json").write_text(json.dumps(manifest))
    (folder / name / "model-config.yaml").write_text(CONFIGURATIONS[name])
    (folder / name / "model.onnx").symlink_to(file.absolute())


def properties(ports: list[int]) -> str:
    """config.properties; the first port serves predictions by gRPC, the fourth describes models."""
    lines = {
        "grpc_inference_address": "127.0.0.1",
        "grpc_management_address": "127.0.0.1",
        "grpc_inference_port": ports[0],
        "grpc_management_port": ports[1],
        "inference_address": f"http://127.0.0.1:{ports[2]}",
        "management_address": f"http://127.0.0.1:{ports[3]}",
        "metrics_address": f"http://127.0.0.1:{ports[4]}",
        "job_queue_size": 16384,
        "enable_metrics_api": "false",
        "disable_system_metrics": "true",
        "disable_token_authorization": "true",
    }
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def command(installed: Path, folder: Path, model: str) -> list[str]:
    """Without its launcher, which leaves Java behind when it is ended."""
    return [
        "java",
        f"-Dmodel_server_home={installed}",
        f"-Djava.io.tmpdir={folder}",  # for the sockets of its workers
        f"-Dlog4j.configurationFile=file://{folder / 'log4j2.xml'}",
        *("-cp", f"{installed}/ts/frontend/*", "org.pytorch.serve.ModelServer"),
        *("--python", sys.executable),
        *("-f", str(folder / "config.properties")),
        *("-s", str(folder / "models")),
        *("-ncs", "-m", f"{model}={model}"),
    ]


def main() -> None:
    model, file = sys.argv[1:]
    installed = Path(os.environ["TORCHSERVE"]).absolute()
    with tempfile.TemporaryDirectory() as name:
        folder, ports = Path(name), launch.free_ports(5)
        write_store(folder / "models", model, Path(file))
        (folder / "config.properties").write_text(properties(ports))
        (folder / "log4j2.xml").write_text(LOGS)
        environment = os.environ | {
            "PYTHONPATH": f"{installed}:{launch.ROOT}",
            "LOG_LOCATION": name,
            "METRICS_LOCATION": name,
        }
        # Healthy it calls itself before its worker is.
        ready = launch.Ready(ports[0], f"http://127.0.0.1:{ports[3]}/models/{model}", '"status": "READY"')
        launch.serve("torchserve", command(installed, folder, model), environment, ready)


if __name__ == "__main__":
    main()
