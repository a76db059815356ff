"""ETTh1: an electricity transformer's six loads and its oil temperature, hourly for two years.

Licence: CC BY-ND 4.0 (github.com/zhouhaoyi/ETDataset): the file may be passed on unmodified only.
Everyone splits it into 12, 4 and 4 months of 30 days and scores on values z-scored by the mean and
standard deviation of the training part; inputs may reach back into the split before.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import store

LICENCE = "CC-BY-ND-4.0"
URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"
CHECKSUM = "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
# Row ranges [start, stop) of the standard split; the 3,020 rows after it are left unused.
TRAIN = (0, 8640)
VALIDATION = (8640, 11520)
TEST = (11520, 14400)


@dataclass(frozen=True, eq=False)
class EtthSeries:
    """`values` float32 [17420, 7] in the columns' own units; `dates` datetime64[h] [17420]."""

    values: NDArray[np.float32]
    columns: tuple[str, ...]
    dates: NDArray[np.datetime64]

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the training part's mean and standard deviation, each float32 [7]."""
        train = self.values[slice(*TRAIN)].astype(np.float64)
        return train.mean(0).astype(np.float32), train.std(0).astype(np.float32)


def series() -> EtthSeries:
    """Return the whole series, 17,420 hours from 2016-07-01 00:00."""
    path = store.locate("etth1", "ETTh1.csv", [URL])
    content = path.read_bytes()
    store.check("etth1", store.sha256(content), CHECKSUM, path)
    head, *rows = content.decode("ascii").splitlines()
    columns = tuple(head.split(",")[1:])
    cells = [row.split(",") for row in rows if row]
    values = np.array([row[1:] for row in cells], np.float64).astype(np.float32)
    dates = np.array([row[0] for row in cells], "datetime64[h]")
    return EtthSeries(values, columns, dates)
