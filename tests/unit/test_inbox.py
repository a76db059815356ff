"""Commands in order, and none lost that comes once the thread has ended."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from tenuto.serving.inbox import Command, Inbox


def named(name: str) -> Command:
    return (lambda *_: None, name, None)


class Late:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.names: list[Any] = []

    def __call__(self, command: Command) -> None:
        self.names.append(command[1])


def test_commands_come_out_as_they_went_in() -> None:
    inbox = Inbox()
    for name in "ab":
        inbox.put(named(name))
    assert inbox.qsize() == 2
    assert inbox.get(timeout=1)[1] == "a"
    assert inbox.get_nowait()[1] == "b"
    with pytest.raises(queue.Empty):
        inbox.get_nowait()


def test_what_is_there_at_the_close_and_what_comes_after_is_carried_out() -> None:
    inbox, late = Inbox(), Late()
    inbox.put(named("before"))
    inbox.close(late)
    assert late.names == ["before"]
    inbox.put(named("after"))
    assert late.names == ["before", "after"]
    assert inbox.qsize() == 0


def test_a_late_command_may_put_another() -> None:
    inbox, names = Inbox(), []

    def late(command: Command) -> None:
        names.append(command[1])
        if command[1] == "first":
            inbox.put(named("second"))

    inbox.close(late)
    inbox.put(named("first"))
    assert names == ["first", "second"]


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
    taken = [inbox.get(timeout=10)[1] for _ in range(count)]
    inbox.close(late)
    for thread in threads:
        thread.join()
    assert sorted(taken + late.names) == sorted(f"{n}-{i}" for n in range(4) for i in range(count))
