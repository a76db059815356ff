"""How a client connects and how long it waits; checked when built."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import invalid

_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")
_LISTS = ("ipv4:", "ipv6:")  # gRPC's names with commas of their own


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one client. Times in seconds, sizes in bytes.

    Raises InvalidInput(reason="WRONG_SETTING") naming the field, what it may be and what it was.
    """

    # "host:port", or a gRPC name such as "dns:///tenuto:8001" or "unix:/run/tenuto"; several behind commas
    target: str
    timeout_seconds: float = 10.0  # for a unary call, and for a stream to open
    reply_seconds: float | None = 30.0  # for an output that is owed; None: for ever
    keepalive_seconds: float = 30.0  # between pings while a call is open; the server must permit it
    max_message_bytes: int = 64 << 20
    buffer_bytes: int = 64 << 20  # outputs of one stream that may wait unread
    resume_seconds: float = 30.0  # for a lost stream to be open again; 0: it is an error at once
    replay_bytes: int = 16 << 20  # chunks of one stream that are kept to be sent again
    poison_losses: int = 2  # lost streams at one step, after which it is not sent any more
    token: str | Callable[[], str] = field(default="", repr=False)  # who calls; asked before every call

    def __post_init__(self) -> None:
        for target in self.targets:
            _check_target(target)
        for name in ("timeout_seconds", "reply_seconds", "keepalive_seconds"):
            value = getattr(self, name)
            if name == "reply_seconds" and value is None:
                continue
            check_seconds(name, value)
        if not _is_seconds(self.resume_seconds):
            raise _wrong("resume_seconds", "a number of seconds, or 0 for never", self.resume_seconds)
        if not callable(self.token):
            self.metadata()
        for name in ("max_message_bytes", "buffer_bytes", "replay_bytes", "poison_losses"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise _wrong(name, "an integer from 1 to 2147483647", value)

    @property
    def targets(self) -> tuple[str, ...]:
        """Each server, or name of servers, of its own."""
        if self.target.startswith(_LISTS):
            return (self.target,)
        return tuple(target.strip() for target in self.target.split(","))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what goes with each call: the token, if there is one.

        Raises InvalidInput(reason="WRONG_SETTING") for one that no header can hold, which is not quoted, and
        for a function that raises.
        """
        try:
            token = self.token() if callable(self.token) else self.token
        except Exception as error:
            raise invalid(f"setting token: {error}", "WRONG_SETTING") from error
        if not isinstance(token, str):
            raise _wrong("token", "text, or a function that returns it", type(token).__name__)
        if not re.fullmatch(r"[!-~]*", token):
            text = "setting token: expected ASCII without spaces, got other characters among its"
            raise invalid(f"{text} {len(token)}", "WRONG_SETTING")
        return (("authorization", f"Bearer {token}"),) if token else ()

    def channel_options(self, target: str) -> list[tuple[str, int | str]]:
        """Return gRPC's channel arguments for one of the targets."""
        options: list[tuple[str, int | str]] = [
            # Where a name has several addresses, each gets its share of the calls, and a dead one none.
            ("grpc.lb_policy_name", "round_robin"),
            # gRPC's own pause between two attempts to connect grows to 120 s; a server that is back
            # would not be seen within resume_seconds.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # A lost connection has its name asked for again, but 30 s after the last time at the earliest by
            # gRPC's default: resume_seconds may be over then. 2 s is the longest pause between two resumes.
            ("grpc.dns_min_time_between_resolutions_ms", 2000),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", 10_000),
            # Ping during calls only, and then however little is said.
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        if target.startswith(_LOOPBACK):
            options.append(("grpc.enable_http_proxy", 0))
        return options


def _check_target(target: str) -> None:
    # A gRPC name with its scheme.
    if target.startswith(_LISTS) or re.match(r"[a-z0-9-]+:(//|/|[^0-9])", target):
        return
    port = re.fullmatch(r"(?:\[[^\]]+\]|[^:\[\]/\s]+):(\d{1,5})", target)
    if port is None or not 1 <= int(port[1]) <= 65535:
        expected = "'host:port', e.g. '127.0.0.1:8001' or '[::1]:8001', or several behind commas"
        raise _wrong("target", expected, target)


def check_seconds(name: str, value: object) -> None:
    """Raise InvalidInput(reason="WRONG_SETTING") unless that is a time to wait."""
    if not _is_seconds(value) or value == 0:
        raise _wrong(name, "a number of seconds above 0", value)


def _is_seconds(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0  # type: ignore[arg-type,operator]


def _wrong(name: str, expected: str, got: object) -> Exception:
    return invalid(f"setting {name}: expected {expected}, got {got!r}", "WRONG_SETTING")
