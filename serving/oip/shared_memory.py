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
_NEARBY = ("ipv4:127.", "ipv6:[::1]", "unix:")


@dataclass(frozen=True, slots=True)
class Region:
    """One that is registered."""

    name: str
    key: str
    offset: int
    nbytes: int
    file: int


class Regions:
    """All of a server. Any thread."""

    def __init__(self, prefix: str) -> None:
        """Keys begin with `prefix`; an empty one means that there is no shared memory."""
        self.prefix = prefix
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: str, offset: int, nbytes: int, peer: str) -> None:
        """Raises: Refusal."""
        self._check_peer(peer)
        if not _KEY.fullmatch(key) or not key.removeprefix("/").startswith(self.prefix.removeprefix("/")):
            raise Refusal(
                f"failed to register shared memory region '{name[:100]}': its key {key[:100]!r} does not "
                f"begin with {self.prefix!r}, or has other characters than letters, digits, '.', '_' and '-'"
            )
        with self._lock:
            if name in self._regions:
                raise Refusal(f"shared memory region '{name}' already in manager", Code.ALREADY_EXISTS)
            if len(self._regions) >= _MOST_REGIONS:
                text = f"{_MOST_REGIONS} shared memory regions are registered; unregister some"
                raise Refusal(text, Code.UNAVAILABLE)
            file = _opened(name, key, offset + nbytes)
            self._regions[name] = Region(name, key, offset, nbytes, file)

    def unregister(self, name: str, peer: str) -> None:
        """All of them without a name. One that is not there is no error, as in Triton."""
        self._check_peer(peer)
        with self._lock:
            names = [name] if name else list(self._regions)
            for one in names:
                region = self._regions.pop(one, None)
                if region is not None:
                    os.close(region.file)

    def status(self, name: str, peer: str) -> list[Region]:
        """That one, or all. Raises: Refusal."""
        self._check_peer(peer)
        with self._lock:
            if name and name not in self._regions:
                raise _unknown(name)
            return [self._regions[name]] if name else list(self._regions.values())

    def read(self, place: Place, peer: str) -> bytes:
        """Raises: Refusal."""
        self._check_peer(peer)
        with self._lock:  # or its file might be closed meanwhile, and be another one
            region = self._region(place)
            data = os.pread(region.file, place.nbytes, region.offset + place.offset)
        if len(data) != place.nbytes:
            raise Refusal(
                f"shared memory region '{place.region}' was cut off: {len(data)} bytes are left there"
            )
        return data

    def write(self, place: Place, data: bytes, output: str) -> None:
        """Raises: Refusal."""
        if len(data) > place.nbytes:
            raise Refusal(
                f"shared memory size specified with the request for output '{output}' ({place.nbytes} bytes) "
                f"should be at least {len(data)} bytes to hold the results",
                Code.INTERNAL,
            )
        with self._lock:
            region = self._region(place)
            if os.fstat(region.file).st_size < region.offset + place.offset + len(data):  # or it would grow
                raise Refusal(f"shared memory region '{place.region}' was cut off")
            os.pwrite(region.file, data, region.offset + place.offset)

    def check(self, place: Place, peer: str) -> None:
        """Whether a tensor may be written there. Raises: Refusal."""
        self._check_peer(peer)
        with self._lock:
            self._region(place)

    def close(self) -> None:
        """Lets go of all of them."""
        with self._lock:
            regions, self._regions = self._regions, {}
        for region in regions.values():
            os.close(region.file)

    def _region(self, place: Place) -> Region:
        region = self._regions.get(place.region)
        if region is None:
            raise _unknown(place.region)
        if place.offset >= region.nbytes:
            raise Refusal(f"Invalid offset for shared memory region: '{place.region}'")
        if place.offset + place.nbytes > region.nbytes:
            raise Refusal(f"Invalid offset + byte size for shared memory region: '{place.region}'")
        return region

    def _check_peer(self, peer: str) -> None:
        if not self.prefix:
            raise Refusal(
                "shared memory is off; start the server with --shared-memory",
                Code.UNIMPLEMENTED,
                "NOT_SUPPORTED",
            )
        if not peer.startswith(_NEARBY):
            raise Refusal(
                "shared memory is for clients on the server's machine, over the loopback or a Unix socket",
                Code.UNIMPLEMENTED,
                "NOT_SUPPORTED",
            )


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
