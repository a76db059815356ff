"""Who may call: bearer tokens from a file, and what each caller may have at once.

    [alice]
    tokens = ["3f9c…"]          # `openssl rand -hex 32`; two while one replaces the other
    max_sequences = 100         # live at once on this server; 0, the default: no limit of its own
    chunks_per_second = 500     # on average over a second; above it her streams are read later. 0: any
    operator = false            # may list and end what others have, too, and load and unload models

Without a file everybody may call, and sees everything.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from .errors import ConfigInvalid, NotAnOperator, PoolFull, RateExceeded, Unauthenticated

log = logging.getLogger("tenuto.callers")

_LEAST_TOKEN_LENGTH = 16
_SCHEME = "bearer "
_LONGEST_PAUSE_SECONDS = 3600.0

Token = Annotated[str, Field(min_length=_LEAST_TOKEN_LENGTH, max_length=1024, pattern=r"^[!-~]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]


class Rights(BaseModel):
    """What one section of the file says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Annotated[tuple[Token, ...], Field(min_length=1)]
    max_sequences: Annotated[int, Field(ge=0)] = 0
    chunks_per_second: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    operator: bool = False

    @field_validator("chunks_per_second")
    @classmethod
    def _is_no_trifle(cls, rate: float) -> float:
        if 0 < rate < 0.01:
            raise ValueError("expected 0, or 0.01 at least")
        return rate


_FILE: TypeAdapter[dict[str, Rights]] = TypeAdapter(dict[Name, Rights])


class Account:
    """What one caller has here, whichever of its tokens it shows. Any thread, with `lock`."""

    def __init__(self) -> None:
        self.live = 0  # sequences
        self.rate = 0.0  # chunks a second that `left` is counted by
        self.left, self.at = 0.0, 0.0  # chunks that may come at once, and when that was so
        self.lock = threading.Lock()


class Caller:
    """Who shows one of a caller's tokens. Those of one caller share its account. Any thread."""

    def __init__(
        self,
        name: str,
        operator: bool = False,
        max_sequences: int = 0,
        rate: float = 0.0,
        account: Account | None = None,
    ) -> None:
        self.name = name
        self.is_known = True  # False once the token is not in the file any more, or is another caller's
        self.account = account or Account()
        self.allow(operator, max_sequences, rate)

    def allow(self, operator: bool, max_sequences: int, rate: float) -> None:
        """What it may from now on. `rate`: chunks a second."""
        with self.account.lock:
            self.operator = operator
            self.max_sequences = max_sequences
            self.rate = rate
            if rate != self.account.rate:
                self.account.rate = self.account.left = rate  # a second's worth may come at once

    def may_see(self, owner: str) -> bool:
        """Whether sequences of that caller are its business."""
        return self.operator or owner == self.name

    def check_operator(self) -> None:
        """For what loads and unloads models. Raises: NotAnOperator."""
        if not self.operator:
            raise NotAnOperator("only operators load and unload models; see --callers")

    def take_place(self, instead: bool = False) -> None:
        """For one more sequence; or `instead` of one that ends by that. Raises: PoolFull."""
        account = self.account
        with account.lock:
            if self.max_sequences and account.live >= self.max_sequences + instead:
                raise PoolFull(
                    f"caller {self.name!r} has {account.live} live sequences here, its limit; end one first"
                )
            account.live += 1

    def leave_places(self, count: int) -> None:
        with self.account.lock:
            self.account.live -= count

    def spend(self, chunks: int, now: float) -> float:
        """Counts them. How many seconds the next ones should wait; 0 without a rate."""
        account, rate = self.account, self.rate
        with account.lock:
            if not rate:
                return 0.0
            account.left = min(rate, account.left + (now - account.at) * rate) - chunks
            account.at = now
            return min(max(0.0, -account.left / rate), _LONGEST_PAUSE_SECONDS)

    def check_rate(self, now: float, patience_seconds: float = 0.0) -> None:
        """For what is refused instead of waiting longer than that. Raises: RateExceeded."""
        seconds = self.spend(0, now)
        if seconds > patience_seconds:
            raise RateExceeded(
                f"caller {self.name!r} sends more than its {self.rate:g} chunks a second; slow down",
                retry_after_ms=1 + int(1000 * seconds),
            )


ANYBODY = Caller("", operator=True)


