"""Which runner a model gets: one that is fed its states, or one whose graph keeps them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from .errors import NotSupported, PlatformError
from .model_runner import ModelRunner
from .repository import ModelFiles

if TYPE_CHECKING:
    from .graph_pool import GraphRunner

log = logging.getLogger("tenuto.runners")

PoolKind = Literal["numpy", "graph"]


@dataclass(frozen=True)
class RunSettings:
    """How models are run. The child process that checks them runs them in the same way."""

    provider: str
    threads: int = 0  # as ModelRunner takes it
    pool: PoolKind = "numpy"


def open_runner(
    files: ModelFiles, settings: RunSettings, max_sequences: int, max_bytes: int = 0
) -> ModelRunner | GraphRunner:
    """A graph that cannot keep its states is fed them; the log says why.

    Raises: what ModelRunner raises; PlatformError if a package is missing.
    """
    where = files.folder.where
    plain = ModelRunner(
        files.model, files.manifest, where, provider=settings.provider, threads=settings.threads
    )
    if settings.pool == "numpy" or not plain.manifest.states:
        return plain
    if find_spec("onnx") is None:
        raise PlatformError("--pool graph needs the package onnx; install 'tenuto[gpu]', or use --pool numpy")
    from .graph_pool import GraphRunner  # it takes onnx along, which nobody else needs

    try:
        return GraphRunner(files.model, plain, max_sequences, max_bytes)
    except NotSupported as error:
        log.info("%s: %s", where, error)
        return plain
