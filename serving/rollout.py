"""Which versions serve: the newest that passes its checks, at start and whenever a newer one appears.

A new version is checked in the child process, loaded and warmed up while the old one serves; then it takes
the new sequences, and the old one keeps those it has until they end or are past their time. A version that
fails leaves everything as it is.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .catalogue import Catalogue, Loaded, Refused, Served, Unloaded
from .engine import Engine
from .errors import ModelInvalid, ModelNotReady, TenutoError, UnknownModel
from .loader import Loader
from .metrics import ServerMetrics
from .repository import ModelFolder, ModelRepository, Signature
from .sequence import Ending
from .vetting import Verdict

log = logging.getLogger("tenuto.rollout")

# A client that lost its connection comes back within that (its own default); its version waits for it.
_RESUME_SECONDS = 30.0
# So many times the memory of a version that was unloaded is given back, until it is gone.
_LOOKS = 5
# What an operator unloads or replaces has that long to answer what it has accepted.
_UNLOAD_SECONDS = 5.0
_STOPPING = "the server stops"


class Rollout:
    """Keeps the catalogue as the repository wants it.

    `load_newest` once, then `start`: from there on a thread of its own polls, until `stop`. A test may call
    `poll` itself. Polling, since what a volume in a cluster does to its files is not always an event.
    """

    def __init__(
        self,
        repository: ModelRepository,
        loader: Loader,
        metrics: ServerMetrics,
        *,
        max_age_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalogue = Catalogue([], [])
        self._repository = repository
        self._loader = loader
        self._metrics = metrics
        self._max_age_seconds = max_age_seconds
        self._clock = clock
        self._seen: dict[ModelFolder, Signature | None] = {}  # at the last poll
        self._tried: dict[ModelFolder, Signature | None] = {}  # when it was checked
        self._empty: dict[str, tuple[int, float]] = {}  # version -> sequences lost, since when it is empty
        self._unloaded: list[tuple[weakref.ref[Engine], int]] = []  # still in memory; looks that are left
        self._trouble = ""  # the last one that was logged
        self._held: set[str] = set()  # models that an operator unloaded: nobody but an operator loads them
        self._turn = threading.Lock()  # one who changes what is loaded at a time
        self._command = threading.Lock()  # of the operator whose turn it is, or is next
        self._commanded = ""  # what he wants
        self._running = False
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # nothing begins to serve once `stop` has returned
        self._thread: threading.Thread | None = None

    def load_newest(self) -> None:
        """Each model's newest version; if it fails its checks, the next newest.

        Raises: ModelInvalid if none serves.
        """
        waiting = self._repository.folders()
        while waiting:
            self._try([folders.pop(0) for folders in waiting.values()])
            waiting = {m: f for m, f in waiting.items() if f and not self.catalogue.newest_version(m)}
        if not self.catalogue.served:
            why = (
                "; ".join(f"{r.model}/{r.version}: {r.why}" for r in self.catalogue.refused)
                or "it holds no <model>/<version>/ folder"
            )
            raise ModelInvalid(f"no model of {self._repository.root} serves: {why}")

    def start(self, poll_seconds: float) -> None:
        """Starts the engines, and polls from now on; 0: never."""
        for engine in self.catalogue.engines:
            engine.start()
        self._running = True
        if poll_seconds:
            self._thread = threading.Thread(
                target=self._loop, args=(poll_seconds,), name="rollout", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """No version begins to serve from here on. A check in progress ends soon; see `join`."""
        with self._lock:
            self._stopping.set()

    def join(self, seconds: float = 5.0) -> None:
        """Waits until the thread has ended, and with it its child process."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _loop(self, poll_seconds: float) -> None:
        while not self._stopping.wait(poll_seconds):
            try:
                self.poll()
                self._trouble = ""
            except OSError as error:  # a network volume, perhaps; it is said once
                if self._trouble != str(error):
                    self._trouble = str(error)
                    log.warning("the model repository cannot be read, and is tried again: %s", error)
            except Exception:  # the next look may go well, and nobody else takes this one
                log.exception("a look for new versions met a bug")

    def poll(self) -> None:
        """Looks once: what has retired and is empty goes, what is new and stood still since the last look is
        tried.

        Raises: OSError where the repository cannot be read.
        """
        with self._turn:
            self._poll()

    def load(self, model: str) -> Loaded:
        """Has the newest version of the model serve that passes its checks, now; none if the newest serves.

        Raises: UnknownModel, ModelNotReady, OSError.
        """
        with self._alone(f"load of {model!r}"):
            return self._bring(model, lambda folder, serving: folder.version <= serving.engine.version)

    def reload(self, model: str) -> Loaded:
        """As `load`, and looks at what the version that serves was loaded from: other files are loaded in its
        place, and its sequences end as in `unload`; where it is gone, the newest that is there takes over.

        Raises: UnknownModel, ModelNotReady, OSError.
        """
        with self._alone(f"reload of {model!r}"):
            return self._bring(model, _is_of)

    def unload(self, model: str) -> Unloaded:
        """Lets go of all versions of the model, until an operator loads it. Its sequences end, with tokens,
        once their accepted chunks are answered; those that take too long for that, at once.

        Raises: UnknownModel, ModelNotReady.
        """
        with self._alone(f"unload of {model!r}"):
            gone = self.catalogue.withdraw(model)
            if not gone:
                raise UnknownModel(f"failed to unload '{model}': it is not loaded")
            self._held.add(model)
            return Unloaded(tuple(sorted(one.engine.version for one in gone)), self._send_away(gone))

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """One operator waits until the look in progress is over; another one does not: few threads serve such
        calls, and a check may take minutes.

        Raises: ModelNotReady.
        """
        if not self._command.acquire(blocking=False):
            raise ModelNotReady(f"another operator's {self._commanded} is not finished; try again")
        try:
            self._commanded = what
            with self._turn:
                yield
        finally:
            self._command.release()

    def _bring(self, model: str, suffices: Callable[[ModelFolder, Served], bool]) -> Loaded:
        """Tries the model's versions, newest first, until what serves `suffices` for one."""
        folders = self._repository.folders().get(model, [])
        if not folders:
            raise UnknownModel(f"failed to load '{model}': the model repository has no version of it")
        before, refusals, ended = self._serving(model), list[str](), 0
        for folder in folders:
            serving = self._serving(model)
            if serving is not None and suffices(folder, serving):
                break
            refusal, away = self._try([folder])[folder]
            if refusal:
                refusals.append(refusal if folder.where in refusal else f"{folder.where}: {refusal}")
            ended += away
            if not refusal or (serving is not None and folder.version == serving.engine.version):
                break  # it serves now, or the version that it would replace goes on
        serving = self._serving(model)
        if serving is not None:
            self._held.discard(model)
        if refusals or serving is None:
            left = f", {serving.engine.where} serves" if serving else ""
            raise ModelNotReady(f"failed to load '{model}'{left}: {'; '.join(refusals)}")
        return Loaded(serving, serving is not before, ended)

    def _serving(self, model: str) -> Served | None:
        """The version that takes the new sequences."""
        return next((one for one in self.catalogue.served if one.manifest.name == model), None)

    def _poll(self) -> None:
        self._unload()
        there = self._repository.folders()
        self._forget_deleted(there)
        folders = {model: versions for model, versions in there.items() if model not in self._held}
        before, self._seen = self._seen, {}
        candidates = []
        for model, versions in folders.items():
            newer = [f for f in versions if f.version > self.catalogue.newest_version(model)]
            self._seen.update({folder: folder.signature() for folder in newer})
            candidates += [f for f in newer if self._stood_still(f, before)][:1]
        self._tried = {f: s for f, s in self._tried.items() if f in self._seen}
        if candidates:
            self._try(candidates)

    def _stood_still(self, folder: ModelFolder, before: dict[ModelFolder, Signature | None]) -> bool:
        """Whether it is whole, as far as can be told, and was not tried as it is now."""
        signature = self._seen[folder]
        return bool(signature) and before.get(folder) == signature != self._tried.get(folder)

    def _forget_deleted(self, folders: dict[str, list[ModelFolder]]) -> None:
        there = {(f.model, f.version) for versions in folders.values() for f in versions}
        for refused in self.catalogue.refused:
            if (refused.model, refused.version) not in there:
                self.catalogue.forget(refused.model, refused.version)

    def _try(self, folders: list[ModelFolder]) -> dict[ModelFolder, tuple[str, int]]:
        """One folder a model: each takes over, or is refused. Why it was; how many sequences ended by it."""
        self._tried.update({folder: folder.signature() for folder in folders})
        self.catalogue.announce([(folder.model, folder.version) for folder in folders])
        try:
            verdicts = self._loader.check(folders, self._stopping)
            return {folder: self._load(folder, verdicts[folder]) for folder in folders}
        finally:
            self.catalogue.announce([])

    def _load(self, folder: ModelFolder, verdict: Verdict) -> tuple[str, int]:
        if self._stopping.is_set():
            return _STOPPING, 0
        try:
            served = self._loader.load(folder, verdict)
        except (TenutoError, MemoryError) as error:
            log.error("%s is not served: %s", folder.where, error)
            self._metrics.loads[folder.model, "failed"] += 1
            serving = self._serving(folder.model)
            if serving is None or serving.engine.version != folder.version:  # else it serves as it was
                self.catalogue.refuse(Refused(folder.model, folder.version, str(error)))
            return str(error), 0
        return self._take_over(served)

    def _take_over(self, new: Served) -> tuple[str, int]:
        with self._lock:
            if self._stopping.is_set():
                return _STOPPING, 0
            if self._running:
                new.engine.start()
            self._metrics.loads[new.manifest.name, "loaded"] += 1
            replaced = self.catalogue.add(new)
        # Two of one name and number would be one line in metrics: the older one goes first.
        same = tuple(one for one in self.catalogue.retiring if one.engine.where == new.engine.where)
        self._retire(new, [old for old in replaced if old not in same])
        ended = self._send_away(same)
        self._metrics.models.append(new.engine.metrics)
        return "", ended

    def _retire(self, new: Served, replaced: list[Served]) -> None:
        for old in replaced:
            old.engine.metrics.retiring = True
            old.engine.retire(self._max_age_seconds)
            log.info(
                "%s takes over from %s, whose %d live sequences have up to %g s (0: no end)",
                new.engine.where,
                old.engine.where,
                old.engine.metrics.active_sequences,
                self._max_age_seconds,
            )

    def _send_away(self, gone: tuple[Served, ...]) -> int:
        """Lets go of them once they have answered what they have accepted, or after a while. How many
        sequences ended by it."""
        ended = 0
        for one in gone:
            one.engine.metrics.retiring = True
            ended -= _sent_away(one.engine)
            one.engine.drain()
        for one in gone:
            one.engine.emptied.wait(_UNLOAD_SECONDS)
            self._unloaded.append((self._let_go(one), _LOOKS))
            ended += _sent_away(one.engine) + len(one.engine.sequences())  # whose run goes on even now
        return ended

    def _unload(self) -> None:
        """Lets go of the versions that retired and to which nobody comes back."""
        gone = [self._let_go(one) for one in self.catalogue.retiring if self._is_deserted(one.engine)]
        unloaded = self._unloaded + [(engine, _LOOKS) for engine in gone]
        if unloaded:
            _give_back_memory()
        # What another thread holds for a moment is gone at one of the next looks.
        self._unloaded = [(engine, looks - 1) for engine, looks in unloaded if looks and engine() is not None]

    def _let_go(self, old: Served) -> weakref.ref[Engine]:
        self.catalogue.remove(old)
        self._empty.pop(old.engine.where, None)
        old.engine.stop(Ending.MAX_AGE)
        self._metrics.forget(old.engine.metrics)
        log.info("%s is unloaded, SHA-256 %s", old.engine.where, old.sha256)
        return weakref.ref(old.engine)

    def _is_deserted(self, engine: Engine) -> bool:
        """Whether it was empty at the last look as well: somebody may just be on the way. After a broken
        connection it takes longer."""
        if not engine.emptied.is_set():
            self._empty.pop(engine.where, None)
            return False
        lost = engine.metrics.ended[Ending.CANCELLED.name]
        lost_before, since = self._empty.get(engine.where, (-1, 0.0))
        if lost != lost_before:
            self._empty[engine.where] = (lost, self._clock())
            return False
        return not lost or engine.past_max_age or self._clock() - since >= _RESUME_SECONDS


def _is_of(folder: ModelFolder, serving: Served) -> bool:
    """Whether the version that serves is what the folder holds."""
    if folder.version != serving.engine.version:
        return False
    try:
        return folder.read().fingerprint == serving.fingerprint
    except TenutoError:  # its check will tell
        return False


def _sent_away(engine: Engine) -> int:
    ended = engine.metrics.ended
    return ended[Ending.DRAINING.name] + ended[Ending.MAX_AGE.name]


def _give_back_memory() -> None:
    """An engine and its metrics refer to each other, and glibc keeps what was freed for the next one."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
