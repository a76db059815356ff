"""TLS for the server's connections: certificates that are read again when they change, and a socket's wire.

TLS 1.2 or newer, HTTP/2 by ALPN as gRPC's clients ask for it. With a client authority every client must show
a certificate of it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigInvalid

log = logging.getLogger("tenuto.tls")

_RECORD_BYTES = 1 << 14  # the most that one TLS record holds


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the server's chain and key, and the authorities whose clients may come; None: any may."""

    certificate: Path
    key: Path
    client_authorities: Path | None = None

    def read(self) -> tuple[bytes, ...]:
        """Their contents. Raises: ConfigInvalid."""
        files = [self.certificate, self.key, *([self.client_authorities] if self.client_authorities else [])]
        try:
            return tuple(file.read_bytes() for file in files)
        except OSError as error:
            raise ConfigInvalid(f"{error.filename}: cannot be read: {error.strerror}") from error

    def context(self) -> ssl.SSLContext:
        """Raises: ConfigInvalid, naming the files."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # What the other side may ask for in the middle of a connection costs us more than it.
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["h2"])
        try:
            # A key behind a passphrase would have OpenSSL ask the terminal for it.
            context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise ConfigInvalid(
                f"--tls-cert {self.certificate} and --tls-key {self.key} are no PEM certificate with its "
                f"key: {error}"
            ) from error
        if self.client_authorities is not None:
            try:
                context.load_verify_locations(self.client_authorities)
            except (OSError, ssl.SSLError) as error:
                raise ConfigInvalid(
                    f"--tls-client-ca {self.client_authorities} holds no PEM certificate: {error}"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class Tls:
    """The context that new connections take. Those that are there keep theirs.

    Raises (when built): ConfigInvalid.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.contents = files.read()
        self.context = files.context()
        self._known = self.contents  # nothing while they are wrong: so that it is said once

    def reload(self) -> bool:
        """Takes the files if they changed; what is wrong leaves the old ones. Whether it did."""
        try:
            contents = self.files.read()
            if contents == self._known:
                return False
            context = self.files.context()
        except ConfigInvalid as error:
            if self._known:
                log.error("the certificates stay as they were: %s", error)
            self._known = ()
            return False
        self.contents = self._known = contents
        self.context = context
        log.info("new connections get the certificates that are in %s now", self.files.certificate)
        return True


class TlsWire:
    """One connection's encrypted socket, not blocking. One thread reads it and others send, one at a time;
    OpenSSL allows but one of them all."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        self.socket = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self._lock = threading.Lock()
        self._over = False

    def handshake(self) -> None:
        """Goes on with it.

        Raises: BlockingIOError if more must come first; OSError (ssl.SSLError is one) if it failed.
        """
        with self._lock, _waiting():
            self.socket.do_handshake()

    def send(self, data: bytes | memoryview) -> int:
        """Raises: BlockingIOError: then the same must be sent again, perhaps with more behind it. OSError."""
        with self._lock, _waiting():
            if self._over:
                raise OSError("nothing goes out any more")
            return self.socket.send(data)

    def recv(self, size: int) -> bytes:
        """What is there, some `size` bytes at most; empty at the end. Raises: BlockingIOError, OSError."""
        parts: list[bytes] = []
        left = size
        with self._lock:
            while left > 0:
                try:
                    with _waiting():
                        part = self.socket.recv(max(left, _RECORD_BYTES))
                except BlockingIOError:
                    if not parts:
                        raise
                    break
                parts.append(part)
                left -= len(part)
                if len(part) < _RECORD_BYTES:  # else more of them are likely
                    break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def shutdown(self) -> None:
        """Says that no more will come. Raises: OSError."""
        with self._lock:
            self._over = True
            with contextlib.suppress(
                OSError, ValueError
            ):  # it waits for the other side's word, and we do not
                self.socket.unwrap()
            self.socket.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """What OpenSSL must wait for, in the words of a plain socket."""
    try:
        yield
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
        raise BlockingIOError from error
