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
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigInvalid

log = logging.getLogger("tenuto.tls")

_RECORD_BYTES = 1 << 14  # the most that one TLS record holds
_MOST_READ = 1 << 15  # bytes in one turn
_MOST_TAKEN = 1 << 18  # bytes that are encrypted at once
_MOST_UNSENT = 1 << 19  # encrypted bytes in front of the socket
_MOST_EMPTY = 1 << 15  # bytes in a row that carry nothing: of changes of keys, say


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
    OpenSSL allows but one of them all.

    OpenSSL works on bytes in memory and not on the socket: it would read on within one call for as long as
    records come that carry nothing (changes of keys, 24 microseconds each), and hold the reading thread.
    """

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        self.socket = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()
        self._unsent = b""  # encrypted, and not taken by the socket
        self._empty = 0  # bytes that came and carried nothing, since something did
        self._over = False

    @property
    def holds(self) -> bool:
        """Whether something encrypted waits for the socket: `send` is to be called when it takes more."""
        return bool(self._unsent)

    def handshake(self) -> None:
        """Goes on with it.

        Raises: BlockingIOError if more must come, or go, first; OSError (ssl.SSLError is one) if it failed.
        """
        with self._lock:
            self._fetch(_RECORD_BYTES)
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError as error:
                raise BlockingIOError from error
            finally:
                self._flush()
            self._empty = 0

    def send(self, data: bytes | memoryview) -> int:
        """Takes some of it, once all that was taken before is gone. Raises: BlockingIOError, OSError."""
        with self._lock:
            if self._over:
                raise OSError("nothing goes out any more")
            self._flush()
            if self._unsent:
                raise BlockingIOError
            taken = self._tls.write(data[:_MOST_TAKEN]) if data else 0
            self._flush()
            return taken

    def recv(self, size: int) -> bytes:
        """What is there; empty at the end. Raises: BlockingIOError, OSError."""
        parts: list[bytes] = []
        with self._lock:
            came = self._fetch(min(size, _MOST_READ))
            try:
                while part := self._tls.read(size):
                    parts.append(part)
            except ssl.SSLWantReadError as error:
                if not parts:
                    self._empty += came
                    if self._empty > _MOST_EMPTY:
                        raise OSError(f"{self._empty} bytes of TLS carry nothing") from error
                    raise BlockingIOError from error
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                pass  # the end, behind what was read
            finally:
                self._flush()  # answers of TLS's own
            self._empty = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def shutdown(self) -> None:
        """Says that no more will come. Raises: OSError."""
        with self._lock:
            self._over = True
            with contextlib.suppress(
                OSError, ValueError
            ):  # it waits for the other side's word, and we do not
                self._tls.unwrap()
            self._flush()
            self.socket.shutdown(socket.SHUT_WR)

    def _fetch(self, size: int) -> int:
        """Takes what the socket has, perhaps nothing: how many bytes. Raises: OSError."""
        try:
            read = self.socket.recv(size)
        except BlockingIOError:
            return 0
        if read:
            self._incoming.write(read)
        else:
            self._incoming.write_eof()
        return len(read)

    def _flush(self) -> None:
        """Gives the socket what is encrypted, as much as it takes. Raises: OSError."""
        if self._outgoing.pending:
            self._unsent += self._outgoing.read()
        if len(self._unsent) > _MOST_UNSENT:
            raise OSError("answers of TLS are asked for and not read")
        while self._unsent:
            try:
                sent = self.socket.send(self._unsent)
            except BlockingIOError:
                return
            self._unsent = self._unsent[sent:]
