"""DLinear (Zeng 2023, "Are transformers effective for time series forecasting?"): a baseline for forecasts.

Each series is cut into a moving mean and what is left; each of the two is mapped linearly to the hours to
come, with the same weights for all series.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .graph import Array
from .progress import progress

KERNEL = 25  # hours of the moving mean


class DLinear(nn.Module):
    """Windows float32 [batch, window] to forecasts [batch, horizon]."""

    def __init__(self, window: int, horizon: int) -> None:
        super().__init__()
        self.trend, self.rest = nn.Linear(window, horizon), nn.Linear(window, horizon)
        for layer in (self.trend, self.rest):
            nn.init.constant_(layer.weight, 1 / window)

    def forward(self, windows: Tensor) -> Tensor:
        """Forecast from each window."""
        padded = F.pad(windows[:, None], (KERNEL // 2, KERNEL // 2), mode="replicate")
        mean = F.avg_pool1d(padded, KERNEL, stride=1)[:, 0]
        answer: Tensor = self.trend(mean) + self.rest(windows - mean)
        return answer


def forecaster(train: Array, validation: Array, window: int, horizon: int, epochs: int = 8) -> DLinear:
    """Train on z-scored hours [n, series]; keep the epoch that is best on `validation` [m, series].

    The first `window` hours of `validation` are those before the part that is scored. About 10 CPU seconds.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = DLinear(window, horizon)
    optimizer = torch.optim.Adam(network.parameters(), 5e-4)
    pieces, held = _pieces(train, window + horizon), _pieces(validation, window + horizon)
    best, kept = float("inf"), network.state_dict()
    with progress("DLinear", epochs) as bar:
        for _ in range(epochs):
            for chosen in torch.from_numpy(rng.permutation(len(pieces))).split(256):
                loss = _error(network, pieces[chosen], window)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                error = float(_error(network, held, window))
            if error < best:
                best, kept = error, {name: value.clone() for name, value in network.state_dict().items()}
            bar.update()
    network.load_state_dict(kept)
    return network.eval()


def _pieces(hours: Array, length: int) -> Tensor:
    """Return every stretch of `length` hours of every series, a view [n, length]."""
    stretches = torch.from_numpy(hours).unfold(0, length, 1)
    return stretches.reshape(-1, length)


def _error(network: DLinear, pieces: Tensor, window: int) -> Tensor:
    return F.mse_loss(network(pieces[:, :window]), pieces[:, window:])
