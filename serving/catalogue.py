"""What is loaded: an engine for each model version that serves or retires, and why the others do not.

Every thread reads it, without a lock: what it reads is a snapshot that never changes. The thread that loads
models puts a new snapshot in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from .engine import Engine
from .errors import ModelNotReady, TokenInvalid, UnknownModel
from .manifest import Manifest, state_schema
from .reply import OutputWriter
from .tensor import Reader


@dataclass(frozen=True)
class Served:
    """One model version that is loaded."""

    engine: Engine
    reader: Reader
    writer: OutputWriter  # its engine thread's
    provider: str
    sha256: str  # of model.onnx and its external data
    fingerprint: str  # of model.onnx and manifest.json
    file_bytes: int = 0  # of the graph, with its external data
    memo: dict[type, object] = field(default_factory=dict, compare=False, repr=False)  # others' notes of it

    @property
    def manifest(self) -> Manifest:
        return self.engine.manifest


@dataclass(frozen=True)
class Refused:
    """One model version that failed its checks."""

    model: str
    version: int
    why: str


@dataclass(frozen=True)
class Loaded:
    """What serves after an operator asked for a model."""

    served: Served
    changed: bool  # False: it served before
    ended: int = 0  # sequences of what was there under its version, from other files


@dataclass(frozen=True)
class Unloaded:
    """What an operator took away."""

    versions: tuple[int, ...]
    ended: int  # sequences


@dataclass(frozen=True)
class _Snapshot:
    served: tuple[Served, ...]  # take new sequences
    retiring: tuple[Served, ...]  # keep those they have
    refused: tuple[Refused, ...]
    newest: dict[str, Served]  # of those that serve
    # Models that were unloaded by hand, and the newest version that served.
    withdrawn: Mapping[str, int] = field(default_factory=dict)
    loading: frozenset[tuple[str, int]] = frozenset()  # models and versions


def _newest(served: tuple[Served, ...]) -> dict[str, Served]:
    return {one.manifest.name: one for one in sorted(served, key=_version)}


def _version(one: Served) -> int:
    return one.engine.version


class Catalogue:
    """Models by name. Any thread may read it; `announce`, `add`, `withdraw`, `remove`, `refuse` and `forget`
    are the rollout's."""

    def __init__(self, served: list[Served], refused: list[Refused]) -> None:
        self._now = _Snapshot(tuple(served), (), tuple(refused), _newest(tuple(served)))
        self._lock = threading.Lock()  # of those who change it

    def find(self, model: str, version: int = 0) -> Served:
        """The model version that takes new sequences; version 0 is the newest.

        Raises: UnknownModel, ModelNotReady.
        """
        now = self._now
        newest = now.newest.get(model)
        if newest is not None and version in (0, newest.engine.version):
            return newest
        for one in now.served:
            if (one.manifest.name, one.engine.version) == (model, version):
                return one
        refused, unloaded = _refusal(now, model, version), model in now.withdrawn
        if refused is not None and (version or not unloaded):
            raise ModelNotReady(f"model {model}/{refused.version} failed its checks: {refused.why}")
        if unloaded:
            raise UnknownModel(f"model {model!r} was unloaded by an operator, who may load it again")
        if newest is None:
            names = ", ".join(sorted(now.newest)) or "none"
            raise UnknownModel(f"no model {model!r} here; there is {names}")
        if any((one.manifest.name, one.engine.version) == (model, version) for one in now.retiring):
            raise UnknownModel(
                f"version {version} of model {model!r} was replaced by {newest.engine.version} and takes no "
                "new sequences; open that one, or name no version"
            )
        raise UnknownModel(
            f"model {model!r} has no version {version} here; it serves {newest.engine.version}"
        )

    def resume(self, model: str, fingerprint: str, schema: str) -> Served:
        """The newest version on which a sequence goes on whose state was kept on the version of that
        fingerprint, with states of that schema. A retiring one is found until it is past its max age.

        Raises: UnknownModel, TokenInvalid.
        """
        now = self._now
        loaded = [one for one in (*now.served, *now.retiring) if one.manifest.name == model]
        if not loaded:
            raise UnknownModel(f"model {model!r} is not served here; resume where it is")
        loaded.sort(key=_version, reverse=True)
        for one in loaded:
            if not one.engine.past_max_age and _takes(one, fingerprint, schema):
                return one
        heir = next((one for one in loaded if fingerprint in one.manifest.resumes_from), None)
        if heir is not None:
            raise TokenInvalid(
                f"the token is of a version ({fingerprint[:12]}…) of model {model!r} whose states differ "
                f"from those of version {heir.engine.version}; open a new sequence"
            )
        raise TokenInvalid(
            f"the token is of a version ({fingerprint[:12]}…) of model {model!r} that this server does not "
            f"serve, and version {loaded[0].engine.version} does not take it over (manifest: resumes_from); "
            "open a new sequence"
        )

    @property
    def served(self) -> tuple[Served, ...]:
        """Those that take new sequences."""
        return self._now.served

    @property
    def retiring(self) -> tuple[Served, ...]:
        """Those that were replaced and still have sequences."""
        return self._now.retiring

    @property
    def withdrawn(self) -> Mapping[str, int]:
        """Models of which nothing serves, since somebody unloaded them, and the newest version of each."""
        return self._now.withdrawn

    @property
    def loading(self) -> frozenset[tuple[str, int]]:
        """Models and versions that are being checked and loaded."""
        return self._now.loading

    @property
    def refused(self) -> tuple[Refused, ...]:
        return self._now.refused

    @property
    def engines(self) -> list[Engine]:
        """Of all that are loaded."""
        now = self._now
        return [one.engine for one in (*now.served, *now.retiring)]

    def newest_version(self, model: str) -> int:
        """The newest that serves; 0: none does."""
        newest = self._now.newest.get(model)
        return newest.engine.version if newest else 0

    def retired(self, model: str, version: int) -> Served | None:
        """That version, if it retires."""
        return next(
            (o for o in self._now.retiring if (o.manifest.name, _version(o)) == (model, version)), None
        )

    def refusal(self, model: str, version: int) -> Refused | None:
        """Why that version, or version 0: any, failed its checks."""
        return _refusal(self._now, model, version)

    # The thread that loads.

    def announce(self, loading: list[tuple[str, int]]) -> None:
        """These are being checked and loaded now, and no others."""
        with self._lock:
            self._now = replace(self._now, loading=frozenset(loading))

    def add(self, new: Served) -> tuple[Served, ...]:
        """The version takes the new sequences of its model from now on. Those that it replaces."""
        model = new.manifest.name
        with self._lock:
            now = self._now
            replaced = tuple(o for o in now.served if o.manifest.name == model)
            served = (*(o for o in now.served if o not in replaced), new)
            self._now = replace(
                now,
                served=served,
                retiring=(*now.retiring, *replaced),
                refused=tuple(_others(now.refused, model, _version(new))),
                newest=_newest(served),
                withdrawn={m: v for m, v in now.withdrawn.items() if m != model},
            )
        return replaced

    def withdraw(self, model: str) -> tuple[Served, ...]:
        """No version of the model takes new sequences any more. All that are loaded of it."""
        with self._lock:
            now = self._now
            withdrawn = tuple(o for o in now.served if o.manifest.name == model)
            served = tuple(o for o in now.served if o not in withdrawn)
            gone = tuple(o for o in (*now.retiring, *withdrawn) if o.manifest.name == model)
            self._now = replace(
                now,
                served=served,
                retiring=(*now.retiring, *withdrawn),
                newest=_newest(served),
                withdrawn={**now.withdrawn, **({model: max(map(_version, gone))} if gone else {})},
            )
            return gone

    def remove(self, gone: Served) -> None:
        """It has no sequence any more."""
        with self._lock:
            self._now = replace(self._now, retiring=tuple(o for o in self._now.retiring if o is not gone))

    def refuse(self, refused: Refused) -> None:
        """The version failed its checks; if it had before, this is why now."""
        with self._lock:
            others = _others(self._now.refused, refused.model, refused.version)
            self._now = replace(self._now, refused=(*others, refused))

    def forget(self, model: str, version: int) -> None:
        """The folder that was refused is there no more."""
        with self._lock:
            self._now = replace(self._now, refused=tuple(_others(self._now.refused, model, version)))


def _takes(one: Served, fingerprint: str, schema: str) -> bool:
    if one.fingerprint == fingerprint:
        return True
    return fingerprint in one.manifest.resumes_from and state_schema(one.manifest) == schema


def _refusal(now: _Snapshot, model: str, version: int) -> Refused | None:
    return next((r for r in now.refused if r.model == model and version in (0, r.version)), None)


def _others(refused: tuple[Refused, ...], model: str, version: int) -> Iterator[Refused]:
    return (r for r in refused if (r.model, r.version) != (model, version))
