"""Where data files come from: the folder named by TENUTO_DATA, or a download into a cache.

With `TENUTO_DATA=/path` a file is read from `/path/<data set>/<file>` and nothing is downloaded.
Without it the file is downloaded once into pooch's cache folder for `tenuto`. Either way the
loaders check the content, so a wrong file is refused wherever it came from.
"""

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pooch

VARIABLE = "TENUTO_DATA"


class DataUnavailable(RuntimeError):
    """A data file is neither in TENUTO_DATA nor downloadable; the text says what to do."""


class ChecksumMismatch(RuntimeError):
    """A data file was found, but its content is not the published one."""


def locate(data_set: str, filename: str, urls: Sequence[str]) -> Path:
    """Return the path of one file of a data set.

    `urls` are tried in order when TENUTO_DATA is not set and the cache lacks the file.
    Raises DataUnavailable, naming the file, its addresses and the ways to supply it.
    """
    root = os.environ.get(VARIABLE)
    if root:
        path = Path(root) / data_set / filename
        if not path.is_file():
            raise DataUnavailable(
                f"{data_set}: {VARIABLE} is set, but it has no file {data_set}/{filename}; "
                f"put it there (from {' or '.join(urls)}), or unset {VARIABLE} to download it"
            )
        return path
    return _download(data_set, filename, urls)


def _download(data_set: str, filename: str, urls: Sequence[str]) -> Path:
    folder = Path(pooch.os_cache("tenuto")) / data_set
    cause: Exception | None = None
    for url in urls:
        try:
            # The loader checks the content itself: archives are not byte-stable everywhere.
            found = pooch.retrieve(
                url,
                known_hash=None,
                fname=filename,
                path=folder,
                downloader=pooch.HTTPDownloader(progressbar=find_spec("tqdm") is not None, timeout=30),
            )
            return Path(found)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            cause = error
    raise DataUnavailable(
        f"{data_set}: {filename} is not in the cache and could not be downloaded from "
        f"{' or '.join(urls)} ({type(cause).__name__}); go online, or set {VARIABLE} to a folder "
        f"that has {data_set}/{filename}"
    ) from cause


def sha256(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def check(what: str, digest: str, expected: str, path: Path) -> None:
    """Raise ChecksumMismatch unless `digest` is the `expected` one; `path` is where it was read."""
    if digest != expected:
        raise ChecksumMismatch(
            f"{what}: {path.name} has sha256 {digest}, expected {expected}; "
            f"delete or replace the file ({path})"
        )
