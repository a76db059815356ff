"""A TLS client that changes its keys as often as it likes, by OpenSSL's library: Python's own cannot."""

from __future__ import annotations

import ctypes
import socket

import pytest

from tenuto.serving.frame import PREFACE

_PENDING = 10  # BIO_CTRL_PENDING


def load() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    try:
        return ctypes.CDLL("libssl.so.3"), ctypes.CDLL("libcrypto.so.3")
    except OSError as error:
        pytest.skip(f"no OpenSSL 3 to make a client of: {error}")


def prepared(plain: socket.socket, count: int) -> bytes:
    """Shakes hands on the socket, and returns so many changes of keys, encrypted, to be sent on it."""
    tls, crypto = load()
    for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
        getattr(tls, name).restype = ctypes.c_void_p
    for name in ("BIO_s_mem", "BIO_new"):
        getattr(crypto, name).restype = ctypes.c_void_p
    pointer = ctypes.c_void_p
    own = pointer(tls.SSL_new(pointer(tls.SSL_CTX_new(pointer(tls.TLS_client_method())))))
    patience = plain.gettimeout()
    plain.setblocking(True)  # the library waits by itself
    tls.SSL_set_fd(own, plain.fileno())
    tls.SSL_set_alpn_protos(own, b"\x02h2", 3)
    assert tls.SSL_connect(own) == 1
    begin = PREFACE + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # empty SETTINGS
    assert tls.SSL_write(own, begin, len(begin)) == len(begin)
    plain.settimeout(patience)
    memory = pointer(crypto.BIO_new(pointer(crypto.BIO_s_mem())))
    tls.SSL_set0_wbio(own, memory)
    for _ in range(count):
        tls.SSL_key_update(own, 0)
        assert tls.SSL_do_handshake(own) == 1
    size = crypto.BIO_ctrl(memory, _PENDING, 0, None)
    buffer = ctypes.create_string_buffer(size)
    return buffer.raw[: crypto.BIO_read(memory, buffer, size)]
