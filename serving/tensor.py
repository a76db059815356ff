"""What a client sends for one input -> samples in the graph's own dtype, time first.

Checks everything that one tensor alone can tell: name, dtype, rank, axes, number of bytes, encoding. Values
(range, NaN) are checked a batch at a time, in `layout`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import NotFinite, TooLarge, WrongDtype, WrongEncoding, WrongInput, WrongShape
from .manifest import Dim, Input, Manifest, State, WireDtype, initial
from .text import Text

Array = NDArray[Any]
# The text of one chunk: the engine cuts it between two batches, in about 1 µs a word.
_MOST_TEXT_BYTES = 64 << 10
_FORMATS = {"png": "PNG", "jpeg": "JPEG"}


class WireTensor(Protocol):
    """The fields of a tensor message."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def data(self) -> bytes: ...


class Reader:
    """Reads one model's inputs from the tensors of a request."""

    def __init__(self, manifest: Manifest, max_bytes: int) -> None:
        self._only = manifest.inputs[0].name if len(manifest.inputs) == 1 else None
        self._multiples = [i.multiple for i in manifest.inputs]
        self._inputs = [_InputReader(spec, manifest, max_bytes) for spec in manifest.inputs]
        self._index = {r.name: i for i, r in enumerate(self._inputs)}

    def read(self, tensors: Sequence[WireTensor], max_images: int | None = None) -> tuple[bytes, ...]:
        """Per input, in the manifest's order, its samples' bytes. `max_images` bounds the encoded images.

        Raises: WrongInput, WrongDtype, WrongShape, WrongEncoding, TooLarge.
        """
        if self._only is not None and len(tensors) == 1:
            only = tensors[0]
            if only.name in ("", self._only):
                return (self._inputs[0].read(only, max_images)[0],)
        read: list[tuple[bytes, int] | None] = [None] * len(self._inputs)
        for position, tensor in enumerate(tensors):
            index = self._index.get(tensor.name) if tensor.name else position
            if index is None or index >= len(self._inputs) or read[index] is not None:
                name = tensor.name or f"number {position + 1}"
                raise WrongInput(f"tensor {name!r} is not expected, or sent twice; {self._expected()}")
            read[index] = self._inputs[index].read(tensor, max_images)
        missing = [r.name for r, got in zip(self._inputs, read, strict=True) if got is None]
        if missing:
            raise WrongInput(f"input {', '.join(missing)} is missing; {self._expected()}")
        pairs = [got for got in read if got is not None]
        # Equal time (or rows) in each, or what one input is ahead of another would pile up unseen.
        frames = {Fraction(count, n) for (_, count), n in zip(pairs, self._multiples, strict=True)}
        if len(frames) > 1:
            told = ", ".join(f"{n} {c}" for n, (_, c) in zip(self._index, pairs, strict=True))
            raise WrongShape(
                f"the inputs bring different lengths: {told}; send the same time, or rows, for each"
            )
        return tuple(data for data, _ in pairs)

    def takes_as_it_is(self, tensor: WireTensor) -> bool:
        """Whether the tensor's bytes are its samples, for any bytes of that length: then another one with the
        same name, dtype, shape and length need not be read again."""
        return self._only is not None and self._inputs[0].takes_as_it_is(tensor)

    def _expected(self) -> str:
        return f"the model's inputs are {', '.join(self._index)}"


def read_given(tensors: Sequence[WireTensor], manifest: Manifest) -> tuple[bytes, ...]:
    """The values of all states where a sequence begins whose client gives those that the manifest asks for;
    nothing of a model that asks for none.

    Raises: WrongInput, WrongDtype, WrongShape, NotFinite.
    """
    given = {tensor.name: tensor for tensor in tensors}
    asked = {s.input: s for s in manifest.given}
    if given.keys() != asked.keys() or len(given) != len(tensors):
        raise WrongInput(
            f"Open gives {', '.join(t.name for t in tensors) or 'no state'} initial values, model "
            f"{manifest.name!r} asks for {', '.join(asked) or 'none'}"
        )
    if not asked:
        return ()
    return tuple(
        _given(given[s.input], s) if s.input in asked else initial(s).tobytes() for s in manifest.states
    )


