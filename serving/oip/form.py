"""One model version in this protocol: its tensors' names, datatypes and shapes; requests and answers in them.

Where every tensor has its batch axis first, shapes have it and `max_batch_size` is above 0; else shapes are
the graph's own. A sequence's tensors have one row: `[1, time, ...]`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from tenuto.oip import inference_pb2 as pb
from tenuto.serving.catalogue import Served
from tenuto.serving.manifest import Input, Manifest, Output
from tenuto.serving.sequence import Output as Answer
from tenuto.serving.varint import varint

from .datatype import BYTES, DATATYPES, DTYPES, elements_of, is_stated, packed, raw
from .question import Question, Wanted, place_of
from .refusal import Refusal
from .shared_memory import Memory

# Per output its shape without the batch axis, and its bytes.
Tensors = tuple[tuple[tuple[int, ...], bytes], ...]
_MOST_HEADS = 256  # combinations of shapes that are remembered
# Fields of the wire, each as its tag, which is its number << 3 | its kind.
_ID, _RAW = b"\x1a", b"\x32"  # of a ModelInferResponse
_RESPONSE = b"\x12"  # of a ModelStreamInferResponse
_PNG = b"\x89PNG"
_MOST_CLASSES = 1 << 16  # of one answer: they are written one by one


@dataclass(slots=True)
class Tensor:
    """An input as `tensor.Reader` takes it."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


def batched(manifest: Manifest) -> bool:
    """Whether clients see a batch axis."""
    return all(tensor.batch_axis == 0 for tensor in (*manifest.inputs, *manifest.outputs))


def shape_of(tensor: Input | Output, alone: bool) -> list[int]:
    """What clients see; -1 for any length. `alone`: a sequence's, which has one row."""
    free = (tensor.batch_axis, tensor.time_axis)
    shape = [-1 if axis in free or not isinstance(d, int) else d for axis, d in enumerate(tensor.shape)]
    if alone and tensor.batch_axis:  # not the first one, which clients know to be the batch
        shape[tensor.batch_axis] = 1
    return shape