class Callers:
    """The callers of a file; `reload` reads it again when it changed. Without one, `identify` gives ANYBODY.

    Raises (when built): ConfigInvalid.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.refused = 0  # calls without a token that is in the file
        self._lock = threading.Lock()  # of that count
        self._text = b""
        self._seen = b""  # what the file held at the last look
        self._by_name: dict[str, Account] = {}
        self._digests: dict[bytes, Caller] = {}  # by the SHA-256 of its token
        if file is not None:
            self._text = _read(file)
            self._take(parse(self._text, str(file)))

    def identify(self, metadata: Callable[[], Iterable[tuple[str, str | bytes]]]) -> Caller:
        """Whose call that is, by its `authorization: Bearer …`.

        Raises: Unauthenticated. The time it takes does not depend on how near a wrong token comes: what is
        looked up, and compared, is its SHA-256. Those of two tokens of one caller are two objects.
        """
        if self._file is None:
            return ANYBODY
        values = [value for name, value in metadata() if name == "authorization"]
        shown = values[0] if len(values) == 1 else ""
        if isinstance(shown, str) and shown[: len(_SCHEME)].lower() == _SCHEME:
            digest = _digest(shown[len(_SCHEME) :].strip())
            caller = self._digests.get(digest)
            if caller is not None:
                return caller
        with self._lock:
            self.refused += 1
        raise Unauthenticated(
            "the call's token is not known here"
            if values
            else "the call brings no token; send one as "
            "'authorization: Bearer …' (Client(token=…), tenuto --token-file)"
        )

    def reload(self) -> bool:
        """Takes the file if it changed and is as it was at the last look, so that nobody is still writing it;
        what is wrong leaves the old one. Whether it did."""
        if self._file is None:
            return False
        try:
            text = _read(self._file)
            before, self._seen = self._seen, text
            if text == self._text or text != before:
                return False
            rights = parse(text, str(self._file))
        except ConfigInvalid as error:
            if self._text:
                log.error("the callers stay as they were: %s", error)
            self._text = b""  # said once; and read again once it is right
            return False
        self._text = text
        self._take(rights)
        log.info("%d callers from %s", len(rights), self._file)
        return True

    def _take(self, rights: dict[str, Rights]) -> None:
        accounts = {name: self._by_name.get(name) or Account() for name in rights}
        digests: dict[bytes, Caller] = {}
        for name, one in rights.items():
            limits = one.operator, one.max_sequences, one.chunks_per_second
            for digest in map(_digest, one.tokens):
                caller = self._digests.get(digest)
                if caller is None or caller.name != name:
                    caller = Caller(name, *limits, accounts[name])
                caller.allow(*limits)
                digests[digest] = caller
        for digest, caller in self._digests.items():
            caller.is_known = digests.get(digest) is caller
        self._digests = digests
        self._by_name = accounts


def parse(text: bytes, where: str) -> dict[str, Rights]:
    """By name, what a file of callers says.

    Raises: ConfigInvalid, which quotes no token.
    """
    try:
        rights = _FILE.validate_python(tomllib.loads(text.decode()))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigInvalid(f"{where}: is no TOML: {error}") from None
    except ValidationError as error:
        faults = "; ".join(_fault(e["loc"], e["msg"]) for e in error.errors(include_input=False))
        raise ConfigInvalid(f"{where}: {faults}") from None
    owners: dict[str, str] = {}
    for name, one in rights.items():
        for token in one.tokens:
            other = owners.setdefault(token, name)
            if other != name:
                raise ConfigInvalid(f"{where}: {other} and {name} have the same token; give each its own")
    if not rights:
        raise ConfigInvalid(f"{where}: names no caller, so nobody could call")
    return rights


def _fault(place: tuple[int | str, ...], text: str) -> str:
    """Where the place may be a token by mistake, it is not quoted."""
    words = [str(word) if len(str(word)) < _LEAST_TOKEN_LENGTH else "…" for word in place]
    return f"{'.'.join(words)}: {text}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"--callers {path} cannot be read: {error.strerror}") from error


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class Pacer:
    """Wakes who has to wait, on a thread of its own, which begins with the first of them. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._condition = threading.Condition()
        self._due: dict[Callable[[], None], float] = {}
        self._thread: threading.Thread | None = None
        self._over = False

    def later(self, seconds: float, resume: Callable[[], None]) -> None:
        """Calls it once, after that time."""
        with self._condition:
            self._due[resume] = self._clock() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pacer", daemon=True)
                self._thread.start()
            self._condition.notify()

    @property
    def waiting(self) -> int:
        return len(self._due)

    def forget(self, resume: Callable[[], None]) -> None:
        with self._condition:
            self._due.pop(resume, None)

    def close(self) -> None:
        """Nobody is woken any more."""
        with self._condition:
            self._over = True
            self._due.clear()
            self._condition.notify()

    def _run(self) -> None:
        while not self._over:
            for resume in self._next():
                try:
                    resume()
                except Exception:  # the others wait for this thread as well
                    log.exception("who waited for his turn met a bug")

    def _next(self) -> list[Callable[[], None]]:
        """Those whose time has come, after waiting for the first of them."""
        with self._condition:
            now = self._clock()
            due = [resume for resume, at in self._due.items() if at <= now]
            for resume in due:
                del self._due[resume]
            if not due and not self._over:
                self._condition.wait(max(0.0, min(self._due.values()) - now) if self._due else None)
            return due
