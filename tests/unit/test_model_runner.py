"""What the runner loads, refuses and asks of the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tenuto.serving import model_runner
from tenuto.serving.errors import (
    ManifestInvalid,
    ModelInvalid,
    NotSupported,
    PlatformError,
    RunFailed,
)
from tenuto.serving.manifest import METADATA_KEY, Manifest
from tenuto.serving.model_runner import (
    CPU,
    CUDA,
    ModelRunner,
    available_cpus,
    choose_provider,
    flush_denormals,
)
from tests import toys

from .fakes import Array, f32

ROOT = Path(__file__).parents[2]


def create_runner(made: tuple[bytes, dict[str, Any]], *, own: bool = False, **changes: Any) -> ModelRunner:
    """A runner on the CPU; `own`: the manifest stands in the file, not beside it."""
    model, fields = made
    manifest = Manifest.model_validate(fields | changes)
    if own:
        proto = onnx.load_from_string(model)
        onnx.helper.set_model_props(proto, {METADATA_KEY: manifest.to_json()})
        model = proto.SerializeToString()
    return ModelRunner(model, None if own else manifest, "toy/1", provider=CPU, threads=1)


# Loading.


def test_the_bytes_of_the_file_are_not_kept() -> None:
    """As much memory again as the weights."""
    model, fields = toys.doubler()
    references = sys.getrefcount(model)
    runner = ModelRunner(model, Manifest.model_validate(fields), "toy/1", provider=CPU, threads=1)
    assert sys.getrefcount(model) == references
    assert runner.run({"x": f32([[1, 2]])})[0].tolist() == [[2, 4]]


@pytest.mark.parametrize("own", [False, True], ids=["beside", "inside"])
def test_a_model_runs_by_the_names_of_its_manifest(own: bool) -> None:
    runner = create_runner(toys.accumulator(), own=own)
    assert runner.manifest.name == "accumulator"
    x, total = f32([[1, 2]]), f32([[10]])
    y, new = runner.run({"x": x, "total": total, "lengths": np.array([2], np.int32)})
    assert (y.tolist(), new.tolist()) == ([[11, 13]], [[13]])


def test_bytes_that_are_no_model_are_refused_by_name() -> None:
    manifest = Manifest.model_validate(toys.doubler()[1])
    with pytest.raises(ModelInvalid, match="toy/1: ONNX Runtime does not load it") as caught:
        ModelRunner(b"no model", manifest, "toy/1", provider=CPU, threads=1)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_manifest_is_told_where_to_put_it() -> None:
    with pytest.raises(ModelInvalid, match="no 'tenuto.manifest' in the metadata and no manifest.json"):
        ModelRunner(toys.doubler()[0], None, "toy/1", provider=CPU, threads=1)


def test_a_manifest_that_disagrees_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match=r"input 'x' is \['batch', 2\] in the graph"):
        create_runner(toys.doubler(), inputs=[{"name": "x", "dtype": "float32", "shape": ["batch", 3]}])


Y = {"name": "y", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
NOT_YET: dict[str, tuple[dict[str, Any], str]] = {
    "an output without a batch axis": (
        {"outputs": [Y | {"shape": ["time"], "batch_axis": None, "time_axis": 0}]},
        "uses outputs without a batch_axis,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", NOT_YET.values(), ids=NOT_YET.keys())
def test_what_this_version_cannot_do_is_refused_never_ignored(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupported, match=message):
        create_runner(toys.accumulator(), **changes)


def test_an_output_without_a_batch_axis_is_refused_of_a_stateless_model_too() -> None:
    """Each row would get another slice of it."""
    y = {"name": "y", "dtype": "float32", "shape": [2], "batch_axis": None}
    with pytest.raises(NotSupported, match="outputs without a batch_axis"):
        create_runner(toys.doubler(), outputs=[y])


def test_a_failed_run_is_named_in_one_line() -> None:
    runner = create_runner(toys.lookup(checked=False))
    with pytest.raises(RunFailed, match="^toy/1: ") as caught:
        runner.run({"index": np.array([[9]], np.int64), "total": f32([[0]])})
    assert "\n" not in str(caught.value)


def test_a_provider_that_did_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself falls back to the CPU without an exception."""

    class Fallback:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def get_providers(self) -> list[str]:
            return [CPU]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallback)
    manifest = Manifest.model_validate(toys.doubler()[1])
    with pytest.raises(PlatformError, match=f"{CUDA} was chosen, ONNX Runtime took {CPU}"):
        ModelRunner(b"", manifest, "toy/1", provider=CUDA, threads=1)


