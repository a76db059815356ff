"""One ModelInferRequest: what it asks for beside its tensors, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenuto.oip import inference_pb2 as pb

from .refusal import Code, Refusal

_MOST_ID_CHARACTERS = 128
_TRITONS_OWN = "triton_enable_empty_final_response"


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a registered region of shared memory."""

    region: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output that a client asks for."""

    name: str
    classes: int = 0  # above 0: the labels of so many largest values instead of the values
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What the request says beside its tensors and its id."""

    sequence: int | str  # 0 or "": in none that has a name
    start: bool
    end: bool
    step: int  # from 1 on; 0: not stated
    wanted: tuple[Wanted, ...]  # none: all outputs

    @classmethod
    def of(cls, request: pb.ModelInferRequest) -> Question:
        """Raises: Refusal."""
        stated, sequence, start, end, step = request.parameters, 0, False, False, 0
        if stated:  # looking into an empty map costs, too
            sequence, start, end, step = _sequence(stated)
        wanted = tuple(map(_wanted, request.outputs))
        if len({one.name for one in wanted}) < len(wanted):
            raise Refusal("an output is requested twice; once is enough for each")
        return cls(sequence, start, end, step, wanted)


def version_of(text: str) -> int:
    """0 for an empty one. Raises: Refusal."""
    if not text:
        return 0
    if not re.fullmatch(r"-?[0-9]{1,19}", text):
        raise Refusal(
            f"failed to get model version from specified version string '{text}' (details: stol), version "
            "should be an integral value > 0"
        )
    if not 0 < int(text) < 2**63:
        raise Refusal(f"invalid model version specified '{text}' , version should be an integral value > 0")
    return int(text)


def _sequence(stated: Mapping[str, Any]) -> tuple[Any, bool, bool, int]:
    """The id, whether the request begins it, whether it ends it, and the step."""
    sequence: int | str = 0
    start = end = False
    step = 0
    for key, value in stated.items():
        kind = value.WhichOneof("parameter_choice")
        if key == "sequence_id":
            if kind not in ("int64_param", "string_param"):
                raise _wrong_type(key, "int64_param or string_param")
            sequence = value.string_param if kind == "string_param" else value.int64_param
            if isinstance(sequence, str) and len(sequence) > _MOST_ID_CHARACTERS:
                text = f"string correlation ID cannot be longer than {_MOST_ID_CHARACTERS} characters"
                raise Refusal(text, Code.UNIMPLEMENTED)
        elif key == "sequence_start":
            start = _flag(key, kind, value)
        elif key == "sequence_end":
            end = _flag(key, kind, value)
        elif key == "sequence_step":
            step = _step(kind, value)
        elif key == "priority":
            if kind not in ("int64_param", "uint64_param"):
                raise _wrong_type(key, "int64_param or uint64_param")
            if value.int64_param < 0:
                raise Refusal("invalid value for 'priority', expected value >= 0.")
        elif key == "timeout":
            if kind != "int64_param":
                raise _wrong_type(key, "int64_param")
        elif key.startswith("triton_") and key != _TRITONS_OWN:
            raise Refusal(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following "
                f"keys starting with 'triton_' are allowed: {_TRITONS_OWN}"
            )
    return sequence, start, end, step


def _flag(key: str, kind: str | None, value: pb.InferParameter) -> bool:
    if kind != "bool_param":
        raise _wrong_type(key, "bool_param")
    return value.bool_param


def _step(kind: str | None, value: pb.InferParameter) -> int:
    if kind not in ("int64_param", "uint64_param"):
        raise _wrong_type("sequence_step", "int64_param or uint64_param")
    step = value.int64_param or value.uint64_param
    if not 0 < step < 2**63:
        raise Refusal(f"invalid value {step} for 'sequence_step', expected a number from 1 on.")
    return step


def _wanted(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> Wanted:
    if not output.parameters:
        return Wanted(output.name)
    classes = 0
    if "classification" in output.parameters:
        value = output.parameters["classification"]
        if value.WhichOneof("parameter_choice") != "int64_param":
            raise _wrong_type("classification", "int64_param", end="")
        if value.int64_param <= 0:
            raise Refusal("invalid value for 'classification' parameter, expected >= 0")
        classes = value.int64_param
    place = place_of(output.parameters, f"output '{output.name}'")
    if classes and place is not None:
        raise Refusal("output can't set both 'shared_memory_region' and 'classification'")
    return Wanted(output.name, classes, place)


def place_of(parameters: Mapping[str, Any], what: str) -> Place | None:
    """Where in shared memory a tensor is; None: not there. Raises: Refusal."""
    if "shared_memory_region" not in parameters:
        return None
    region = parameters["shared_memory_region"]
    if region.WhichOneof("parameter_choice") != "string_param":
        raise _wrong_type("shared_memory_region", "string_param", end="")
    numbers = {}
    for key in ("shared_memory_byte_size", "shared_memory_offset"):
        value = parameters[key] if key in parameters else pb.InferParameter(int64_param=0)
        if value.WhichOneof("parameter_choice") != "int64_param":
            raise _wrong_type(key, "int64_param", end="")
        if value.int64_param < 0:
            raise Refusal(f"invalid value {value.int64_param} for '{key}' of {what}, expected >= 0")
        numbers[key] = value.int64_param
    if not numbers["shared_memory_byte_size"]:
        raise Refusal(
            f"'shared_memory_byte_size' must be specified along with 'shared_memory_region' "
            f"parameter for {what}"
        )
    return Place(region.string_param, numbers["shared_memory_offset"], numbers["shared_memory_byte_size"])


def _wrong_type(key: str, expected: str, end: str = ".") -> Refusal:
    return Refusal(f"invalid value type for '{key}' parameter, expected {expected}{end}")
