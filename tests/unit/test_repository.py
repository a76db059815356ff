"""What counts as a model folder, in which order, and what is said of what cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tenuto.serving.errors import ConfigInvalid, ManifestInvalid, ModelInvalid
from tenuto.serving.repository import ModelFolder, ModelRepository

from .fakes import doubler


def create_version(root: Path, model: str, version: str, *, manifest: str | None = None) -> Path:
    folder = root / model / version
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"the model")
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    return folder


def versions(root: Path) -> dict[str, list[int]]:
    return {name: [f.version for f in folders] for name, folders in ModelRepository(root).folders().items()}


def read(folder: Path) -> ModelFolder:
    return ModelFolder(folder.parent.name, int(folder.name), folder)


def test_versions_come_newest_first_and_in_order_of_number(tmp_path: Path) -> None:
    for version in ("2", "10", "9"):
        create_version(tmp_path, "digits", version)
    assert versions(tmp_path) == {"digits": [10, 9, 2]}


def test_models_come_by_name(tmp_path: Path) -> None:
    for model in ("b", "a"):
        create_version(tmp_path, model, "1")
    assert list(versions(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    "version", ["v1", "0", "01", "1.0", "-1", "latest", ".tmp-1", "1~", "²", "9999999999"]
)
def test_folders_that_are_no_positive_integer_are_no_versions(tmp_path: Path, version: str) -> None:
    create_version(tmp_path, "digits", version)
    assert versions(tmp_path) == {}


@pytest.mark.parametrize("model", [".git", "Digits", "_x", "with space"])
def test_folders_that_no_manifest_can_be_named_after_are_no_models(tmp_path: Path, model: str) -> None:
    create_version(tmp_path, model, "1")
    assert versions(tmp_path) == {}


def test_files_beside_the_folders_are_left_alone(tmp_path: Path) -> None:
    create_version(tmp_path, "digits", "1")
    (tmp_path / "LICENSES.md").write_text("")
    (tmp_path / "digits" / "2").write_text("a file named as a version")
    (tmp_path / "empty").mkdir()
    assert versions(tmp_path) == {"digits": [1]}


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_repository_that_is_no_folder_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "models"
    if kind == "file":
        root.write_text("")
    with pytest.raises(ConfigInvalid, match=f"the model repository {root} is no folder"):
        ModelRepository(root)


def test_reads_the_bytes_their_hash_and_the_sidecar(tmp_path: Path) -> None:
    folder = create_version(tmp_path, "doubler", "3", manifest=doubler().to_json())
    files = read(folder).read()
    assert (files.folder.where, files.model) == ("doubler/3", b"the model")
    assert files.sha256 == hashlib.sha256(b"the model").hexdigest()
    assert files.manifest == doubler()


def test_without_a_sidecar_the_graph_must_say(tmp_path: Path) -> None:
    assert read(create_version(tmp_path, "digits", "1")).read().manifest is None


def test_the_fingerprint_changes_with_either_file(tmp_path: Path) -> None:
    text = doubler().to_json()
    folder = create_version(tmp_path, "doubler", "1", manifest=text)
    prints = [read(folder).read().fingerprint]
    assert read(folder).read().fingerprint == prints[0]
    (folder / "manifest.json").write_text(text + "\n")
    prints.append(read(folder).read().fingerprint)
    (folder / "model.onnx").write_bytes(b"another")
    prints.append(read(folder).read().fingerprint)
    (folder / "manifest.json").unlink()
    prints.append(read(folder).read().fingerprint)
    assert len(set(prints)) == 4


def test_a_version_without_a_model_is_named(tmp_path: Path) -> None:
    folder = create_version(tmp_path, "digits", "1")
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelInvalid, match="digits/1: model.onnx cannot be read: No such file"):
        read(folder).read()


@pytest.mark.parametrize("text", ["", "{}", "no json", json.dumps({"name": "x"})])
def test_a_sidecar_that_is_no_manifest_is_refused_never_ignored(tmp_path: Path, text: str) -> None:
    folder = create_version(tmp_path, "digits", "1", manifest=text)
    with pytest.raises(ManifestInvalid, match="digits/1/manifest.json: the manifest is"):
        read(folder).read()


def test_a_sidecar_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = create_version(tmp_path, "digits", "1")
    (folder / "manifest.json").mkdir()
    with pytest.raises(ModelInvalid, match="digits/1: manifest.json cannot be read"):
        read(folder).read()


def test_a_version_without_a_model_has_no_signature(tmp_path: Path) -> None:
    folder = create_version(tmp_path, "digits", "1", manifest="{}")
    (folder / "model.onnx").rename(folder / "model.onnx.part")
    assert read(folder).signature() is None
    assert read(tmp_path / "digits" / "2").signature() is None


def test_the_signature_stays_while_nothing_is_written(tmp_path: Path) -> None:
    folder = create_version(tmp_path, "digits", "1", manifest="{}")
    signature = read(folder).signature()
    assert signature
    assert read(folder).signature() == signature
    folder.rename(folder.with_name("moved"))
    (folder.with_name("moved")).rename(folder)
    assert read(folder).signature() == signature  # moving a folder into place changes no file


def test_the_signature_changes_with_any_file(tmp_path: Path) -> None:
    folder = create_version(tmp_path, "digits", "1")
    signatures = [read(folder).signature()]
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"more")
    signatures.append(read(folder).signature())
    (folder / "golden.npz").write_bytes(b"")
    signatures.append(read(folder).signature())
    os.utime(folder / "golden.npz", ns=(1, 1))  # as many bytes, written again
    signatures.append(read(folder).signature())
    (folder / "golden.npz").unlink()
    (folder / "model.onnx").rename(folder / "old")
    (folder / "model.onnx").write_bytes((folder / "old").read_bytes())
    (folder / "old").unlink()
    signatures.append(read(folder).signature())
    assert len(set(signatures)) == 5
    assert None not in signatures


def test_a_link_turned_to_other_files_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes does with its volumes."""
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"the model")
        os.utime(folder / "model.onnx", ns=(1, 1))
    (tmp_path / "digits").mkdir()
    link = tmp_path / "digits" / "1"
    link.symlink_to(tmp_path / "first")
    signature = read(link).signature()
    assert versions(tmp_path) == {"digits": [1]}
    link.unlink()
    link.symlink_to(tmp_path / "second")
    assert signature
    assert read(link).signature() not in (None, signature)


def test_a_folder_that_may_not_be_read_is_named_once_and_the_others_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A volume that another user wrote, say."""
    for model in ("closed", "open"):
        (tmp_path / model / "1").mkdir(parents=True)
    real = Path.iterdir

    def iterdir(path: Path) -> object:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    repository = ModelRepository(tmp_path)
    for _ in range(2):
        assert list(repository.folders()) == ["open"]
    assert caplog.text.count(f"{tmp_path / 'closed'} cannot be read: Permission denied") == 1
