"""How a model that generates is sampled."""

from dataclasses import dataclass

from .errors import TenutoError, invalid
from .v1 import tenuto_pb2 as pb


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a client may choose for one sequence, and what the server tells it; None: the server chooses.

    `seed` is from 0 to 2^64 - 1; unset, the server draws one. `temperature`, above 0, divides the model's
    logits; `top_k` keeps the k most probable choices, 1 the most probable one; unset, the manifest says.
    The same sampling and the same chunks give the same samples again.
    """

    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None

    def message(self) -> pb.Sampling:
        """Return it as it travels; raises InvalidInput."""
        for name, value in (("temperature", self.temperature), ("top_k", self.top_k)):
            if value is not None and not value > 0:  # 0 would mean unset
                raise invalid(f"sampling: {name} is {value}, expected more than 0", "WRONG_SETTING")
        try:
            return pb.Sampling(seed=self.seed, temperature=self.temperature, top_k=self.top_k)
        except (TypeError, ValueError) as error:
            if isinstance(error, TenutoError):
                raise
            raise invalid(f"sampling: {self}: {error}", "WRONG_SETTING") from error


def sampling_of(message: pb.Opened) -> Sampling | None:
    """Return what the server said; None for a model that does not generate."""
    if not message.HasField("sampling"):
        return None
    told = message.sampling
    return Sampling(told.seed, told.temperature, told.top_k or None)
