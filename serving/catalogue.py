"""What is loaded: an engine for each model version that serves, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass

from .engine import Engine
from .errors import ModelNotReady, TokenInvalid, UnknownModel
from .manifest import Manifest
from .reply import OutputWriter
from .snapshot import Snapshot
from .tensor import Reader


@dataclass(frozen=True)
class Served:
    """One model version that serves."""

    engine: Engine
    reader: Reader
    writer: OutputWriter  # its engine thread's
    provider: str
    sha256: str
    fingerprint: str = ""  # of model.onnx and manifest.json

    @property
    def manifest(self) -> Manifest:
        return self.engine.manifest


@dataclass(frozen=True)
class Refused:
    """One model version that failed its checks."""

    model: str
    version: int
    why: str


class Catalogue:
    """Models by name. Read by every thread, never changed once built."""

    def __init__(self, served: list[Served], refused: list[Refused]) -> None:
        self.served = served
        self.refused = refused
        self._newest: dict[str, Served] = {}
        for one in sorted(served, key=lambda s: s.engine.version):
            self._newest[one.manifest.name] = one

    def find(self, model: str, version: int = 0) -> Served:
        """The model version that serves; version 0 is the newest.

        Raises: UnknownModel, ModelNotReady.
        """
        newest = self._newest.get(model)
        if newest is not None and version in (0, newest.engine.version):
            return newest
        for one in self.served:
            if (one.manifest.name, one.engine.version) == (model, version):
                return one
        for other in self.refused:
            if other.model == model and version in (0, other.version):
                raise ModelNotReady(f"model {model}/{other.version} failed its checks: {other.why}")
        if newest is not None:
            raise UnknownModel(
                f"model {model!r} has no version {version} here; it serves {newest.engine.version}"
            )
        names = ", ".join(sorted(self._newest)) or "none"
        raise UnknownModel(f"no model {model!r} here; there is {names}")

    def resume(self, snapshot: Snapshot) -> Served:
        """The model version that goes on with the sequence.

        Raises: UnknownModel, TokenInvalid.
        """
        served = self.find(snapshot.model)
        if served.fingerprint != snapshot.fingerprint:
            raise TokenInvalid(f"the resume token is of another version of {snapshot.model!r}")
        return served

    @property
    def engines(self) -> list[Engine]:
        return [one.engine for one in self.served]
