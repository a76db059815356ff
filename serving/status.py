"""The one table from the server's errors to gRPC statuses, and what goes with them in trailing metadata."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from . import errors
from .errors import TenutoError

_C = grpc.StatusCode
STATUS: dict[type[TenutoError], grpc.StatusCode] = {
    errors.UnknownModel: _C.NOT_FOUND,
    errors.UnknownSequence: _C.NOT_FOUND,
    errors.ModelNotReady: _C.UNAVAILABLE,
    errors.PoolFull: _C.RESOURCE_EXHAUSTED,
    errors.Overloaded: _C.RESOURCE_EXHAUSTED,
    errors.ServerDraining: _C.UNAVAILABLE,
    errors.StreamIdle: _C.UNAVAILABLE,
    errors.NotOpen: _C.FAILED_PRECONDITION,
    errors.AlreadyOpen: _C.FAILED_PRECONDITION,
    errors.StepGap: _C.OUT_OF_RANGE,
    errors.TooLarge: _C.RESOURCE_EXHAUSTED,
    errors.WrongInput: _C.INVALID_ARGUMENT,
    errors.WrongDtype: _C.INVALID_ARGUMENT,
    errors.WrongShape: _C.INVALID_ARGUMENT,
    errors.WrongEncoding: _C.INVALID_ARGUMENT,
    errors.OutOfRangeValue: _C.INVALID_ARGUMENT,
    errors.NotFinite: _C.INVALID_ARGUMENT,
    errors.WrongMessage: _C.INVALID_ARGUMENT,
    errors.WrongSetting: _C.INVALID_ARGUMENT,
    errors.NotStateless: _C.FAILED_PRECONDITION,
    errors.NotSupported: _C.UNIMPLEMENTED,
    errors.TokenInvalid: _C.FAILED_PRECONDITION,
    errors.Unauthenticated: _C.UNAUTHENTICATED,
    errors.NotAnOperator: _C.PERMISSION_DENIED,
    errors.RateExceeded: _C.RESOURCE_EXHAUSTED,
    errors.DeadlinePassed: _C.DEADLINE_EXCEEDED,
    errors.StateNotFinite: _C.INTERNAL,
    errors.RunFailed: _C.INTERNAL,
}


def code_of(error: TenutoError) -> grpc.StatusCode:
    return STATUS.get(type(error), _C.INTERNAL)


def metadata_of(error: TenutoError) -> tuple[tuple[str, str | bytes], ...]:
    """google.rpc.Status with ErrorInfo, and the same in plain text for clients without that package."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain="tenuto")
    status = status_pb2.Status(code=code_of(error).value[0], message=str(error))
    status.details.add().Pack(info)
    plain: tuple[tuple[str, str | bytes], ...] = (("tenuto-reason", error.reason),)
    if error.retry_after_ms:
        plain += (("tenuto-retry-after-ms", str(error.retry_after_ms)),)
    return (*plain, ("grpc-status-details-bin", status.SerializeToString()))
