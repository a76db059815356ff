"""What a sequence that goes on by itself is fed: samples, drawn from its last output frame.

The same for the same seed, step and part, whoever shares its batch and wherever the sequence was resumed: the
uniform numbers are those of a counter, not of a stream. They are Philox-4x64-10's (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), as numpy gives them for `key=seed` and
`counter=(step << 128) + (part << 64)`, the upper 53 bits of each; all arithmetic is in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RunFailed, WrongInput, WrongSetting
from .manifest import LEAST_TEMPERATURE, MOST_TEMPERATURE, Manifest

MOST_SEED = 2**64 - 1

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence is sampled. `top_k` 0: of all."""

    seed: int
    temperature: float
    top_k: int

    def __post_init__(self) -> None:
        """Raises: WrongSetting."""
        if not 0 <= self.seed <= MOST_SEED:
            raise WrongSetting(f"sampling: seed is {self.seed}, expected 0 to 2^64 - 1")
        if not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise WrongSetting(
                f"sampling: temperature is {self.temperature:g}, expected {LEAST_TEMPERATURE:g} to "
                f"{MOST_TEMPERATURE:g}; for the most probable choice set top_k to 1"
            )


@dataclass(slots=True)
class Generation:
    """Where one sequence stands in what it generates."""

    sampling: Sampling
    frame: bytes = b""  # the last output frame; empty: there is none yet
    done: int = 0  # parts answered of the chunk that is generated now, or that comes next; 0: none is
    digest: str = ""  # of that chunk


class Sampler:
    """Draws from the outputs of one model that generates."""

    def __init__(self, manifest: Manifest) -> None:
        rule = manifest.generate
        assert rule is not None
        names = [o.name for o in manifest.outputs]
        self._output = manifest.outputs[names.index(rule.output)]
        self._index = names.index(rule.output)
        self._dtype = manifest.inputs[0].numpy_dtype
        self._draw = _categorical if rule.sampling == "categorical" else _bernoulli
        self._uniforms = Uniforms()
        self._logits = _LOGITS[self._output.activation]
        spec = manifest.inputs[0]
        # One sample as a client would send it: the manifest's axes without the batch axis.
        self.shape = tuple(
            1 if axis == spec.time_axis else int(length)
            for axis, length in enumerate(spec.shape)
            if axis != spec.batch_axis
        )

    def last_frame(self, part: tuple[bytes, ...]) -> bytes:
        """The last frame in one turn's outputs."""
        return part[self._index][-self._output.frame_bytes :]

    def draw(self, generation: Generation, step: int, part: int) -> bytes:
        """The sample that is fed for that part, in the input's dtype.

        Raises: WrongInput if there is no output yet, RunFailed for one from which nothing can be drawn.
        """
        if not generation.frame:
            raise WrongInput("it generates before there is any output; send a sample first")
        numbers = np.frombuffer(generation.frame, self._output.numpy_dtype).astype(np.float64)
        logits = self._logits(numbers)
        if np.isnan(logits).any():
            bad = numbers[np.isnan(logits)][0]
            raise RunFailed(f"output {self._output.name!r} holds {bad:g}, of which nothing can be drawn")
        sampling = generation.sampling
        uniforms = partial(self._uniforms.draw, sampling.seed, step, part)
        drawn = self._draw(logits, sampling, uniforms)
        return drawn.astype(self._dtype).tobytes()


class Uniforms:
    """One generator that is set to any place: a sixth of the cost of a new one. For one thread."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state: Any = self._philox.state  # with nothing in its buffer
        self._place = self._state["state"]

    def draw(self, seed: int, step: int, part: int, count: int) -> Floats:
        """That many numbers in [0, 1)."""
        self._place["key"][0] = seed
        self._place["counter"][:] = 0, part, step, 0
        self._philox.state = self._state
        raw = self._philox.random_raw(count)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _categorical(logits: Floats, sampling: Sampling, uniforms: Callable[[int], Floats]) -> NDArray[Any]:
    """One index, by inversion of the cumulative distribution of the `top_k` largest."""
    most = logits.max()
    if not np.isfinite(most):
        raise RunFailed(f"the largest logit is {most:g}, of which nothing can be drawn")
    with np.errstate(over="ignore"):  # two float64 outputs may be that far apart
        weights = np.exp((logits - most) / sampling.temperature)
    if 0 < sampling.top_k < logits.size:
        # Of equal ones, those of the lower index.
        weights[np.argsort(-logits, kind="stable")[sampling.top_k :]] = 0.0
    sums = weights.cumsum()
    index = sums.searchsorted(uniforms(1)[0] * sums[-1], side="right")
    if index == sums.size:  # the product was rounded up to the whole
        index = np.flatnonzero(weights)[-1]
    return np.array([index])


def _bernoulli(logits: Floats, sampling: Sampling, uniforms: Callable[[int], Floats]) -> NDArray[Any]:
    """A one where its own uniform number is below its probability, else a zero."""
    with np.errstate(over="ignore"):  # exp(800) is infinite, and its probability zero
        probabilities = 1.0 / (1.0 + np.exp(-logits / sampling.temperature))
    return uniforms(logits.size) < probabilities


def _of_probabilities(numbers: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0 is -inf; of what is no probability, NaN
        return np.log(numbers)


def _of_sigmoid(numbers: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(numbers) - np.log1p(-numbers)


# An output's activation -> what turns its numbers into logits.
_LOGITS: dict[str, Callable[[Floats], Floats]] = {
    "": lambda numbers: numbers,
    "log_softmax": lambda numbers: numbers,
    "softmax": _of_probabilities,
    "sigmoid": _of_sigmoid,
}
