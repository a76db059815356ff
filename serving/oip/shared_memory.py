"""Regions of POSIX shared memory that a client on this machine registered: tensors that are in no message.

They are read and written by file, not mapped: a client that cuts a region off would end the process that has
it mapped (SIGBUS). A short read is an error of one request.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

from .question import Place
from .refusal import Code, Refusal

_FOLDER = Path("/dev/shm")  # where shm_open of Linux keeps them
_KEY = re.compile(r"/?[A-Za-z0-9._-]{1,250}")
_MOST_REGIONS = 4096
# As our own server and gRPC's name the loopback.
_NEARBY = (
    "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "ipv6:[::ffff:127.", "ipv6:%5B::ffff:127.", "unix:",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Region:
    """One that is registered."""

    name: str
    key: str
    offset: int
    nbytes: int
    file: int


class Regions:
    """All of a server, each its caller's. Any thread."""

    def __init__(self, prefix: str, max_bytes: int) -> None:
        """Keys begin with `prefix`; an empty one means that there is no shared memory. A tensor
        there has `max_bytes` at most, as a message has."""
        self.prefix = prefix
        self.max_bytes = max_bytes
        self._regions: dict[tuple[str, str], Region] = {}
        self._lock = threading.Lock()

    def of(self, owner: str, peer: str) -> Memory:
        """That caller's, who calls from there."""
        return Memory(self, owner, peer)

    def register(self, owner: str, name: str, key: str, offset: int, nbytes: int) -> None:
        """Raises: Refusal."""
        if not _KEY.fullmatch(key) or not key.removeprefix("/").startswith(self.prefix.removeprefix("/")):
            raise Refusal(
                f"failed to register shared memory region '{name[:100]}': its key {key[:100]!r} does not "
                f"begin with {self.prefix!r}, or has other characters than letters, digits, '.', '_' and '-'"
            )
        with self._lock:
            if (owner, name) in self._regions:
                raise Refusal(f"shared memory region '{name}' already in manager", Code.ALREADY_EXISTS)
            if len(self._regions) >= _MOST_REGIONS:
                text = f"{_MOST_REGIONS} shared memory regions are registered; unregister some"
                raise Refusal(text, Code.UNAVAILABLE)
            file = _opened(name, key, offset + nbytes)
            self._regions[owner, name] = Region(name, key, offset, nbytes, file)

    def unregister(self, owner: str, name: str) -> None:
        """All of them without a name. One that is not there is no error, as in Triton."""
        with self._lock:
            own = [one for one in self._regions if one[0] == owner and name in ("", one[1])]
            for one in own:
                os.close(self._regions.pop(one).file)

    def status(self, owner: str, name: str) -> list[Region]:
        """That one, or all. Raises: Refusal."""
        with self._lock:
            found = [r for (whose, n), r in self._regions.items() if whose == owner and name in ("", n)]
        if name and not found:
            raise _unknown(name)
        return found

    def borrow(self, owner: str, place: Place) -> tuple[int, int]:
        """A file of the caller's own, to be closed, and where the place begins in it. Raises: Refusal."""
        with self._lock:
            region = self._regions.get((owner, place.region))
            if region is None:
                raise _unknown(place.region)
            if place.offset >= region.nbytes:
                raise Refusal(f"Invalid offset for shared memory region: '{place.region}'")
            if place.offset + place.nbytes > region.nbytes:
                raise Refusal(f"Invalid offset + byte size for shared memory region: '{place.region}'")
            return os.dup(region.file), region.offset + place.offset

    def close(self) -> None:
        """Lets go of all of them."""
        with self._lock:
            regions, self._regions = self._regions, {}
        for region in regions.values():
            os.close(region.file)


@dataclass(frozen=True, slots=True)
class Memory:
    """The regions of one caller, who calls from `peer`."""

    regions: Regions
    owner: str
    peer: str

    def register(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Raises: Refusal."""
        self._check()
        self.regions.register(self.owner, name, key, offset, nbytes)

    def unregister(self, name: str) -> None:
        """Raises: Refusal."""
        self._check()
        self.regions.unregister(self.owner, name)

    def status(self, name: str) -> list[Region]:
        """Raises: Refusal."""
        self._check()
        return self.regions.status(self.owner, name)

    def read(self, place: Place) -> bytes:
        """Raises: Refusal."""
        self._check()
        if place.nbytes > self.regions.max_bytes:
            raise Refusal(
                f"{place.nbytes} bytes of shared memory region '{place.region}', the limit is "
                f"{self.regions.max_bytes} (--max-message-bytes)"
            )
        file, begin = self.regions.borrow(self.owner, place)
        try:
            data = os.pread(file, place.nbytes, begin)
        finally:
            os.close(file)
        if len(data) != place.nbytes:
            text = f"shared memory region '{place.region}' was cut off: {len(data)} bytes are left there"
            raise Refusal(text)
        return data

    def write(self, place: Place, data: bytes, output: str) -> None:
        """Raises: Refusal."""
        if len(data) > place.nbytes:
            raise Refusal(
                f"shared memory size specified with the request for output '{output}' ({place.nbytes} bytes) "
                f"should be at least {len(data)} bytes to hold the results",
                Code.INTERNAL,
            )
        file, begin = self.regions.borrow(self.owner, place)
        try:
            if os.fstat(file).st_size < begin + len(data):  # or it would grow
                raise Refusal(f"shared memory region '{place.region}' was cut off")
            os.pwrite(file, data, begin)
        finally:
            os.close(file)

    def check(self, place: Place) -> None:
        """Whether a tensor may be written there. Raises: Refusal."""
        self._check()
        file, _ = self.regions.borrow(self.owner, place)
        os.close(file)

    def _check(self) -> None:
        if not self.regions.prefix:
            text = "shared memory is off; start the server with --shared-memory"
            raise Refusal(text, Code.UNIMPLEMENTED, "NOT_SUPPORTED")
        if not self.peer.startswith(_NEARBY):
            text = "shared memory is for clients on the server's machine, over the loopback or a Unix socket"
            raise Refusal(text, Code.UNIMPLEMENTED, "NOT_SUPPORTED")


def _opened(name: str, key: str, nbytes: int) -> int:
    """The file of that key, of so many bytes or more. Raises: Refusal."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        file = os.open(_FOLDER / key.removeprefix("/"), flags)
    except OSError as error:
        text = f"Unable to open shared memory region: '{name}': {error.strerror}"
        raise Refusal(text, Code.INTERNAL) from error
    there = os.fstat(file)
    if not stat.S_ISREG(there.st_mode) or there.st_size < nbytes:
        os.close(file)
        raise Refusal(
            f"failed to register shared memory region '{name}': invalid args: it has {there.st_size} bytes, "
            f"and {nbytes} were to be registered"
        )
    return file


def _unknown(name: str) -> Refusal:
    return Refusal(f"Unable to find shared memory region: '{name}'", Code.NOT_FOUND)
