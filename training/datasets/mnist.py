"""MNIST handwritten digits (LeCun, Cortes, Burges): 60,000 training and 10,000 test images.

Licence: CC BY-SA 3.0. The checksums are of the uncompressed bytes, so any mirror's .gz will do.
"""

import gzip

import numpy as np
from numpy.typing import NDArray

from . import store

LICENCE = "CC-BY-SA-3.0"
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
CHECKSUMS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
LABELS = tuple("0123456789")

Images = NDArray[np.uint8]
Labels = NDArray[np.uint8]


def train() -> tuple[Images, Labels]:
    """Return (images uint8 [60000, 28, 28], labels uint8 [60000]); 0 is paper, 255 is ink."""
    return _read("train-images-idx3-ubyte"), _read("train-labels-idx1-ubyte")


def test() -> tuple[Images, Labels]:
    """Return (images uint8 [10000, 28, 28], labels uint8 [10000]); 0 is paper, 255 is ink."""
    return _read("t10k-images-idx3-ubyte"), _read("t10k-labels-idx1-ubyte")


def _read(name: str) -> NDArray[np.uint8]:
    path = store.locate("mnist", f"{name}.gz", [f"{mirror}{name}.gz" for mirror in MIRRORS])
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise store.ChecksumMismatch(f"mnist: {path} is not a whole gzip file") from error
    store.check("mnist", store.sha256(content), CHECKSUMS[name], path)
    # IDX: two zero bytes, the type (8: uint8), the rank, then each dimension as big-endian int32.
    rank = content[3]
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