@pytest.mark.parametrize(
    "stateful, own, threads, expected",
    [(True, False, 0, 1), (False, False, 0, 7), (False, True, 0, 7), (True, True, 0, 1), (True, False, 3, 3)],
)
def test_recurrent_models_get_one_thread_others_all_that_there_are(
    stateful: bool, own: bool, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "available_cpus", lambda: 7)
    model, fields = toys.accumulator() if stateful else toys.doubler()
    proto = onnx.load_from_string(model)
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(fields)})
    manifest = None if own else Manifest.model_validate(fields)
    runner = ModelRunner(proto.SerializeToString(), manifest, "t", provider=CPU, threads=threads)
    assert runner._session.get_session_options().intra_op_num_threads == expected


# A run on zeros.


CONSTANT_ARRAY = [{"name": "gain", "dtype": "float32", "value": 2.0, "shape": [2]}]


def gained_by_column() -> tuple[bytes, dict[str, Any]]:
    """Stateless: y = gain * x, the gain a constant of shape [2] that the manifest gives as one number."""
    nodes = [onnx.helper.make_node("Mul", ["x", "gain"], ["y"])]
    x, gain = toys.value("x", toys.FLOAT, "batch", 2), toys.value("gain", toys.FLOAT, 2)
    made = toys.model(nodes, [x, gain], [toys.value("y", toys.FLOAT, "batch", 2)])
    return made, toys.doubler()[1] | {"constants": CONSTANT_ARRAY}


@pytest.mark.parametrize(
    "made",
    [
        toys.accumulator(),
        toys.accumulator(ragged=False),
        toys.accumulator(x={"chunk": {"multiple": 4}, "left_context": 2}),
        toys.accumulator(fixed_batch=3),
        toys.doubler(fixed_batch=2),
        toys.brightness(),
        toys.lookup(),
        toys.gain(),
        gained_by_column(),
    ],
    ids=["ragged", "plain", "context", "fixed", "stateless", "image", "index", "constant", "constant array"],
)
def test_every_kind_of_model_runs_on_zeros(made: tuple[bytes, dict[str, Any]]) -> None:
    runner = create_runner(made)
    results = runner.run(runner.zero_feeds())
    assert len(results) == len(runner.manifest.outputs) + len(runner.manifest.states)
    rows = runner.manifest.fixed_batch or 1
    assert results[0].shape[0] == rows


def test_zeros_are_moved_into_a_range_without_zero() -> None:
    model, fields = toys.lookup()
    feeds = create_runner(
        (model, fields | {"inputs": [fields["inputs"][0] | {"range": [1, 3]}]})
    ).zero_feeds()
    assert feeds["index"].tolist() == [[1]]


# The machine.


