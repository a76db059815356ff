"""Weights that lie beside model.onnx are served, from the bytes that were hashed and from nowhere else."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tenuto.serving import repository
from tenuto.serving.errors import ModelInvalid
from tenuto.serving.model_runner import CPU
from tenuto.serving.repository import ModelFolder
from tenuto.serving.runners import RunSettings, open_runner
from tests import external, toys
from tests.external import WEIGHTS, tensor

BYTES = WEIGHTS.tobytes()
ZEROS = np.zeros((1, external.WIDTH), np.float32)
Made = tuple[bytes, toys.Manifest]


def create(root: Path, made: Made, **files: bytes) -> ModelFolder:
    """`w_bin` is the file w.bin."""
    path = toys.write(root, made[1]["name"], made)
    for name, contents in files.items():
        (path / name.replace("_", ".")).write_bytes(contents)
    return ModelFolder(made[1]["name"], 1, path)


def answer(folder: ModelFolder) -> list[float]:
    """What it makes of zeros: the weights."""
    runner = open_runner(folder.read(), RunSettings(CPU, 1), max_sequences=1)
    values: list[float] = runner.run({"x": ZEROS})[0][0].tolist()
    return values


@pytest.mark.parametrize(
    "make",
    [
        external.offsetter,
        external.by_attribute,
        external.by_subgraph,
        external.by_function,
        external.by_sparse,
    ],
)
def test_weights_are_found_wherever_in_the_model_they_stand(
    make: Callable[[Any], Made], tmp_path: Path
) -> None:
    folder = create(tmp_path, make(tensor("w", "w.bin", 8, 16)), w_bin=bytes(8) + BYTES)
    assert answer(folder) == WEIGHTS.tolist()
    assert folder.read().external == ("w.bin",)


@pytest.mark.parametrize("offset, length, ahead", [(None, None, 0), (0, None, 0), (4096, 16, 4096)])
def test_offset_and_length_may_be_left_out(
    offset: int | None, length: int | None, ahead: int, tmp_path: Path
) -> None:
    made = external.offsetter(tensor("w", "w.bin", offset, length))
    assert answer(create(tmp_path, made, w_bin=bytes(ahead) + BYTES)) == WEIGHTS.tolist()


def test_a_file_may_lie_in_a_folder_and_be_a_link_to_another_one_there(tmp_path: Path) -> None:
    folder = create(tmp_path, external.offsetter(tensor("w", "./parts/w.bin")))
    (folder.path / "blobs").mkdir()
    (folder.path / "blobs/1").write_bytes(BYTES)
    (folder.path / "parts").symlink_to("blobs")
    (folder.path / "blobs/w.bin").symlink_to("1")
    assert answer(folder) == WEIGHTS.tolist()


def test_the_version_itself_may_be_a_link(tmp_path: Path) -> None:
    folder = create(tmp_path / "a", external.offsetter(tensor("w", "w.bin")), w_bin=BYTES)
    (tmp_path / "2").symlink_to(folder.path)
    assert answer(ModelFolder("offsetter", 2, tmp_path / "2")) == WEIGHTS.tolist()


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2"])
def test_numbers_that_share_bytes_are_counted_so(kind: str, tmp_path: Path) -> None:
    odd = tensor("w", "w.bin", 0, None, doc_string=kind)
    odd.data_type, odd.dims[0] = TensorProto.DataType.Value(kind), 5
    folder = create(tmp_path, external.offsetter(odd), w_bin=bytes(9))
    embedded = onnx.load_model_from_string(folder.read().model).graph.initializer[0]
    assert len(embedded.raw_data) == (2 if "2" in kind and "4" not in kind else 3)


def test_a_model_with_a_state_keeps_it_in_its_graph_too(tmp_path: Path) -> None:
    """What reads the model's bytes a second time sees the weights as well."""
    made, manifest, contents = external.accumulator("w.bin")
    folder = create(tmp_path, (made, manifest), w_bin=contents)
    runner = open_runner(folder.read(), RunSettings(CPU, 1, "graph"), max_sequences=1)
    assert runner.pool is not None
    assert runner.run(runner.zero_feeds() | {"x": np.full((1, 1), 3, np.float32)})[0].tolist() == [[3.0]]


# What is hashed.


def test_checksum_and_fingerprint_cover_the_files(tmp_path: Path) -> None:
    made = external.offsetter(tensor("w", "w.bin"))
    folder = create(tmp_path, made, w_bin=BYTES)
    first = folder.read()
    assert first.sha256 == hashlib.sha256(made[0] + BYTES).hexdigest()
    assert folder.read() == first
    (folder.path / "w.bin").write_bytes(BYTES[::-1])
    second = folder.read()
    assert second.sha256 != first.sha256
    assert second.fingerprint != first.fingerprint


