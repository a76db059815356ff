"""The composition: from settings to a server that serves, top to bottom, and its end in two stages."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .call import Call, Listener
from .callers import Callers
from .config import ServerConfig
from .errors import PlatformError
from .front_end import FrontSettings
from .loader import Loader
from .metrics import ServerMetrics
from .metrics_port import MetricsPort
from .model_runner import choose_provider
from .oip import servicer as oip
from .oip.inference import Inferences, Shared
from .oip.sequences import Sequences
from .oip.shared_memory import Regions
from .pending import PendingBytes
from .predict import Predicts
from .repository import ModelRepository
from .resume_token import TokenSealer
from .rollout import Rollout
from .sequence import Ending
from .servicer import SERVICE, Servicer
from .stream import StreamLimits, Streams
from .tls import Tls, TlsFiles
from .tracing import Traces
from .transport import StreamPlaces, Terms, Transport, transport

log = logging.getLogger("tenuto.server")

# Names of the health service, so that a draining server stays alive and is not ready.
LIVENESS = "liveness"
READINESS = "readiness"
# Exit status after a run that did not return; and when no run succeeds any more.
HUNG, BROKEN = 70, 71
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Threads that decode pictures, and read large requests.
_READERS = 2
_THREAD_PREDICTS = 24
# Pool threads beyond those that waiting Predicts may hold on gRPC's server, for health, models and refusals.
_SPARE_THREADS = 8
# What the end takes beyond the grace at most: for each engine whose run goes on; for the last replies.
_JOIN_SECONDS, _LAST_REPLIES_SECONDS = 0.5, 1.0
_END_SECONDS = 0.01
# How often to look for other token keys, and for streams that carry nothing.
_LOOK_SECONDS = 1.0
# The main thread waits that long at a time, so that a signal is always seen.
_SIGNAL_SECONDS = 0.2


class Server:
    """A server that serves from `start` on.

    Raises (when built): ConfigInvalid, PlatformError (port in use, CUDA demanded but not loadable),
    ModelInvalid if there is no model at all that serves.
    """

    def __init__(self, config: ServerConfig, version: str) -> None:
        self.config = config
        self.metrics = ServerMetrics(version)
        self._pending = PendingBytes(config.max_pending_bytes)
        self.metrics.pending_bytes = lambda: self._pending.bytes
        self.metrics.pending_bytes_limit = config.max_pending_bytes
        self._sealer = TokenSealer(
            config.token_key_file,
            lifetime_seconds=config.token_seconds,
            max_bytes=config.max_token_bytes if config.large_states == "refuse" else config.max_message_bytes,
        )
        self.provider = choose_provider(config.device)
        config.check_front_ends()
        self._tls = _tls(config)
        self._callers = Callers(config.callers)
        self._traces = (
            Traces(config.otlp_endpoint, config.trace_chunks, version) if config.otlp_endpoint else None
        )
        self.metrics.unauthenticated = lambda: self._callers.refused
        self._stopped = threading.Event()
        self._signals = 0
        self._to_send = 0.0  # sequences that may be sent elsewhere, and were not
        _check_port(config.host, config.port)
        self._streams = StreamPlaces(mode=config.transport, max_streams=config.max_streams)
        # Where each of them holds a thread, and nothing bounds the bytes that they bring, fewer may wait.
        most = config.max_predicts
        self._most_predicts = min(most, _THREAD_PREDICTS) if self._streams.mode == "threads" else most
        self._transport = transport(
            self._streams,
            Terms(
                services=(SERVICE, oip.SERVICE),
                threads=_SPARE_THREADS + (self._most_predicts if self._streams.mode == "threads" else 0),
                max_message_bytes=config.max_message_bytes,
                max_pending_bytes=config.max_pending_bytes,
                tls=self._tls,
                check=self._callers.identify,
                front=_front_settings(config),
            ),
        )
        fronts = self._transport.front_ends
        if fronts is not None:
            self.metrics.front_ends = lambda: fronts.alive
            self.metrics.front_ends_lost = lambda: fronts.lost
        self.metrics.open_streams = lambda: self._streams.open_streams
        self.metrics.streams_refused = lambda: self._streams.refused
        self.metrics.open_streams_limit = self._streams.max_streams
        self.metrics.waiting_predicts_limit = self._most_predicts
        loader = Loader(
            config,
            self.provider,
            self._pending,
            self._sealer,
            self._transport.flush,
            self._transport.defer,
        )
        repository = ModelRepository(config.repository)
        self.rollout = Rollout(repository, loader, self.metrics, max_age_seconds=config.max_age_seconds)
        self.rollout.load_newest()
        self.catalogue = self.rollout.catalogue
        limits = StreamLimits(config.window, config.idle_seconds, max_generate=config.max_generate)
        self._conversations = Streams(
            self.catalogue,
            self._pending,
            self.metrics,
            limits,
            self._sealer.unseal,
            self._callers,
            self._traces,
        )
        self.health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(2, "health")
        )
        self._register()
        self.port = _bind(self._transport, config.host, config.port)
        try:
            self._second = self._open_metrics_port()
        except PlatformError:
            self._transport.stop(0.0)
            raise
        self.metrics_port = self._second.port

    def _register(self) -> None:
        """All methods but the stream."""
        self._predicts = predicts = Predicts(
            self.catalogue,
            self._pending,
            most=self._most_predicts,
            is_draining=lambda: self.metrics.draining,
            readers=ThreadPoolExecutor(_READERS, "predict"),
            callers=self._callers,
            refused=self.metrics.refuse,
        )
        self.metrics.waiting_predicts = lambda: predicts.waiting
        self.metrics.paced_streams = lambda: self._conversations.paced
        self._transport.listen(f"/{SERVICE}/Predict", predicts.open)
        self._transport.listen_to_streams(f"/{SERVICE}/Stream", self._open_stream)
        servicer = Servicer(
            self.catalogue, self._callers, self.rollout if self.config.model_control else None
        )
        server: Any = self._transport  # takes handlers as a grpc.Server does, and is none
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, servicer.handlers()),))
        self._register_oip(server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        names = (SERVICE, oip.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    def _register_oip(self, server: Any) -> None:
        """The Open Inference Protocol."""
        config = self.config
        self._inferences = Inferences(
            Shared(
                catalogue=self.catalogue,
                sequences=Sequences(config.idle_seconds, self._pending),
                predicts=self._predicts,
                regions=Regions(config.shared_memory, config.max_message_bytes),
                pending=self._pending,
                refused=self.metrics.refuse,
                is_draining=lambda: self.metrics.draining,
            ),
            self._callers,
        )
        self._transport.listen(f"/{oip.SERVICE}/ModelInfer", self._inferences.open_unary)
        self._transport.listen_to_streams(f"/{oip.SERVICE}/ModelStreamInfer", self._inferences.open_stream)
        site = oip.Site(
            version=self.metrics.version,
            is_ready=lambda: self._is(READINESS),
            idle_seconds=config.idle_seconds,
            control=self.rollout if config.model_control else None,
        )
        handlers = oip.OipServicer(self._inferences.shared, site, self._callers).handlers()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(oip.SERVICE, handlers),))

    def _open_metrics_port(self) -> MetricsPort:
        """Raises: PlatformError."""
        host, port = self.config.host, self.config.metrics_port
        fronts = self._transport.front_ends
        probes = {
            "/livez": lambda: self._is(LIVENESS),
            "/readyz": lambda: self._is(READINESS) and (fronts is None or fronts.alive > 0),
        }
        try:
            return MetricsPort(self.metrics, host, port, probes)
        except OSError as error:
            raise _in_use(host, port, "--metrics-port", error.strerror or "") from error

    def _is(self, name: str) -> bool:
        """Whether that service of health is SERVING."""
        request = health_pb2.HealthCheckRequest(service=name)
        nobody: Any = _Nobody()
        return bool(self.health.Check(request, nobody).status == _SERVING)

    def _open_stream(self, call: Call) -> Listener:
        return self._conversations.open(call)

    @property
    def ready_line(self) -> str:
        """What `tenuto serve` prints once it serves."""
        models = " ".join(f"{s.manifest.name}/{s.engine.version}" for s in self.catalogue.served)
        return (
            f"tenuto serving on {self.config.host}:{self.port}, "
            f"metrics on http://{self.config.host}:{self.metrics_port}/metrics, {self.provider}: {models}"
        )

    def start(self) -> None:
        self.rollout.start(self.config.poll_seconds)
        self._transport.start()
        threading.Thread(target=self._watch_runs, name="watchdog", daemon=True).start()
        threading.Thread(target=self._look_around, name="housekeeper", daemon=True).start()
        for name in ("", SERVICE, oip.SERVICE, LIVENESS, READINESS):
            self.health.set(name, _SERVING)

    def stop(self, grace_seconds: float | None = None) -> None:
        """Refuses new sequences, sends the live ones away for `grace_seconds` at most, and stops."""
        grace = self.config.drain_seconds if grace_seconds is None else grace_seconds
        for name in (READINESS, SERVICE, oip.SERVICE, ""):  # before the first refusal
            self.health.set(name, _NOT_SERVING)
        if self.config.drain_notice_seconds:  # whoever asks now and then must hear of it first
            self._stopped.wait(self.config.drain_notice_seconds)
        self.metrics.draining = True
        self.rollout.stop()  # from here on there are no other engines than these
        for engine in self.catalogue.engines:
            engine.drain()
        deadline = time.monotonic() + grace
        for engine in self.catalogue.engines:
            while not engine.emptied.wait(min(_SIGNAL_SECONDS, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    break
        for engine in self.catalogue.engines:
            engine.stop(Ending.DRAINING, join_seconds=_JOIN_SECONDS)
        self.rollout.join(_JOIN_SECONDS)
        self._stopped.set()
        # The last replies, tokens among them, are still on their way: a stream ends behind its own.
        self._end_streams()
        while self._streams.open_streams and time.monotonic() < deadline:
            time.sleep(_END_SECONDS)
            self._end_streams()  # those who came back at once
        # For Predicts, and for the streams that others keep open: those who watch our health, say.
        self._transport.stop(_LAST_REPLIES_SECONDS).wait()
        self._predicts.close()
        self._inferences.shared.regions.close()
        if self._traces is not None:
            self._traces.close()
        self._second.close()

    def _end_streams(self) -> None:
        self._conversations.leave()
        self._inferences.leave()

    @property
    def lingers(self) -> bool:
        """Whether a thread of ours is still in the middle of something after `stop`."""
        threads = ("engine-", "rollout", "housekeeper")
        return any(thread.name.startswith(threads) for thread in threading.enumerate())

    def catch_signals(self) -> None:
        """SIGTERM and SIGINT from now on: the first ends `serve_until_signal`, the second the process."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self._signals += 1
            if self._signals > 1:
                os._exit(128 + number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handle)

    def serve_until_signal(self) -> None:
        """Runs until a signal, then stops. `catch_signals` comes first."""
        # Python runs handlers between two steps of this thread: a wait without end may miss one that comes
        # while it begins.
        while not self._signals:
            self._stopped.wait(_SIGNAL_SECONDS)
        live = sum(e.metrics.active_sequences for e in self.catalogue.engines)
        log.info("stopping: %d live sequences are sent away, for up to %g s", live, self.config.drain_seconds)
        self.stop()
        log.info("stopped")

    def _watch_runs(self) -> None:
        """A run that does not return holds its whole model: better to leave, and let clients go elsewhere."""
        while not self._stopped.wait(min(1.0, self.config.run_seconds / 4)):
            self._look_at_runs()  # by a method: what waits here must not keep an engine in memory

    def _look_around(self) -> None:
        """What may wait for a volume that does not answer, and so must not hold the watchdog up."""
        while not self._stopped.wait(_LOOK_SECONDS):
            try:
                self._conversations.expire(time.monotonic())
                self._rebalance()
                self._sealer.reload()
                if self._callers.reload():
                    self._conversations.drop_unknown()
                    self._inferences.drop_unknown()
                if self._tls is not None:
                    self._tls.reload()
            except Exception:  # the next look may go well, and nobody else takes this one
                log.exception("a look for keys, callers, certificates and silent streams met a bug")

    def _rebalance(self) -> None:
        """Sends sequences elsewhere while this server is fuller than it should be; called every second."""
        config = self.config
        self._to_send = min(self._to_send, 1.0) + config.rebalance_per_second * _LOOK_SECONDS
        count = int(self._to_send)
        if config.rebalance_above and count:
            self._to_send -= count
            for engine in self.catalogue.engines:
                engine.rebalance(config.rebalance_above, count, config.rebalance_age_seconds)

    def _look_at_runs(self) -> None:
        for engine in self.catalogue.engines:
            since = engine.running_since
            if since and time.monotonic() - since > self.config.run_seconds:
                seconds = self.config.run_seconds
                self._leave(f"a run of {engine.where} takes more than {seconds:g} s", HUNG)
            if engine.broken:
                self._leave(f"{engine.where} is broken: {engine.broken}", BROKEN)

    def _leave(self, why: str, status: int) -> None:
        """At once: whoever has sequences here goes on elsewhere, as after a crash."""
        self.health.set(LIVENESS, _NOT_SERVING)
        log.critical("%s; leaving with status %d", why, status)
        os._exit(status)