def _given(tensor: WireTensor, state: State) -> bytes:
    dtype, shape = np.dtype(state.dtype), list(state.slot_shape)
    if tensor.dtype != state.dtype:
        raise WrongDtype(f"initial {state.input!r} is {tensor.dtype or 'without a dtype'}, expected {dtype}")
    if list(tensor.shape) != shape or len(tensor.data) != state.slot_bytes:
        raise WrongShape(
            f"initial {state.input!r} has shape {list(tensor.shape)} and {len(tensor.data)} bytes, expected "
            f"{shape} and {state.slot_bytes}"
        )
    if state.finite and dtype.kind == "f" and not np.isfinite(np.frombuffer(tensor.data, dtype)).all():
        raise NotFinite(f"initial {state.input!r} holds NaN or Inf")
    return tensor.data


class _InputReader:
    def __init__(self, spec: Input, manifest: Manifest, max_bytes: int) -> None:
        self.name = spec.name
        self._spec = spec
        self._max_bytes = max_bytes
        # The client's shape: without the batch axis for a sequence, with it (as the free axis) else.
        free = spec.time_axis if manifest.stateful else spec.batch_axis
        dropped = spec.batch_axis if manifest.stateful else None
        self._shape: list[Dim] = [d for a, d in enumerate(spec.shape) if a != dropped]
        self._free = None if free is None else free - (dropped is not None and dropped < free)
        self._sample_bytes = spec.sample_bytes
        self._rest = self._shape[1:]
        self._fixed = [d if a != self._free else None for a, d in enumerate(self._shape)]

    def takes_as_it_is(self, tensor: WireTensor) -> bool:
        return tensor.dtype == self._spec.dtype and not self._free

    def read(self, tensor: WireTensor, max_images: int | None) -> tuple[bytes, int]:
        dtype, spec = tensor.dtype, self._spec
        if dtype == spec.dtype:
            if self._free == 0:  # the common case, without a loop
                data, shape = tensor.data, tensor.shape[:]  # a list: each look into the message costs
                if shape[1:] == self._rest and shape and len(data) == shape[0] * self._sample_bytes:
                    return data, shape[0]
            return self._time_first(tensor.data, tensor.shape, spec.numpy_dtype)
        wire = spec.wire_dtypes.get(dtype)
        if wire is not None:
            data, count = self._time_first(tensor.data, tensor.shape, np.dtype(wire.dtype))
            self._check_bytes(count, "samples become")
            return self._scaled(np.frombuffer(data, wire.dtype), wire), count
        if dtype in spec.wire_encodings:
            return self._decoded(tensor, max_images)
        if dtype == "utf8" and spec.text is not None:
            return self._text(tensor), 0
        accepted = ", ".join([spec.dtype, *spec.wire_dtypes, *sorted(spec.wire_encodings)])
        accepted += ", utf8" if spec.text else ""
        raise WrongDtype(f"input {self.name!r} is {dtype or 'without a dtype'}; accepted: {accepted}")

    def _text(self, tensor: WireTensor) -> Text:
        """The text as it came: what it is cut into depends on what its sequence sent before."""
        if len(tensor.shape):
            raise WrongShape(
                f"input {self.name!r}: a text has shape {list(tensor.shape)}, expected []; one text a chunk"
            )
        if len(tensor.data) > _MOST_TEXT_BYTES:
            raise TooLarge(
                f"input {self.name!r}: a text of {len(tensor.data)} bytes, the limit is {_MOST_TEXT_BYTES}; "
                "send several chunks, cut wherever you like"
            )
        return Text(tensor.data)

    def _time_first(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[bytes, int]:
        agrees = len(shape) == len(self._fixed)
        for have, want in zip(shape, self._fixed, strict=False):
            agrees = agrees and (want is None or have == want)
        if not agrees:
            raise WrongShape(f"input {self.name!r} has shape {list(shape)}, expected {self._shape}")
        size = dtype.itemsize
        for length in shape:
            size *= length
        if len(data) != size:
            raise WrongShape(
                f"input {self.name!r} brings {len(data)} bytes, expected {size} for {dtype} {list(shape)}"
            )
        if self._free is None:
            return data, 1
        if self._free:
            data = np.moveaxis(np.frombuffer(data, dtype).reshape(shape), self._free, 0).tobytes()
        return data, shape[self._free]

    def _scaled(self, values: Array, wire: WireDtype) -> bytes:
        dtype = self._spec.numpy_dtype
        scaled = values.astype(dtype)
        if wire.scale != 1.0:
            scaled = scaled * dtype.type(wire.scale)
        if wire.offset:
            scaled = scaled + dtype.type(wire.offset)
        return scaled.astype(dtype, copy=False).tobytes()

    def _decoded(self, tensor: WireTensor, max_images: int | None) -> tuple[bytes, int]:
        files = [tensor.data] if not tensor.shape else self._split(tensor.data, tensor.shape[0])
        if self._free is None and len(files) != 1:
            raise WrongShape(f"input {self.name!r} brings {len(files)} images, expected 1")
        self._check_bytes(len(files), "images decode to")
        if max_images is not None and len(files) > max_images:
            raise TooLarge(
                f"input {self.name!r}: {len(files)} encoded images in one chunk, the limit is {max_images}; "
                "send several chunks, or raw pixels"
            )
        if not files:
            return b"", 0
        pixels = np.stack([self._image(file, tensor.dtype) for file in files])
        wire = self._spec.wire_dtypes.get("uint8", WireDtype(dtype="uint8"))
        return self._scaled(pixels, wire), len(files)

    def _check_bytes(self, count: int, what: str) -> None:
        """What a message unpacks to is bounded like the message."""
        size = count * self._sample_bytes
        if size > self._max_bytes:
            raise TooLarge(
                f"input {self.name!r}: {count} {what} {size} bytes, the limit is {self._max_bytes}; "
                "send fewer at once"
            )

    def _split(self, data: bytes, count: int) -> list[bytes]:
        """`count` files, each behind its length as a little-endian uint32."""
        files: list[bytes] = []
        at = 0
        while at + 4 <= len(data):
            (length,) = struct.unpack_from("<I", data, at)
            files.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        if at != len(data) or len(files) != count:
            raise WrongEncoding(
                f"input {self.name!r}: expected {count} encoded images, each behind its length as a "
                f"little-endian uint32; got {len(data)} bytes that hold {len(files)}"
            )
        return files

    def _image(self, file: bytes, encoding: str) -> Array:
        """One image as uint8 of the row's shape. Its size is checked before its pixels are decoded."""
        shape = self._spec.sample_shape
        channels_first = len(shape) == 3 and shape[0] in (1, 3)
        height, width = shape[1:] if channels_first else shape[:2]
        colours = 3 if len(shape) == 3 and 3 in (shape[0], shape[2]) else 1
        try:
            with Image.open(io.BytesIO(file), formats=[_FORMATS[encoding]]) as image:
                if image.size != (width, height):
                    got = f"{image.size[0]}x{image.size[1]}"
                    raise WrongShape(
                        f"input {self.name!r}: an image of {got} pixels, expected {width}x{height}"
                    )
                pixels = np.asarray(image.convert("RGB" if colours == 3 else "L"))
        except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError) as error:
            raise WrongEncoding(f"input {self.name!r}: the bytes are no {encoding} image: {error}") from error
        if channels_first and colours == 3:
            pixels = np.moveaxis(pixels, 2, 0)
        return pixels.reshape(shape)
