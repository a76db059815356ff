"""An epoch's figures as it ends: for TensorBoard, where that is installed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Curve:
    """Writes event files into a training's folder; `tensorboard --logdir runs` shows them."""

    def __init__(self, writer: "SummaryWriter | None") -> None:
        self._writer = writer

    @classmethod
    @contextmanager
    def open(cls, folder: Path, wanted: bool = True) -> "Iterator[Curve]":
        """Give a curve that writes into `folder`; one that writes nothing without the package."""
        if not wanted or find_spec("tensorboard") is None:
            yield cls(None)
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as writer:
            yield cls(writer)

    def write(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Add one epoch's figures."""
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, epoch)
