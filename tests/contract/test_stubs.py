"""The committed stubs are those of proto/. `make check-stubs` compares the bytes, with the compiler;
here the descriptors inside them are compared with the proto files' names, without it."""

import re
import tomllib
from pathlib import Path

import pytest

from tenuto.v1 import tenuto_pb2, tenuto_pb2_grpc

ROOT = Path(__file__).parents[2]
PROTO = (ROOT / "proto/tenuto/v1/tenuto.proto").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared(keyword: str) -> set[str]:
    return set(re.findall(rf"^\s*{keyword} (\w+)", PROTO, flags=re.MULTILINE))


def test_every_message_has_its_class() -> None:
    messages = set(tenuto_pb2.DESCRIPTOR.message_types_by_name)
    assert messages == declared("message")
    assert all(hasattr(tenuto_pb2, name) for name in messages)


def test_every_method_has_its_stub() -> None:
    service = tenuto_pb2.DESCRIPTOR.services_by_name["Tenuto"]
    assert {method.name for method in service.methods} == declared("rpc")
    assert all(hasattr(tenuto_pb2_grpc.TenutoServicer, name) for name in declared("rpc"))


def test_every_field_has_its_number() -> None:
    fields = {
        (field.name, field.number)
        for message in tenuto_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
    }
    source = re.findall(r"^\s*(?:repeated )?[\w<>, ]+? (\w+) = (\d+);", PROTO, flags=re.MULTILINE)
    names_in_enums = {
        value.name for enum in tenuto_pb2.DESCRIPTOR.enum_types_by_name.values() for value in enum.values
    } | {value.name for value in tenuto_pb2.Model.State.DESCRIPTOR.values}
    assert {(name, int(number)) for name, number in source if name not in names_in_enums} == fields


def test_the_stubs_are_protobuf_6_code() -> None:
    """Protobuf runs the code of its own and of the previous major version: 6 and 7 run this."""
    code = (ROOT / "tenuto/v1/tenuto_pb2.py").read_text(encoding="utf-8")
    assert re.search(r"^# Protobuf Python Version: 6\.", code, flags=re.MULTILINE)


@pytest.mark.parametrize("distribution", ["grpcio", "protobuf", "numpy"])
def test_the_oldest_versions_tried_are_the_oldest_allowed(distribution: str) -> None:
    lower = {
        re.split(r"[><=]", line)[0]: re.findall(r">=([\d.]+)", line)[0]
        for line in PYPROJECT["project"]["dependencies"]
    }[distribution]
    oldest = [line for line in PYPROJECT["dependency-groups"]["oldest"] if isinstance(line, str)]
    assert any(re.match(rf"{distribution}=={re.escape(lower)}(\.0)?(;|$)", line) for line in oldest)


def test_every_stub_has_its_types() -> None:
    folder = ROOT / "tenuto/v1"
    assert {path.stem for path in folder.glob("*_pb2.py")} == {path.stem for path in folder.glob("*_pb2.pyi")}


def test_proto_is_no_package() -> None:
    """An __init__.py there would shadow Google's own `proto`."""
    assert list((ROOT / "proto").rglob("__init__.py")) == []
