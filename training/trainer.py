"""Trains any task's network: the one loop, its checkpoints, and what it keeps."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import optimizer
from .checkpoint import Checkpoint, Weights
from .curve import Curve
from .optimizer import Optimizer
from .processes import Processes
from .progress import progress
from .recipe import Recipe
from .task import Batch, Task


class NotTrained(RuntimeError):
    """A training that was to be over, and is not; the text says which, and what to do."""


def has_half_width(device: torch.device) -> bool:
    """Return whether products in bfloat16 are worth it there: with AVX-512, or on an accelerator.

    On other processors they are slow, and oneDNN has no recurrent layer for them at all.
    """
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@dataclass(frozen=True)
class Fitted:
    """A trained network on the CPU, in eval mode, and how it came to be."""

    network: nn.Module
    epochs: int  # that were run
    kept_epoch: int
    validation: float  # of the kept epoch
    cpu_seconds: float  # of this process, over all the runs that it took
    curve: list[dict[str, float]]


@dataclass
class Trainer:
    """One training of one task with one seed. `run` begins it, or goes on where it was killed."""

    task: Task
    recipe: Recipe
    seed: int
    folder: Path  # gets checkpoint.pt and TensorBoard's event files
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    processes: Processes = field(default_factory=Processes)

    def run(self, train: bool = True) -> Fitted:
        """Train to the end and return what is kept. The task's data must be loaded.

        With `train` false nothing is trained: raises NotTrained if this training did not come to its end.

        The same task, recipe, seed and number of processes give the same weights on the same machine, killed
        and started again or not.
        """
        torch.set_num_threads(self.recipe.threads)
        torch.manual_seed(self.seed)
        self._network = self.task.network().to(self.device)
        self._average = self._averaged()
        self._optimizer = Optimizer(self._network, self.recipe, self.recipe.epochs * self.task.steps())
        self._at = self._resumed()
        if not self._at.finished:
            if not train:
                raise NotTrained(
                    f"{self.task.name}: {self._path} is not the end of this training "
                    f"(seed {self.seed}); run tenuto train first"
                )
            self._train()
        network = self.task.network()
        network.load_state_dict(self._at.kept)
        at = self._at
        kept = at.best_epoch if self.recipe.keep == "best" else at.epoch
        return Fitted(
            network.eval(), at.epoch, kept, at.curve[kept - 1]["validation"], at.cpu_seconds, at.curve
        )

    @property
    def _path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _averaged(self) -> AveragedModel | None:
        if self.recipe.average is None:
            return None
        average = get_ema_multi_avg_fn(self.recipe.average)
        return AveragedModel(self._network, multi_avg_fn=average, use_buffers=True)

    def _resumed(self) -> Checkpoint:
        """Return the checkpoint to go on from, its weights loaded, or a new one."""
        how = inspect.getsource(optimizer) if self.recipe.matrix_rate is not None else ""
        fingerprint = self.recipe.fingerprint(
            self.task.source() + how, self.seed, self.device.type, self.processes.count
        )
        found = Checkpoint.read(self._path)
        if found is None or found.fingerprint != fingerprint:
            return Checkpoint(fingerprint)
        if not found.finished:
            self._network.load_state_dict(found.network)
            if self._average is not None:
                self._average.load_state_dict(found.average)
            self._optimizer.load_state_dict(found.optimizer)
        return found

    def _train(self) -> None:
        at, recipe = self._at, self.recipe
        total = recipe.epochs * self.task.steps()
        label = f"{self.task.name}, seed {self.seed}"
        with progress(label, total) as bar, Curve.open(self.folder, self.processes.first) as curve:
            bar.update(at.epoch * self.task.steps())
            while at.epoch < recipe.epochs and not self._stopped():
                started = time.process_time()
                figures = self._epoch(at.epoch + 1, bar.update)
                figures["validation"] = self._validate()
                at.cpu_seconds += time.process_time() - started
                at.epoch += 1
                at.curve.append(figures)
                curve.write(at.epoch, figures)
                self._keep(figures["validation"])
                self._checkpoint()
        at.finished = True
        self._checkpoint()

    def _stopped(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and self._at.epoch - self._at.best_epoch >= patience

    def _epoch(self, epoch: int, tick: Callable[[int], object]) -> dict[str, float]:
        """Run one epoch; return its means."""
        # All randomness of an epoch begins here, so that nothing of it needs to be in a checkpoint. Dropout
        # differs between processes, the batches do not.
        torch.manual_seed((self.seed * 1000 + epoch) * 1000 + self.processes.rank)
        rng = np.random.default_rng([self.seed, epoch])
        self._network.train()
        losses, norms = [], []
        for batch in self.task.batches(rng):
            loss, norm = self._step(self.processes.share(batch))
            losses.append(loss)
            norms.append(norm)
            tick(1)
        self.processes.average_buffers(self._network)
        return {
            "loss": float(torch.stack(losses).mean()),
            "gradient_norm": float(torch.stack(norms).mean()),
            "learning_rate": self._optimizer.rate,
        }

    def _step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step; return the loss and the length of the gradient before clipping."""
        half = self.recipe.precision == "bfloat16" and has_half_width(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            loss = self.task.loss(self._network, tuple(tensor.to(self.device) for tensor in batch))
        self._optimizer.zero_grad()
        loss.backward()
        self.processes.average_gradients(self._network)
        most = float("inf") if self.recipe.clip_norm is None else self.recipe.clip_norm
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), most)
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self._network)
        return loss.detach(), norm

    def _candidate(self) -> nn.Module:
        """Return the network that is judged and kept."""
        return self._network if self._average is None else self._average.module

    def _validate(self) -> float:
        network = self._candidate().eval()
        with torch.no_grad():
            return float(self.task.validate(network))

    def _keep(self, validation: float) -> None:
        at = self._at
        better = validation < at.best
        if better:
            at.best, at.best_epoch = validation, at.epoch
        if better or self.recipe.keep == "last":
            at.kept = _copied(self._candidate())

    def _checkpoint(self) -> None:
        at = self._at
        at.network = self._network.state_dict()
        at.average = {} if self._average is None else self._average.state_dict()
        at.optimizer = self._optimizer.state_dict()
        if self.processes.first:
            at.write(self._path)
        self.processes.wait()


def _copied(network: nn.Module) -> Weights:
    return {name: value.detach().to("cpu", copy=True) for name, value in network.state_dict().items()}
