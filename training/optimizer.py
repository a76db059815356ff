"""How weights follow gradients: a recipe's optimizers, each under one cycle of its rate (Smith 2018)."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from .recipe import Recipe


class Optimizer:
    """AdamW (Loshchilov 2019); and Muon (Jordan 2024) for recurrent layers' matrices if the recipe says so.

    Muon makes each step of a matrix orthogonal: all directions of it are learnt alike fast.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, steps: int) -> None:
        matrices = _recurrent(network) if recipe.matrix_rate is not None else []
        taken = set(map(id, matrices))
        rest = [one for one in network.parameters() if id(one) not in taken]
        adamw = torch.optim.AdamW(rest, recipe.learning_rate, weight_decay=recipe.weight_decay)
        self._optimizers: list[torch.optim.Optimizer] = [adamw]
        self._schedules = [OneCycleLR(adamw, recipe.learning_rate, steps)]
        if recipe.matrix_rate is not None:
            if not matrices:
                raise ValueError("the recipe has a matrix_rate, but the network has no recurrent layer")
            muon = torch.optim.Muon(
                matrices,
                recipe.matrix_rate,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",  # steps as long as AdamW's (Liu 2025)
            )
            self._optimizers.append(muon)
            self._schedules.append(OneCycleLR(muon, recipe.matrix_rate, steps, cycle_momentum=False))

    @property
    def rate(self) -> float:
        """The learning rate of what AdamW learns, as it is now."""
        return float(self._schedules[0].get_last_lr()[0])

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for one in self._optimizers:
            one.zero_grad()

    def step(self) -> None:
        """Follow the gradients, and go on in the cycle."""
        for one in self._optimizers:
            one.step()
        for schedule in self._schedules:
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what a training that goes on needs."""
        return {
            "optimizers": [one.state_dict() for one in self._optimizers],
            "schedules": [one.state_dict() for one in self._schedules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: the inverse of `state_dict`."""
        for one, own in zip(self._optimizers, state["optimizers"], strict=True):
            one.load_state_dict(own)
        for schedule, own in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(own)


def _recurrent(network: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of the recurrent layers."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.RNNBase)]
    return [one for layer in layers for one in layer.parameters() if one.ndim == 2]
