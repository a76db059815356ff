"""From a model folder to an engine: checked in a child process, loaded here from the bytes that passed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .catalogue import Served
from .config import ServerConfig
from .engine import Engine
from .errors import ModelInvalid
from .inbox import Defer, never
from .manifest import Manifest, state_schema
from .metrics import ModelMetrics
from .pending import PendingBytes
from .reply import OutputWriter
from .repository import ModelFiles, ModelFolder
from .resume_token import TokenSealer
from .runners import RunSettings, open_runner, reduced
from .snapshot import Checkpoints, token_bytes
from .tensor import Reader
from .vetting import Limits, Verdict, vet

if TYPE_CHECKING:
    from .runners import AnyRunner

log = logging.getLogger("tenuto.loader")


class Loader:
    """Makes engines of folders; it starts none."""

    def __init__(
        self,
        config: ServerConfig,
        provider: str,
        pending: PendingBytes,
        sealer: TokenSealer,
        flush: Callable[[], None] = lambda: None,
        defer: Defer = never,
    ) -> None:
        self._config = config
        self._how = RunSettings(provider, config.threads, config.pool, config.buffers)
        self._pending = pending
        self._sealer = sealer
        self._flush = flush
        self._defer = defer

    def check(
        self, folders: list[ModelFolder], stopping: threading.Event | None = None
    ) -> dict[ModelFolder, Verdict]:
        """What a child process makes of them. It ends when `stopping` is set."""
        config = self._config
        limits = Limits(config.vet_seconds, config.vet_memory_bytes)
        return vet(folders, self._how, limits, stopping)

    def load(self, folder: ModelFolder, verdict: Verdict) -> Served:
        """Raises: TenutoError, with why it is not served."""
        if verdict.why:
            raise ModelInvalid(verdict.why)
        started = time.monotonic()
        files = folder.read()
        if files.fingerprint != verdict.fingerprint:
            raise ModelInvalid(
                f"{folder.where}: its files changed while they were checked; leave versions as they are"
            )
        config, provider = self._config, self._how.provider
        runner = open_runner(files, self._how, config.max_sequences, config.max_state_bytes)
        # The first runs take memory and time that no client should wait for.
        for _ in range(2 if runner.kept else 1):
            runner.run(runner.zero_feeds())
        manifest = runner.manifest
        seconds = time.monotonic() - started
        engine = Engine(
            manifest,
            runner,
            version=folder.version,
            max_sequences=config.max_sequences,
            max_state_bytes=config.max_state_bytes,
            pool=runner.pool,
            bucketed=runner.kept,
            in_flight=config.in_flight,
            resume_reserve=config.resume_reserve,
            checkpoints=self._checkpoints(manifest, files),
            pending=self._pending,
            metrics=ModelMetrics(
                manifest.name,
                folder.version,
                provider,
                load_seconds=seconds,
                nodes=runner.placement.counts(),
                sha256=files.sha256,
            ),
            flush=self._flush,
            defer=self._defer,
        )
        self._tell(files, engine, verdict, runner)
        reader = Reader(manifest, config.max_message_bytes)
        writer, size = OutputWriter(manifest), len(files.model)
        return Served(engine, reader, writer, provider, files.sha256, files.fingerprint, size)

    def _tell(self, files: ModelFiles, engine: Engine, verdict: Verdict, runner: AnyRunner) -> None:
        """How the model runs, and what of it does not run where it was to."""
        provider, precision = self._how.provider, "float32"
        if reduced(engine.manifest, self._how):
            precision = engine.manifest.precision
        golden = "no golden.npz to tell its error"
        if verdict.golden_steps:
            golden = (
                f"{verdict.golden_steps} golden steps replayed, off by at most {verdict.golden_worst:.2g}"
            )
        log.info(
            "%s serves on %s in %s: %d sequences, %.1f MiB of state at most%s, %s, SHA-256 %s",
            files.folder.where,
            provider,
            precision,
            engine.max_sequences,
            engine.state_bytes / 2**20,
            ", which its graph keeps" if runner.pool else "",
            golden,
            files.sha256,
        )
        strays = runner.placement.elsewhere(provider)
        if strays:
            log.warning("%s: %s", files.folder.where, strays)

    def _checkpoints(self, manifest: Manifest, files: ModelFiles) -> Checkpoints:
        """How its sequences are sealed.

        Raises: ModelInvalid if its tokens would be too large.
        """
        config, size = self._config, token_bytes(manifest)
        rarer = -(-size // config.max_token_bytes)
        if size > config.max_message_bytes:
            raise ModelInvalid(
                f"{files.folder.where}: a resume token of it takes up to {size} bytes, a message at most "
                f"{config.max_message_bytes} (--max-message-bytes)"
            )
        if rarer > 1 and config.large_states == "refuse":
            raise ModelInvalid(
                f"{files.folder.where}: a resume token of it takes up to {size} bytes, --max-token-bytes is "
                f"{config.max_token_bytes}; raise that, or set --large-states rarer"
            )
        every, schema = config.checkpoint_every, state_schema(manifest)
        return Checkpoints(self._sealer.seal, files.fingerprint, schema, every, rarer)
