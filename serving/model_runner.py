"""Owns the ONNX Runtime session of one model: how it is built, what it runs on, and what a run needs."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .device_memory import DeviceMemory, device_memory
from .errors import ModelInvalid, NotSupported, PlatformError, RunFailed
from .kept_buffers import KeptBuffers
from .layout import Layout, one_a_row
from .manifest import METADATA_KEY, GraphTensor, Manifest
from .placement import RECORD, Placement

log = logging.getLogger("tenuto.model_runner")

Array = NDArray[Any]
Device = Literal["auto", "cpu", "cuda"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# What ONNX Runtime's CUDA provider loads, in the order in which people miss it.
_CUDA_LIBRARIES = ("libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13",
                   "libcurand.so.10", "libcufft.so.12", "libcudnn.so.9")  # fmt: skip

# How it says that it does not have an operator.
_UNKNOWN = re.compile(r"is not a registered function/op|No opset import for domain|No Op registered for")

_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool",
    **{t: t for t in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}  # fmt: skip


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: its affinity, and the cgroup's quota (version 2 or 1), rounded up."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return cpus
    if quota == "max" or int(quota) <= 0:
        return cpus
    return max(1, min(cpus, math.ceil(int(quota) / int(period))))


def choose_provider(device: Device) -> str:
    """The execution provider for `device`.

    Raises: PlatformError if CUDA is demanded and cannot be loaded, naming the first library that is missing.
    """
    if device == "cpu":
        return CPU
    missing = _missing_for_cuda()
    if not missing:
        log.info("running on CUDA")
        return CUDA
    if device == "cuda":
        raise PlatformError(
            f"CUDA was demanded (--device cuda) but {missing}; install the NVIDIA driver and "
            "'tenuto[gpu]', or use --device cpu"
        )
    log.info("running on the CPU: %s", missing)
    return CPU


def _missing_for_cuda() -> str:
    """Why CUDA cannot be used, or nothing. ONNX Runtime itself would fall back without an exception."""
    if CUDA not in onnxruntime.get_available_providers():
        return "this build of onnxruntime has no CUDA provider"
    if not _loads(_CUDA_LIBRARIES[0]):
        return f"{_CUDA_LIBRARIES[0]} cannot be loaded"
    onnxruntime.preload_dlls()
    absent = next((name for name in _CUDA_LIBRARIES if not _loads(name)), "")
    return f"{absent} cannot be loaded" if absent else ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


class ModelRunner:
    """One session. `threads` 0: one for models that hold state (two buy nothing under batch 128), else all
    CPUs that the process may use. `kept`: what it reads and writes stays where it is from run to run, and its
    rows should come in few numbers; then the next run overwrites the results of the one before.

    Raises (when built): ModelInvalid for bytes that are no model or that ONNX Runtime refuses,
    ManifestInvalid where manifest and graph disagree, PlatformError if CUDA was chosen and did not load.
    """

    pool = None  # its states come as feeds, and go as results

    def __init__(
        self,
        model: bytes,
        manifest: Manifest | None,
        where: str,
        *,
        provider: str,
        threads: int,
        kept: bool = False,
    ) -> None:
        self.where = where
        self.provider = provider
        self.kept = kept
        self._memory = device_memory(provider == CUDA) if kept else None
        self.threads = threads or (available_cpus() if manifest and not manifest.stateful else 1)
        self._session = session(model, where, provider, self.threads, _tf32(manifest), self._memory)
        self.manifest = manifest or self._own_manifest()
        self._build_again(model, threads, known=manifest is not None)
        self.placement = Placement.of(self._session)
        _check_supported(self.manifest, where)
        inputs = [_graph_tensor(t) for t in self._session.get_inputs()]
        outputs = [_graph_tensor(t) for t in self._session.get_outputs()]
        self.manifest.check_graph(inputs, outputs, where)
        self._names = [*self.manifest.fetched, *(s.output for s in self.manifest.states)]
        self._buffers = KeptBuffers(self._session, self._names, self._memory) if self._memory else None

    def _build_again(self, model: bytes, threads: int, known: bool) -> None:
        """Where the manifest came out of the session, and says that it should be another one."""
        more = not threads and not self.manifest.stateful and available_cpus() > 1
        tf32 = self.provider == CUDA and _tf32(self.manifest)
        if known or not (more or tf32):
            return
        self.threads = available_cpus() if more else self.threads
        self._session = session(model, self.where, self.provider, self.threads, tf32, self._memory)

    def _own_manifest(self) -> Manifest:
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if text is None:
            raise ModelInvalid(
                f"{self.where}: no {METADATA_KEY!r} in the metadata and no manifest.json beside the file; "
                "write one, see docs/manifest.md"
            )
        return Manifest.parse(text, self.where)

    @staticmethod
    def enter_thread() -> None:
        """Called on the thread that will run: denormal numbers are treated as zero there."""
        if not flush_denormals():
            log.info("denormals are not flushed to zero on %s: they may be slow", platform.machine())

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """What the manifest has `fetched`, then its states' outputs.

        Raises: RunFailed, with ONNX Runtime's text.
        """
        with failing(self.where):
            if self._buffers is not None:
                return self._buffers.run(feeds)
            results: list[Array] = self._session.run(self._names, feeds)
        return results

    def probe(self) -> None:
        """Runs `zero_feeds`, which ran when the model was checked.

        Raises: RunFailed.
        """
        self.run(self.zero_feeds())

    def zero_feeds(self) -> dict[str, Array]:
        """One batch of one row and one frame, all zero."""
        m, feeds = self.manifest, dict[str, Array]()
        rows = m.fixed_batch or 1
        for i in m.inputs:
            length = i.multiple + i.left_context
            axes = {i.batch_axis: rows, i.time_axis: length}
            low, high = i.range or (0, 0)
            value = min(max(0, low), high)  # zero, or the nearest that the range allows
            feeds[i.name] = np.full([int(axes.get(a, d)) for a, d in enumerate(i.shape)], value, i.dtype)
            if i.lengths:
                feeds[i.lengths] = np.full(rows, length, np.int32)
        for s in m.states:
            feeds[s.input] = np.zeros(
                [rows if a == s.batch_axis else int(d) for a, d in enumerate(s.shape)], s.dtype
            )
        for k in m.controls:
            feeds[k.name] = one_a_row(k, [], rows)
        return feeds | Layout(m).constants(())


@contextlib.contextmanager
def failing(where: str) -> Iterator[None]:
    """What ONNX Runtime raises in there is RunFailed."""
    try:
        yield
    except Exception as error:  # it has a class of its own for each status
        raise RunFailed(f"{where}: {str(error).splitlines()[0]}") from error


def session(
    model: bytes,
    where: str,
    provider: str,
    threads: int,
    tf32: bool = False,
    memory: DeviceMemory | None = None,
) -> onnxruntime.InferenceSession:
    """A session as all of this server's are. `tf32`: CUDA may round factors to 10 bits. `memory`: whose queue
    the runs are put into.

    Raises: ModelInvalid if ONNX Runtime refuses the model, PlatformError if it took another provider.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning costs 80 % more CPU at 512 streams and gains nothing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _libm():  # its own threads like the engine's, or a row's bits would depend on which of them has it
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry(RECORD, "1")
    options.log_severity_level = 4  # what it says of a run that failed quotes the input; it is raised as well
    cuda = {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "1" if tf32 else "0",  # on, if nothing is said
    } | (memory.provider_options if memory else {})
    providers: list[Any] = [(CUDA, cuda), CPU] if provider == CUDA else [CPU]
    try:
        with _environment_kept():  # the first session would change this thread's for good
            made = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # a class of its own for each status
        words = (str(error).splitlines() or [""])[0]
        if _UNKNOWN.search(words):
            words += "; there are ONNX's operators and ONNX Runtime's, and no others: export it with these"
        raise ModelInvalid(f"{where}: ONNX Runtime does not load it: {words}") from error
    # It keeps the file's bytes for a change of providers, as much again as the weights: 128 MiB of 128.
    made._model_bytes = None
    if made.get_providers()[0] != provider:
        raise PlatformError(f"{where}: {provider} was chosen, ONNX Runtime took {made.get_providers()[0]}")
    _check_names(made, where)
    return made


