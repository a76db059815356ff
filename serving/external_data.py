"""Tensors of a model whose numbers lie in other files of its folder: found, read, and put into the model.

So what was hashed is what is loaded, and ONNX Runtime, which gets a model without references, opens no file:
given a model as bytes it would look for them in the server's own working folder, and what subgraphs refer to
it takes from nowhere else (1.31).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper

from .errors import ModelInvalid
from .regular_file import read_inside

_NUMBER = re.compile(r"[0-9]{1,19}")
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}  # of those that share bytes
_SHOWN = 64  # characters of a name


@dataclass(frozen=True)
class ExternalFile:
    """One of them: its name, as the model spells it, and the SHA-256 of its bytes."""

    name: str
    digest: bytes


@dataclass(frozen=True)
class _Reference:
    tensor: TensorProto
    file: str
    offset: int
    nbytes: int
    where: str


def embedded(
    model: bytes, folder: Path, where: str, whole: hashlib._Hash, most_bytes: int
) -> tuple[bytes, tuple[ExternalFile, ...]]:
    """The model with all numbers in it, and the files that they came from, by name; `whole` is updated by
    the bytes of each. The same model, if it refers to none. `most_bytes`: of all together, and of each file.

    Raises: ModelInvalid.
    """
    if model[4:8] == b"ORTM":  # ONNX Runtime's own format, in which nothing lies elsewhere
        return model, ()
    try:
        proto = onnx.load_model_from_string(model)
    except DecodeError as error:
        raise ModelInvalid(f"{where}: model.onnx is no ONNX file: {error}") from error
    references = [_reference(tensor, where) for tensor in _external(proto)]
    if not references:
        return model, ()
    total = len(model) + sum(r.nbytes for r in references)
    if total > most_bytes:
        raise ModelInvalid(
            f"{where}: model.onnx and its external data have {total} bytes, of which at most {most_bytes} "
            "can be loaded; store its weights in fewer bits"
        )
    files = []
    for name in sorted({r.file for r in references}):
        of_it = [r for r in references if r.file == name]
        contents = read_inside(folder, name, most_bytes, of_it[0].where)
        whole.update(contents)
        files.append(ExternalFile(name, hashlib.sha256(contents).digest()))
        for reference in of_it:
            _put(reference, contents)
    return bytes(proto.SerializeToString()), tuple(files)


def _external(message: Message) -> Iterator[TensorProto]:
    """Wherever in the model: initializers, attributes, subgraphs, functions."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in (value,) if isinstance(value, Message) else value:
            if not isinstance(inner, TensorProto):
                yield from _external(inner)
            elif inner.data_location == TensorProto.EXTERNAL:
                yield inner


def _reference(tensor: TensorProto, where: str) -> _Reference:
    """What a tensor says of where its numbers lie.

    Raises: ModelInvalid.
    """
    where = f"{where}: external data of tensor {_short(tensor.name)}"
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in entries:
            raise ModelInvalid(f"{where}: {entry.key!r} is there twice")
        entries[entry.key] = entry.value
    if "location" not in entries:
        raise ModelInvalid(f"{where}: it names no file ('location')")
    nbytes = _nbytes(tensor, where)
    offset, length = entries.get("offset", "0"), entries.get("length", str(nbytes))
    if not _NUMBER.fullmatch(offset) or not _NUMBER.fullmatch(length) or int(length) != nbytes:
        raise ModelInvalid(
            f"{where}: offset is {_short(offset)}, length {_short(length)}; expected a number, and the "
            f"{nbytes} bytes of its shape {list(tensor.dims)[:8]}"
        )
    return _Reference(tensor, entries["location"], int(offset), nbytes, where)


def _nbytes(tensor: TensorProto, where: str) -> int:
    try:
        kind = TensorProto.DataType.Name(tensor.data_type)
        bits = _BITS.get(kind) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError) as error:
        raise ModelInvalid(f"{where}: its type {tensor.data_type} is none that ONNX knows") from error
    if kind in ("STRING", "UNDEFINED") or any(d < 0 for d in tensor.dims):
        raise ModelInvalid(f"{where}: {kind} {list(tensor.dims)[:8]} cannot lie in another file")
    return -(-math.prod(tensor.dims) * bits // 8)


def _put(reference: _Reference, contents: bytes) -> None:
    """Raises: ModelInvalid if the file is too short."""
    tensor, end = reference.tensor, reference.offset + reference.nbytes
    if end > len(contents):
        raise ModelInvalid(
            f"{reference.where}: {_short(reference.file)} has {len(contents)} bytes, the tensor takes those "
            f"from {reference.offset} to {end}"
        )
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = contents[reference.offset : end]


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
