"""The protocol's messages from and to the client's nouns; shared by the two clients."""

import json
from collections.abc import Mapping
from typing import Protocol, TypeVar

from . import errors
from .reply import Loaded, Model, Prediction, Sequence, Timing, Unloaded
from .sampling import Sampling
from .tensor import Inputs, Value, pack, unpack
from .v1 import tenuto_pb2 as pb


class Code(Protocol):
    """A member of grpc.StatusCode."""

    @property
    def name(self) -> str: ...


def predict_request(model: str, inputs: Inputs, version: int) -> pb.PredictRequest:
    """Return the request of one batch; raises InvalidInput."""
    try:
        return pb.PredictRequest(model=model, version=version, inputs=pack(inputs))
    except (TypeError, ValueError) as error:
        raise _wrong_field("predict", error) from error


def get_model_request(model: str, version: int) -> pb.GetModelRequest:
    """Return the request of one model's description; raises InvalidInput."""
    try:
        return pb.GetModelRequest(model=model, version=version)
    except (TypeError, ValueError) as error:
        raise _wrong_field("model", error) from error


def list_sequences_request(model: str) -> pb.ListSequencesRequest:
    """Return the request of the live sequences; raises InvalidInput."""
    try:
        return pb.ListSequencesRequest(model=model)
    except (TypeError, ValueError) as error:
        raise _wrong_field("sequences", error) from error


def end_sequence_request(sequence_id: str) -> pb.EndSequenceRequest:
    """Return the request that ends one sequence; raises InvalidInput."""
    try:
        return pb.EndSequenceRequest(sequence_id=sequence_id)
    except (TypeError, ValueError) as error:
        raise _wrong_field("end_sequence", error) from error


Command = TypeVar("Command", pb.LoadModelRequest, pb.UnloadModelRequest, pb.ReloadModelRequest)


def command(kind: type[Command], model: str) -> Command:
    """Return an operator's request about one model; raises InvalidInput."""
    try:
        return kind(model=model)
    except (TypeError, ValueError) as error:
        raise _wrong_field("model", error) from error


def open_event(
    model: str,
    *,
    version: int,
    period_ms: int,
    idle_seconds: int,
    constants: Mapping[str, float] | None,
    label: str,
    resume_token: bytes,
    sampling: Sampling | None,
    initial: Mapping[str, Value] | None,
) -> pb.Open:
    """Return the event that begins a sequence; raises InvalidInput."""
    try:
        return pb.Open(
            model=model,
            version=version,
            period_ms=period_ms,
            idle_seconds=idle_seconds,
            constants=dict(constants or {}),
            label=label,
            resume_token=resume_token,
            sampling=sampling.message() if sampling is not None else None,
            initial=pack(initial),
        )
    except (TypeError, ValueError) as error:
        raise _wrong_field("stream", error) from error


def prediction(response: pb.PredictResponse) -> Prediction:
    """Return the batch's answer; raises ProtocolError."""
    return Prediction(unpack(response.outputs), response.version, timing(response.timing))


def timing(message: pb.Timing) -> Timing:
    """Return the server's own timing, in microseconds."""
    return Timing(message.queue_us, message.compute_us, message.batch_size)


def model(message: pb.Model, manifest_json: str = "") -> Model:
    """Return the model, with its manifest where the server sent it; raises ProtocolError."""
    try:
        manifest = json.loads(manifest_json) if manifest_json else {}
    except ValueError as error:
        raise errors.ProtocolError(f"{message.name}: its manifest is no JSON: {error}") from error
    names = {number: name for name, number in pb.Model.State.items()}
    return Model(
        name=message.name,
        version=message.version,
        state=names.get(message.state, str(message.state)),
        why=message.why,
        stateful=message.stateful,
        provider=message.provider,
        sha256=message.sha256,
        fingerprint=message.fingerprint,
        description=message.description,
        sequences=message.sequences,
        slots=message.slots,
        state_bytes=message.state_bytes,
        state_bytes_used=message.state_bytes_used,
        file_bytes=message.file_bytes,
        manifest=manifest,
    )


def loaded(response: pb.LoadModelResponse | pb.ReloadModelResponse) -> Loaded:
    """Return what serves now."""
    ended = response.sequences if isinstance(response, pb.ReloadModelResponse) else 0
    return Loaded(model(response.model), response.changed, ended)


def unloaded(response: pb.UnloadModelResponse) -> Unloaded:
    """Return what was taken away."""
    return Unloaded(tuple(response.versions), response.sequences)


def sequence(message: pb.Sequence) -> Sequence:
    """Return the live sequence."""
    return Sequence(
        id=message.sequence_id,
        model=message.model,
        version=message.version,
        label=message.label,
        last_step=message.last_step,
        age_seconds=message.age_seconds,
        idle_seconds=message.idle_seconds,
    )


def status_error(
    code: Code,
    details: str | None,
    metadata: Mapping[str, str],
    *,
    target: str,
    seconds: float | None,
) -> errors.TenutoError:
    """Return the error for the status of a call to `target`.

    `metadata` is the call's trailing metadata; `seconds` the deadline it had, None for a stream.
    """
    message = details or "no text"
    if code.name == "DEADLINE_EXCEEDED" and seconds is not None:
        return errors.ReplyTimeout(
            f"{target} did not answer within {seconds:g} s; raise timeout_seconds, or look at the "
            "server's metrics"
        )
    reason = metadata.get("tenuto-reason", "")
    if not reason:
        # gRPC's own words: say where, and mark what will not get better.
        message = f"{target}: {message}"
        if code.name == "RESOURCE_EXHAUSTED" and "larger than max" in message:
            reason = "TOO_LARGE"
    after = metadata.get("tenuto-retry-after-ms", "")
    return errors.refusal(
        message,
        code=code.name,
        reason=reason,
        retry_after_ms=int(after) if after.isdecimal() else 0,
    )


def client_closed(target: str) -> errors.Unavailable:
    """Return the error for a call on a client that was closed."""
    return errors.Unavailable(
        f"the client of {target} is closed; make a new one", code="CANCELLED", reason="CLIENT_CLOSED"
    )


def plain(metadata: object) -> dict[str, str]:
    """Return a call's trailing metadata, whichever gRPC class it is, without the binary keys."""
    pairs = metadata if metadata is not None else ()
    return {key: value for key, value in pairs if isinstance(value, str)}  # type: ignore[attr-defined]


def _wrong_field(what: str, error: Exception) -> Exception:
    """Return the InvalidInput for a value that the protocol's field cannot hold."""
    if isinstance(error, errors.TenutoError):
        return error
    return errors.invalid(f"{what}: an argument does not fit its field: {error}", "WRONG_SETTING")
