"""Which runner a model gets: one that is fed its states or one whose graph keeps them, in which precision."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import NotSupported
from .manifest import Manifest
from .model_runner import CUDA, ModelRunner
from .repository import ModelFiles

if TYPE_CHECKING:
    from .graph_pool import GraphRunner

    AnyRunner = ModelRunner | GraphRunner

log = logging.getLogger("tenuto.runners")

PoolKind = Literal["numpy", "graph"]
BufferKind = Literal["fresh", "kept"]


@dataclass(frozen=True)
class RunSettings:
    """How models are run. The child process that checks them runs them in the same way."""

    provider: str
    threads: int = 0  # as ModelRunner takes it
    pool: PoolKind = "numpy"
    buffers: BufferKind = "fresh"


def open_runner(
    files: ModelFiles, settings: RunSettings, max_sequences: int, max_bytes: int = 0
) -> AnyRunner:
    """A graph that cannot keep its states is fed them; the log says why.

    Raises: what ModelRunner raises; NotSupported if the manifest says float16 and nothing in the graph can be
    halved.
    """
    where = files.folder.where
    model, manifest, how = files.model, files.manifest, settings
    same: dict[str, Any] = {
        "provider": how.provider, "threads": how.threads, "kept": how.buffers == "kept"
    }  # fmt: skip
    plain = ModelRunner(model, manifest, where, **same)
    precision = plain.manifest.precision
    if precision != "float32" and not reduced(plain.manifest, how):
        log.info("%s: %s is for CUDA; on the CPU it is computed in float32", where, precision)
    elif precision == "float16":
        model = _halved(model, where)
        plain = ModelRunner(model, plain.manifest, where, **same)
    if how.pool == "numpy" or not plain.manifest.states:
        return plain
    from .graph_pool import GraphRunner  # it takes onnx along, which few need

    try:
        return GraphRunner(model, plain, max_sequences, max_bytes)
    except NotSupported as error:
        log.info("%s: %s", where, error)
        return plain


def reduced(manifest: Manifest, settings: RunSettings) -> bool:
    """Whether the model runs in fewer bits than its golden steps were computed in."""
    return manifest.precision != "float32" and settings.provider == CUDA


def _halved(model: bytes, where: str) -> bytes:
    """Raises: NotSupported if nothing in the graph can be halved."""
    from .precision import halved

    return halved(model, where)
