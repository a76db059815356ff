"""An LSTM that forecasts a transformer's loads and oil temperature: `tenuto train oil-temperature`.

Many to many: one hour of seven values in, the next 96 hours of all seven out. Each forecast looks at the
last 336 hours, normalised by their own mean and standard deviation (Kim 2022, RevIN): one linear map shared
by the seven series (Zeng 2023, DLinear) plus what an LSTM (Hochreiter and Schmidhuber 1997) adds from all
hours since the sequence began.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.serving.manifest import Manifest
from tenuto.training import dlinear, oil_temperature_graph
from tenuto.training.candidate import AnyArray, Candidate, Tensors
from tenuto.training.datasets import etth1
from tenuto.training.graph import Array
from tenuto.training.progress import progress
from tenuto.training.recipe import Recipe
from tenuto.training.stepper import Stepper
from tenuto.training.task import Batch, Figures, Task
from tenuto.training.weights import count, exported

BATCH = 16
SEGMENT = 168  # consecutive hours that one training example forecasts from
STEPS = 50  # an epoch

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


DATA = {
    "name": "ETTh1",
    "licence": etth1.LICENCE,
    "sha256": {"ETTh1.csv": etth1.CHECKSUM},
    "split": "standard: hours 0 to 8640 to train on, 8640 to 11520 for validation, 11520 to 14400 to test",
}


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

    def initial_state(self, batch: int) -> OilState:
        """Return the state before the first hour."""
        return OilState.zeros(batch)

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


class OilTemperatureTask(Task):
    """ETTh1, an hour a step."""

    name = "oil-temperature"
    recipe = Recipe(epochs=12, learning_rate=1e-3, keep="best", seeds=(0, 1, 2))
    data = DATA
    card = """
Takes the six loads and the oil temperature of an electricity transformer, hour by hour (HUFL, HULL,
MUFL, MULL, LUFL, LULL, OT), and after each hour forecasts all seven for the next 96 hours, in the
units given. For demonstrations and tests of time-series streams.

