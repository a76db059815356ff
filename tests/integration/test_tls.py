"""Encrypted connections: who is let in, who is not, and certificates that change under live streams."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto.serving import http2
from tenuto.serving.config import ServerConfig
from tenuto.serving.errors import ConfigInvalid
from tenuto.serving.server import Server
from tenuto.serving.tls import Tls, TlsFiles, TlsWire
from tenuto.v1 import tenuto_pb2 as pb

from . import key_updates
from .authority import DAY, Authority, Certificate
from .running import ALL_TRANSPORTS, assert_nothing_is_left, build, serving, wait_for
from .wire import PATIENCE_SECONDS, Conversation, array, chunk, ending, opening, stub, tensor

OURS = Authority("ours")
STRANGERS = Authority("strangers")


def credentials(trusted: Authority = OURS, own: Certificate | None = None) -> grpc.ChannelCredentials:
    if own is None:
        return grpc.ssl_channel_credentials(trusted.pem)
    return grpc.ssl_channel_credentials(trusted.pem, own.key, own.chain)


def connect(port: int, how: grpc.ChannelCredentials) -> grpc.Channel:
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
    return grpc.secure_channel(f"127.0.0.1:{port}", how, options)


@contextmanager
def encrypted(
    repository: Path, folder: Path, transport: str, own: Certificate | None = None, **settings: Any
) -> Iterator[Server]:
    certificate, key = (own or OURS.sign()).write(folder)
    more: dict[str, Any] = {"tls_cert": certificate, "tls_key": key, "transport": transport} | settings
    with serving(repository, **more) as server:
        yield server
        assert_nothing_is_left(server)


def assert_serves(channel: grpc.Channel) -> None:
    with Conversation(channel) as conversation:
        conversation.send(opening("accumulator"), chunk(1, [1.0, 2.0]), ending())
        conversation.opened()
        assert conversation.values(1) == [1.0, 3.0]
        assert conversation.closed().reason == pb.END
    request = pb.PredictRequest(model="doubler", inputs=[tensor([[1, 2]])])
    answer = stub(channel).Predict(request, timeout=PATIENCE_SECONDS)
    assert array(answer.outputs[0]).tolist() == [[2, 4]]


def assert_refused(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub(channel).ListModels(pb.ListModelsRequest(), timeout=PATIENCE_SECONDS)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_an_encrypted_server_serves(transport: str, toy_repository: Path, tmp_path: Path) -> None:
    with (
        encrypted(toy_repository, tmp_path, transport) as server,
        connect(server.port, credentials()) as channel,
    ):
        assert_serves(channel)


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_messages_of_many_records_come_whole_both_ways(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    """Half a MiB each way, several at once."""
    rows = np.arange(1 << 17, dtype=np.float32).reshape(-1, 2)
    request = pb.PredictRequest(model="doubler", inputs=[tensor(rows)])
    with (
        encrypted(toy_repository, tmp_path, transport) as server,
        connect(server.port, credentials()) as channel,
    ):
        calls = [stub(channel).Predict.future(request, timeout=PATIENCE_SECONDS) for _ in range(4)]
        for call in calls:
            np.testing.assert_array_equal(array(call.result().outputs[0]), 2 * rows)


STRANGE = {
    "signed by another authority": STRANGERS.sign(),
    "expired": OURS.sign(valid=-DAY),
    "of another host": OURS.sign(host="other.example"),
}


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
@pytest.mark.parametrize("own", STRANGE.values(), ids=STRANGE.keys())
def test_a_client_refuses_a_server_it_cannot_trust(
    own: Certificate, transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    with (
        encrypted(toy_repository, tmp_path, transport, own) as server,
        connect(server.port, credentials()) as channel,
    ):
        assert_refused(channel)


STRANGER_CLIENTS = {
    "no certificate": None,
    "signed by another authority": STRANGERS.sign("client"),
    "expired": OURS.sign("client", valid=-DAY),
}


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_clients_must_show_a_certificate_of_the_authority(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    with encrypted(toy_repository, tmp_path, transport, tls_client_ca=OURS.write(tmp_path)) as server:
        for own in STRANGER_CLIENTS.values():
            with connect(server.port, credentials(own=own)) as channel:
                assert_refused(channel)
        with connect(server.port, credentials(own=OURS.sign("client"))) as channel:
            assert_serves(channel)


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_another_authority_of_clients_is_taken_without_a_restart(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    """Its clients get in, and those of the one before do not any more; who is here stays."""
    file = OURS.write(tmp_path)
    old, new = OURS.sign("client"), STRANGERS.sign("client")
    with (
        encrypted(toy_repository, tmp_path, transport, tls_client_ca=file) as server,
        connect(server.port, credentials(own=old)) as channel,
        Conversation(channel) as conversation,
    ):
        conversation.send(opening("accumulator"), chunk(1, [1.0]))
        conversation.opened()
        assert conversation.values(1) == [1.0]
        with connect(server.port, credentials(own=new)) as another:
            assert_refused(another)
        before = context_of(server)
        file.write_bytes(STRANGERS.pem)
        wait_for(lambda: context_of(server) is not before, "the new authority")
        with connect(server.port, credentials(own=new)) as another:
            assert_serves(another)
        with connect(server.port, credentials(own=old)) as another:
            assert_refused(another)
        conversation.send(chunk(2, [2.0]), ending())
        assert conversation.values(2) == [3.0]
        assert conversation.closed().reason == pb.END


def context_of(server: Server) -> ssl.SSLContext:
    """What new connections take."""
    assert server._tls is not None
    return server._tls.context


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_a_client_without_tls_harms_nobody(transport: str, toy_repository: Path, tmp_path: Path) -> None:
    with encrypted(toy_repository, tmp_path, transport) as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            assert_refused(channel)
        with connect(server.port, credentials()) as channel:
            assert_serves(channel)


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_certificates_are_exchanged_without_dropping_a_stream(
    transport: str, toy_repository: Path, tmp_path: Path
) -> None:
    """A wrong pair leaves the old one; a new one is for new connections; the stream goes on through both."""
    with (
        encrypted(toy_repository, tmp_path, transport) as server,
        connect(server.port, credentials()) as channel,
        Conversation(channel) as conversation,
    ):
        assert server._tls is not None
        conversation.send(opening("accumulator"), chunk(1, [1.0]))
        conversation.opened()
        assert conversation.values(1) == [1.0]
        (tmp_path / "server.crt").write_bytes(STRANGERS.sign().chain)  # with the old key: no pair
        assert not server._tls.reload()
        with connect(server.port, credentials()) as another:
            assert_serves(another)
        STRANGERS.sign().write(tmp_path)
        # Of several front ends each looks for itself.
        wait_for(lambda: all(other_serves(server.port) for _ in range(8)), "the new certificate")
        with connect(server.port, credentials()) as another:
            assert_refused(another)
        conversation.send(chunk(2, [2.0]), ending())
        assert conversation.values(2) == [3.0]
        assert conversation.closed().reason == pb.END


def other_serves(port: int) -> bool:
    """Whether new connections get the strangers' certificate."""
    context = ssl.create_default_context(cadata=STRANGERS.pem.decode())
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="localhost"),
        ):
            return True
    except ssl.SSLError:
        return False


