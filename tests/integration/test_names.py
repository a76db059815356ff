"""A client that knows one name follows it: what the name stands for is asked anew when a server is lost."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenuto import Client, Stream
from tenuto.serving.server import Server

from .running import assert_nothing_is_left, serving, wait_for

NAME = "tenuto.test"
A, B = "127.0.0.1", "127.0.0.2"  # one name has one port
_ADDRESS = 1  # the type of a question and of an answer: an IPv4 address


class NameServer:
    """Answers who asks for the addresses of a name, whichever, by what `addresses` holds."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.asked = 0  # for IPv4 addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((A, 0))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._answer_all, name="name-server")

    def __enter__(self) -> NameServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendto(b"", (A, self.port))  # ends the thread
        self._thread.join()
        self._socket.close()

    def _answer_all(self) -> None:
        while True:
            query, asker = self._socket.recvfrom(512)
            if not query:
                return
            self._socket.sendto(self._answer(query), asker)

    def _answer(self, query: bytes) -> bytes:
        """RFC 1035: the head, the question as it came, and an answer for each address."""
        end = query.index(b"\0", 12) + 5  # of the question: a name, its end, type and class
        (kind,) = struct.unpack_from("!H", query, end - 4)
        found = self.addresses if kind == _ADDRESS else ()
        self.asked += kind == _ADDRESS
        head = query[:2] + struct.pack("!5H", 0x8180, 1, len(found), 0, 0)
        # Each is of the name at byte 12, may be kept for 0 s, and has four bytes.
        answers = [
            struct.pack("!3HIH", 0xC00C, _ADDRESS, 1, 0, 4) + socket.inet_aton(address) for address in found
        ]
        return head + query[12:end] + b"".join(answers)


@contextmanager
def serving_at(repository: Path, address: str, port: int, keys: Path, **settings: Any) -> Iterator[Server]:
    with serving(repository, host=address, port=port, token_key_file=keys, **settings) as server:
        yield server
        assert_nothing_is_left(server)


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("no_grpc_proxy", NAME)  # the name is nobody else's to look up
    file = tmp_path / "keys"
    file.write_text("5a" * 32)
    return file


def add_one(stream: Stream) -> float:
    """The sum so far."""
    stream.send(np.ones(1, np.float32))
    return float(next(stream)["y"][0])


@pytest.mark.skipif(sys.platform == "darwin", reason="of 127.0.0.0/8 macOS has 127.0.0.1 alone")
def test_a_sequence_goes_where_its_name_leads_now(toy_repository: Path, keys: Path) -> None:
    """From A, which drains, to B, though the name still led to A when it was asked for first. All within the
    `resume_seconds` that a client has by default; gRPC's default would let it ask every 30 s."""
    with (
        serving_at(toy_repository, A, 0, keys) as a,
        serving_at(toy_repository, B, a.port, keys),
        NameServer(A) as names,
        Client(f"dns://{A}:{names.port}/{NAME}:{a.port}") as client,
        client.stream("accumulator") as stream,
    ):
        assert add_one(stream) == 1.0
        a.stop()
        stream.send(np.ones(1, np.float32))
        wait_for(lambda: names.asked == 2, "the name to be asked for again")
        names.addresses = (B,)
        assert next(stream)["y"] == [2.0]
        assert stream.resumes == 1
        stream.end()
        assert list(stream) == []


def test_who_is_sent_elsewhere_asks_for_the_name_again(
    toy_repository: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers that came since are among what it stands for; the connection goes on for who stays."""
    look = Server._rebalance
    monkeypatch.setattr(Server, "_rebalance", lambda _: None)  # the housekeeper's own seconds
    settings = {"max_sequences": 4, "rebalance_above": 0.25, "rebalance_age_seconds": 0.0}
    with (
        serving_at(toy_repository, A, 0, keys, **settings) as a,
        NameServer(A) as names,
        Client(f"dns://{A}:{names.port}/{NAME}:{a.port}") as client,
        client.stream("accumulator") as leaves,
        client.stream("accumulator") as stays,
    ):
        assert [add_one(leaves), add_one(stays)] == [1.0, 1.0]
        asked = names.asked
        look(a)
        wait_for(lambda: names.asked > asked, "the name to be asked for again")
        assert [add_one(leaves), add_one(stays)] == [2.0, 2.0]
        assert [leaves.resumes, stays.resumes] == [1, 0]
        for stream in (leaves, stays):
            stream.end()
            assert list(stream) == []