It knows one transformer, in China, 2016 to 2018. It normalises by the last 336 hours; before so
many were seen, the missing ones count as equal to the first, and forecasts are poor: the first
hour's is close to "stays as it is". On the validation split the error falls from 2.3 after the first
hour to 1.6 after a day, 0.89 after a week and 0.72 after two, and is 0.69 on a stream that has been
running; without the LSTM's correction it would be 0.73. A missing hour must be filled by the caller:
the model has no clock, it counts hours. States are bounded: the window holds values as given, `seen`
is 0 or 1, the LSTM's are bounded by its gates.
"""

    def load(self) -> None:
        """Read the series; the part held out begins with the 336 hours before it."""
        self.take(etth1.series().values[slice(*etth1.TRAIN)], _with_context(etth1.VALIDATION))

    def take(self, train: Array, held: Array) -> None:
        """Train on hours [n, 7] and validate on [m, 7], of which the first 336 are not scored."""
        mean, std = train.mean(0, np.float64), train.std(0, np.float64)
        self._mean, self._std = mean.astype(np.float32), std.astype(np.float32)
        self._train, self._held = (
            torch.from_numpy((part - self._mean) / self._std) for part in (train, held)
        )

    def network(self) -> nn.Module:
        """Return the network, which has the training part's mean and standard deviation in it."""
        return OilNetwork(self._mean, self._std)

    def steps(self) -> int:
        """Return a number that is small enough to see the best moment: the network overfits soon."""
        return STEPS

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield z-scored hours [16, 335 + 168 + 96, 7], stretches that begin anywhere."""
        length = WINDOW - 1 + SEGMENT + HORIZON
        for starts in rng.integers(len(self._train) - length + 1, size=(STEPS, BATCH)):
            yield (torch.stack([self._train[start : start + length] for start in starts]),)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the mean squared error, z-scored, of all forecasts of all stretches."""
        assert isinstance(network, OilNetwork)
        (hours,) = batch
        answer, _ = network.forecast(hours[:, :-HORIZON], network.initial_state(len(hours)).memory)
        truth = hours[:, WINDOW:].unfold(1, HORIZON, 1)  # [batch, time, 7, 96]
        return F.mse_loss(answer, truth)

    def validate(self, network: nn.Module) -> float:
        """Return the same of the part held out, as one stretch."""
        return float(self.loss(network, (self._held[None],)))

    def candidate(self, network: nn.Module, seed: int) -> Candidate:
        """Build the ONNX file, and a synthetic series to check it with."""
        assert isinstance(network, OilNetwork)
        described = oil_temperature_graph.manifest(WINDOW, HORIZON, HIDDEN)

        def reference(chunks: Sequence[AnyArray]) -> list[Tensors]:
            state, outputs = network.initial_state(1), []
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
            card=self.card,
        )

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Error of 96-hour forecasts of all 7 series, z-scored; fed hour by hour, one sequence."""
        hours, stepper = _with_context(etth1.TEST), Stepper(session, manifest)
        told = []
        with progress("oil-temperature: test", len(hours) - HORIZON) as bar:
            for hour in range(len(hours) - HORIZON):
                told.append(stepper.step(hours[hour : hour + 1])["forecast"][0])
                bar.update()
        return {
            **_errors(told[WINDOW - 1 :], hours),
            "test_set": f"ETTh1, standard split: hours {etth1.TEST[0]} to {etth1.TEST[1]}, {HORIZON} hours "
            f"ahead, all 7 series, z-scored by the training part, after {WINDOW} hours of the split before",
        }

    def baselines(self) -> Mapping[str, Figures]:
        """Return what needs no LSTM: the last hour repeated, the last day repeated, DLinear."""
        hours = _with_context(etth1.TEST)
        mean, std = etth1.series().statistics()
        train, held = etth1.series().values[slice(*etth1.TRAIN)], _with_context(etth1.VALIDATION)
        network = dlinear.forecaster((train - mean) / std, (held - mean) / std, WINDOW, HORIZON)

        def linear(window: Array) -> Array:
            with torch.no_grad():
                z: Array = network(torch.from_numpy((window - mean) / std).T.contiguous()).numpy()
            return z.T * std + mean

        ways: dict[str, Callable[[Array], Array]] = {
            "the last hour, repeated": lambda window: np.repeat(window[-1:], HORIZON, 0),
            "the last day, repeated": lambda window: np.tile(window[-24:], (HORIZON // 24, 1)),
            "DLinear, 336 hours": linear,
        }
        windows = [hours[hour : hour + WINDOW] for hour in range(len(hours) - HORIZON - WINDOW + 1)]
        return {label: _errors([way(window) for window in windows], hours) for label, way in ways.items()}


def _with_context(split: tuple[int, int]) -> Array:
    """Return a split's hours, and before them the window that its first forecast looks at."""
    return etth1.series().values[split[0] - WINDOW : split[1]]


def _errors(told: Sequence[Array], hours: Array) -> Figures:
    """Return errors of forecasts [96, 7] made after hour 336, 337, ... of `hours`."""
    _, std = etth1.series().statistics()
    truths = [hours[hour : hour + HORIZON] for hour in range(WINDOW, len(hours) - HORIZON + 1)]
    errors = [(one.astype(np.float64) - truth) / std for one, truth in zip(told, truths, strict=True)]
    return {
        "metric": "mse",
        "value": float(np.mean([(one**2).mean() for one in errors])),
        "mae": float(np.mean([np.abs(one).mean() for one in errors])),
        "n": len(errors),
    }


def seasons(seed: int, hours: int) -> Array:
    """Return a synthetic series float32 [hours, 7]: days, weeks and noise at made-up levels."""
    rng = np.random.default_rng(seed)
    time = np.arange(hours)[:, None]
    day = np.sin(2 * np.pi * (time / 24 + rng.random(SERIES)))
    week = np.sin(2 * np.pi * (time / 168 + rng.random(SERIES)))
    noise = rng.standard_normal((hours, SERIES)) * 0.2
    level = np.array([8, 2, 5, 1, 3, 1, 17]) + (day + 0.5 * week + noise) * 2
    return level.astype(np.float32)