def _tls(config: ServerConfig) -> Tls | None:
    """Raises: ConfigInvalid."""
    config.check_encryption()
    if config.tls_cert is None or config.tls_key is None:
        return None
    return Tls(TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca))


def _front_settings(config: ServerConfig) -> FrontSettings | None:
    """What front ends are told, if there are any."""
    if not config.front_ends:
        return None
    files = (str(config.tls_cert), str(config.tls_key), str(config.tls_client_ca or ""))
    return FrontSettings(
        count=config.front_ends,
        services=(SERVICE, oip.SERVICE),
        max_message_bytes=config.max_message_bytes,
        max_pending_bytes=config.max_pending_bytes,
        tls=files if config.tls_cert else None,
        log_format=config.log_format,
        log_level=config.log_level,
    )


def _check_port(host: str, port: int) -> None:
    """Finds out before the models are loaded that the port is in use.

    Raises: PlatformError.
    """
    if not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _in_use(host, port, "--port", error.strerror or "") from error


def _in_use(host: str, port: int, flag: str, why: str) -> PlatformError:
    return PlatformError(
        f"cannot listen on {host}:{port}: {why or 'in use'}; choose another {flag}, 0 takes a free one"
    )


def _bind(server: Transport, host: str, port: int) -> int:
    try:
        return server.bind(host, port)
    except (OSError, RuntimeError) as error:
        raise _in_use(host, port, "--port", getattr(error, "strerror", "")) from error


class _Nobody:
    """Asks for our own health, and does not mind that it is not known yet."""

    def set_code(self, _: grpc.StatusCode) -> None: ...
