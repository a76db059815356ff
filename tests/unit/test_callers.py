"""Who may call, how much, and what happens when the file that says so changes."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from tenuto.serving.callers import ANYBODY, Caller, Callers, Pacer
from tenuto.serving.errors import ConfigInvalid, PoolFull, RateExceeded, TokenInvalid, Unauthenticated
from tenuto.serving.resume_token import TokenSealer

from .test_resume_token import SNAPSHOT

ALICE, BOB, NEW = "a" * 32, "b" * 32, "n" * 32
FILE = f"""
[alice]
tokens = ["{ALICE}"]
max_sequences = 2
chunks_per_second = 10

[bob]
tokens = ["{BOB}"]
operator = true
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "callers.toml"
    path.write_text(FILE)
    return path


def taken(known: Callers) -> bool:
    """Whether a changed file is taken, at the second look."""
    assert not known.reload()
    return known.reload()


def shown(*tokens: str, scheme: str = "Bearer ") -> list[tuple[str, str | bytes]]:
    return [("x-other", "1"), *(("authorization", scheme + token) for token in tokens)]


def identify(known: Callers, *tokens: str, scheme: str = "Bearer ") -> Caller:
    return known.identify(lambda: shown(*tokens, scheme=scheme))


def test_a_token_says_who_calls(file: Path) -> None:
    known = Callers(file)
    assert identify(known, ALICE).name == "alice"
    assert identify(known, BOB, scheme="bearer  ").name == "bob"
    assert identify(known, ALICE) is identify(known, ALICE)
    assert known.refused == 0


@pytest.mark.parametrize("tokens", [(), ("c" * 32,), (ALICE[:-1],), (ALICE + "a",), ("",), (ALICE, BOB)])
def test_whoever_shows_none_that_is_known_is_refused(file: Path, tokens: tuple[str, ...]) -> None:
    known = Callers(file)
    with pytest.raises(Unauthenticated) as refused:
        identify(known, *tokens)
    assert known.refused == 1
    assert not any(token and token in str(refused.value) for token in tokens)


@pytest.mark.parametrize("scheme", ["", "Basic ", "Bearer"])
def test_another_scheme_is_none(file: Path, scheme: str) -> None:
    with pytest.raises(Unauthenticated):
        identify(Callers(file), ALICE, scheme=scheme)


def test_what_is_compared_is_a_hash(file: Path) -> None:
    """So that the time of a comparison tells nothing of how many characters were right."""
    known = Callers(file)
    assert set(known._digests) == {hashlib.sha256(token.encode()).digest() for token in (ALICE, BOB)}


def test_without_a_file_everybody_may_and_nobody_is_asked() -> None:
    assert Callers().identify(lambda: pytest.fail("asked")) is ANYBODY
    assert ANYBODY.may_see("whoever")
    assert not Callers().reload()


def test_who_sees_what(file: Path) -> None:
    alice, bob = (identify(Callers(file), token) for token in (ALICE, BOB))
    assert [alice.may_see(owner) for owner in ("alice", "bob", "")] == [True, False, False]
    assert [bob.may_see(owner) for owner in ("alice", "bob", "")] == [True, True, True]


def test_a_caller_has_so_many_places(file: Path) -> None:
    alice = identify(Callers(file), ALICE)
    for _ in range(2):
        alice.take_place()
    with pytest.raises(PoolFull, match="caller 'alice' has 2 live sequences here, its limit; end one first"):
        alice.take_place()
    alice.leave_places(1)
    alice.take_place()
    bob = identify(Callers(file), BOB)
    for _ in range(1000):
        bob.take_place()


def test_a_second_s_worth_may_come_at_once_and_then_it_is_the_rate() -> None:
    alice = Caller("alice", rate=10.0)
    assert [alice.spend(5, 100.0), alice.spend(5, 100.0)] == [0.0, 0.0]
    assert alice.spend(5, 100.0) == pytest.approx(0.5)
    assert alice.spend(0, 100.5) == pytest.approx(0.0)
    assert alice.spend(1, 100.5) == pytest.approx(0.1)
    assert alice.spend(10, 200.0) == 0.0  # what was not used is not saved up beyond a second's worth
    assert alice.spend(1, 200.0) == pytest.approx(0.1)
    assert Caller("bob").spend(10**9, 0.0) == 0.0


