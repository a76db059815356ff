"""The protocol's words for dtypes, and tensors whose elements stand in the message one by one."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from tenuto.oip import inference_pb2 as pb

from .refusal import Refusal

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}
BYTES = "BYTES"
# Where InferTensorContents keeps the elements of each. FP16 has no field: it comes as raw bytes alone.
_FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", BYTES: "bytes_contents",
}  # fmt: skip
_LENGTH = struct.Struct("<I")  # before each element of BYTES


def data_type(datatype: str) -> str:
    """The name of the same in a model's configuration."""
    return "TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}"


def raw(contents: pb.InferTensorContents, datatype: str, name: str, model: str) -> bytes:
    """The elements as raw bytes.

    Raises: Refusal for elements of another kind than the datatype's.
    """
    field = _FIELDS.get(datatype)
    for found, _ in contents.ListFields():
        if found.name != field:
            kind = {f: d for d, f in _FIELDS.items()}.get(found.name, found.name)
            raise Refusal(
                f"unexpected explicit tensor data for input tensor '{name}' for model '{model}' of type "
                f"'{kind}', expected datatype '{datatype}'"
            )
    elements: Any = getattr(contents, field) if field else ()
    if datatype == BYTES:
        return packed(elements)
    try:
        return np.array(list(elements), DTYPES[datatype]).tobytes()
    except OverflowError as error:
        raise Refusal(f"input '{name}' for model '{model}': {error}") from error


def packed(elements: Iterable[bytes]) -> bytes:
    """Elements of BYTES, each behind its length."""
    return b"".join([_LENGTH.pack(len(element)) + element for element in elements])


def elements_of(data: bytes, count: int, name: str, model: str) -> list[bytes]:
    """The inverse, of so many. Raises: Refusal."""
    found: list[bytes] = []
    at = 0
    while at + _LENGTH.size <= len(data) and len(found) < count:
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size + length
        found.append(data[at - length : at])
    if at != len(data) or len(found) != count:
        raise Refusal(
            f"expected {count} string elements for inference input '{name}' for model '{model}', got "
            f"{len(found)} in {len(data)} bytes, or the last one is not whole"
        )
    return found


def is_stated(contents: pb.InferTensorContents) -> bool:
    """Whether there are elements in it."""
    return bool(contents.ListFields())
