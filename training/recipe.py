"""How one network is trained: everything that decides the weights beside data, code and seed."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """What `optimizer.Optimizer` and the trainer do."""

    epochs: int
    learning_rate: float  # the highest of the cycle
    matrix_rate: float | None = None  # of recurrent matrices, which Muon then learns; None: AdamW has them
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0  # gradients longer than that are shortened to it
    # Epochs without a better validation figure, after which training stops; None: never. The cycle is laid
    # out for all epochs, so with `keep="last"` a stop would leave the rate high.
    patience: int | None = None
    keep: Literal["best", "last"] = "last"  # which epoch's weights become the model
    average: float | None = (
        None  # decay a step of an exponential moving average of the weights, which is kept
    )
    # Matrix products and convolutions of training in half the width, where the processor has it (see
    # `trainer.has_half_width`); the weights stay float32, and so does the exported model.
    precision: Literal["float32", "bfloat16"] = "float32"
    # Sums are cut differently with another number of threads. Recurrent networks: one, more only wait.
    threads: int = 1
    seeds: tuple[int, ...] = (0,)  # `make models` trains them all; the first becomes the model

    def __post_init__(self) -> None:
        if self.patience is not None and self.keep == "last":
            raise ValueError("patience needs keep='best': the last epoch before a stop is no choice")

    def fingerprint(self, *more: object) -> str:
        """Return a hash of the recipe and of what else decides the weights."""
        text = json.dumps([asdict(self), *map(str, more)], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:16]
