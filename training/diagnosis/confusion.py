"""Which classes a classifier takes for which."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenuto.training.candidate import AnyArray
from tenuto.training.stepper import load
from tenuto.training.task import Answers, Task

from .plot import picture


@dataclass(frozen=True, eq=False)
class Confusion:
    """`counts[truth, said]` int64 [classes, classes]."""

    name: str
    labels: list[str]
    counts: AnyArray

    @classmethod
    def of(cls, name: str, answers: Answers) -> "Confusion":
        """Count the answers."""
        counts = np.zeros((len(answers.labels),) * 2, np.int64)
        np.add.at(counts, (answers.truth, answers.said), 1)
        return cls(name, list(answers.labels), counts)

    @classmethod
    def measure(cls, task: Task, folder: Path) -> "Confusion | None":
        """Ask the exported model in `folder` its test set; None if it is no classifier."""
        answers = task.answers(*load(folder / "model.onnx"))
        return None if answers is None else cls.of(task.name, answers)

    def worst(self) -> tuple[str, str, int]:
        """Return the commonest mistake: the right class, what was said, how often."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        truth, said = np.unravel_index(wrong.argmax(), wrong.shape)
        return self.labels[truth], self.labels[said], int(wrong[truth, said])

    def draw(self, path: Path) -> None:
        """Draw the counts, coloured by their part of the right class."""
        parts = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        side = 1.6 + 0.36 * len(self.labels)
        with picture(path, size=(side, side)) as axes:
            axes.imshow(np.sqrt(parts), cmap="Blues", vmin=0, vmax=1)
            axes.grid(visible=False)
            places = range(len(self.labels))
            axes.set_xticks(places, self.labels)
            axes.set_yticks(places, self.labels)
            axes.set(title=self.name, xlabel="said", ylabel="right")
            for truth, said in zip(*np.nonzero(self.counts), strict=True):
                colour = "white" if parts[truth, said] > 0.5 else "black"
                count = str(self.counts[truth, said])
                axes.text(said, truth, count, ha="center", va="center", fontsize=6, color=colour)
