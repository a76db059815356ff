"""What lies in the model folder: `<model>/<version>/model.onnx`, version an integer.

Reading only: nothing here loads a model. The newest version that passes its checks serves.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .errors import ConfigInvalid, ModelInvalid
from .manifest import Manifest
from .regular_file import read

log = logging.getLogger("tenuto.repository")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

# Of a model with all that belongs to it: protobuf, and so ONNX Runtime, reads no longer message.
_MOST_BYTES = 2**31 - 1
_MOST_MANIFEST_BYTES = 16 << 20
_MOST_FILES = 10_000  # of a version that are looked at for changes

# Per file of a version's folder: name, bytes, last change in nanoseconds, inode, device.
Signature = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True)
class ModelFolder:
    """One version's folder."""

    model: str
    version: int
    path: Path

    @property
    def where(self) -> str:
        return f"{self.model}/{self.version}"

    def signature(self) -> Signature | None:
        """Changes when a file does; None while there is no model.onnx. Links are followed, so that a link
        turned to other files is a change."""
        try:
            files = list(islice(_files(self.path), _MOST_FILES))
        except OSError:  # it went, or changed, while we looked: the next look will tell
            return None
        if not any(name == "model.onnx" for name, _ in files):
            return None
        return tuple(sorted((n, s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev) for n, s in files))

    def read(self) -> ModelFiles:
        """The bytes that are checked are the bytes that are loaded.

        Raises: ModelInvalid, ManifestInvalid.
        """
        model = read(self.path / "model.onnx", _MOST_BYTES, self.where)
        if not model:
            raise ModelInvalid(f"{self.where}: model.onnx is empty: ONNX Runtime does not load it")
        beside, text = self.path / "manifest.json", None
        if os.path.lexists(beside):
            text = read(beside, _MOST_MANIFEST_BYTES, self.where)
        manifest = None if text is None else Manifest.parse(text, f"{self.where}/manifest.json")
        whole, mark = hashlib.sha256(model), hashlib.sha256(hashlib.sha256(text or b"").digest() + model)
        external: tuple[str, ...] = ()
        if b"location" in model:  # the key by which a tensor names its file: others refer to none
            from .external_data import embedded  # it takes onnx along, which few models need

            model, files = embedded(model, self.path, self.where, whole, _MOST_BYTES)
            mark.update(b"".join(file.digest for file in files))
            external = tuple(file.name for file in files)
        return ModelFiles(self, model, whole.hexdigest(), mark.hexdigest(), manifest, external)


def _files(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """What lies in a folder and in those below it. A link to a folder is a file here, and so is whatever has
    model.onnx for a name: its check says what is wrong with it."""
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders.sort()
        marked = [f for f in folders if f == "model.onnx" or os.path.islink(os.path.join(folder, f))]
        for name in sorted(names + marked):
            path = os.path.join(folder, name)
            yield os.path.relpath(path, root), os.stat(path) if os.path.exists(path) else os.lstat(path)


def _raise(error: OSError) -> None:
    raise error


@dataclass(frozen=True)
class ModelFiles:
    """What one version's folder held when it was read. `manifest` is the sidecar's, if there is one."""

    folder: ModelFolder
    model: bytes  # with its external data in it
    sha256: str  # of model.onnx, and the bytes of `external` behind it
    fingerprint: str  # of model.onnx, `external` and manifest.json
    manifest: Manifest | None
    external: tuple[str, ...] = ()  # the files that hold tensors of it, by name


class ModelRepository:
    """The folder of models. Folders that are no integer, and hidden ones, are not versions.

    Raises: ConfigInvalid if `root` is no folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ConfigInvalid(
                f"the model repository {root} is no folder; name one that holds <model>/<version>/"
            )
        self.root = root
        self._unreadable: set[Path] = set()

    def _inside(self, folder: Path) -> list[Path]:
        """What is in it; nothing where it may not be read, which the log says once."""
        try:
            inside = sorted(folder.iterdir())
        except OSError as error:
            if folder not in self._unreadable:
                self._unreadable.add(folder)
                log.warning("%s cannot be read: %s", folder, error.strerror)
            return []
        self._unreadable.discard(folder)
        return inside

    def folders(self) -> dict[str, list[ModelFolder]]:
        """Per model, its versions, newest first. Models by name."""
        found: dict[str, list[ModelFolder]] = {}
        for model in self._inside(self.root):
            if not _NAME.fullmatch(model.name) or not model.is_dir():
                continue
            versions = [int(v.name) for v in self._inside(model) if _VERSION.fullmatch(v.name) and v.is_dir()]
            if versions:
                found[model.name] = [
                    ModelFolder(model.name, v, model / str(v)) for v in sorted(versions, reverse=True)
                ]
        return found
