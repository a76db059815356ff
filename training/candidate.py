"""What a recipe hands over to be checked, measured and written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from tenuto.serving.manifest import Manifest

AnyArray = NDArray[Any]
Tensors = dict[str, AnyArray]

# The trained torch network, fed one sequence chunk by chunk from its initial state. Chunks have the
# model's own axes without the batch axis and whole frames; the outputs likewise, by name. A stateless
# network gets one chunk, which is a batch.
Reference = Callable[[Sequence[AnyArray]], list[Tensors]]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A trained model before anything is written."""

    manifest: Manifest
    model: bytes  # the ONNX file, the manifest inside
    reference: Reference
    golden: Sequence[AnyArray]  # synthetic chunks of the first input, by step
    probe: AnyArray  # a longer synthetic stretch (time or rows first) to check invariance with
    tolerance: float  # largest accepted difference between torch and ONNX, in the output's unit
    golden_tolerance: float  # the same between ONNX Runtime here and elsewhere, other CPUs and CUDA
    parameters: int
    card: str  # what the model is for and where it fails, for MODEL_CARD.md
    training: Mapping[str, Any] = field(default_factory=dict)  # choices and validation figures

    def with_training(self, **facts: Any) -> "Candidate":
        """Return the same candidate with facts about its training, for metrics.json."""
        return replace(self, training={**self.training, **facts})
