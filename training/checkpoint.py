"""What a killed training goes on from: one file an epoch, written whole or not at all."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


@dataclass
class Checkpoint:
    """The state of a training after `epoch` epochs."""

    fingerprint: str  # of the recipe, the task's text, the seed, the number of processes
    epoch: int = 0
    network: Weights = field(default_factory=dict)
    average: Weights = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    best: float = float("inf")  # the lowest validation figure so far
    best_epoch: int = 0
    kept: Weights = field(default_factory=dict)  # the weights that became, or would now become, the model
    curve: list[dict[str, float]] = field(default_factory=list)  # a line an epoch
    cpu_seconds: float = 0.0
    finished: bool = False

    def write(self, path: Path) -> None:
        """Write to `path`; a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        torch.save(vars(self), scratch)
        os.replace(scratch, path)

    @classmethod
    def read(cls, path: Path) -> "Checkpoint | None":
        """Return what `path` holds; None if there is no such file, or an older version wrote it."""
        if not path.is_file():
            return None
        found = torch.load(path, map_location="cpu", weights_only=True)
        return cls(**found) if found.keys() == {field.name for field in fields(cls)} else None