class Form:
    """Reads requests for a model version, on any thread, and writes its answers."""

    def __init__(self, served: Served) -> None:
        self._served = weakref.ref(served)  # who remembers an answer must not keep a model in memory
        self._reader = served.reader
        self.manifest = manifest = served.manifest
        self.name, self.version = manifest.name, str(served.engine.version)
        self.max_batch_size = manifest.max_batch if batched(manifest) else 0
        self._inputs = {spec.name: _InputForm(spec, manifest) for spec in manifest.inputs}
        self._outputs = {spec.name: index for index, spec in enumerate(manifest.outputs)}
        model = pb.ModelInferResponse(model_name=self.name, model_version=self.version)
        self._model = model.SerializeToString()
        # By shapes, and what is empty.
        self._heads: dict[tuple[tuple[tuple[int, ...], bool], ...], bytes] = {}
        self._nothing: Tensors = tuple([(_empty(spec, manifest.stateful), b"") for spec in manifest.outputs])

    @property
    def served(self) -> Served:
        """The version, while it is loaded."""
        served = self._served()
        assert served is not None, "asked for behind its unloading. This is a bug."
        return served

    # Requests.

    def read(self, request: pb.ModelInferRequest, memory: Memory) -> tuple[bytes, ...]:
        """Per input, in the manifest's order, its samples' bytes.

        Raises: Refusal, TenutoError.
        """
        tensors = self._tensors(request, memory)
        return self._reader.read(tensors, None if self.manifest.stateful else self.manifest.max_batch)

    def _tensors(self, request: pb.ModelInferRequest, memory: Memory) -> list[Tensor]:
        forms, raws, tensors = self._inputs, list(request.raw_input_contents), []
        self._check_names([tensor.name for tensor in request.inputs])
        rows = -1
        for tensor in request.inputs:
            form = forms[tensor.name]
            shape = list(tensor.shape)
            dtype = form.dtype(tensor.datatype)
            own = form.own_shape(shape, tensor.datatype)
            data = self._data(tensor, raws, memory)
            tensors.append(form.tensor(dtype, tensor.datatype, own, shape, data))
            if self.max_batch_size and not self.manifest.stateful and shape:
                if rows not in (-1, shape[0]):
                    raise Refusal(
                        f"input '{tensor.name}' batch size does not match other inputs for '{self.name}'"
                    )
                rows = shape[0]
        if raws:
            raise Refusal(
                f"got {len(request.raw_input_contents)} raw input contents for {len(request.inputs)} inputs "
                f"of model '{self.name}'; one for each that is not in shared memory"
            )
        return tensors

    def _check_names(self, names: list[str]) -> None:
        for name in names:
            if name not in self._inputs:
                raise Refusal(f"unexpected inference input '{name}' for model '{self.name}'")
        if len(names) == len(self._inputs) == len(set(names)):
            return
        missing = [name for name in self._inputs if name not in names]
        tail = f", but missing required input(s) {missing}" if missing else ""
        raise Refusal(
            f"expected {len(self._inputs)} inputs but got {len(names)} inputs for model '{self.name}'. Got "
            f"input(s) {names}{tail}. Please provide all required input(s)."
        )

    def _data(
        self, tensor: pb.ModelInferRequest.InferInputTensor, raws: list[bytes], memory: Memory
    ) -> bytes:
        place = place_of(tensor.parameters, f"input '{tensor.name}'") if tensor.parameters else None
        explicit = tensor.HasField("contents") and is_stated(tensor.contents)
        if place is not None:
            if explicit:
                raise Refusal(
                    f"unexpected 'content' provided when using shared memory for input tensor "
                    f"'{tensor.name}' for model '{self.name}'"
                )
            return memory.read(place)
        if explicit:
            if raws:
                raise Refusal(
                    "contents field must not be specified when using raw_input_contents for "
                    f"'{tensor.name}' for model '{self.name}'"
                )
            return raw(tensor.contents, tensor.datatype, tensor.name, self.name)
        if raws:
            return raws.pop(0)
        if 0 in tensor.shape:
            return b""
        raise Refusal(
            f"unable to find data for input tensor '{tensor.name}' for model '{self.name}' in request."
        )

    def takes_as_it_is(self, tensor: pb.ModelInferRequest.InferInputTensor) -> bool:
        """Whether the tensor's bytes are its samples, for any bytes of that length: another one with the same
        datatype and shape need not be read again."""
        form = self._inputs[tensor.name]
        return self._reader.takes_as_it_is(
            Tensor(tensor.name, form.dtype(tensor.datatype), list(tensor.shape), b"")
        )

    def check_wanted(self, question: Question, memory: Memory) -> None:
        """Raises: Refusal for outputs that there are not, and for places that are none."""
        for wanted in question.wanted:
            if wanted.name not in self._outputs:
                raise Refusal(f"unexpected inference output '{wanted.name}' for model '{self.name}'")
            if wanted.place is not None:
                memory.check(wanted.place)

    # Answers.

    def joined(self, answers: Items[Answer]) -> Tensors:
        """Those of one step, in the order of time, as one."""
        if len(answers) == 1:
            return answers[0].tensors
        joined = []
        for index, spec in enumerate(self.manifest.outputs):
            parts = [answer.tensors[index] for answer in answers if answer.tensors]
            if not parts:
                return ()
            if spec.time_axis is None:
                joined.append(parts[-1])
                continue
            axis = spec.time_axis - (spec.batch_axis is not None and spec.batch_axis < spec.time_axis)
            arrays = [np.frombuffer(data, spec.numpy_dtype).reshape(shape) for shape, data in parts]
            whole = np.concatenate(arrays, axis)
            joined.append((whole.shape, whole.tobytes()))
        return tuple(joined)

    def write(
        self, tensors: Tensors, question: Question, request_id: str, memory: Memory, *, streamed: bool
    ) -> bytes:
        """A ModelInferResponse; `streamed`: one inside a ModelStreamInferResponse.

        Raises: Refusal where an output does not fit into its place.
        """
        tensors = tensors or self._nothing  # no frame was completed
        if question.wanted:
            parts = [self._write_wanted(tensors, question, request_id, memory)]
        else:
            parts = self._write_all(tensors, request_id)
        if not streamed:
            return b"".join(parts)
        parts.append(_IS_FINAL)
        return b"".join((_RESPONSE, varint(sum(map(len, parts))), *parts))

    def _write_all(self, tensors: Tensors, request_id: str) -> list[bytes]:
        """By hand, in protobuf's encoding: from one answer to the next nothing differs but id and data."""
        key = tuple([(shape, not data) for shape, data in tensors])
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= _MOST_HEADS:
                self._heads.clear()
            head = self._heads[key] = self._head(tensors)
        fields = [self._model]
        if request_id:
            told = request_id.encode()
            fields += (_ID, varint(len(told)), told)
        fields.append(head)
        for _, data in tensors:
            fields += (_RAW, varint(len(data)), data)
        return fields

    def _head(self, tensors: Tensors) -> bytes:
        """The outputs up to their bytes."""
        response = pb.ModelInferResponse()
        for spec, (shape, data) in zip(self.manifest.outputs, tensors, strict=True):
            whole = self._with_row(spec, shape, data)
            response.outputs.add(name=spec.name, datatype=DATATYPES[spec.dtype], shape=whole)
        return response.SerializeToString()

    def _with_row(self, spec: Output, shape: tuple[int, ...], data: bytes) -> list[int]:
        """A sequence's output has one row."""
        whole = list(shape)
        if self.manifest.stateful and spec.batch_axis is not None:
            # What has no time axis has no value where no frame was completed, and so no row.
            whole.insert(spec.batch_axis, int(bool(data) or spec.time_axis is not None))
        return whole

    def _write_wanted(self, tensors: Tensors, question: Question, request_id: str, memory: Memory) -> bytes:
        response = pb.ModelInferResponse(model_name=self.name, model_version=self.version, id=request_id)
        for wanted in question.wanted:
            index = self._outputs[wanted.name]
            spec, (shape, data) = self.manifest.outputs[index], tensors[index]
            output = response.outputs.add(name=spec.name, datatype=DATATYPES[spec.dtype])
            whole = self._with_row(spec, shape, data)
            if wanted.classes:
                output.datatype = BYTES
                values = np.frombuffer(data, spec.numpy_dtype).reshape(whole)
                whole, data = classified(values, wanted.classes, spec.labels)
            output.shape.extend(whole)
            response.raw_output_contents.append(data if wanted.place is None else b"")
            if wanted.place is not None:
                _put(output, wanted, data, memory)
        return response.SerializeToString()


