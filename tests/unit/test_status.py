"""The table from errors to statuses is that of the proto's header, and whole."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tenuto.serving import errors
from tenuto.serving.errors import PoolFull, TenutoError, WrongShape
from tenuto.serving.status import STATUS, code_of, metadata_of

PROTO = Path(__file__).parents[2] / "proto/tenuto/v1/tenuto.proto"
AT_START = {"ManifestInvalid", "ModelInvalid", "ConfigInvalid", "PlatformError"}  # never sent


def subclasses() -> list[type[TenutoError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, TenutoError)]


def in_proto() -> dict[str, str]:
    """Reason -> status, of the table in the proto's header."""
    rows = re.findall(r"^//   ([A-Z_]+) +([A-Z_]+|\(Closed\)) ", PROTO.read_text(), re.MULTILINE)
    return {reason: status for reason, status in rows if status != "(Closed)"}


def test_the_statuses_are_those_that_the_proto_promises() -> None:
    assert {e.reason: code.name for e, code in STATUS.items()} == in_proto()


def test_every_error_that_a_client_may_get_has_a_status() -> None:
    sent = {c for c in subclasses() if c.__name__ not in AT_START and c is not TenutoError}
    assert sent == set(STATUS)


def test_every_error_has_a_reason_of_its_own() -> None:
    reasons = [c.reason for c in subclasses()]
    assert len(set(reasons)) == len(reasons)


def test_an_error_without_a_status_is_internal() -> None:
    assert code_of(TenutoError("a bug")) is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("error", [WrongShape("3 is not 4"), PoolFull("full", 250)])
def test_the_trailing_metadata_says_it_in_both_ways(error: TenutoError) -> None:
    metadata = dict(metadata_of(error))
    packed = metadata["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    status = status_pb2.Status.FromString(packed)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, status.message) == (code_of(error).value[0], str(error))
    assert (info.reason, info.domain) == (error.reason, "tenuto")
    assert metadata["tenuto-reason"] == error.reason
    assert metadata.get("tenuto-retry-after-ms") == (
        str(error.retry_after_ms) if error.retry_after_ms else None
    )