def cgroup(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(quota: str, period: str = "100000") -> dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": quota + "\n", "cpu/cpu.cfs_period_us": period + "\n"}


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu.max": "nonsense\n"}, 8),
        (v1("300000"), 3),
        (v1("-1"), 8),
        (v1("50000"), 1),
        ({"cpu/cpu.cfs_quota_us": "300000"}, 8),
        ({"cpu.max": "max 100000"} | v1("300000"), 8),
    ],
    ids=["none", "v2 no limit", "v2", "v2 rounded up", "v2 below one", "v2 more than there are",
         "v2 unreadable", "v1", "v1 no limit", "v1 below one", "v1 half there", "v2 before v1"],
)  # fmt: skip
def test_cpus_are_those_of_the_cgroup_and_the_affinity(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cpus(cgroup(tmp_path, files)) == cpus


@pytest.mark.parametrize("quota, threads", [("300000 100000", 3), ("150000 100000", 2), ("50000 100000", 1)])
def test_the_threads_of_a_run_follow_the_quota_of_the_cgroup(
    quota: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model without state; one with state has one thread on any machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    root = cgroup(tmp_path, {"cpu.max": quota + "\n"})
    monkeypatch.setattr(model_runner, "available_cpus", lambda: available_cpus(root))
    for (model, fields), expected in ((toys.doubler(), threads), (toys.accumulator(), 1)):
        runner = ModelRunner(model, Manifest.model_validate(fields), "t", provider=CPU, threads=0)
        assert runner._session.get_session_options().intra_op_num_threads == expected


def test_this_machine_has_a_cpu() -> None:
    assert available_cpus() >= 1


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)


def test_the_cpu_is_taken_without_looking_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "_missing_for_cuda", lambda: pytest.fail("looked for CUDA"))
    assert choose_provider("cpu") == CPU


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("missing", ["libcuda.so.1", "libcublas.so.13", "libcudnn.so.9"])
def test_cuda_demanded_and_not_loadable_names_the_library(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(model_runner, "_loads", lambda name: name != missing)
    with pytest.raises(PlatformError, match=f"--device cuda.* but {missing} cannot be loaded"):
        choose_provider("cuda")
    with caplog.at_level("INFO"):
        assert choose_provider("auto") == CPU
    assert missing in caplog.text


def test_cuda_demanded_of_a_build_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(PlatformError, match="this build of onnxruntime has no CUDA provider"):
        choose_provider("cuda")


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_cuda_that_loads_is_taken_and_the_log_says_so(
    device: model_runner.Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(model_runner, "_loads", lambda _: True)
    with caplog.at_level("INFO"):
        assert choose_provider(device) == CUDA
    assert "running on CUDA" in caplog.text


flushes = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="x86-64 and glibc only"
)


@flushes
def test_denormals_are_zero_on_the_thread_that_asked_and_no_other() -> None:
    """Both as results (flush to zero) and as inputs (denormals are zero)."""
    denormal, small = np.full(8, 1e-40, np.float32), np.full(8, 1e-30, np.float32)

    def as_input() -> float:
        return float((denormal * np.float32(1e10)).max())

    def as_result() -> float:
        return float((small * np.float32(1e-10)).view(np.uint32).max())  # bits: a denormal input reads as 0

    found: list[float | bool] = []
    thread = threading.Thread(target=lambda: found.extend([flush_denormals(), as_input(), as_result()]))
    thread.start()
    thread.join()
    assert found == [True, 0.0, 0.0]
    assert as_input() > 0
    assert as_result() > 0


@flushes
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_denormals_are_zero_on_all_threads_of_a_run(threads: int) -> None:
    """Or a row's bits would depend on the thread that had it."""
    nodes = [onnx.helper.make_node("Mul", ["x", "x"], ["y"])]
    x, y = toys.value("x", toys.FLOAT, "batch", 2), toys.value("y", toys.FLOAT, "batch", 2)
    manifest = Manifest.model_validate(toys.doubler()[1])
    runner = ModelRunner(toys.model(nodes, [x], [y]), manifest, "t", provider=CPU, threads=threads)
    rows = np.full((1 << 20, 2), 1e-20, np.float32)  # enough for all threads; 1e-40 is denormal
    found: list[Array] = []

    def run() -> None:
        runner.enter_thread()
        found.extend(runner.run({"x": rows}))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert np.count_nonzero(found[0].view(np.uint32)) == 0


@flushes
def test_building_a_runner_leaves_its_thread_as_it_was() -> None:
    """In a process of its own: ONNX Runtime changes the thread that builds the first session."""
    program = (
        "import numpy as np; from tests import toys; from tests.unit.test_model_runner import create_runner; "
        "create_runner(toys.doubler()); x = np.full(8, 1e-30, np.float32); "
        "print((x * np.float32(1e-10)).view(np.uint32).max() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_a_platform_without_flushing_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not flush_denormals()
    runner = create_runner(toys.doubler())
    with caplog.at_level("INFO"):
        runner.enter_thread()
    assert "denormals are not flushed to zero on riscv64: they may be slow" in caplog.text