def _empty(spec: Output, alone: bool) -> tuple[int, ...]:
    """The shape of no frames, or no rows, as an answer's tensors have it."""
    shape = [0 if d == -1 else d for d in shape_of(spec, alone)]
    if alone and spec.batch_axis is not None:
        del shape[spec.batch_axis]
    return tuple(shape)


def _put(
    output: pb.ModelInferResponse.InferOutputTensor, wanted: Wanted, data: bytes, memory: Memory
) -> None:
    """Raises: Refusal."""
    place = wanted.place
    assert place is not None
    memory.write(place, data, wanted.name)
    output.parameters["shared_memory_region"].string_param = place.region
    output.parameters["shared_memory_byte_size"].int64_param = len(data)
    if place.offset:
        output.parameters["shared_memory_offset"].int64_param = place.offset


def classified(
    values: np.ndarray,
    classes: int,
    labels: Items[str],
) -> tuple[list[int], bytes]:
    """The largest along the last axis as `value:index:label`, the largest first; shape and elements."""
    *leading, width = values.shape or (1,)
    count = min(classes, width)
    if not values.size:
        return [*leading, count], b""
    rows = values.reshape(-1, width)
    if len(rows) * count > _MOST_CLASSES:
        raise Refusal(
            f"a classification of {len(rows) * count} elements, the limit is {_MOST_CLASSES}; send less"
        )
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    elements = [
        f"{row[index]:f}:{index}" + (f":{labels[index]}" if index < len(labels) else "")
        for row, best in zip(rows.tolist(), order.tolist(), strict=True)
        for index in best
    ]
    return [*leading, count], packed(element.encode() for element in elements)