def test_what_is_wrong_with_new_files_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = OURS.sign().write(tmp_path)
    tls = Tls(TlsFiles(certificate, key))
    before = tls.context
    key.unlink()
    for _ in range(3):
        assert not tls.reload()
    assert tls.context is before
    assert caplog.text.count("the certificates stay as they were") == 1
    assert f"{key}: cannot be read" in caplog.text
    OURS.sign().write(tmp_path)
    assert tls.reload()
    assert tls.context is not before
    assert not tls.reload()


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "another's key": ({"tls_key": "other.key"}, "are no PEM certificate with its key"),
    "no certificate": ({"tls_cert": "server.key"}, "are no PEM certificate with its key"),
    "no such file": ({"tls_cert": "nowhere.crt"}, "nowhere.crt: cannot be read"),
    "an authority that is none": ({"tls_client_ca": "server.key"}, "--tls-client-ca .* holds no PEM"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG.keys())
def test_files_that_do_not_fit_are_refused_at_start(
    changes: dict[str, str], message: str, toy_repository: Path, tmp_path: Path
) -> None:
    certificate, key = OURS.sign().write(tmp_path)
    STRANGERS.sign().write(tmp_path, "other")
    files: dict[str, Any] = {"tls_cert": certificate, "tls_key": key}
    files |= {k: tmp_path / v for k, v in changes.items()}
    with pytest.raises(ConfigInvalid, match=message):
        build(toy_repository, **files)


def test_a_key_behind_a_passphrase_asks_nobody(toy_repository: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    certificate, key = OURS.sign().write(tmp_path)
    locked = s.load_pem_private_key(key.read_bytes(), None).private_bytes(
        s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret")
    )
    key.write_bytes(locked)
    with pytest.raises(ConfigInvalid, match="are no PEM certificate with its key"):
        build(toy_repository, tls_cert=certificate, tls_key=key)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"tls_cert": "a"}, "--tls-cert and --tls-key come together"),
        ({"tls_key": "a"}, "--tls-cert and --tls-key come together"),
        ({"tls_client_ca": "a"}, "--tls-client-ca needs --tls-cert and --tls-key"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 is reached from other machines.* or --insecure"),
        ({"host": "::"}, "--host :: is reached from other machines"),
        ({"host": "a.example"}, "--host a.example is reached from other machines"),
    ],
)
def test_settings_that_expose_the_server_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        ServerConfig.build(flags, {}).check_encryption()