def _check_names(made: onnxruntime.InferenceSession, where: str) -> None:
    """Names of inputs and outputs stand in errors, answers and lines of the log.

    Raises: ModelInvalid.
    """
    try:
        names = [tensor.name for tensor in (*made.get_inputs(), *made.get_outputs())]
    except UnicodeDecodeError as error:
        raise ModelInvalid(f"{where}: the name of an input or output is no UTF-8: {error}") from error
    odd = [name[:64] for name in names if not name.isprintable()]
    if odd:
        raise ModelInvalid(
            f"{where}: the name {odd[0]!r} of an input or output holds characters that cannot be printed; "
            "rename it"
        )


def _tf32(manifest: Manifest | None) -> bool:
    return manifest is not None and manifest.precision == "tf32"


def _graph_tensor(node: Any) -> GraphTensor:
    inner = node.type.removeprefix("tensor(").removesuffix(")")
    return GraphTensor(node.name, _DTYPES.get(inner, inner), tuple(node.shape))


def _check_supported(manifest: Manifest, where: str) -> None:
    """What the vocabulary can say and this version cannot do yet is refused, never ignored."""
    lacking = []
    single = manifest.alone or manifest.fixed_batch == 1
    if any(o.batch_axis is None for o in manifest.outputs) and not single:
        lacking.append("outputs without a batch_axis")
    if lacking:
        raise NotSupported(
            f"{where}: the manifest uses {', '.join(lacking)}, which this version does not support"
        )


def flush_denormals() -> bool:
    """Sets flush-to-zero and denormals-are-zero for this thread; returns whether that is known here.

    Inputs of 2e-38 cost an LSTM 13 to 18 times the time otherwise. MXCSR's bits 15 (FTZ) and 6 (DAZ) do it.
    """
    libm = _libm()
    if libm is None:
        return False
    environment = _Environment()
    libm.fegetenv(environment)
    environment[7] |= 0x8040
    libm.fesetenv(environment)
    return True


_Environment = ctypes.c_uint32 * 8  # x86-64 with glibc: 28 bytes of x87 state, and then MXCSR


def _libm() -> ctypes.CDLL | None:
    """Where a thread's floating-point environment is read and set; None where its layout is not known."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libm.so.6")


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """This thread's floating-point environment is afterwards what it was before."""
    libm, environment = _libm(), _Environment()
    if libm:
        libm.fegetenv(environment)
    try:
        yield
    finally:
        if libm:
            libm.fesetenv(environment)
