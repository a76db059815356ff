"""How sequences go on by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from .part import Name, Part
from .tensors import Input, Output

# Beyond these all choices are alike, or one is certain; and none is denormal: an engine's thread takes such
# numbers for zero.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 1e6
# Those that an output cannot have from which is sampled in that way.
_OTHER_ACTIVATIONS = {"categorical": ("sigmoid",), "bernoulli": ("softmax", "log_softmax")}


class Generate(Part):
    """The server may sample from an output and feed what it drew back as the next sample (`Chunk.generate`).
    The model has that one input, takes single samples (`chunk` free, or of 1), and gives one output frame for
    each. What its numbers are, the output's `activation` says: `""` for logits."""

    output: Name
    """what is sampled from: float, one axis a frame"""
    input: Name
    """what is fed"""
    sampling: Literal["categorical", "bernoulli"]
    """`"categorical"`: one number of a frame is drawn, and its index is fed; `"bernoulli"`: each number is
    drawn by itself, and ones and zeros are fed"""
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE, le=MOST_TEMPERATURE)] = 1.0
    """what logits or log probabilities are divided by, unless a client chooses at Open"""
    top_k: Annotated[int, Field(ge=0)] = 0
    """only so many of a categorical output, the most probable ones, may be drawn, of equal ones those of the
    lower index, unless a client chooses at Open; 0: all"""

    def check(self, inputs: Sequence[Input], outputs: Sequence[Output], *, stateful: bool) -> None:
        """Whether what is sampled from the output is a sample of the input.

        Raises: ValueError.
        """
        output = next((o for o in outputs if o.name == self.output), None)
        if output is None or [i.name for i in inputs] != [self.input] or not stateful:
            raise ValueError(
                f"generate feeds output {self.output!r} to input {self.input!r}: it needs a stateful "
                "model with that output, and that input alone"
            )
        fed = inputs[0]
        if fed.multiple != 1 or (fed.time_axis is None) != (output.time_axis is None):
            raise ValueError(
                "generate: one sample in must give one frame out, so chunk is free, multiple 1 or exact 1, "
                "and both have a time_axis or neither"
            )
        if output.numpy_dtype.kind != "f" or len(output.frame_shape) != 1:
            raise ValueError(
                f"generate samples from float numbers, one axis a frame; {output.name} is {output.dtype} "
                f"with {list(output.frame_shape)} a frame"
            )
        if self.sampling == "categorical":
            self._check_categorical(fed, output)
        else:
            self._check_bernoulli(fed, output)
        if output.activation in _OTHER_ACTIVATIONS[self.sampling]:
            raise ValueError(f"generate, {self.sampling}: {output.name}'s activation is {output.activation}")

    def _check_categorical(self, fed: Input, output: Output) -> None:
        (count,) = output.frame_shape
        if fed.numpy_dtype.kind not in "iu" or fed.sample_shape:
            raise ValueError(
                f"generate, categorical: the input takes one index a sample; {fed.name} is {fed.dtype} "
                f"with {list(fed.sample_shape)} a sample"
            )
        low, high = fed.range or (0, np.iinfo(fed.numpy_dtype).max)
        if not low <= 0 <= count - 1 <= high:
            raise ValueError(f"generate: indices go from 0 to {count - 1}, range is {[low, high]}")
        if self.top_k > count:
            raise ValueError(
                f"generate: top_k is {self.top_k}; of a categorical output it is at most {count}"
            )

    def _check_bernoulli(self, fed: Input, output: Output) -> None:
        frame, sample = list(output.frame_shape), list(fed.sample_shape)
        if frame != sample or fed.numpy_dtype.kind not in "fiub":
            raise ValueError(
                f"generate, bernoulli: {output.name} has {frame} a frame, {fed.name} {sample} a sample; they "
                "must be the same"
            )
        if self.top_k:
            raise ValueError(f"generate: top_k is {self.top_k}; of a bernoulli output it is 0")