def test_bytes_that_move_from_one_file_to_another_make_another_fingerprint(tmp_path: Path) -> None:
    proto = onnx.load_model_from_string(external.offsetter(tensor("w", "a.bin"))[0])
    proto.graph.initializer.append(tensor("unused", "b.bin"))
    made = (proto.SerializeToString(), external.offsetter(tensor("w", "a.bin"))[1])
    folder = create(tmp_path, made, a_bin=BYTES, b_bin=BYTES + b"1234")
    before = folder.read().fingerprint
    (folder.path / "a.bin").write_bytes(BYTES + BYTES[:4])
    (folder.path / "b.bin").write_bytes((BYTES + b"1234")[4:])
    assert folder.read().fingerprint != before


def test_a_file_that_changes_is_a_change_of_the_version(tmp_path: Path) -> None:
    folder = create(tmp_path, external.offsetter(tensor("w", "parts/w.bin")))
    (folder.path / "parts").mkdir()
    seen = [folder.signature()]
    for contents in (BYTES, BYTES + b"1"):
        (folder.path / "parts/w.bin").write_bytes(contents)
        seen.append(folder.signature())
    assert None not in seen
    assert len(set(seen)) == 3


def test_a_model_that_refers_to_nothing_is_not_parsed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "load_model_from_string", None)
    made = toys.doubler()
    files = create(tmp_path, made).read()
    assert (files.model, files.external) == (made[0], ())
    assert files.sha256 == hashlib.sha256(made[0]).hexdigest()


def test_a_name_with_the_word_in_it_is_no_reference(tmp_path: Path) -> None:
    made, manifest = toys.doubler()
    proto = onnx.load_model_from_string(made)
    proto.graph.node[0].name = "location"
    files = create(tmp_path, (proto.SerializeToString(), manifest)).read()
    assert (files.model, files.external) == (proto.SerializeToString(), ())


# What is refused. `secret` lies outside of the folder.


def outside(folder: Path) -> Path:
    return folder.parent / "secret"


