"""A network of recurrent layers between what comes in and a linear map, for most tasks all that is needed."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cell = Literal["lstm", "gru", "rnn"]
Activation = Literal["", "log_softmax", "sigmoid"]
State = tuple[Tensor, ...]  # each [1, batch, hidden]; layer by layer, for an LSTM h and then c

CELLS: dict[Cell, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}


@dataclass(frozen=True)
class Shape:
    """What decides the sizes of a recurrent network's weights."""

    inputs: int  # values at each step; with `symbols`, the length of a symbol's vector
    hidden: tuple[int, ...]  # units of each layer
    outputs: int
    cell: Cell = "lstm"
    symbols: int | None = None  # steps are indices below it, and each has a vector of its own to be learnt
    activation: Activation = "log_softmax"


class RecurrentNetwork(nn.Module):
    """Steps float32 [batch, time, inputs], or symbols int64 [batch, time], to float32 [batch, time, outputs].

    LSTM: Hochreiter and Schmidhuber 1997; GRU: Cho 2014; RNN: Elman 1990, with tanh.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0, input_dropout: float | None = None) -> None:
        """`dropout` is behind every layer; `input_dropout` before the first, the same if None."""
        super().__init__()
        self.shape = shape
        self.embedding = None if shape.symbols is None else nn.Embedding(shape.symbols, shape.inputs)
        # What is taken off the inputs, and what they are then divided by; tasks set them from training data.
        self.register_buffer("mean", torch.zeros(shape.inputs))
        self.register_buffer("std", torch.ones(shape.inputs))
        sizes = zip((shape.inputs, *shape.hidden), shape.hidden, strict=False)
        self.layers = nn.ModuleList(CELLS[shape.cell](i, o, batch_first=True) for i, o in sizes)
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(dropout if input_dropout is None else input_dropout)
        self.head = nn.Linear(shape.hidden[-1], shape.outputs)

    def initial_state(self, batch: int) -> State:
        """Return the state of sequences that have seen nothing: zeros."""
        parts = 2 if self.shape.cell == "lstm" else 1
        device = self.mean.device
        return tuple(torch.zeros(1, batch, h, device=device) for h in self.shape.hidden for _ in range(parts))

    def features(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Return what the last layer says, [batch, time, hidden], and the new state."""
        y = (x - self.mean) / self.std if self.embedding is None else self.embedding(x)
        after: list[Tensor] = []
        parts = len(state) // len(self.layers)
        for i, layer in enumerate(self.layers):
            before = state[i * parts : (i + 1) * parts]
            drop = self.dropout if i else self.input_dropout
            y, new = layer(drop(y), before if parts == 2 else before[0])
            after += new if parts == 2 else [new]
        return self.dropout(y), tuple(after)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the outputs of every step, activated, and the state after the last one."""
        y, state = self.features(x, state)
        y = self.head(y)
        match self.shape.activation:
            case "log_softmax":
                return F.log_softmax(y, dim=-1), state
            case "sigmoid":
                return torch.sigmoid(y), state
            case _:
                return y, state
