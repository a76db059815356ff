"""Progress bars for long work: on a terminal a bar, elsewhere nothing."""

from typing import Any

from tqdm import tqdm


def progress(what: str, total: int) -> "tqdm[Any]":
    """Return a bar on stderr for `total` steps; a context manager with `update()`."""
    return tqdm(total=total, desc=what, disable=None, dynamic_ncols=True, leave=False)