BAD_PLACES: dict[str, tuple[str, str]] = {
    "absolute": ("/etc/hostname", "its name leads out of the version's folder"),
    "above": ("../secret", "its name leads out of the version's folder"),
    "above, later": ("parts/../../secret", "its name leads out of the version's folder"),
    "nothing": ("", "its name is empty, or holds a character"),
    "backslash": ("..\\secret", "its name is empty, or holds a character"),
    "NUL": ("w.bin\0", "its name is empty, or holds a character"),
    "escape": ("\x1b[2J", "its name is empty, or holds a character"),
    "missing": ("none.bin", "'none.bin' cannot be read: No such file"),
    "below a file": ("model.onnx/w.bin", "cannot be read: "),
    "the folder": (".", "it is a folder, and must be a file"),
    "a folder": ("parts", "it is a folder, and must be a file"),
    "a FIFO": ("fifo", "it is a FIFO, and must be a file"),
    "a socket": ("socket", "it is a socket, and must be a file"),
    "a link to a device": ("zero", "a link leads out of the version's folder"),
    "a link that leads out": ("out", "a link leads out of the version's folder"),
    "a folder that is a link that leads out": ("outer/secret", "a link leads out of the version's folder"),
    "a link to itself": ("loop", "'loop' cannot be read: Too many levels of symbolic links"),
    "memory": ("*/_ORT_MEM_ADDR_/*", "cannot be read: No such file"),  # ONNX Runtime's own word for it
    "a very long name": ("x" * 5000, "cannot be read: File name too long"),
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened by number from here on, as `regular_file` does it."""
    paths: list[str] = []
    real = os.open

    def spy(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        paths.append(os.fspath(path))
        return real(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", spy)
    return paths


@pytest.mark.parametrize("place, why", BAD_PLACES.values(), ids=BAD_PLACES.keys())
def test_a_reference_to_what_is_no_file_of_the_folder_is_refused(
    place: str, why: str, tmp_path: Path, opened: list[str]
) -> None:
    folder = create(tmp_path, external.offsetter(tensor("w", place)))
    outside(folder.path).write_bytes(BYTES)
    (folder.path / "parts").mkdir()
    os.mkfifo(folder.path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder.path / "socket"))
        for name, target in (("zero", "/dev/zero"), ("out", "../secret"), ("outer", ".."), ("loop", "loop")):
            (folder.path / name).symlink_to(target)
        with pytest.raises(ModelInvalid) as raised:
            folder.read()
    assert why in str(raised.value)
    assert str(raised.value).startswith("offsetter/1: external data of tensor 'w': ")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1100
    inside = {str(folder.path / name) for name in ("", "model.onnx", "manifest.json")}
    assert set(opened) <= inside | {os.path.realpath(folder.path)}


def test_a_link_that_turns_while_it_is_looked_at_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(tmp_path, external.offsetter(tensor("w", "parts/w.bin")))
    outside(folder.path).mkdir()
    (outside(folder.path) / "w.bin").write_bytes(BYTES)
    (folder.path / "parts").mkdir()
    (folder.path / "parts/w.bin").write_bytes(BYTES)
    real = os.path.realpath

    def then_turn(path: Any, *, strict: bool = False) -> str:
        found = real(path, strict=strict)
        if str(path).endswith("w.bin"):
            (folder.path / "parts").rename(folder.path / "gone")
            (folder.path / "parts").symlink_to(outside(folder.path))
        return found

    monkeypatch.setattr(os.path, "realpath", then_turn)
    with pytest.raises(ModelInvalid, match="'parts/w.bin' cannot be read: Not a directory"):
        folder.read()


TENSORS: dict[str, tuple[TensorProto, str]] = {
    "beyond the end": (
        tensor("w", "w.bin", 8, 16),
        "'w.bin' has 16 bytes, the tensor takes those from 8 to 24",
    ),
    "far beyond the end": (tensor("w", "w.bin", 2**62), "'w.bin' has 16 bytes"),
    "a length of another shape": (tensor("w", "w.bin", 0, 12), r"the 16 bytes of its shape \[4\]"),
    "a negative offset": (tensor("w", "w.bin", -4), "offset is '-4'"),
    "an offset that is no number": (tensor("w", "w.bin", "0x10"), "offset is '0x10'"),
    "an offset of a thousand digits": (tensor("w", "w.bin", "9" * 1000), "offset is '999"),
    "no file": (TensorProto(name="w", dims=[4], data_location=TensorProto.EXTERNAL), "it names no file"),
    "text": (tensor("w", "w.bin"), "STRING"),
    "an unknown type": (tensor("w", "w.bin"), "its type 99"),
    "a negative length": (tensor("w", "w.bin"), r"FLOAT \[-4\] cannot lie in another file"),
    "more than memory": (tensor("w", "w.bin"), "of which at most 2147483647 can be loaded"),
    "named twice": (tensor("w", "w.bin"), "'location' is there twice"),
}
TENSORS["text"][0].data_type = TensorProto.STRING
TENSORS["an unknown type"][0].data_type = 99
TENSORS["a negative length"][0].dims[0] = -4
TENSORS["more than memory"][0].dims[0] = 1 << 40
TENSORS["named twice"][0].external_data.add(key="location", value="/etc/hostname")


@pytest.mark.parametrize("weights, why", TENSORS.values(), ids=TENSORS.keys())
def test_a_tensor_that_its_file_cannot_hold_is_refused(
    weights: TensorProto, why: str, tmp_path: Path
) -> None:
    weights.doc_string = "location"  # so that the one without any entry is looked at
    folder = create(tmp_path, external.offsetter(weights), w_bin=BYTES)
    with pytest.raises(ModelInvalid, match=why):
        folder.read()


def test_a_file_larger_than_any_model_is_not_read(tmp_path: Path) -> None:
    folder = create(tmp_path, external.offsetter(tensor("w", "w.bin")), w_bin=BYTES)
    os.truncate(folder.path / "w.bin", 1 << 40)  # on disk, it takes nothing
    with pytest.raises(
        ModelInvalid, match="it has 1099511627776 bytes, of which at most 2147483647 are read"
    ):
        folder.read()


def test_what_no_parser_takes_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """What one parser refuses another may take, and open what it names."""
    made, manifest = external.offsetter(tensor("w", "w.bin"))
    folder = create(tmp_path, (made[:-3], manifest), w_bin=BYTES)
    with pytest.raises(ModelInvalid, match="offsetter/1: model.onnx is no ONNX file"):
        folder.read()


# The version's own files.


def test_a_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(tmp_path, toys.doubler())
    real = os.fstat

    def stale(handle: int) -> Any:
        status = real(handle)
        with (folder.path / "model.onnx").open("ab") as file:
            file.write(b"more")
        return status

    monkeypatch.setattr(os, "fstat", stale)
    with pytest.raises(ModelInvalid, match="model.onnx cannot be read: it changes while it is read"):
        folder.read()


def test_a_giant_manifest_is_not_read(tmp_path: Path) -> None:
    folder = create(tmp_path, toys.doubler())
    os.truncate(folder.path / "manifest.json", repository._MOST_MANIFEST_BYTES + 1)
    with pytest.raises(ModelInvalid, match="manifest.json cannot be read: it has 16777217 bytes"):
        folder.read()
