"""Whose turn it is among the servers of one client."""

import random
from collections import Counter
from typing import Any

import pytest

from tenuto import NotFound, ReplyTimeout, TenutoError, Unavailable
from tenuto.servers import Servers
from tenuto.settings import Settings

NAMES = tuple(f"host-{n}:1" for n in range(4))


class Channel:
    """Makes methods that nobody calls."""

    def unary_unary(self, *_: Any, **__: Any) -> None: ...
    def stream_stream(self, *_: Any, **__: Any) -> None: ...


def servers(*names: str) -> Servers:
    return Servers(Settings(",".join(names)), lambda target, options: Channel())


def test_each_target_is_first_in_its_turn_and_all_are_in_every_round() -> None:
    some = servers(*NAMES)
    rounds = [some.round() for _ in range(8)]
    assert all(sorted(one) == sorted(NAMES) for one in rounds)
    firsts = [one[0] for one in rounds]
    assert firsts[:4] == firsts[4:]
    assert sorted(firsts[:4]) == sorted(NAMES)


def test_the_sequences_of_a_lost_server_do_not_all_go_to_one_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fixed stream of chance, so that this fails in no run by chance.
    monkeypatch.setattr("tenuto.servers.random", random.Random(7))
    some = servers(*NAMES)
    lost = [one for one in (some.round() for _ in range(400)) if one[0] == NAMES[0]]
    assert len(lost) == 100
    counts = Counter(one[1] for one in lost)
    assert set(counts) == set(NAMES[1:])
    assert min(counts.values()) > 20


def test_the_only_name_is_tried_three_times_where_its_server_drains_and_for_nothing_else() -> None:
    some = servers("tenuto:8001")
    assert some.tries() == ("tenuto:8001",) * 3
    assert some.may_try_on(Unavailable("leaving", code="UNAVAILABLE", reason="DRAINING"))
    for error in (
        Unavailable("refused", code="UNAVAILABLE"),
        NotFound("sequence", code="NOT_FOUND", reason="UNKNOWN_SEQUENCE"),
        ReplyTimeout("late"),
    ):
        assert not some.may_try_on(error)


@pytest.mark.parametrize(
    "error,may",
    [
        (Unavailable("refused", code="UNAVAILABLE"), True),
        (Unavailable("leaving", code="UNAVAILABLE", reason="DRAINING"), True),
        (NotFound("sequence", code="NOT_FOUND", reason="UNKNOWN_SEQUENCE"), True),
        (NotFound("model", code="NOT_FOUND", reason="UNKNOWN_MODEL"), False),
        (ReplyTimeout("late"), False),
    ],
)
def test_of_several_targets_each_is_tried_once(error: TenutoError, may: bool) -> None:
    some = servers(*NAMES)
    assert sorted(some.tries()) == sorted(NAMES)
    assert some.may_try_on(error) is may


def test_a_target_has_one_stub_and_a_closed_client_none() -> None:
    some = servers(*NAMES)
    assert some.stub(NAMES[0]) is some.stub(NAMES[0])
    assert len(some.close()) == 1
    with pytest.raises(Unavailable, match="is closed"):
        some.stub(NAMES[0])
