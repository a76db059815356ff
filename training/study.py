"""All the trainings whose figures go into one model: its seeds, and its variants."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .candidate import Candidate
from .stepper import load
from .task import Figures, Task
from .trainer import Fitted

Fit = Callable[[Task, int, str], Fitted]  # of a loaded task, with a seed, under a label


@dataclass(frozen=True)
class Study:
    """A task's networks, trained. The first seed's is the one to export."""

    task: Task
    seeds: Mapping[int, Fitted]
    variants: Mapping[str, tuple[Task, Fitted]]

    @classmethod
    def run(cls, task: Task, seeds: Sequence[int], fit: Fit, with_variants: bool = True) -> "Study":
        """Train with every seed, then every variant with the first one. Raises what `task.load` raises."""
        task.load()
        fitted = {seed: fit(task, seed, "") for seed in seeds}
        variants = {}
        for label, variant in task.variants().items() if with_variants else ():
            variant.load()
            variants[label] = variant, fit(variant, seeds[0], label)
        return cls(task, fitted, variants)

    def candidate(self) -> Candidate:
        """Return the first seed's network as an ONNX file, with all that is needed to check it."""
        seed, fitted = next(iter(self.seeds.items()))
        return self.task.candidate(fitted.network, seed)

    def figures(self, first: Figures) -> dict[str, Any]:
        """Return the figures of the other seeds and of the variants; `first` are those of the first seed."""
        others = [self._test(self.task, one, seed) for seed, one in list(self.seeds.items())[1:]]
        found: dict[str, Any] = {"seeds": _spread(list(self.seeds), [first, *others])}
        if self.variants:
            seed = next(iter(self.seeds))
            tested = {label: self._test(task, one, seed) for label, (task, one) in self.variants.items()}
            found["variants"] = tested | {"mean": fmean(one["value"] for one in tested.values())}
        return found

    def cpu_seconds(self) -> float:
        """Return what all of it took."""
        return sum(one.cpu_seconds for one in [*self.seeds.values(), *(f for _, f in self.variants.values())])

    @staticmethod
    def _test(task: Task, fitted: Fitted, seed: int) -> Figures:
        session, manifest = load(task.candidate(fitted.network, seed).model)
        return task.test(session, manifest)


def _spread(seeds: Sequence[int], figures: Sequence[Figures]) -> dict[str, Any]:
    values = [one["value"] for one in figures]
    return {
        "values": {str(seed): value for seed, value in zip(seeds, values, strict=True)},
        "mean": fmean(values),
        "standard_deviation": stdev(values) if len(values) > 1 else None,
    }
