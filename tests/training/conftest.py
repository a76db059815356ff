"""What the tests of training share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tenuto.training.datasets.store import DataUnavailable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def reachable() -> Callable[[Callable[[], Any]], Any]:
    """Call a loader (or what uses one); skip, with the loader's own words, if it has no data."""

    def call(load: Callable[[], Any]) -> Any:
        try:
            return load()
        except DataUnavailable as missing:
            pytest.skip(str(missing))

    return call


@pytest.fixture
def one_thread() -> Iterator[Any]:
    """Give torch with one thread: the number decides the bytes, so it is part of every recipe."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)
