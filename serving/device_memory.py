"""Where a session's tensors lie, and how bytes get there and back: the host's memory, or a GPU's.

All copies of one session and its runs are queued one behind the other, so that a step waits once, at its end.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import RunFailed

Array = NDArray[Any]

_CUDART = "libcudart.so.13"
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking: it does not wait for what others have queued


class DeviceMemory(Protocol):
    """One model's. Addresses are those of ONNX Runtime's own values. The engine thread."""

    name: str  # as ONNX Runtime is told it
    place: str  # as ONNX Runtime tells where a tensor is wanted; empty: all of them are wanted on the host
    provider_options: dict[str, str]  # of the session whose runs are to be in the same queue

    def staging(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An array of the host's that is copied from and to. Raises: RunFailed, if there is no room."""

    def send(self, values: Array, address: int) -> None:
        """`values` are to be there before what is queued next. Raises: RunFailed."""

    def fetch(self, address: int, values: Array) -> None:
        """`values` are what is there after what was queued before. Raises: RunFailed."""

    def settle(self) -> None:
        """All that was queued is done. Raises: RunFailed."""


class HostMemory:
    """On a CPU nothing needs to be copied, and there is no queue."""

    name, place = "cpu", ""
    provider_options: dict[str, str]

    def __init__(self) -> None:
        self.provider_options = {}

    def staging(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def send(self, values: Array, address: int) -> None:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def fetch(self, address: int, values: Array) -> None:
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def settle(self) -> None:
        return


class CudaMemory:
    """A GPU's: one stream for copies and runs, and page-locked arrays, which the GPU reads by itself.

    Raises (when built): RunFailed, with CUDA's words; OSError where its library is missing.
    """

    name, place = "cuda", "Cuda"

    def __init__(self, library: Any = None) -> None:
        self._cuda = library or _runtime()
        stream = ctypes.c_void_p()
        self._check(self._cuda.cudaStreamCreateWithFlags(ctypes.byref(stream), _NON_BLOCKING))
        self._stream = stream
        weakref.finalize(self, self._cuda.cudaStreamDestroy, stream).atexit = False  # an engine may still run
        self.provider_options = {"user_compute_stream": str(stream.value or 0)}

    def staging(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        nbytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        address = ctypes.c_void_p()
        self._check(self._cuda.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(nbytes), 0))
        memory: Any = (ctypes.c_char * nbytes).from_address(address.value or 0)
        weakref.finalize(memory, self._cuda.cudaFreeHost, address).atexit = False
        return np.ndarray(shape, dtype, memory)

    def send(self, values: Array, address: int) -> None:
        self._copy(address, values.ctypes.data, values.nbytes, _TO_DEVICE)

    def fetch(self, address: int, values: Array) -> None:
        self._copy(values.ctypes.data, address, values.nbytes, _TO_HOST)

    def settle(self) -> None:
        self._check(self._cuda.cudaStreamSynchronize(self._stream))

    def _copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        pointers = ctypes.c_void_p(to), ctypes.c_void_p(source)
        self._check(self._cuda.cudaMemcpyAsync(*pointers, ctypes.c_size_t(nbytes), kind, self._stream))

    def _check(self, status: int) -> None:
        if status:
            self._cuda.cudaGetLastError()  # forgets it: ONNX Runtime would take it for its next kernel's
            raise RunFailed(f"CUDA: {self._cuda.cudaGetErrorString(status).decode(errors='replace')}")


def device_memory(cuda: bool) -> DeviceMemory:
    """Raises: RunFailed, OSError as `CudaMemory` does."""
    return CudaMemory() if cuda else HostMemory()


def _runtime() -> Any:
    library = ctypes.CDLL(_CUDART)
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library
