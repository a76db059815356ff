"""Every setting of the server: one frozen object, checked when it is built.

A setting is a flag of `tenuto serve` (`--max-sequences`) and an environment variable
(`TENUTO_MAX_SEQUENCES`); the flag wins. No other module reads the environment.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigInvalid

PREFIX = "TENUTO_"
# Not the server's: data and models for training and tests, the client commands' server.
_NOT_OURS = frozenset(
    f"TENUTO_{name}"
    for name in (
        "DATA",
        "MODELS",
        "SERVER",
        "TIMEOUT_SECONDS",
        "REPLY_SECONDS",
        "TOKEN_FILE",
        "TLS_CA",
        "TLS_CLIENT_CERT",
        "TLS_CLIENT_KEY",
    )
)

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
_LONGEST_SECONDS = 1e9  # more, infinity above all, is nothing that a timer can wait for
Seconds = Annotated[float, Field(gt=0, le=_LONGEST_SECONDS)]
SecondsOrZero = Annotated[float, Field(ge=0, le=_LONGEST_SECONDS)]


class ServerConfig(BaseModel):
    """The settings. Each description is the flag's help text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repository: Annotated[Path, Field(description="folder of models: <model>/<version>/model.onnx")] = Path(
        "exported"
    )
    host: Annotated[str, Field(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[Port, Field(description="gRPC port; 0 takes a free one")] = 8001
    tls_cert: Annotated[
        Path | None,
        Field(description="PEM file of the server's certificate chain; read again when it changes"),
    ] = None
    tls_key: Annotated[Path | None, Field(description="PEM file of its key")] = None
    tls_client_ca: Annotated[
        Path | None, Field(description="PEM file of authorities: clients must show a certificate of one")
    ] = None
    callers: Annotated[
        Path | None,
        Field(description="TOML file of those who may call, with their tokens; read again when it changes"),
    ] = None
    insecure: Annotated[
        bool, Field(description="listen beyond this machine without TLS: behind a proxy, in a closed network")
    ] = False
    metrics_port: Annotated[Port, Field(description="Prometheus port; 0 takes a free one")] = 8002
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="auto takes CUDA where it loads; cuda refuses to start else"),
    ] = "auto"
    threads: Annotated[
        int, Field(ge=0, description="CPU threads inside a run; 0: by the model and the CPUs")
    ] = 0
    max_sequences: Annotated[Positive, Field(description="live sequences per model")] = 4096
    max_state_bytes: Annotated[
        int, Field(ge=0, description="bytes of state per model version; 0: what --max-sequences takes")
    ] = 0
    max_streams: Annotated[Positive, Field(description="open gRPC streams")] = 8192
    max_predicts: Annotated[
        Positive,
        Field(description="unary Predict calls that may wait at once; with --transport threads 24 at most"),
    ] = 256
    max_pending_bytes: Annotated[
        Positive, Field(description="unanswered bytes; above it no stream is read")
    ] = 256 << 20
    max_message_bytes: Annotated[Positive, Field(description="bytes of one request message")] = 64 << 20
    window: Annotated[int, Field(ge=1, le=1024, description="unanswered chunks of one sequence")] = 4
    max_generate: Annotated[
        int, Field(ge=1, le=1_000_000, description="samples that one chunk may have generated")
    ] = 4096
    idle_seconds: Annotated[
        SecondsOrZero, Field(description="a silent sequence ends after that; 0: never")
    ] = 300.0
    run_seconds: Annotated[Seconds, Field(description="a longer run of a model stops the server")] = 30.0
    drain_seconds: Annotated[
        SecondsOrZero, Field(description="live sequences have that long after SIGTERM")
    ] = 30.0
    drain_notice_seconds: Annotated[
        SecondsOrZero,
        Field(description="after SIGTERM, not ready but taking new sequences, until health checks have told"),
    ] = 0.0
    token_key_file: Annotated[
        Path | None,
        Field(description="keys of resume tokens, one a line, the first seals; read again when it changes"),
    ] = None
    token_seconds: Annotated[Seconds, Field(description="a resume token is good for that long")] = 86_400.0
    max_token_bytes: Annotated[
        Positive, Field(description="a model whose resume tokens are larger counts as large")
    ] = 1 << 20
    large_states: Annotated[
        Literal["refuse", "rarer"],
        Field(description="a large model is refused, or sends tokens as much rarer as it is larger"),
    ] = "refuse"
    checkpoint_every: Annotated[
        int, Field(ge=0, le=1_000_000, description="chunks between two resume tokens; 0: only when asked")
    ] = 50
    resume_reserve: Annotated[
        float, Field(ge=0, le=0.9, description="share of the sequences that only those that resume may take")
    ] = 0.1
    rebalance_above: Annotated[
        float,
        Field(ge=0, le=1, description="share of slots in use above which sequences leave; 0: never"),
    ] = 0.0
    rebalance_per_second: Annotated[
        float, Field(gt=0, le=10_000, description="sequences of a model that are sent elsewhere so, at most")
    ] = 5.0
    rebalance_age_seconds: Annotated[
        SecondsOrZero, Field(description="and none that is here for less than that")
    ] = 60.0
    poll_seconds: Annotated[
        SecondsOrZero, Field(description="how often to look for new model versions; 0: at start alone")
    ] = 2.0
    max_age_seconds: Annotated[
        SecondsOrZero, Field(description="sequences stay that long on a version that was replaced; 0: no end")
    ] = 3600.0
    vet_seconds: Annotated[Seconds, Field(description="the check of one model may take that long")] = 120.0
    vet_memory_bytes: Annotated[Positive, Field(description="the check of one model may take that much")] = (
        8 << 30
    )
    model_control: Annotated[
        bool, Field(description="operators may load, unload and reload models by call (`tenuto load MODEL`)")
    ] = False
    shared_memory: Annotated[
        str,
        Field(
            pattern=r"^(/?[A-Za-z0-9._-]*)$",
            description="clients on this machine may register shared memory whose keys begin so; empty: none",
        ),
    ] = ""
    pool: Annotated[
        Literal["numpy", "graph"],
        Field(description="numpy: states are fed to the graph; graph: it keeps them, on its device"),
    ] = "numpy"
    buffers: Annotated[
        Literal["fresh", "kept"],
        Field(
            description="fresh: made for each run; kept: where they are from run to run, for few batch sizes"
        ),
    ] = "fresh"
    in_flight: Annotated[
        int,
        Field(ge=1, le=2, description="batches of a model at once; 2: one is gathered while another runs"),
    ] = 2
    transport: Annotated[
        Literal["auto", "http2", "threads"],
        Field(description="auto is http2, our own server; threads is gRPC's, two threads a stream"),
    ] = "auto"
    front_ends: Annotated[
        int,
        Field(ge=0, le=64, description="processes that receive for this one; 0: it receives by itself"),
    ] = 0
    otlp_endpoint: Annotated[
        str,
        Field(description="URL for traces by OTLP over HTTP, http://host:4318/v1/traces say; empty: none"),
    ] = ""
    trace_chunks: Annotated[Positive, Field(description="one chunk in so many has a span")] = 100
    log_format: Annotated[
        Literal["console", "json"], Field(description="lines for people, or a JSON object each")
    ] = "console"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="log level")] = (
        "info"
    )

    @classmethod
    def build(cls, flags: Mapping[str, Any], environment: Mapping[str, str]) -> ServerConfig:
        """Flags over environment over defaults.

        Raises: ConfigInvalid, naming every setting that is wrong or unknown.
        """
        values: dict[str, Any] = {}
        unknown: list[str] = []
        for variable, text in environment.items():
            if not variable.startswith(PREFIX) or variable in _NOT_OURS:
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name in cls.model_fields and variable == variable_of(name):
                values[name] = text
            else:
                unknown.append(variable)
        if unknown:
            known = ", ".join(variable_of(name) for name in cls.model_fields)
            raise ConfigInvalid(f"unknown setting {', '.join(sorted(unknown))}; known: {known}")
        values.update(flags)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = [(str(e["loc"][0]), e) for e in error.errors()]
            lines = [f"{flag_of(n)} ({variable_of(n)}) is {e['input']!r}: {e['msg']}" for n, e in faults]
            raise ConfigInvalid("; ".join(lines)) from error

    def check_front_ends(self) -> None:
        """Raises: ConfigInvalid."""
        if self.front_ends and self.transport == "threads":
            raise ConfigInvalid("--front-ends belong to our own server: leave --transport threads out")
        if self.front_ends and not hasattr(socket, "SO_REUSEPORT"):
            raise ConfigInvalid(
                "--front-ends share a port, which this system does not let them; leave it out"
            )

    def check_encryption(self) -> None:
        """Whether TLS is whole, or its lack meant. Raises: ConfigInvalid."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigInvalid("--tls-cert and --tls-key come together: give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigInvalid("--tls-client-ca needs --tls-cert and --tls-key")
        if self.tls_cert is None and not self.insecure and not _is_loopback(self.host):
            raise ConfigInvalid(
                f"--host {self.host} is reached from other machines, and without TLS all that comes and goes "
                "can be read on the way: give --tls-cert and --tls-key, or --insecure if something else "
                "protects it"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return PREFIX + name.upper()