class _InputForm:
    """One input."""

    def __init__(self, spec: Input, manifest: Manifest) -> None:
        self.spec = spec
        self._manifest = manifest
        self._datatype = DATATYPES[spec.dtype]
        self._expected = shape_of(spec, manifest.stateful)
        self._fixed = [(axis, d) for axis, d in enumerate(self._expected) if d != -1]
        self._row_axis = spec.batch_axis if manifest.stateful else None
        self._takes_bytes = bool(spec.wire_encodings or spec.text)

    def dtype(self, datatype: str) -> str:
        """The same in our words, empty for BYTES. Raises: Refusal."""
        if datatype == self._datatype:
            return self.spec.dtype
        if datatype == BYTES and self._takes_bytes:
            return ""
        dtype = DTYPES.get(datatype, "")
        if dtype in self.spec.wire_dtypes:
            return dtype
        raise Refusal(
            f"inference input '{self.spec.name}' data-type is '{datatype}', but model "
            f"'{self._manifest.name}' expects '{self._datatype}'"
        )

    def own_shape(self, shape: list[int], datatype: str) -> list[int]:
        """As our own protocol has it: a sequence's without its one row. Raises: Refusal."""
        model, name = self._manifest.name, self.spec.name
        if any(d < 0 for d in shape):
            raise Refusal(
                f"All input dimensions should be specified for input '{name}' for model '{model}', "
                f"got {_told(shape)}"
            )
        if datatype == BYTES:
            return shape
        if len(shape) != len(self._expected) or any(shape[axis] != d for axis, d in self._fixed):
            raise Refusal(
                f"unexpected shape for input '{name}' for model '{model}'. Expected "
                f"{_told(self._expected)}, got {_told(shape)}."
            )
        row = self._row_axis
        if row is not None:
            if shape[row] != 1:
                raise Refusal(
                    f"inference request to model '{model}' must specify batch-size 1 due to requirements of "
                    "sequence batcher"
                )
            return shape[:row] + shape[row + 1 :]
        if not self._manifest.stateful and self.spec.batch_axis == 0 and shape[0] > self._manifest.max_batch:
            raise Refusal(f"inference request batch-size must be <= {self._manifest.max_batch} for '{model}'")
        return shape

    def tensor(self, dtype: str, datatype: str, own: list[int], shape: list[int], data: bytes) -> Tensor:
        """Raises: Refusal."""
        spec, model = self.spec, self._manifest.name
        if datatype == BYTES:
            count = _product(shape)
            if spec.text is None and count > self._manifest.max_batch:  # before they are counted
                raise Refusal(
                    f"inference request batch-size must be <= {self._manifest.max_batch} for '{model}'"
                )
            elements = elements_of(data, min(count, self._manifest.max_batch), spec.name, model)
            if spec.text is not None:
                if count != 1:
                    raise Refusal(
                        f"input '{spec.name}' for model '{model}' takes one text a request, got {count}"
                    )
                return Tensor(spec.name, "utf8", [], elements[0])
            encoding = "png" if elements and elements[0].startswith(_PNG) else "jpeg"
            return Tensor(spec.name, encoding, [len(elements)], data)
        size = _product(shape) * np.dtype(dtype).itemsize
        if len(data) != size:
            raise Refusal(
                f"input byte size mismatch for input '{spec.name}' for model '{model}'. Expected {size}, got "
                f"{len(data)}"
            )
        return Tensor(spec.name, dtype, own, data)


def _product(shape: Items[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _told(shape: Items[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _is_final() -> bytes:
    response = pb.ModelInferResponse()
    response.parameters["triton_final_response"].bool_param = True
    return response.SerializeToString()


_IS_FINAL = _is_final()


def form_of(served: Served) -> Form:
    """The form of that version, made once."""
    form = served.memo.get(Form)
    if not isinstance(form, Form):
        form = served.memo[Form] = Form(served)
    return form
