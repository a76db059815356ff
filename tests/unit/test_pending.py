"""The bound on unanswered bytes: who waits is resumed, once."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.pending import PendingBytes


def test_there_is_no_waiting_up_to_the_limit() -> None:
    pending = PendingBytes(10)
    pending.add(10)
    assert not pending.full
    assert not pending.wait(lambda: None)


def test_above_the_limit_one_waits_until_there_is_room_again() -> None:
    pending, resumed = PendingBytes(10), list[int]()
    pending.add(25)
    assert pending.full
    assert pending.wait(lambda: resumed.append(1))
    assert pending.wait(lambda: resumed.append(2))
    pending.remove(10)
    assert resumed == []
    pending.remove(5)
    assert resumed == [1, 2]
    pending.remove(10)
    assert resumed == [1, 2]


def test_one_that_is_resumed_may_wait_again() -> None:
    """Which happens at once where what it reads then is too much again."""
    pending, resumed = PendingBytes(10), list[int]()

    def resume() -> None:
        resumed.append(1)
        pending.add(20)
        assert pending.wait(lambda: resumed.append(2))

    pending.add(20)
    assert pending.wait(resume)
    pending.remove(20)
    assert resumed == [1]
    pending.remove(20)
    assert resumed == [1, 2]


def test_what_is_settled_is_taken_off_the_parts_and_the_whole() -> None:
    whole = PendingBytes(100)
    one, two = PendingBytes(10, whole), PendingBytes(10, whole)
    for part in (one, two):
        part.add_to_both(60)
    whole.add(7)
    resumed: list[str] = []
    for name, pending in (("one", one), ("two", two), ("whole", whole)):
        assert pending.wait(lambda name=name: resumed.append(name))  # type: ignore[misc]
    whole.settle({one: 50, None: 7})
    assert (one.bytes, two.bytes, whole.bytes) == (10, 60, 70)
    assert resumed == ["one", "whole"]
    whole.settle({one: 10, two: 60})
    assert (one.bytes, two.bytes, whole.bytes) == (0, 0, 0)
    assert resumed == ["one", "whole", "two"]
    assert not any(pending.full for pending in (one, two, whole))


@given(st.lists(st.one_of(st.integers(-30, 30), st.just(None)), max_size=40))
def test_everyone_who_waits_is_resumed_exactly_once(actions: list[int | None]) -> None:
    """None waits, a number adds or removes."""
    pending, held, waiting = PendingBytes(20), 0, 0
    resumed: list[int] = []
    for number, action in enumerate(actions):
        if action is None:
            waiting += pending.wait(lambda n=number: resumed.append(n))  # type: ignore[misc]
        elif action > 0:
            pending.add(action)
            held += action
        else:
            pending.remove(min(-action, held))
            held -= min(-action, held)
        assert pending.bytes == held
        assert held > 20 or len(resumed) == waiting
    pending.remove(held)
    assert len(resumed) == len(set(resumed)) == waiting


def test_threads_lose_no_byte() -> None:
    pending = PendingBytes(5)
    resumed = threading.Semaphore(0)

    def work() -> None:
        for _ in range(500):
            pending.add(3)
            if pending.wait(resumed.release):
                pending.remove(3)
                assert resumed.acquire(timeout=30)
            else:
                pending.remove(3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert pending.bytes == 0


def test_a_waiter_that_is_gone_is_not_kept_and_not_called() -> None:
    pending, called = PendingBytes(10), list[str]()

    def gone() -> None:
        called.append("gone")

    def stays() -> None:
        called.append("stays")

    pending.add(11)
    assert pending.wait(gone)
    assert pending.wait(stays)
    pending.forget(gone)
    pending.remove(11)
    assert called == ["stays"]