@pytest.mark.parametrize(
    "flags",
    [
        {"host": "127.0.0.2"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "insecure": "true"},
        {"host": "0.0.0.0", "tls_cert": "a", "tls_key": "b"},
    ],
)
def test_settings_that_do_not_are_taken(flags: dict[str, str]) -> None:
    ServerConfig.build(flags, {}).check_encryption()


def test_a_server_checks_its_settings(toy_repository: Path) -> None:
    with pytest.raises(ConfigInvalid, match="or --insecure"):
        build(toy_repository, host="0.0.0.0")


def test_what_a_slow_reader_does_not_take_is_sent_later_and_once(tmp_path: Path) -> None:
    """As an Outflow sends: what did not go is offered again, with more behind it."""
    context = TlsFiles(*OURS.sign().write(tmp_path)).context()
    trusting = ssl.create_default_context(cadata=OURS.pem.decode())
    near, far = socket.socketpair()
    near.setblocking(False)
    wire = TlsWire(near, context)
    sent = np.random.default_rng(0).bytes(3 << 20)
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(trusting.wrap_socket, far, server_hostname="localhost")
        wait_for(lambda: proceeds(wire.handshake), "the handshake")
        with client.result(PATIENCE_SECONDS) as reader, near:
            offered = 1 << 20  # so much of it is there to be sent by now
            gone = wire.send(memoryview(sent)[:offered])
            assert not proceeds(lambda: wire.send(memoryview(sent)[gone:offered]))  # the socket is full
            got = pool.submit(read_exactly, reader, len(sent))
            while gone < len(sent) or wire.holds:
                offered = min(len(sent), offered + 100_000)
                with contextlib.suppress(BlockingIOError):
                    gone += wire.send(memoryview(sent)[gone:offered])
            assert got.result(PATIENCE_SECONDS) == sent
            wire.shutdown()
            assert reader.recv(1) == b""
            with pytest.raises(OSError, match="nothing goes out any more"):
                wire.send(b"in plain text")


def proceeds(step: Callable[[], object]) -> bool:
    try:
        step()
    except BlockingIOError:
        return False
    return True


def read_exactly(reader: ssl.SSLSocket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        parts.append(reader.recv(min(size, 1 << 16)))
        size -= len(parts[-1])
    return b"".join(parts)


def test_of_too_many_handshakes_the_oldest_is_given_up(
    toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever only connects keeps nobody out."""
    monkeypatch.setattr(http2, "_MOST_UNPROVEN", 2)
    with encrypted(toy_repository, tmp_path, "http2") as server, caplog.at_level(logging.WARNING):
        where = ("127.0.0.1", server.port)
        with contextlib.ExitStack() as stack:
            silent = [
                stack.enter_context(socket.create_connection(where, PATIENCE_SECONDS)) for _ in range(3)
            ]
            assert silent[0].recv(1) == b""
            with connect(server.port, credentials()) as channel:
                assert_serves(channel)
            assert silent[1].recv(1) == b""
        wait_for(lambda: "did not get through their handshakes" in caplog.text, "the log to say so")


def test_a_client_that_changes_its_keys_for_ever_holds_nobody_up(
    toy_repository: Path, tmp_path: Path
) -> None:
    """Each change costs the server more than the client; a few thousand in one write end the connection."""
    with (
        encrypted(toy_repository, tmp_path, "http2") as server,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS) as plain,
    ):
        flood = key_updates.prepared(plain, 20_000)
        with contextlib.suppress(ConnectionError):  # it ends before all of it is sent
            plain.sendall(flood)
        with contextlib.suppress(ConnectionError):
            while plain.recv(1 << 16):
                pass
        with connect(server.port, credentials()) as channel:
            assert_serves(channel)


def test_handshakes_take_turns_with_those_who_are_here(
    toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty newcomers at once, one step of a handshake a turn: all come in."""
    monkeypatch.setattr(http2, "_HANDSHAKES_AT_ONCE", 1)
    with encrypted(toy_repository, tmp_path, "http2") as server:
        channels = [connect(server.port, credentials()) for _ in range(20)]
        calls = [
            stub(channel).ListModels.future(pb.ListModelsRequest(), timeout=PATIENCE_SECONDS)
            for channel in channels
        ]
        assert all(call.result().models for call in calls)
        for channel in channels:
            channel.close()


def test_who_says_nothing_is_dropped(
    toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(http2, "_HANDSHAKE_SECONDS", 0.1)
    with (
        encrypted(toy_repository, tmp_path, "http2") as server,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS) as silent,
    ):
        assert silent.recv(1) == b""
