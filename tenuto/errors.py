"""What the client raises. Every error is a TenutoError; gRPC's own never reach the caller.

    TenutoError
    ├── ServerError            the server, or gRPC on the way to it, refused: code, reason
    │   ├── InvalidInput       the request is wrong, and wrong again if repeated (also a ValueError)
    │   ├── NotFound           no such model, version or sequence
    │   ├── Refused            understood, and not possible now or here
    │   ├── Overloaded         no room: try again after retry_after_seconds
    │   ├── Unavailable        no server there, or it is leaving, or the connection broke
    │   └── SequenceFailed     the model, or the server, failed under this sequence
    ├── SequenceEnded          the server ended the sequence: reason, last_step, resume_token
    ├── PoisonedChunk          a chunk whose server died, each time it was sent: step
    ├── ReplyTimeout           an answer is overdue (also a TimeoutError)
    ├── OutputsUnread          too many outputs wait for the caller to read them
    └── ProtocolError          the server's reply does not fit the protocol

`code` is the name of a gRPC status, e.g. "NOT_FOUND"; `reason` a word in capitals from the table at
the top of proto/tenuto/v1/tenuto.proto, e.g. "UNKNOWN_MODEL", or "" where the server gave none.
"""

# The names of gRPC's status codes, by number.
CODES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)


class TenutoError(Exception):
    """Anything that goes wrong between this client and its server."""


class ServerError(TenutoError):
    """The server, or gRPC on the way to it, refused.

    `message` says what, where, expected and got, and what to do. `retry_after_seconds` is None
    where the server named no time. `resume_token` is where a failed sequence can go on, or b"".
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        retry_after_seconds: float | None = None,
        resume_token: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds
        self.resume_token = resume_token

    def __str__(self) -> str:
        return f"{self.reason or self.code}: {self.message}"


class InvalidInput(ServerError, ValueError):
    """The request is wrong: a name, dtype, shape, encoding, value or size. Do not repeat it."""


class NotFound(ServerError):
    """No such model, version or sequence."""


class Refused(ServerError):
    """Understood, and not possible: not open, a step was skipped, not permitted …"""


class Overloaded(ServerError):
    """Every slot, or the queue, is taken, or the server answers its other sequences too late.

    Try again after `retry_after_seconds`.
    """


class Unavailable(ServerError):
    """No server answers there, it is leaving, the model is not ready, or the connection broke."""


class SequenceFailed(ServerError):
    """The model or the server failed under this sequence, e.g. STATE_NOT_FINITE, RUN_FAILED."""


class SequenceEnded(TenutoError):
    """The server ended the sequence although the client did not ask for it, and it cannot resume.

    `reason` is an Ending of the protocol, e.g. "IDLE_EXPIRED"; `last_step` the last step that was
    answered; `resume_token`, if not b"", is for `client.stream(…, resume_token=…)` to go on with.
    """

    def __init__(
        self, message: str, *, reason: str = "", last_step: int = 0, resume_token: bytes = b""
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.last_step = last_step
        self.resume_token = resume_token


class PoisonedChunk(TenutoError):
    """Streams were lost again and again at the same step; it is not sent to further servers.

    `step` is the first one unanswered: its chunk, or one of those sent right behind it, is what
    no server survived.
    """

    def __init__(self, message: str, *, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class ReplyTimeout(TenutoError, TimeoutError):
    """An answer did not come within `timeout_seconds` (a call) or `reply_seconds` (an output).

    An output is waited for on other servers as well, for `resume_seconds` more.
    """


class OutputsUnread(TenutoError):
    """More than `buffer_bytes` of outputs wait unread. Iterate over the stream, then send again."""


class ProtocolError(TenutoError):
    """The server's reply does not fit the protocol; the two may be of different versions."""


_BY_REASON: dict[str, type[ServerError]] = {
    "TOO_LARGE": InvalidInput,  # RESOURCE_EXHAUSTED on the wire, but repeating it does not help
}
_BY_CODE: dict[str, type[ServerError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "NOT_FOUND": NotFound,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "CANCELLED": Unavailable,  # not by this client: what proxies turn a dead backend into
    "ALREADY_EXISTS": Refused,
    "PERMISSION_DENIED": Refused,
    "UNAUTHENTICATED": Refused,
    "FAILED_PRECONDITION": Refused,
    "OUT_OF_RANGE": Refused,
    "UNIMPLEMENTED": Refused,
}


def refusal(
    message: str,
    *,
    code: str,
    reason: str = "",
    retry_after_ms: int = 0,
    resume_token: bytes = b"",
    otherwise: type[ServerError] = ServerError,
) -> ServerError:
    """Return the error for a status: by its reason, else by its code, else `otherwise`."""
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, otherwise)
    return kind(
        message,
        code=code,
        reason=reason,
        retry_after_seconds=retry_after_ms / 1000 if retry_after_ms else None,
        resume_token=resume_token,
    )


def drains(error: TenutoError) -> bool:
    """Whether a server refused because it leaves: behind the same name another one may stand."""
    return isinstance(error, ServerError) and error.reason == "DRAINING"


def invalid(message: str, reason: str) -> InvalidInput:
    """Return the error for what the client itself finds wrong before it sends."""
    return InvalidInput(message, code="INVALID_ARGUMENT", reason=reason)
