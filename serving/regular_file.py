"""Reads files of the model folder, which may hold anything: regular files alone, whole, and none that is too
large. A FIFO would hold its reader up, a device would be asked for things.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from .errors import ModelInvalid

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_SHOWN = 64  # characters of a name
_KINDS = {
    stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}  # fmt: skip


def read(path: Path, most_bytes: int, where: str) -> bytes:
    """The file's bytes. Links are followed, wherever they lead.

    Raises: ModelInvalid.
    """
    try:
        _check(os.stat(path))
        return _contents(os.open(path, _OPEN), most_bytes)
    except (OSError, _Unfit) as error:
        raise ModelInvalid(f"{where}: {path.name} cannot be read: {_words(error)}") from error


def read_inside(folder: Path, name: str, most_bytes: int, where: str) -> bytes:
    """The bytes of the file of that name, in POSIX's spelling, in the folder or below it. Links may lead to
    other files in there; nothing outside is opened, even if links change meanwhile.

    Raises: ModelInvalid.
    """
    try:
        return _contents(_open_inside(folder, name), most_bytes)
    except (OSError, _Unfit) as error:
        raise ModelInvalid(f"{where}: {name[:_SHOWN]!r} cannot be read: {_words(error)}") from error


class _Unfit(Exception):
    """What is there is nothing to read."""


def _words(error: OSError | _Unfit) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _open_inside(folder: Path, name: str) -> int:
    if not name or not name.isprintable() or "\\" in name:
        raise _Unfit("its name is empty, or holds a character that no name of a file here may hold")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise _Unfit("its name leads out of the version's folder; put the file into it")
    root = Path(os.path.realpath(folder, strict=True))
    real = Path(os.path.realpath(root / name, strict=True))
    if not real.is_relative_to(root):
        raise _Unfit("a link leads out of the version's folder; put the file itself into it")
    *folders, last = real.relative_to(root).parts or (".",)
    at = os.open(root, _OPEN | os.O_DIRECTORY)
    try:
        for part in folders:  # one by one, since one of them may be a link by now
            inner = os.open(part, _OPEN | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        _check(os.stat(last, dir_fd=at, follow_symlinks=False))
        return os.open(last, _OPEN | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "link")
        raise _Unfit(f"it is a {kind}, and must be a file")


def _contents(handle: int, most_bytes: int) -> bytes:
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        _check(status)
        if status.st_size > most_bytes:
            raise _Unfit(f"it has {status.st_size} bytes, of which at most {most_bytes} are read")
        contents = file.read(status.st_size + 1)
    if len(contents) != status.st_size:
        raise _Unfit("it changes while it is read; write it elsewhere, and rename it when it is whole")
    return contents
