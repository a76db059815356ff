"""Seals snapshots, so that clients can hold them: AES-GCM under a key that each process derives for itself.

    token = format (1 byte) | key id (4) | salt (16) | nonce (12) | ciphertext with its tag
    ciphertext: expiry (unix seconds, float64) | snapshot
    key = HKDF-SHA256(master, salt)           (RFC 5869; NIST SP 800-38D for the nonces)

The salt is random for each process and each change of keys, the nonce a counter: a fleet that drew random
nonces under one key would reach the limit of 2^32 messages in days. The master keys come from a file whose
first key seals and whose keys all open, so that a key is exchanged in two steps. Without a file the master is
random, and tokens are good for this process alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import ConfigInvalid, TokenInvalid
from .snapshot import Snapshot

log = logging.getLogger("tenuto.resume_token")

_FORMAT = b"\x01"
_KEY_BYTES, _ID_BYTES, _SALT_BYTES, _NONCE_BYTES, _TAG_BYTES = 32, 4, 16, 12, 16
_HEAD_BYTES = len(_FORMAT) + _ID_BYTES + _SALT_BYTES
_EXPIRY = struct.Struct("<d")
_LEAST_BYTES = _HEAD_BYTES + _NONCE_BYTES + _EXPIRY.size + _TAG_BYTES
_MOST_KEYS = 8


@dataclass(frozen=True)
class _Keys:
    """The masters, and this process's own key under the first of them."""

    masters: tuple[bytes, ...]
    salt: bytes = field(default_factory=lambda: os.urandom(_SALT_BYTES))
    count: itertools.count[int] = field(default_factory=itertools.count)  # `next` is one step: any thread

    @functools.cached_property
    def head(self) -> bytes:
        return _FORMAT + _key_id(self.masters[0]) + self.salt

    @functools.cached_property
    def own(self) -> AESGCM:
        return AESGCM(_derive(self.masters[0], self.salt))


class TokenSealer:
    """Seals and opens resume tokens. Any thread.

    `key_file` holds one master key a line, 64 hexadecimal digits (`openssl rand -hex 32`); lines that begin
    with # are comments. `reload` reads it again when it changed.

    Raises (when built): ConfigInvalid if the file cannot be read or holds no key.
    """

    def __init__(
        self,
        key_file: Path | None = None,
        *,
        lifetime_seconds: float = 86_400.0,
        max_bytes: int = 1 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = key_file
        self._lifetime_seconds = lifetime_seconds
        self._max_bytes = max_bytes  # no token is larger, and none is opened that is
        self._clock = clock  # of the wall: tokens go from machine to machine
        self._text = b""
        self._keys = _Keys((os.urandom(_KEY_BYTES),))
        if key_file is None:
            log.info("no --token-key-file: resume tokens are good for this process alone")
        else:
            self._text = _read(key_file)
            self._keys = _Keys(parse_keys(self._text, str(key_file)))

    def reload(self) -> bool:
        """Takes the file's keys if they changed; what cannot be read leaves the old ones. Whether it did."""
        if self._file is None:
            return False
        try:
            text = _read(self._file)
            if text == self._text:
                return False
            masters = parse_keys(text, str(self._file))
        except ConfigInvalid as error:
            if self._text:
                log.error("the token keys stay as they were: %s", error)
            self._text = b""  # said once; and read again once it is whole
            return False
        if masters != self._keys.masters:
            self._keys = _Keys(masters)
            log.info("%d token keys from %s, %s seals", len(masters), self._file, _key_id(masters[0]).hex())
        elif not self._text:
            log.info("%s can be read again; the token keys are as they were", self._file)
        self._text = text
        return True

    def seal(self, snapshot: Snapshot, caller: str = "") -> bytes:
        """Good for that caller alone."""
        keys = self._keys
        nonce = next(keys.count).to_bytes(_NONCE_BYTES, "big")
        plain = _EXPIRY.pack(self._clock() + self._lifetime_seconds) + snapshot.to_bytes()
        return keys.head + nonce + keys.own.encrypt(nonce, plain, keys.head + caller.encode())

    def unseal(self, token: bytes, caller: str = "") -> Snapshot:
        """The snapshot that one of these keys sealed. The same work for a forged token as for a good one.

        Raises: TokenInvalid, saying whether it is truncated, not of these keys, or expired.
        """
        if not _LEAST_BYTES <= len(token) <= self._max_bytes or not token.startswith(_FORMAT):
            raise TokenInvalid(f"{len(token)} bytes are no resume token; send it as it came")
        head, nonce = token[:_HEAD_BYTES], token[_HEAD_BYTES : _HEAD_BYTES + _NONCE_BYTES]
        key_id, salt = head[1 : 1 + _ID_BYTES], head[1 + _ID_BYTES :]
        masters = self._keys.masters
        master = next((m for m in masters if _key_id(m) == key_id), masters[0])
        try:
            sealed = token[_HEAD_BYTES + _NONCE_BYTES :]
            plain = _opener(master, salt).decrypt(nonce, sealed, head + caller.encode())
        except InvalidTag:
            text = (
                "the resume token was changed on its way, or is another caller's, or sealed with a key that "
                "this server does not have; give all servers the same --token-key-file"
            )
            raise TokenInvalid(text) from None
        (expiry,) = _EXPIRY.unpack_from(plain)
        late_seconds = self._clock() - expiry
        if late_seconds > 0:
            raise TokenInvalid(
                f"the resume token expired {late_seconds:.0f} s ago (--token-seconds); open a new sequence"
            )
        return Snapshot.from_bytes(plain[_EXPIRY.size :])


def parse_keys(text: bytes, where: str) -> tuple[bytes, ...]:
    """The keys of a key file, the sealing one first.

    Raises: ConfigInvalid, without quoting what should be a key.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        if not word or word.startswith(b"#"):
            continue
        try:
            key = bytes.fromhex(word.decode("ascii"))
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES:
            raise ConfigInvalid(
                f"{where}, line {number}: expected {2 * _KEY_BYTES} hexadecimal digits; "
                "make a key with: openssl rand -hex 32"
            )
        keys.append(key)
    if not 1 <= len(keys) <= _MOST_KEYS:
        raise ConfigInvalid(f"{where}: expected 1 to {_MOST_KEYS} keys, one a line, got {len(keys)}")
    return tuple(keys)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"--token-key-file {path} cannot be read: {error.strerror}") from error


def _key_id(master: bytes) -> bytes:
    return hashlib.sha256(b"tenuto key id" + master).digest()[:_ID_BYTES]


def _derive(master: bytes, salt: bytes) -> bytes:
    return HKDF(SHA256(), _KEY_BYTES, salt=salt, info=b"tenuto resume token").derive(master)


@functools.lru_cache(maxsize=64)
def _opener(master: bytes, salt: bytes) -> AESGCM:
    return AESGCM(_derive(master, salt))
