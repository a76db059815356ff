"""A torch network's weights as numpy arrays, for the graph builders."""

import numpy as np
from torch import nn

from .graph import Array


def exported(network: nn.Module) -> dict[str, Array]:
    """Return the floating-point tensors of the state_dict as float32 arrays, by name."""
    return {
        name: value.numpy().astype(np.float32)
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }


def count(network: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
