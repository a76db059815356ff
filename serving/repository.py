"""What lies in the model folder: `<model>/<version>/model.onnx`, version an integer.

Reading only: nothing here loads a model. The newest version that passes its checks serves.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigInvalid, ModelInvalid
from .manifest import Manifest

log = logging.getLogger("tenuto.repository")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

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
            files = [(p.name, p.stat()) for p in self.path.iterdir() if p.is_file()]
        except OSError:  # it went, or changed, while we looked: the next look will tell
            return None
        if not any(name == "model.onnx" for name, _ in files):
            return None
        return tuple(sorted((n, s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev) for n, s in files))

    def read(self) -> ModelFiles:
        """The bytes that are checked are the bytes that are loaded.

        Raises: ModelInvalid, ManifestInvalid.
        """
        model = self._bytes("model.onnx")
        text = self._bytes("manifest.json") if (self.path / "manifest.json").exists() else None
        manifest = None if text is None else Manifest.parse(text, f"{self.where}/manifest.json")
        fingerprint = hashlib.sha256(hashlib.sha256(text or b"").digest() + model).hexdigest()
        return ModelFiles(self, model, hashlib.sha256(model).hexdigest(), fingerprint, manifest)

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise ModelInvalid(f"{self.where}: {name} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class ModelFiles:
    """What one version's folder held when it was read. `manifest` is the sidecar's, if there is one."""

    folder: ModelFolder
    model: bytes
    sha256: str  # of model.onnx
    fingerprint: str  # of model.onnx and manifest.json
    manifest: Manifest | None


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
