"""The committed stubs are those of proto/. `make check-stubs` compares the bytes, with the compiler;
here the descriptors inside them are compared with the proto files' names, without it."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenuto.oip import inference_pb2, inference_pb2_grpc, model_config_pb2
from tenuto.v1 import tenuto_pb2, tenuto_pb2_grpc

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, tuple[Any, Any]] = {
    "tenuto/v1/tenuto": (tenuto_pb2, tenuto_pb2_grpc.TenutoServicer),
    "tenuto/oip/inference": (inference_pb2, inference_pb2_grpc.GRPCInferenceServiceServicer),
    "tenuto/oip/model_config": (model_config_pb2, None),
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def proto(name: str) -> str:
    return (ROOT / f"proto/{name}.proto").read_text(encoding="utf-8")


def declared(name: str, keyword: str) -> set[str]:
    return set(re.findall(rf"^\s*{keyword} (\w+)", proto(name), flags=re.MULTILINE))


def messages(module: Any) -> Iterator[Any]:
    """All, the nested ones too, but for the entries of maps."""
    waiting = list(module.DESCRIPTOR.message_types_by_name.values())
    while waiting:
        message = waiting.pop()
        if not message.GetOptions().map_entry:
            yield message
            waiting += message.nested_types


@pytest.mark.parametrize("name", SERVICES)
def test_every_message_has_its_class(name: str) -> None:
    module, _ = SERVICES[name]
    assert {message.name for message in messages(module)} == declared(name, "message")
    assert all(hasattr(module, message) for message in module.DESCRIPTOR.message_types_by_name)


@pytest.mark.parametrize("name", SERVICES)
def test_every_method_has_its_stub(name: str) -> None:
    module, servicer = SERVICES[name]
    methods = {m.name for s in module.DESCRIPTOR.services_by_name.values() for m in s.methods}
    assert methods == declared(name, "rpc")
    assert all(hasattr(servicer, method) for method in methods)


@pytest.mark.parametrize("name", SERVICES)
def test_every_field_has_its_number(name: str) -> None:
    module, _ = SERVICES[name]
    fields = {(field.name, field.number) for message in messages(module) for field in message.fields}
    enums = [*module.DESCRIPTOR.enum_types_by_name.values()]
    enums += [enum for message in messages(module) for enum in message.enum_types]
    values = {value.name for enum in enums for value in enum.values}
    source = re.findall(r"^\s*(?:repeated )?[\w<>, .]+? (\w+) = (\d+);", proto(name), flags=re.MULTILINE)
    assert {(field, int(number)) for field, number in source if field not in values} == fields


@pytest.mark.parametrize("name", SERVICES)
def test_the_stubs_are_protobuf_6_code(name: str) -> None:
    """Protobuf runs the code of its own and of the previous major version: 6 and 7 run this."""
    code = (ROOT / f"{name}_pb2.py").read_text(encoding="utf-8")
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
