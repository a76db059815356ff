"""Only what was sealed under these keys, whole and in time, opens; keys change without losing a sequence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.errors import ConfigInvalid, TokenInvalid
from tenuto.serving.manifest import state_schema
from tenuto.serving.resume_token import TokenSealer, parse_keys
from tenuto.serving.snapshot import Checkpoints, Snapshot, token_bytes

from .fakes import accumulator, doubler

ONE, TWO, THREE = ("11" * 32, "22" * 32, "33" * 32)
SNAPSHOT = Snapshot("m", 2, "f" * 64, "s" * 64, "0a1b", 7, (("gain", 0.5),), (b"left",), (b"h" * 8, b""))


def key_file(folder: Path, *keys: str) -> Path:
    path = folder / "keys"
    path.write_text("# two at most\n\n" + "\n".join(keys) + "\n")
    return path


def test_what_one_process_seals_another_of_the_same_keys_opens(tmp_path: Path) -> None:
    path = key_file(tmp_path, ONE)
    assert TokenSealer(path).unseal(TokenSealer(path).seal(SNAPSHOT)) == SNAPSHOT


def test_without_a_file_tokens_are_good_for_this_process_alone() -> None:
    own = TokenSealer()
    token = own.seal(SNAPSHOT)
    assert own.unseal(token) == SNAPSHOT
    with pytest.raises(TokenInvalid, match="give all servers the same --token-key-file"):
        TokenSealer().unseal(token)


def test_no_two_tokens_share_salt_and_nonce(tmp_path: Path) -> None:
    path = key_file(tmp_path, ONE)
    processes = [TokenSealer(path) for _ in range(5)]
    tokens = [sealer.seal(SNAPSHOT) for sealer in processes for _ in range(100)]
    assert len({token[:33] for token in tokens}) == 500


def test_a_token_does_not_show_what_it_holds() -> None:
    secret = dataclasses.replace(SNAPSHOT, states=(b"a state that nobody reads", b""))
    token = TokenSealer().seal(secret)
    assert b"nobody" not in token
    assert secret.sequence_id.encode() not in token


@given(st.data())
def test_a_changed_token_is_refused(data: st.DataObject) -> None:
    sealer = TokenSealer()
    token = bytearray(sealer.seal(SNAPSHOT))
    at = data.draw(st.integers(0, len(token) - 1))
    token[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TokenInvalid):
        sealer.unseal(bytes(token))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_token_are_refused(data: bytes) -> None:
    with pytest.raises(TokenInvalid):
        TokenSealer().unseal(data)


@pytest.mark.parametrize("kept", [0, 1, 32, 60, -1])
def test_a_truncated_token_is_refused(kept: int) -> None:
    sealer = TokenSealer()
    with pytest.raises(TokenInvalid):
        sealer.unseal(sealer.seal(SNAPSHOT)[:kept])


def test_a_token_expires(tmp_path: Path) -> None:
    now = 1e9
    sealer = TokenSealer(lifetime_seconds=60, clock=lambda: now)
    token = sealer.seal(SNAPSHOT)
    now += 60
    assert sealer.unseal(token) == SNAPSHOT
    now += 5
    with pytest.raises(TokenInvalid, match="expired 5 s ago"):
        sealer.unseal(token)


def test_the_first_key_seals_and_all_open(tmp_path: Path) -> None:
    old, both, new = (TokenSealer(key_file(tmp_path, *keys)) for keys in ((ONE,), (TWO, ONE), (TWO,)))
    assert both.unseal(old.seal(SNAPSHOT)) == SNAPSHOT
    assert new.unseal(both.seal(SNAPSHOT)) == SNAPSHOT
    with pytest.raises(TokenInvalid, match="a key that this server does not have"):
        new.unseal(old.seal(SNAPSHOT))


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = key_file(tmp_path, ONE)
    sealer = TokenSealer(path)
    before = sealer.seal(SNAPSHOT)
    assert not sealer.reload()
    key_file(tmp_path, TWO, ONE)
    assert sealer.reload()
    assert sealer.unseal(before) == SNAPSHOT
    assert TokenSealer(key_file(tmp_path, TWO)).unseal(sealer.seal(SNAPSHOT)) == SNAPSHOT


@pytest.mark.parametrize("text", ["", "no key\n", None])
def test_a_file_that_went_bad_leaves_the_keys_as_they_were(
    tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = key_file(tmp_path, ONE)
    sealer = TokenSealer(path)
    token = sealer.seal(SNAPSHOT)
    path.unlink() if text is None else path.write_text(text)
    assert not sealer.reload()
    assert not sealer.reload()
    assert caplog.text.count("the token keys stay as they were") == 1
    assert sealer.unseal(token) == SNAPSHOT
    key_file(tmp_path, ONE)
    sealer.reload()
    assert sealer.unseal(token) == SNAPSHOT


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "expected 1 to 8 keys"),
        ("# none\n", "expected 1 to 8 keys"),
        (f"{ONE}\nabc\n", "line 2: expected 64 hexadecimal digits"),
        (ONE[:-2], "line 1: .*openssl rand -hex 32"),
        ("\n".join([ONE] * 9), "got 9"),
    ],
)
def test_a_key_file_says_what_is_wrong_and_never_shows_a_key(text: str, words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words) as caught:
        parse_keys(text.encode(), "keys")
    assert ONE[:-2] not in str(caught.value)


def test_a_key_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="--token-key-file .*none cannot be read: No such file"):
        TokenSealer(tmp_path / "none")


# Snapshots.

TEXTS, BLOBS = st.text(max_size=20), st.lists(st.binary(max_size=40), max_size=3).map(tuple)
CONSTANTS = st.lists(st.tuples(TEXTS, st.floats(allow_nan=False)), max_size=3).map(tuple)


@given(
    st.builds(
        Snapshot,
        TEXTS,
        st.integers(1, 9),
        TEXTS,
        TEXTS,
        TEXTS,
        st.integers(0, 2**63),
        CONSTANTS,
        BLOBS,
        BLOBS,
    )
)
def test_a_snapshot_comes_back_as_it_went(snapshot: Snapshot) -> None:
    assert Snapshot.from_bytes(snapshot.to_bytes()) == snapshot


@pytest.mark.parametrize(
    "data", [b"", b"\x05\0\0\0[1,2]", SNAPSHOT.to_bytes()[:-1], SNAPSHOT.to_bytes() + b"x"]
)
def test_a_snapshot_of_another_format_is_refused(data: bytes) -> None:
    with pytest.raises(TokenInvalid, match="of another format"):
        Snapshot.from_bytes(data)


def test_what_a_token_may_take_covers_what_it_takes() -> None:
    for manifest in (accumulator(), accumulator(x={"chunk": {"multiple": 3}, "left_context": 5}), doubler()):
        feeds = tuple(bytes((i.left_context + i.multiple - 1) * i.sample_bytes) for i in manifest.inputs)
        states = tuple(bytes(s.slot_bytes) for s in manifest.states)
        largest = dataclasses.replace(SNAPSHOT, feeds=feeds, states=states)
        assert len(TokenSealer().seal(largest)) <= token_bytes(manifest)


def test_the_schema_is_of_what_a_snapshot_holds() -> None:
    plain = state_schema(accumulator())
    assert plain == state_schema(accumulator(max_batch=2, name="other"))
    assert plain != state_schema(accumulator(x={"left_context": 1}))
    assert plain != state_schema(doubler())


@pytest.mark.parametrize(
    "every, rarer, wished, interval", [(50, 1, 0, 50), (50, 1, 3, 3), (0, 1, 0, 0), (10, 4, 2, 8)]
)
def test_large_states_are_sealed_rarer_whatever_is_wished(
    every: int, rarer: int, wished: int, interval: int
) -> None:
    assert Checkpoints(lambda *_: b"", "", "", every, rarer).interval(wished) == interval
