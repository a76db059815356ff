"""Client of Tenuto, an inference server that holds its callers' recurrent state.

    from tenuto import Client

    with Client("127.0.0.1:8001") as client:
        prediction = client.predict("digits", images)          # uint8 [8, 28, 28]
        with client.stream("spoken-digits") as stream:
            for chunk in microphone:                            # int16 [160]
                stream.send(chunk)
                print(next(stream)["log_probabilities"])

`tenuto.aio.Client` is the same for asyncio. Names are loaded at first use, so that `import tenuto`
does not load gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client
    from .errors import (
        InvalidInput,
        NotFound,
        OutputsUnread,
        Overloaded,
        PoisonedChunk,
        ProtocolError,
        Refused,
        ReplyTimeout,
        SequenceEnded,
        SequenceFailed,
        ServerError,
        TenutoError,
        Unavailable,
    )
    from .reply import Loaded, Model, Output, Prediction, Sequence, Timing, Unloaded
    from .sampling import Sampling
    from .stream import Stream

    __version__: str

# Name -> the module that defines it.
_HOME = {
    "Client": "client",
    "Stream": "stream",
    "Loaded": "reply",
    "Model": "reply",
    "Output": "reply",
    "Prediction": "reply",
    "Sampling": "sampling",
    "Sequence": "reply",
    "Timing": "reply",
    "Unloaded": "reply",
    "InvalidInput": "errors",
    "NotFound": "errors",
    "OutputsUnread": "errors",
    "Overloaded": "errors",
    "PoisonedChunk": "errors",
    "ProtocolError": "errors",
    "Refused": "errors",
    "ReplyTimeout": "errors",
    "SequenceEnded": "errors",
    "SequenceFailed": "errors",
    "ServerError": "errors",
    "TenutoError": "errors",
    "Unavailable": "errors",
}

__all__ = [
    "Client",
    "InvalidInput",
    "Loaded",
    "Model",
    "NotFound",
    "Output",
    "OutputsUnread",
    "Overloaded",
    "PoisonedChunk",
    "Prediction",
    "ProtocolError",
    "Refused",
    "ReplyTimeout",
    "Sampling",
    "Sequence",
    "SequenceEnded",
    "SequenceFailed",
    "ServerError",
    "Stream",
    "TenutoError",
    "Timing",
    "Unavailable",
    "Unloaded",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tenuto")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
