"""What keeps a model, or the whole server, from starting, and what is said about it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import helper

from tenuto.serving import model_runner
from tenuto.serving import server as server_module
from tenuto.serving.errors import ConfigInvalid, ModelInvalid, PlatformError, TenutoError
from tenuto.serving.server import Server
from tenuto.v1 import tenuto_pb2 as pb
from tests import toys

from .running import build, engine_of, serving
from .wire import Conversation, array, connect, opening, refused, stub, tensor


def _write(root: Path, model: str, onnx: bytes, manifest: Any, version: int = 1) -> None:
    folder = root / model / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(onnx)
    if manifest is not None:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest | {"name": model})
        (folder / "manifest.json").write_text(text)


def _other_dtype(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"inputs": [manifest["inputs"][0] | {"dtype": "int32"}]}


def _never_runs() -> bytes:
    """Takes elements of a table that are beyond its end, whatever comes."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Add", ["shape", "nine"], ["beyond"]),
        helper.make_node("Gather", ["table", "beyond"], ["taken"]),
        helper.make_node("Add", ["x", "taken"], ["y"]),
    ]
    inputs = [toys.value("x", toys.FLOAT, "batch", 2)]
    outputs = [toys.value("y", toys.FLOAT, "batch", 2)]
    return toys.model(nodes, inputs, outputs, {"nine": np.array([9]), "table": np.ones(2, np.float32)})


