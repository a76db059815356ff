"""TorchServe's two messages, PredictionsRequest and PredictionResponse, by their field numbers.

protobuf's wire format: every field that they have is a number, a length and bytes.
"""

from collections.abc import Iterator, Mapping

SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService"
LENGTH_DELIMITED = 2


def request(model: str, inputs: Mapping[str, bytes], sequence_id: str = "") -> bytes:
    """model_name = 1, input = 3 (a map: key = 1, value = 2), sequence_id = 4."""
    parts = [_field(1, model.encode())]
    parts += [_field(3, _field(1, key.encode()) + _field(2, value)) for key, value in inputs.items()]
    if sequence_id:
        parts.append(_field(4, sequence_id.encode()))
    return b"".join(parts)


def prediction(response: bytes) -> bytes:
    """prediction = 1, sequence_id = 2, status = 3, which says why there is none.

    Raises: RuntimeError.
    """
    fields = dict(_fields(response))
    if status := fields.get(3):
        raise RuntimeError(f"TorchServe refused a request: {status!r}")
    return fields.get(1, b"")


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | LENGTH_DELIMITED]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, and the top bit where more come."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        if tag & 7 != LENGTH_DELIMITED:
            raise ValueError(f"expected fields with a length, got wire type {tag & 7} in {message!r}")
        size, at = _read_varint(message, at)
        yield tag >> 3, message[at : at + size]
        at += size


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte <= 0x7F:
            return value, at
        shift += 7
