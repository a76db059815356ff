"""A child that is asked one job after the other, whatever becomes of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tenuto.serving.adoption.dialogue import Dialogue
from tenuto.serving.errors import ModelInvalid
from tenuto.serving.vetting import Limits

MODULE = "tests.adoption.fragile"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `python -m` finds the module."""
    monkeypatch.chdir(Path(__file__).parents[2])


def test_answers_come_in_order_and_prints_are_none() -> None:
    with Dialogue(MODULE, {}, Limits(50.0, 4 << 30)) as child:
        answers = [child.ask({"say": n}) for n in range(3)]
    assert [a["said"] for a in answers] == [0, 1, 2]
    assert len({a["pid"] for a in answers}) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(answers[0]["pid"], 0)


def test_a_refusal_is_an_answer_and_the_child_goes_on() -> None:
    with Dialogue(MODULE, {}, Limits(50.0, 4 << 30)) as child:
        before = child.ask({})["pid"]
        with pytest.raises(ModelInvalid, match="not that"):
            child.ask({"refuse": "not that"})
        assert child.lives
        assert child.ask({})["pid"] == before


@pytest.mark.parametrize(
    "job,why",
    [
        ({"exit": 3}, "it ends the process that runs it (exit status 3"),
        ({"signal": int(signal.SIGSEGV)}, "signal 11"),
        ({"sleep": 60}, "it took more than 2 s"),
    ],
)
def test_another_child_comes_after_one_that_ended(job: dict[str, int], why: str) -> None:
    with Dialogue(MODULE, {}, Limits(2.0, 4 << 30)) as child:
        before = child.ask({})["pid"]
        with pytest.raises(ModelInvalid) as raised:
            child.ask(job)
        assert why in str(raised.value)
        assert not child.lives
        assert child.ask({})["pid"] != before


def test_what_takes_too_much_memory_ends() -> None:
    too_much = pytest.raises(ModelInvalid, match="more than 256 MiB of memory")
    with Dialogue(MODULE, {}, Limits(50.0, 256 << 20)) as child, too_much:
        child.ask({"bytes": 512 << 20})


def test_a_subject_that_it_cannot_begin_with() -> None:
    with Dialogue(MODULE, {"bad": True}, Limits(50.0, 4 << 30)) as child:
        with pytest.raises(ModelInvalid, match="it cannot begin"):
            child.start()
        assert not child.lives
