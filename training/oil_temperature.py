"""An LSTM that forecasts a transformer's loads and oil temperature: `tenuto train oil-temperature`.

About 1 CPU minute. One hour of seven values in, the next 96 hours of all seven out. Each forecast
looks at the last 336 hours, normalised by their own mean and standard deviation (Kim 2022, RevIN):
one linear map shared by the seven series (Zeng 2023, DLinear) plus what an LSTM (Hochreiter and
Schmidhuber 1997) adds from all hours since the sequence began.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import oil_temperature_graph
from .candidate import AnyArray, Candidate, Tensors
from .datasets import etth1
from .graph import Array
from .progress import progress
from .weights import count, exported

NAME = "oil-temperature"
EPOCHS = 12  # of 50 steps each; the one with the lowest validation error is kept
THREADS = 1
BATCH = 16
SEGMENT = 168  # consecutive hours that one training example forecasts from
STEPS = 50
LEARNING_RATE = 1e-3

DATA = {
    "name": "ETTh1",
    "licence": etth1.LICENCE,
    "sha256": {"ETTh1.csv": etth1.CHECKSUM},
    "split": "standard: hours 0 to 8640 to train on, 8640 to 11520 for validation",
}

CARD = """
Takes the six loads and the oil temperature of an electricity transformer, hour by hour (HUFL, HULL,
MUFL, MULL, LUFL, LULL, OT), and after each hour forecasts all seven for the next 96 hours, in the
units given. For demonstrations and tests of time-series streams.