def test_what_is_too_early_is_told_when_to_come_again() -> None:
    alice = Caller("alice", rate=2.0)
    alice.check_rate(100.0)
    alice.spend(3, 100.0)
    with pytest.raises(RateExceeded, match="'alice' sends more than its 2 chunks a second") as early:
        alice.check_rate(100.1)
    assert early.value.retry_after_ms == 401
    alice.check_rate(100.1, patience_seconds=0.5)
    alice.check_rate(100.6)


def test_no_debt_is_too_long_to_wait_for() -> None:
    alice = Caller("alice", rate=0.01)
    assert alice.spend(10**12, 1.0) == 3600.0


def test_who_takes_the_place_of_one_of_its_own_may_be_one_more(file: Path) -> None:
    alice = identify(Callers(file), ALICE)
    for _ in range(2):
        alice.take_place()
    alice.take_place(instead=True)
    with pytest.raises(PoolFull):
        alice.take_place(instead=True)


def test_a_change_of_other_things_forgives_no_debt(file: Path) -> None:
    known = Callers(file)
    alice = identify(known, ALICE)
    assert alice.spend(110, 100.0) == pytest.approx(10.0)
    file.write_text(FILE.replace("max_sequences = 2", "max_sequences = 3"))
    assert taken(known)
    assert alice.max_sequences == 3
    assert alice.spend(0, 100.0) == pytest.approx(10.0)


def test_a_changed_file_is_taken_and_callers_stay_who_they_are(file: Path) -> None:
    known = Callers(file)
    alice, bob = identify(known, ALICE), identify(known, BOB)
    alice.take_place()
    assert not known.reload()
    file.write_text(f'[alice]\ntokens = ["{NEW}", "{ALICE}"]\nmax_sequences = 1')
    assert taken(known)
    assert identify(known, ALICE) is alice
    assert (alice.account.live, alice.max_sequences, alice.rate, alice.is_known) == (1, 1, 0.0, True)
    assert not bob.is_known
    with pytest.raises(Unauthenticated):
        identify(known, BOB)
    file.write_text(FILE)
    assert taken(known)
    with pytest.raises(Unauthenticated):
        identify(known, NEW)


TWO = FILE.replace(f'"{ALICE}"', f'"{ALICE}", "{NEW}"')


def test_two_tokens_of_a_caller_share_what_it_may_have(file: Path) -> None:
    file.write_text(TWO)
    known = Callers(file)
    one, other = identify(known, ALICE), identify(known, NEW)
    one.take_place()
    other.take_place()
    for caller in (one, other):
        with pytest.raises(PoolFull, match="'alice' has 2 live sequences"):
            caller.take_place()
    other.leave_places(1)
    one.take_place()
    assert one.spend(10, 100.0) == 0.0
    assert other.spend(10, 100.0) == pytest.approx(1.0)


def test_a_token_that_is_taken_out_is_known_no_more_and_its_caller_s_others_are(file: Path) -> None:
    file.write_text(TWO)
    known = Callers(file)
    leaked, kept, bob = identify(known, ALICE), identify(known, NEW), identify(known, BOB)
    file.write_text(FILE.replace(ALICE, NEW))
    assert taken(known)
    assert [caller.is_known for caller in (leaked, kept, bob)] == [False, True, True]
    assert identify(known, NEW) is kept
    with pytest.raises(Unauthenticated):
        identify(known, ALICE)


def test_a_token_that_another_caller_gets_is_not_the_first_one_s_any_more(file: Path) -> None:
    known = Callers(file)
    alice = identify(known, ALICE)
    file.write_text(f'[alice]\ntokens = ["{NEW}"]\n[bob]\ntokens = ["{ALICE}"]')
    assert taken(known)
    assert not alice.is_known
    assert identify(known, ALICE).name == "bob"
    assert identify(known, NEW).account is alice.account


