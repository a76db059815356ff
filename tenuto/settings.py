"""How a client connects and how long it waits; checked when built."""

import math
import re
from dataclasses import dataclass

from .errors import invalid

_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one client. Times in seconds, sizes in bytes.

    Raises InvalidInput(reason="WRONG_SETTING") naming the field, what it may be and what it was.
    """

    target: str  # "host:port", or a gRPC name such as "dns:///tenuto:8001" or "unix:/run/tenuto"
    timeout_seconds: float = 10.0  # for a unary call, and for a stream to open
    reply_seconds: float | None = 30.0  # for an output that is owed; None: for ever
    keepalive_seconds: float = 30.0  # between pings while a call is open; the server must permit it
    max_message_bytes: int = 64 << 20
    buffer_bytes: int = 64 << 20  # outputs of one stream that may wait unread

    def __post_init__(self) -> None:
        _check_target(self.target)
        for name in ("timeout_seconds", "reply_seconds", "keepalive_seconds"):
            value = getattr(self, name)
            if name == "reply_seconds" and value is None:
                continue
            if not _is_number(value) or not math.isfinite(value) or value <= 0:
                raise _wrong(name, "a number of seconds above 0", value)
        for name in ("max_message_bytes", "buffer_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise _wrong(name, "an integer from 1 to 2147483647", value)

    def channel_options(self) -> list[tuple[str, int]]:
        """Return gRPC's channel arguments."""
        options = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", 10_000),
            # Ping during calls only, and then however little is said.
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        if self.target.startswith(_LOOPBACK):
            options.append(("grpc.enable_http_proxy", 0))
        return options


def _check_target(target: str) -> None:
    if re.match(r"[a-z0-9-]+:(//|/|[^0-9])", target):  # a gRPC name with its scheme
        return
    port = re.fullmatch(r"(?:\[[^\]]+\]|[^:\[\]/\s]+):(\d{1,5})", target)
    if port is None or not 1 <= int(port[1]) <= 65535:
        raise _wrong("target", "'host:port', e.g. '127.0.0.1:8001' or '[::1]:8001'", target)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(name: str, expected: str, got: object) -> Exception:
    return invalid(f"setting {name}: expected {expected}, got {got!r}", "WRONG_SETTING")