It knows one transformer, in China, 2016 to 2018. It normalises by the last 336 hours; before so
many were seen, the missing ones count as equal to the first, and forecasts are poor: the first
hour's is close to "stays as it is". On the validation split the error falls from 2.2 after the first
hour to 1.7 after a day, 1.0 after a week and 0.74 after two, and is 0.69 on a stream that has been
running; without the LSTM's correction it would be 0.77. A missing hour must be filled by the caller:
the model has no clock, it counts hours. States are bounded: the window holds values as given, `seen`
is 0 or 1, the LSTM's are bounded by its gates.
"""

SERIES = 7
WINDOW = 336  # hours behind each forecast, the newest included
HORIZON = 96  # hours ahead
HIDDEN = 64
VARIANCE_FLOOR = 1e-4  # added to a window's variance, in units of the training part's variance


@dataclass
class OilState:
    """What one step leaves for the next.

    `window` float32 [batch, 335, 7]: the hours before; `seen` [batch, 1]: 0 before the first hour,
    then 1; `memory`: the LSTM's (h, c), each [1, batch, 64].
    """

    window: Tensor
    seen: Tensor
    memory: tuple[Tensor, Tensor]

    @classmethod
    def zeros(cls, batch: int) -> "OilState":
        """Return the state before the first hour."""
        memory = torch.zeros(1, batch, HIDDEN), torch.zeros(1, batch, HIDDEN)
        return cls(torch.zeros(batch, WINDOW - 1, SERIES), torch.zeros(batch, 1), memory)


class OilNetwork(nn.Module):
    """Hours float32 [batch, time, 7] in the data's units to forecasts [batch, time, 96, 7]."""

    mean: Tensor
    std: Tensor
    floor: Tensor

    def __init__(self, mean: Array, std: Array) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("std", torch.from_numpy(std))
        self.register_buffer("floor", torch.tensor(VARIANCE_FLOOR))
        self.linear = nn.Linear(WINDOW, HORIZON)
        self.lstm = nn.LSTM(SERIES, HIDDEN, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(HIDDEN, SERIES * HORIZON)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.head.weight)  # the LSTM begins as no correction at all
        nn.init.zeros_(self.head.bias)

    def forecast(self, z: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Forecast from every window of z-scored hours [batch, 335 + time, 7].

        Returns z-scored forecasts [batch, time, 7, 96] and the LSTM's new state.
        """
        windows = z.unfold(1, WINDOW, 1)  # [batch, time, 7, 336]
        level = windows.mean(-1, keepdim=True)
        deviation = windows - level
        scale = torch.sqrt((deviation**2).mean(-1, keepdim=True) + self.floor)
        normal = deviation / scale
        hidden, memory = self.lstm(normal[..., -1], memory)
        correction = self.head(self.dropout(hidden)).unflatten(-1, (SERIES, HORIZON))
        return (self.linear(normal) + correction) * scale + level, memory

    def forward(self, hours: Tensor, state: OilState) -> tuple[Tensor, OilState]:
        """Take hours [batch, time, 7]; return forecasts [batch, time, 96, 7] and the new state.

        Before the first hour of a sequence the window counts as filled with that hour's values.
        """
        past = torch.where(state.seen[..., None] > 0, state.window, hours[:, :1])
        known = torch.cat([past, hours], 1)
        z, memory = self.forecast((known - self.mean) / self.std, state.memory)
        after = OilState(known[:, 1 - WINDOW :], torch.ones_like(state.seen), memory)
        return z.transpose(2, 3) * self.std + self.mean, after


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained network in eval mode, and how the choice was made."""

    network: OilNetwork
    best_epoch: int
    validation_mse: float


def fit(train: Array, validation: Array, seed: int, epochs: int) -> Fitted:
    """Train on hours [n, 7]; keep the epoch with the lowest error on `validation` [m, 7].

    The first 336 hours of `validation` are those before the part that is scored.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mean, std = train.mean(0, np.float64), train.std(0, np.float64)
    network = OilNetwork(mean.astype(np.float32), std.astype(np.float32))
    z = (torch.from_numpy(train) - network.mean) / network.std
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * STEPS)
    best, best_epoch, kept = float("inf"), 0, network.state_dict()
    with progress("oil-temperature: training", epochs * STEPS) as bar:
        for epoch in range(1, epochs + 1):
            network.train()
            for _ in range(STEPS):
                loss = _loss(network, z, generator)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            error = score(network.eval(), validation)
            if error < best:
                best, best_epoch = error, epoch
                kept = {key: value.clone() for key, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return Fitted(network.eval(), best_epoch, best)


def _loss(network: OilNetwork, z: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error over segments that start anywhere in z-scored hours [n, 7]."""
    length = WINDOW - 1 + SEGMENT + HORIZON
    starts = torch.randint(0, len(z) - length + 1, (BATCH,), generator=generator)
    hours = torch.stack([z[start : start + length] for start in starts])
    answer, _ = network.forecast(hours[:, :-HORIZON], OilState.zeros(BATCH).memory)
    truth = hours[:, WINDOW:].unfold(1, HORIZON, 1)  # [batch, time, 7, 96]
    return F.mse_loss(answer, truth)


def score(network: OilNetwork, hours: Array) -> float:
    """Return the mean squared error, z-scored, of all forecasts after the first 336 hours."""
    z = (torch.from_numpy(hours) - network.mean) / network.std
    with torch.no_grad():
        answer, _ = network.forecast(z[None, :-HORIZON], OilState.zeros(1).memory)
    truth = z[WINDOW:].unfold(0, HORIZON, 1)
    return float(F.mse_loss(answer[0], truth))


def candidate(network: OilNetwork, seed: int) -> Candidate:
    """Build the ONNX file, and a synthetic series to check it with."""
    described = oil_temperature_graph.manifest(WINDOW, HORIZON, HIDDEN)

    def reference(chunks: Sequence[AnyArray]) -> list[Tensors]:
        state, outputs = OilState.zeros(1), []
        for chunk in chunks:
            with torch.no_grad():
                forecast, state = network(torch.from_numpy(chunk)[None], state)
            outputs.append({"forecast": forecast[0].numpy()})
        return outputs

    return Candidate(
        manifest=described,
        model=oil_temperature_graph.build(exported(network), described),
        reference=reference,
        golden=np.split(seasons(seed, hours=40), np.cumsum([1, 1, 3, 27])),
        probe=seasons(seed + 1, hours=1000),
        tolerance=1e-3,
        golden_tolerance=1e-2,
        parameters=count(network),
        card=CARD,
    )


def train(seed: int, epochs: int) -> Candidate:
    """Run the recipe on the standard split of ETTh1."""
    values = etth1.series().values
    start, stop = etth1.VALIDATION
    fitted = fit(values[slice(*etth1.TRAIN)], values[start - WINDOW : stop], seed, epochs)
    return candidate(fitted.network, seed).with_training(
        validation_mse=fitted.validation_mse,
        best_epoch=fitted.best_epoch,
        selection="the epoch with the lowest error on the validation split",
    )


def seasons(seed: int, hours: int) -> Array:
    """Return a synthetic series float32 [hours, 7]: days, weeks and noise at made-up levels."""
    rng = np.random.default_rng(seed)
    time = np.arange(hours)[:, None]
    day = np.sin(2 * np.pi * (time / 24 + rng.random(SERIES)))
    week = np.sin(2 * np.pi * (time / 168 + rng.random(SERIES)))
    noise = rng.standard_normal((hours, SERIES)) * 0.2
    level = np.array([8, 2, 5, 1, 3, 1, 17]) + (day + 0.5 * week + noise) * 2
    return level.astype(np.float32)