def test_a_further_token_forgives_no_debt(file: Path) -> None:
    known = Callers(file)
    alice = identify(known, ALICE)
    assert alice.spend(110, 100.0) == pytest.approx(10.0)
    file.write_text(TWO)
    assert taken(known)
    assert identify(known, NEW).spend(0, 100.0) == alice.spend(0, 100.0) == pytest.approx(10.0)


def test_a_file_that_is_still_being_written_cuts_nobody_off(file: Path) -> None:
    """Cut off between two sections it is a file as well."""
    known = Callers(file)
    file.write_text(FILE[: FILE.index("[bob]")])
    assert not known.reload()
    file.write_text(FILE)
    assert not known.reload()
    assert identify(known, BOB).is_known


def test_a_wrong_file_leaves_the_callers_and_is_told_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Callers(file)
    for text in ("", "[alice]", None):
        file.unlink() if text is None else file.write_text(text)
        for _ in range(3):
            assert not known.reload()
    assert identify(known, ALICE).name == "alice"
    assert caplog.text.count("the callers stay as they were") == 1
    file.write_text(FILE)
    assert taken(known)


WRONG = {
    "nobody": ("", "names no caller"),
    "no TOML": ("[alice", "is no TOML"),
    "no table": ("alice = 1", "alice"),
    "no tokens": ("[alice]", "alice.tokens: Field required"),
    "an empty list": ("[alice]\ntokens = []", "alice.tokens: Tuple should have at least 1 item"),
    "a short token": ('[alice]\ntokens = ["secret"]', "alice.tokens.0: String should have at least 16"),
    "a token that no header holds": (f'[alice]\ntokens = ["{"a b" * 9}"]', "alice.tokens.0: String should"),
    "a trifle": (f'[alice]\ntokens = ["{ALICE}"]\nchunks_per_second = 1e-9', "expected 0, or 0.01 at least"),
    "a token for a name": (f'[{ALICE}]\ntoken = 1', "…"),
    "a wrong name": (f'["al ice"]\ntokens = ["{ALICE}"]', "al ice"),
    "an unknown right": (f'[alice]\ntokens = ["{ALICE}"]\nadmin = true', "alice.admin: Extra inputs"),
    "one token of two": (f'[alice]\ntokens = ["{ALICE}"]\n[bob]\ntokens = ["{ALICE}"]', "have the same"),
}  # fmt: skip


@pytest.mark.parametrize("text, message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_refused_at_start_and_no_token_is_quoted(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "callers.toml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid, match=message) as refused:
        Callers(path)
    assert str(path) in str(refused.value)
    assert not any(word in str(refused.value) for word in ("secret", ALICE, "a ba b"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="--callers .*nowhere cannot be read: No such file"):
        Callers(tmp_path / "nowhere")


def test_a_resume_token_is_good_for_its_caller_alone() -> None:
    sealer = TokenSealer()
    token = sealer.seal(SNAPSHOT, "alice")
    assert sealer.unseal(token, "alice") == SNAPSHOT
    for other in ("bob", "", "alice "):
        with pytest.raises(TokenInvalid, match="or is another caller's"):
            sealer.unseal(token, other)


def test_those_who_wait_are_woken_in_their_order_and_once() -> None:
    pacer, woken, all_woken = Pacer(), list[str](), threading.Event()

    def bug() -> None:
        raise RuntimeError("a bug of one harms no other")

    def last() -> None:
        woken.append("last")
        all_woken.set()

    def forgotten() -> None:
        woken.append("forgotten")

    with pacer._condition:  # both are due at once
        pacer.later(0.0, bug)
        pacer.later(0.0, lambda: woken.append("beside the bug"))
    pacer.later(0.02, last)
    pacer.later(0.01, lambda: woken.append("first"))
    pacer.later(0.005, forgotten)
    pacer.forget(forgotten)
    assert all_woken.wait(30)
    assert woken == ["beside the bug", "first", "last"]
    pacer.later(3600.0, forgotten)
    pacer.close()
    assert pacer._thread is not None
    pacer._thread.join(30)
    assert not pacer._thread.is_alive()
