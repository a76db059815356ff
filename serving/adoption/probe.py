"""Runs of a graph of which nobody knows yet what it wants: feeds of any shape, in a process of its own.

`python -m tenuto.serving.adoption.probe` is that process.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto.serving.errors import ModelInvalid
from tenuto.serving.external_data import embedded
from tenuto.serving.model_runner import CPU, CUDA, choose_provider, failing, session
from tenuto.serving.placement import Placement
from tenuto.serving.regular_file import read
from tenuto.serving.vetting import Limits

from .dialogue import Dialogue, Job, work
from .graph_facts import MOST_BYTES

_MODULE = "tenuto.serving.adoption.probe"
_SEED = 9
_MOST_NAMED = 200  # nodes; an answer is one line, and no long one


@dataclass(frozen=True)
class Feed:
    """A tensor for one run: all its elements are `value`, or they are drawn from [low, high)."""

    dtype: str
    shape: tuple[int, ...]
    value: float | None = None
    low: float = -1.0
    high: float = 1.0

    def array(self, random: np.random.Generator) -> NDArray[Any]:
        dtype = np.dtype(self.dtype)
        if self.value is not None:
            return np.full(self.shape, self.value, dtype)
        if dtype.kind in "iub":
            return random.integers(int(self.low), max(int(self.high), int(self.low) + 1), self.shape).astype(
                dtype
            )
        return random.uniform(self.low, self.high, self.shape).astype(dtype)


Shapes = dict[str, tuple[int, ...]]  # of a run's results, by name


class Probe:
    """One file's runs. What a run did before is not done again."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._child = Dialogue(_MODULE, {"path": str(path)}, limits)
        self._known: dict[str, Shapes | str] = {}
        self._dead = ""  # a run ended the process, or took too much: there is no other one

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()

    def load(self) -> None:
        """Raises: ModelInvalid if ONNX Runtime does not load the file, or not within the limits."""
        self._child.start()

    @property
    def lives(self) -> bool:
        return not self._dead

    def run(self, feeds: Mapping[str, Feed]) -> Shapes:
        """The shapes of all outputs.

        Raises: ModelInvalid, with why the run failed.
        """
        job = {"feeds": {name: asdict(feed) for name, feed in feeds.items()}}
        key = repr(job)
        known = self._known.get(key)
        if known is None and self._dead:
            known = self._dead
        if known is None:
            try:
                answer = self._child.ask(job)
                known = {name: tuple(shape) for name, shape in answer["shapes"].items()}
            except ModelInvalid as error:
                known = str(error)
                self._dead = "" if self._child.lives else known
            self._known[key] = known
        if isinstance(known, str):
            raise ModelInvalid(known)
        return known

    def left_to_cpu(self) -> list[str] | None:
        """The nodes that do not run on CUDA, by ONNX Runtime's own word; None: there is no CUDA here.

        Raises: ModelInvalid.
        """
        nodes: list[str] | None = self._child.ask({"placement": True})["nodes"]
        return nodes


class _Session:
    """The child's side."""

    def __init__(self, job: Job) -> None:
        path = Path(job["path"])
        self._where = path.name
        content = read(path, MOST_BYTES, str(path.parent))
        self._model, _ = embedded(content, path.parent, self._where, hashlib.sha256(), MOST_BYTES)
        self._session = self._open(CPU)

    def _open(self, provider: str) -> Any:
        return session(self._model, self._where, provider, 1)

    def answer(self, job: Job) -> Job:
        if "placement" in job:
            return {"nodes": self._placed()}
        random = np.random.default_rng(_SEED)
        feeds = {name: Feed(**(feed | {"shape": tuple(feed["shape"])})).array(random)
                 for name, feed in job["feeds"].items()}  # fmt: skip
        with failing(self._where):
            results = self._session.run(None, feeds)
        names = [o.name for o in self._session.get_outputs()]
        return {"shapes": {n: list(np.shape(r)) for n, r in zip(names, results, strict=True)}}

    def _placed(self) -> list[str] | None:
        if choose_provider("auto") != CUDA:
            return None
        nodes = Placement.of(self._open(CUDA)).nodes
        return [name for provider, names in nodes.items() if provider != CUDA for name in names][:_MOST_NAMED]


if __name__ == "__main__":
    work(lambda job: _Session(job).answer, sys.argv[1:])
