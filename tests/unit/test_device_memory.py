"""A GPU's memory by CUDA's own calls, and what they say where they fail. Here CUDA is a stand-in."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import pytest

from tenuto.serving.device_memory import CudaMemory, HostMemory, device_memory
from tenuto.serving.errors import RunFailed


class FakeCuda:
    """libcudart whose device is the host; `status` is what its calls return."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.status = 0
        self.blocks: dict[int, Any] = {}

    def cudaStreamCreateWithFlags(self, stream: Any, flags: int) -> int:
        stream._obj.value = 77
        self.log.append(("stream", flags))
        return self.status

    def cudaStreamDestroy(self, stream: Any) -> int:
        self.log.append(("destroy", stream.value))
        return 0

    def cudaHostAlloc(self, address: Any, nbytes: Any, flags: int) -> int:
        block = ctypes.create_string_buffer(nbytes.value)
        address._obj.value = ctypes.addressof(block)
        self.blocks[address._obj.value] = block
        return self.status

    def cudaFreeHost(self, address: Any) -> int:
        del self.blocks[address.value]
        return 0

    def cudaMemcpyAsync(self, to: Any, source: Any, nbytes: Any, kind: int, stream: Any) -> int:
        self.log.append(("copy", nbytes.value, kind, stream.value))
        ctypes.memmove(to.value, source.value, nbytes.value)
        return self.status

    def cudaStreamSynchronize(self, stream: Any) -> int:
        self.log.append(("wait", stream.value))
        return self.status

    def cudaGetLastError(self) -> int:
        self.log.append(("forget",))
        return self.status

    def cudaGetErrorString(self, status: int) -> bytes:
        return b"an illegal memory access was encountered"


def test_copies_and_runs_are_in_one_queue() -> None:
    cuda = FakeCuda()
    memory = CudaMemory(cuda)
    assert memory.provider_options == {"user_compute_stream": "77"}
    device = np.zeros((2, 3), np.float32)  # stands for the device's
    host, back = memory.staging((2, 3), "float32"), memory.staging((2, 3), np.float32)
    host[...] = np.arange(6).reshape(2, 3)
    memory.send(host, device.ctypes.data)
    memory.fetch(device.ctypes.data, back)
    memory.settle()
    np.testing.assert_array_equal(back, host)
    assert cuda.log == [("stream", 1), ("copy", 24, 1, 77), ("copy", 24, 2, 77), ("wait", 77)]


def test_staging_is_freed_with_the_last_array_upon_it_and_the_stream_with_its_memory() -> None:
    cuda = FakeCuda()
    memory = CudaMemory(cuda)
    array = memory.staging((4,), np.int64)
    part = array[1:]
    empty = memory.staging((0, 3), np.int64)
    assert (len(cuda.blocks), empty.shape) == (2, (0, 3))
    del array, empty
    gc.collect()
    assert len(cuda.blocks) == 1
    del part, memory
    gc.collect()
    assert not cuda.blocks
    assert cuda.log[-1] == ("destroy", 77)


@pytest.mark.parametrize("call", ["staging", "send", "fetch", "settle"])
def test_what_cuda_says_is_a_failed_run(call: str) -> None:
    cuda = FakeCuda()
    memory = CudaMemory(cuda)
    array = np.zeros(2, np.float32)
    cuda.status = 700
    calls: dict[str, Any] = {
        "staging": lambda: memory.staging((2,), np.float32),
        "send": lambda: memory.send(array, array.ctypes.data),
        "fetch": lambda: memory.fetch(array.ctypes.data, array),
        "settle": memory.settle,
    }
    with pytest.raises(RunFailed, match="CUDA: an illegal memory access"):
        calls[call]()
    assert cuda.log[-1] == ("forget",)  # or ONNX Runtime's next kernel would be blamed


def test_a_stream_that_cannot_be_made_is_told() -> None:
    cuda = FakeCuda()
    cuda.status = 2
    with pytest.raises(RunFailed, match="CUDA"):
        CudaMemory(cuda)


def test_the_hosts_memory_has_no_place_of_its_own() -> None:
    memory = device_memory(cuda=False)
    assert isinstance(memory, HostMemory)
    assert (memory.name, memory.place, memory.provider_options) == ("cpu", "", {})
