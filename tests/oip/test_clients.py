"""NVIDIA's clients of the Open Inference Protocol, as they are, against our server.

Each in an environment and a process of its own (talk.py): protobuf lets no process have the messages of both.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenuto.serving.server import Server
from tests.integration.running import TRANSPORTS, assert_nothing_is_left, engine_of, serving, write_toys

ROOT = Path(__file__).parents[2]
CLIENTS = {"2.73": "triton", "2.51": "triton-old"}
_SECONDS = 120


def environment(name: str) -> Path:
    """The folder of that environment, made at its first use."""
    made = subprocess.run(
        ["make", "-s", f".venv-{name}/.stamp"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    if made.returncode:
        pytest.skip(f"tritonclient is not to be had here: {made.stderr.strip().splitlines()[-1:]}")
    return ROOT / f".venv-{name}"


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Path:
    return environment(CLIENTS[request.param])


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    toys = write_toys(tmp_path_factory.mktemp("toys"))
    with serving(toys, transport=request.param, shared_memory="/", model_control=True) as server:
        yield server
        assert_nothing_is_left(server)


@pytest.fixture
def talk(client: Path, server: Server) -> Any:
    def run(scenario: str) -> Any:
        python, script = client / "bin/python", Path(__file__).with_name("talk.py")
        command = [str(python), str(script), scenario, address(server)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def address(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


def test_batches_and_descriptions(talk: Any) -> None:
    said = talk("batch")
    index = said.pop("index")
    assert {"doubler", "accumulator", "brightness"} <= set(index)
    assert said == {
        "ready": [True, True, False],
        "answer": [[2, 4], [6, 8]],
        "id": "7",
        "zipped": [[2, 4]],
        "classes": ["4.000000:1"],
        "metadata": ["-1", "-1"],
        "config": 64,
        "statistics": True,
    }


def test_errors_are_those_that_clients_match(talk: Any) -> None:
    unknown = "Request for unknown model: "
    assert talk("errors") == [
        ["StatusCode.NOT_FOUND", f"{unknown}'nobody' is not found"],
        ["StatusCode.NOT_FOUND", f"{unknown}'doubler' version 9 is not found"],
        [
            "StatusCode.INVALID_ARGUMENT",
            "unexpected shape for input 'x' for model 'doubler'. Expected [-1,2], got [1,3].",
        ],
        ["StatusCode.INVALID_ARGUMENT", "unexpected inference input 'z' for model 'doubler'"],
        [
            "StatusCode.INVALID_ARGUMENT",
            ("inference request to model 'accumulator' must specify a non-zero or non-empty correlation ID"),
        ],
        [
            "StatusCode.INVALID_ARGUMENT",
            (
                "inference request for sequence 5 to model 'accumulator' must specify the START flag on the "
                "first request of the sequence"
            ),
        ],
    ]


def test_sequences_by_unary_calls(talk: Any) -> None:
    assert talk("sequences") == [1, 10, 3, 30, 6, 60]


def test_sequences_on_a_stream(talk: Any) -> None:
    assert talk("stream") == [
        ["7-1", 7], ["8-1", 8], ["7-2", 21], ["8-2", 24], ["7-3", 42], ["8-3", 48],
        "Request for unknown model: 'nobody' is not found",
        ["anonymous", 5],
    ]  # fmt: skip


def test_asynchronous_calls(talk: Any) -> None:
    assert talk("asynchronous") == [2.0 * n for n in range(20)]
    assert talk("aio") == [[[2, 4]], [1, 3, 6]]


def test_shared_memory(talk: Any) -> None:
    assert talk("memory") == [[[2, 4]], ["in", "out"]]


def test_the_example_of_the_docs(client: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/oip.md").read_text(), re.DOTALL)
    with serving(ROOT / "exported") as server:
        script = tmp_path / "example.py"
        script.write_text(example.replace("127.0.0.1:8001", address(server)))
        command = [str(client / "bin/python"), str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    assert (done.returncode, done.stdout) == (0, "(1, 10, 10)\n"), done.stderr


def test_loading_and_unloading(talk: Any) -> None:
    assert talk("control") == [False, True]


# -- perf_analyzer ---------------------------------------------------------------------------------

# Few and short windows: enough to see that it works, and not what it costs.
SHORT = ["-s", "999", "--max-trials", "3", "-p", "500"]
BATCHES = ["-m", "doubler", "--input-data", "zero"]
SEQUENCES = ["-m", "accumulator", "--shape", "x:4", "--input-data", "zero", "--sequence-length", "10"]
MEMORY = ["--shared-memory", "system", "--output-shared-memory-size", "4096"]
LOADS = {
    "unary": [*BATCHES, "--concurrency-range", "2"],
    "async": [*BATCHES, "--async", "-b", "4", "--concurrency-range", "4"],
    "streaming": [*BATCHES, "--async", "--streaming", "--concurrency-range", "4"],
    "unary sequences": [*SEQUENCES, "--concurrency-range", "2"],
    "streamed sequences": [*SEQUENCES, "--async", "--streaming", "--concurrency-range", "4"],
    "shared memory": [*BATCHES, *MEMORY, "--concurrency-range", "2"],
    "sequences in shared memory": [*SEQUENCES, *MEMORY, "--async", "--streaming"],
}


@pytest.fixture(scope="module")
def analyzer() -> tuple[list[str], dict[str, str]]:
    """perf_analyzer of the older client, and the libraries that it looks for."""
    folder = environment("triton-old")
    libraries = [str(found.parent) for found in folder.rglob("libcudart.so.12")]
    if not libraries:
        pytest.skip("nvidia-cuda-runtime-cu12 is not to be had here")
    if not _has_b64():
        libraries += _b64(folder)
    return [str(folder / "bin/perf_analyzer")], os.environ | {"LD_LIBRARY_PATH": ":".join(libraries)}


def _has_b64() -> bool:
    return any(Path(root).rglob("libb64.so.0d") for root in ("/lib", "/usr/lib"))


def _b64(folder: Path) -> list[str]:
    """Debian's libb64, unpacked, where it is not installed."""
    target = folder / "b64"
    target.mkdir(exist_ok=True)
    for command in (["apt-get", "download", "libb64-0d"], ["sh", "-c", "dpkg -x libb64-0d*.deb ."]):
        try:
            done = subprocess.run(command, cwd=target, capture_output=True, text=True, timeout=_SECONDS)
        except FileNotFoundError:
            pytest.skip("perf_analyzer needs Debian's libb64-0d")
        if done.returncode:
            pytest.skip(f"perf_analyzer needs Debian's libb64-0d: {done.stderr.strip()}")
    return [str(found.parent) for found in target.rglob("libb64.so.0d")]


@pytest.mark.parametrize("load", LOADS)
def test_perf_analyzer_measures_us(
    analyzer: tuple[list[str], dict[str, str]], server: Server, load: str
) -> None:
    command, variables = analyzer
    model = LOADS[load][1]
    before = engine_of(server, model).metrics.chunks["answered"]
    done = subprocess.run(
        [*command, "-i", "grpc", "-u", address(server), *SHORT, *LOADS[load]],
        env=variables,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    throughput = re.search(r"Throughput: ([\d.]+) infer/sec", done.stdout)
    assert throughput is not None
    assert float(throughput[1]) > 0
    assert "failed" not in done.stdout.lower()
    assert engine_of(server, model).metrics.chunks["answered"] > before + 50
