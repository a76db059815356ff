"""Several processes that train one network: `torchrun --nproc-per-node 2 -m tenuto.cli train TASK`.

Each process draws the same batches and takes its part of every one; gradients are averaged before each
step, so that all hold the same weights. Without torchrun there is one process, and nothing here does
anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .task import Batch


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """Return this process's rows; a batch with fewer rows than processes goes to each whole."""
        if len(batch[0]) < self.count:
            return batch
        return tuple(tensor[self.rank :: self.count] for tensor in batch)

    def average_gradients(self, network: nn.Module) -> None:
        """Replace each gradient by its mean over the processes."""
        self._average([p.grad for p in network.parameters() if p.grad is not None])

    def average_buffers(self, network: nn.Module) -> None:
        """Make floating-point buffers, such as the statistics of batch normalisation, the same everywhere."""
        self._average([buffer for buffer in network.buffers() if buffer.is_floating_point()])

    def _average(self, tensors: list[Tensor]) -> None:
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.count).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started beside this one, and leave them at the end."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Processes()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
