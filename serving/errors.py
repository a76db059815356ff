"""What can go wrong, in the server's own words.

Nothing here knows of gRPC: `status.STATUS` is the one table that maps these classes to statuses. A class's
`reason` is what a program reads; the text is for people and says what, where, expected, got, what to do.

    TenutoError
      UnknownModel  UnknownSequence  ModelNotReady  PoolFull  Overloaded  ServerDraining  DeadlinePassed
      StreamIdle  NotOpen  AlreadyOpen  StepGap  TooLarge
      WrongInput  WrongDtype  WrongShape  WrongEncoding  OutOfRangeValue  NotFinite
      WrongMessage  WrongSetting  NotStateless  NotSupported  TokenInvalid  Unauthenticated  NotAnOperator
      RateExceeded
      StateNotFinite  RunFailed
      ManifestInvalid  ModelInvalid  ConfigInvalid  PlatformError      (at start, never sent to a client)
"""

from __future__ import annotations

import re
from typing import ClassVar

_LONGEST_TEXT = 1000
# Characters that could pass for other lines, or steer a terminal. A text may have lines of its own.
_STRANGE = re.compile(r"[^\n\x20-\x7e]")


def _escaped(found: re.Match[str]) -> str:
    """As Python writes it, where it cannot be printed."""
    return found[0] if found[0].isprintable() else repr(found[0])[1:-1]


class TenutoError(Exception):
    """The root of every error that the server raises on purpose."""

    reason: ClassVar[str] = "INTERNAL_BUG"
    retry_after_ms: int = 0

    def __init__(self, text: str = "") -> None:
        # A text may quote what a client sent, or a file says, and has to fit into gRPC's 8 KiB of metadata,
        # twice.
        if not text.isprintable():
            text = _STRANGE.sub(_escaped, text[: 2 * _LONGEST_TEXT])
        super().__init__(text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …")


class UnknownModel(TenutoError):
    reason = "UNKNOWN_MODEL"


class ModelNotReady(TenutoError):
    reason = "MODEL_NOT_READY"


class PoolFull(TenutoError):
    """Every slot or queue place is taken; nothing was queued."""

    reason = "POOL_FULL"

    def __init__(self, text: str, retry_after_ms: int = 1000) -> None:
        super().__init__(text)
        self.retry_after_ms = retry_after_ms


class Overloaded(TenutoError):
    """The engine answers the sequences it has too late; a new one was not admitted."""

    reason = "OVERLOADED"
    retry_after_ms = 1000  # the figures are those of a second


class ServerDraining(TenutoError):
    reason = "DRAINING"


class UnknownSequence(TenutoError):
    reason = "UNKNOWN_SEQUENCE"


class DeadlinePassed(TenutoError):
    """The caller's deadline passed before the answer was there; the work was dropped."""

    reason = "DEADLINE_PASSED"


class StreamIdle(TenutoError):
    """A stream carried no sequence for too long."""

    reason = "STREAM_IDLE"


class NotOpen(TenutoError):
    reason = "NOT_OPEN"


class AlreadyOpen(TenutoError):
    reason = "ALREADY_OPEN"


class StepGap(TenutoError):
    reason = "STEP_GAP"


class TooLarge(TenutoError):
    reason = "TOO_LARGE"


class WrongInput(TenutoError):
    reason = "WRONG_INPUT"


class WrongDtype(TenutoError):
    reason = "WRONG_DTYPE"


class WrongShape(TenutoError):
    reason = "WRONG_SHAPE"


class WrongEncoding(TenutoError):
    reason = "WRONG_ENCODING"


class OutOfRangeValue(TenutoError):
    reason = "OUT_OF_RANGE_VALUE"


class NotFinite(TenutoError):
    reason = "NOT_FINITE"


class WrongMessage(TenutoError):
    reason = "WRONG_MESSAGE"


class WrongSetting(TenutoError):
    reason = "WRONG_SETTING"


class NotStateless(TenutoError):
    reason = "NOT_STATELESS"


class NotSupported(TenutoError):
    reason = "NOT_SUPPORTED"


class TokenInvalid(TenutoError):
    reason = "TOKEN_INVALID"


class Unauthenticated(TenutoError):
    """The call shows no token, or none that is known."""

    reason = "UNAUTHENTICATED"


class NotAnOperator(TenutoError):
    """The caller is known, and may not do that."""

    reason = "NOT_AN_OPERATOR"


class RateExceeded(TenutoError):
    """The caller asks more often than it may."""

    reason = "RATE_EXCEEDED"

    def __init__(self, text: str, retry_after_ms: int = 1000) -> None:
        super().__init__(text)
        self.retry_after_ms = retry_after_ms


class StateNotFinite(TenutoError):
    reason = "STATE_NOT_FINITE"


class RunFailed(TenutoError):
    reason = "RUN_FAILED"


class ManifestInvalid(TenutoError):
    reason = "MANIFEST_INVALID"


class ModelInvalid(TenutoError):
    reason = "MODEL_INVALID"


class ConfigInvalid(TenutoError):
    reason = "CONFIG_INVALID"


class PlatformError(TenutoError):
    """The machine lacks something that the configuration demands, e.g. a CUDA library or a free port."""

    reason = "PLATFORM"