# Per broken model, what the refusal says.
WHY: dict[str, tuple[str, ...]] = {
    "truncated": ("truncated/1", "ONNX Runtime does not load it"),
    "foreign": ("foreign/1", "ONNX Runtime does not load it"),
    "empty": ("empty/1", "ONNX Runtime does not load it"),
    "missing": ("missing/1", "model.onnx cannot be read", "No such file"),
    "unsaid": ("unsaid/1", "no 'tenuto.manifest' in the metadata", "no manifest.json", "write one"),
    "disagrees": (
        "disagrees/1",
        "disagrees with the graph",
        "input 'x' is float32 in the graph, int32 in the manifest",
    ),
    "nojson": ("nojson/1/manifest.json", "is no JSON"),
    "unknownkey": ("unknownkey/1/manifest.json", "color", "no such key"),
    "misnamed": ("misnamed/1", "the manifest is named 'other'", "must agree"),
    "generates": ("generates/1", "generate feeds output 'y' to input 'x'", "it needs a stateful model"),
    "fails": ("its run on zeros failed", "fails/1"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One model of each fault, checked by the real child process, beside one that works."""
    root = tmp_path_factory.mktemp("broken")
    onnx, manifest = toys.doubler()
    toys.write(root, "doubler", (onnx, manifest))
    _write(root, "truncated", onnx[: len(onnx) // 2], manifest)
    _write(root, "foreign", b"MZ\x90\x00 this is a program\n" * 40, manifest)
    _write(root, "empty", b"", manifest)
    _write(root, "missing", onnx, manifest)
    (root / "missing" / "1" / "model.onnx").unlink()
    _write(root, "unsaid", onnx, None)
    _write(root, "disagrees", onnx, _other_dtype(manifest))
    _write(root, "nojson", onnx, "{")
    _write(root, "unknownkey", onnx, manifest | {"color": "blue"})
    _write(root, "misnamed", onnx, json.dumps(manifest | {"name": "other"}))
    _write(
        root,
        "generates",
        onnx,
        manifest | {"generate": {"output": "y", "input": "x", "sampling": "bernoulli"}},
    )
    _write(root, "fails", _never_runs(), manifest)
    # Its newest version is broken, so the one before it serves.
    toys.write(root, "older", toys.doubler(), version=2)
    _write(root, "older", onnx[:50], manifest, version=10)
    with serving(root, vetted=True) as server:
        yield server


@pytest.fixture
def broken_channel(broken: Server) -> Iterator[grpc.Channel]:
    with connect(broken.port) as channel:
        yield channel


def test_models_that_work_serve_beside_those_that_do_not(broken_channel: grpc.Channel) -> None:
    request = pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])])
    assert array(stub(broken_channel).Predict(request).outputs[0]).tolist() == [[2, 4]]


@pytest.mark.parametrize("model", WHY)
def test_a_broken_model_is_not_ready_and_every_method_says_why(
    broken_channel: grpc.Channel, model: str
) -> None:
    api = stub(broken_channel)
    refusal = refused(api.Predict, pb.PredictRequest(model=model, inputs=[tensor([[1, 2]])]))
    with Conversation(broken_channel) as conversation:
        conversation.send(opening(model))
        failed = conversation.failed("MODEL_NOT_READY")
    got = api.GetModel(pb.GetModelRequest(model=model)).model
    listed = next(m for m in api.ListModels(pb.ListModelsRequest()).models if m.name == model)

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
    assert got == listed
    assert got.state == pb.Model.FAILED
    for text in (refusal.text, failed.message, got.why):
        for fragment in WHY[model]:
            assert fragment in text


def test_the_newest_version_that_works_serves(broken_channel: grpc.Channel, broken: Server) -> None:
    api = stub(broken_channel)
    request = pb.PredictRequest(model="older", inputs=[tensor([[1, 2]])])
    assert api.Predict(request).version == 2
    assert engine_of(broken, "older").version == 2
    older = [m for m in api.ListModels(pb.ListModelsRequest()).models if m.name == "older"]
    assert [(m.version, m.state) for m in older] == [(2, pb.Model.READY), (10, pb.Model.FAILED)]
    refusal = refused(api.Predict, pb.PredictRequest(model="older", version=10))
    assert refusal.reason == "MODEL_NOT_READY"


def test_a_server_without_a_single_model_that_works_does_not_start(tmp_path: Path) -> None:
    onnx, manifest = toys.doubler()
    _write(tmp_path, "unknownkey", onnx, manifest | {"color": "blue"})
    _write(tmp_path, "disagrees", onnx, _other_dtype(manifest))
    with pytest.raises(ModelInvalid) as error:
        build(tmp_path)
    for fragment in ("no model of", "unknownkey/1: ", "disagrees/1: "):
        assert fragment in str(error.value)


def test_an_empty_repository_and_one_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalid, match="holds no <model>/<version>/ folder"):
        build(tmp_path)
    with pytest.raises(ConfigInvalid, match="nowhere is no folder"):
        build(tmp_path / "nowhere")


@pytest.mark.parametrize("checked_before", [True, False])
def test_a_grpc_port_in_use_is_named(
    toy_repository: Path, monkeypatch: pytest.MonkeyPatch, checked_before: bool
) -> None:
    # Also by gRPC itself: without so_reuseport=0 it would share the port and take half the callers.
    if not checked_before:
        monkeypatch.setattr(server_module, "_check_port", lambda *_: None)
    with (
        serving(toy_repository) as first,
        pytest.raises(PlatformError, match=f"cannot listen on 127.0.0.1:{first.port}: .*--port"),
    ):
        build(toy_repository, port=first.port)


def test_a_metrics_port_in_use_is_named(toy_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PlatformError, match=f"127.0.0.1:{port}: .*--metrics-port"):
            build(toy_repository, metrics_port=port)


@pytest.fixture
def without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a driver and CUDA, and no cuDNN."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [model_runner.CUDA, "CPU"])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    monkeypatch.setattr(model_runner, "_loads", lambda library: not library.startswith("libcudnn"))


@pytest.mark.usefixtures("without_cudnn")
def test_cuda_demanded_and_not_loadable_is_refused_with_the_library_that_is_missing(
    toy_repository: Path,
) -> None:
    with pytest.raises(PlatformError, match="CUDA was demanded .*libcudnn.so.9 cannot be loaded"):
        build(toy_repository, device="cuda")


@pytest.mark.usefixtures("without_cudnn")
def test_cuda_not_demanded_and_not_loadable_falls_back_and_says_so(
    toy_repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with serving(toy_repository, device="auto") as server:
        assert server.provider == "CPUExecutionProvider"
    assert "running on the CPU: libcudnn.so.9 cannot be loaded" in caplog.text


def test_a_build_without_cuda_is_named(toy_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPU"])
    with pytest.raises(PlatformError, match="this build of onnxruntime has no CUDA provider"):
        build(toy_repository, device="cuda")


def test_onnx_runtime_taking_another_provider_than_chosen_is_refused(
    toy_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It does not raise: it falls back in silence.
    cpu_only = type("Session", (), {"get_providers": lambda _: ["CPUExecutionProvider"]})
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: cpu_only())
    with pytest.raises(TenutoError, match="CUDAExecutionProvider was chosen"):
        model_runner.ModelRunner(b"", None, "x/1", provider=model_runner.CUDA, threads=1)


ENDS_WHILE_IT_LOADS = """
import os, signal, sys, time
from tenuto.serving import cli, server
class Slow:
    def __init__(self, *_):
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
        time.sleep(60)
server.Server = Slow
cli.main([])
"""


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_models_are_loaded_ends_the_process(name: str, status: int) -> None:
    """By a handler: the first process of a container does not get signals that it does not handle."""
    ended = subprocess.run([sys.executable, "-c", ENDS_WHILE_IT_LOADS, name], timeout=50, capture_output=True)
    assert (ended.returncode, ended.stderr) == (status, b"")


@pytest.mark.parametrize("package", ["tenuto.serving.model_runner", "tenuto.training.stepper"])
def test_nothing_is_reported_to_the_makers_of_the_runtime(package: str, tmp_path: Path) -> None:
    """ONNX Runtime would keep an id of the machine in the home folder."""
    own = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    run = f"""
import {package}, onnxruntime
onnxruntime.InferenceSession("exported/digits-mlp/1/model.onnx", providers=["CPUExecutionProvider"])
"""
    subprocess.run(
        [sys.executable, "-c", run],
        env=own | {"HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=50,
    )
    assert not list(tmp_path.rglob("*onnxruntime*"))
