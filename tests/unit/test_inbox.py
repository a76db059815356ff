"""Commands in order, none lost that comes once the engine has ended, and wake-ups that are deferred."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tenuto.serving.inbox import Command, Inbox

PATIENCE_SECONDS = 10.0


def named(name: str) -> Command:
    return (lambda *_: None, name, None)


class Late:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.names: list[Any] = []

    def __call__(self, command: Command) -> None:
        self.names.append(command[1])


class Deferring:
    """Keeps the wake-ups, as the reading thread does until all that was read is handed on."""

    def __init__(self, takes: bool) -> None:
        self.takes = takes
        self.wakes: list[Callable[[], None]] = []

    def __call__(self, wake: Callable[[], None]) -> bool:
        if self.takes:
            self.wakes.append(wake)
        return self.takes


class Waiter:
    """A thread that waits for a command."""

    def __init__(self, inbox: Inbox) -> None:
        self.back = threading.Event()
        self._inbox = inbox
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()
        while not inbox._sleeps:
            pass

    def _wait(self) -> None:
        self._inbox.wait(PATIENCE_SECONDS)
        self.back.set()

    def join(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert self.back.is_set()


def test_commands_come_out_as_they_went_in() -> None:
    inbox = Inbox()
    for name in "ab":
        inbox.put(named(name))
    assert len(inbox) == 2
    assert inbox.take()[1] == "a"
    assert inbox.take()[1] == "b"
    with pytest.raises(IndexError):
        inbox.take()


def test_whoever_waits_is_woken_by_the_first_command() -> None:
    inbox = Inbox(Deferring(takes=False))
    waiter = Waiter(inbox)
    inbox.put(named("a"))
    waiter.join()
    inbox.wait(PATIENCE_SECONDS)  # it is still there


def test_a_deferred_wake_up_comes_once_for_many_commands() -> None:
    deferring = Deferring(takes=True)
    inbox = Inbox(deferring)
    waiter = Waiter(inbox)
    for name in "abc":
        inbox.put(named(name))
    assert not waiter.back.is_set()
    assert len(deferring.wakes) == 1
    deferring.wakes[0]()
    waiter.join()
    assert len(inbox) == 3


def test_nobody_is_woken_who_does_not_wait() -> None:
    deferring = Deferring(takes=True)
    inbox = Inbox(deferring)
    inbox.put(named("a"))
    inbox.wait(PATIENCE_SECONDS)
    inbox.put(named("b"))
    assert deferring.wakes == []


def test_a_wake_up_for_nothing_is_not_kept() -> None:
    inbox = Inbox()
    inbox.put(named("a"))
    inbox.wake()
    inbox.wait(PATIENCE_SECONDS)
    inbox.take()
    inbox.wait(0.0)  # comes back by the time alone
    assert inbox._bell.empty()


def test_what_is_there_at_the_close_and_what_comes_after_is_carried_out() -> None:
    inbox, late = Inbox(), Late()
    inbox.put(named("before"))
    inbox.close(late)
    assert late.names == ["before"]
    inbox.put(named("after"))
    assert late.names == ["before", "after"]
    assert len(inbox) == 0


def test_a_late_command_may_put_another() -> None:
    inbox, names = Inbox(), []

    def late(command: Command) -> None:
        names.append(command[1])
        if command[1] == "first":
            inbox.put(named("second"))

    inbox.close(late)
    inbox.put(named("first"))
    assert names == ["first", "second"]


def test_late_commands_that_put_others_take_no_deeper_stack() -> None:
    """A chain of ten thousand, each put by the one before."""
    inbox, carried = Inbox(), list[int]()

    def late(command: Command) -> None:
        number: int = command[1]
        carried.append(number)
        if number < 10_000:
            inbox.put((command[0], number + 1, None))

    inbox.close(late)
    inbox.put((lambda *_: None, 0, None))
    assert carried == list(range(10_001))


def test_no_command_of_many_threads_is_lost_or_carried_out_twice() -> None:
    inbox, late, count = Inbox(), Late(), 500
    begin = threading.Barrier(5)

    def bring(thread: int) -> None:
        begin.wait()
        for i in range(count):
            inbox.put(named(f"{thread}-{i}"))

    threads = [threading.Thread(target=bring, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    begin.wait()
    taken: list[Any] = []
    while len(taken) < count:
        inbox.wait(PATIENCE_SECONDS)
        taken.append(inbox.take()[1])
    inbox.close(late)
    for thread in threads:
        thread.join()
    assert sorted(taken + late.names) == sorted(f"{n}-{i}" for n in range(4) for i in range(count))
