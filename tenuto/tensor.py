"""Arrays, texts and encoded images to the wire's Tensor, and back."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import ProtocolError, invalid
from .v1 import tenuto_pb2 as pb

Array: TypeAlias = NDArray[Any]
# One input: an array, a text, the bytes of one PNG or JPEG, or those of several that make one batch.
Value: TypeAlias = Array | str | bytes | Sequence[bytes]
# What a model is fed: values by input name, or one value for a model of one input.
Inputs: TypeAlias = Value | Mapping[str, Value]

DTYPES = frozenset(
    {"bool", "float16", "float32", "float64"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
_MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}


def pack(inputs: Inputs | None) -> list[pb.Tensor]:
    """Return the tensors of `inputs`, none of None; a value without a name gets "" (the manifest's order).

    Raises InvalidInput for a dtype that cannot travel, and for bytes that are neither PNG nor JPEG.
    """
    if inputs is None:
        return []
    if isinstance(inputs, Mapping):
        return [_pack_value(name, value) for name, value in inputs.items()]
    return [_pack_value("", inputs)]


def unpack(tensors: Sequence[pb.Tensor]) -> dict[str, Array]:
    """Return name -> array, each writable and in the machine's own byte order.

    Raises ProtocolError where the bytes do not fit dtype and shape.
    """
    return {tensor.name: _unpack_one(tensor) for tensor in tensors}


def encoding(what: str, data: bytes) -> str:
    """Return "png" or "jpeg" by the first bytes of `data`; `what` names it in the InvalidInput."""
    for name, magic in _MAGIC.items():
        if data.startswith(magic):
            return name
    raise invalid(
        f"{what} begins with {data[:8].hex(' ') or 'nothing'}; expected the bytes of a PNG "
        "(89 50 4e 47 …) or JPEG (ff d8 ff …) file; raw numbers go as a numpy array",
        "WRONG_ENCODING",
    )


def _pack_value(name: str, value: Value) -> pb.Tensor:
    if isinstance(value, np.ndarray | np.generic):
        return _pack_array(name, value)
    if isinstance(value, str):
        return pb.Tensor(name=name, dtype="utf8", data=_encoded(name, value))
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        return pb.Tensor(name=name, dtype=encoding(_what(name), data), data=data)
    if isinstance(value, list | tuple) and value and all(isinstance(one, bytes) for one in value):
        return _pack_images(name, value)
    raise invalid(
        f"{_what(name)} is a {type(value).__name__}; expected a numpy array, a text, the bytes of "
        "a PNG or JPEG file, or a list of such bytes; numbers: numpy.asarray(…, dtype)",
        "WRONG_DTYPE",
    )


def _encoded(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{_what(name)} is no text that UTF-8 can hold: {error}", "WRONG_ENCODING") from error


def _pack_array(name: str, array: Any) -> pb.Tensor:
    if array.dtype.name not in DTYPES:
        raise invalid(
            f"{_what(name)} has dtype {array.dtype.name}; expected one of "
            f"{', '.join(sorted(DTYPES))}; convert it with .astype(…)",
            "WRONG_DTYPE",
        )
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return pb.Tensor(name=name, dtype=array.dtype.name, shape=array.shape, data=little.tobytes(order="C"))


def _pack_images(name: str, images: Sequence[bytes]) -> pb.Tensor:
    encodings = {encoding(_what(name), image) for image in images}
    if len(encodings) > 1:
        raise invalid(
            f"{_what(name)} mixes {' and '.join(sorted(encodings))}; one batch holds one "
            "encoding: send one batch of each",
            "WRONG_ENCODING",
        )
    data = b"".join(struct.pack("<I", len(image)) + image for image in images)
    return pb.Tensor(name=name, dtype=encodings.pop(), shape=[len(images)], data=data)


def _what(name: str) -> str:
    return f"input {name!r}" if name else "the input"


def _unpack_one(tensor: pb.Tensor) -> Array:
    if tensor.dtype not in DTYPES:
        raise ProtocolError(
            f"output {tensor.name!r} has dtype {tensor.dtype!r}, which this client does not know; "
            "upgrade the client"
        )
    little = np.dtype(tensor.dtype).newbyteorder("<")
    shape = tuple(tensor.shape)
    if len(tensor.data) != little.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise ProtocolError(
            f"output {tensor.name!r} has {len(tensor.data)} bytes, expected "
            f"{tensor.dtype} {list(shape)}; report this to the server's maintainers"
        )
    return np.frombuffer(tensor.data, little).reshape(shape).astype(tensor.dtype)
