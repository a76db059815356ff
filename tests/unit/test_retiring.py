"""An engine whose version was replaced: nobody is turned out before time, nothing is left behind."""

from __future__ import annotations

import threading

import pytest

from tenuto.serving.engine import Engine
from tenuto.serving.errors import ModelNotReady
from tenuto.serving.pending import PendingBytes
from tenuto.serving.sequence import Closed, Ending, Failed, Reply, Sequence

from .fakes import Accumulator, Bench, Doubler, FakeSink, accumulator, doubler

MAX_AGE_SECONDS = 100.0


def retire(bench: Bench, max_age_seconds: float = MAX_AGE_SECONDS) -> None:
    bench.engine.retire(max_age_seconds)
    bench.settle()


def test_live_ones_go_on_and_those_on_their_way_still_come_in() -> None:
    bench = Bench()
    live = bench.open()
    retire(bench)
    late = bench.open()  # found its engine just before the newer version was there
    for sequence in (live, late):
        bench.send(sequence, 1, [1])
    bench.now += MAX_AGE_SECONDS - 1
    bench.settle()
    assert bench.outputs(live) == bench.outputs(late) == [[1]]
    assert (bench.ending(live), bench.ending(late)) == (None, None)


def test_it_is_empty_once_the_last_one_has_ended_and_not_while_another_came() -> None:
    bench = Bench()
    live = bench.open()
    retire(bench)
    assert not bench.engine.emptied.is_set()
    bench.engine.finish(live, Ending.END)
    bench.settle()
    assert bench.engine.emptied.is_set()
    resumed = bench.open()
    bench.settle()
    assert not bench.engine.emptied.is_set()
    bench.engine.finish(resumed, Ending.END)
    bench.settle()
    assert bench.engine.emptied.is_set()
    bench.check_at_rest()


def test_at_max_age_what_was_accepted_is_answered_and_then_each_one_ends() -> None:
    bench = Bench()
    silent, busy = bench.open(), bench.open()
    retire(bench)
    bench.send(busy, 1, [1] * 9)  # three turns
    bench.send(busy, 2, [1])
    bench.engine.turn()
    bench.now += MAX_AGE_SECONDS
    bench.engine.turn()
    bench.send(busy, 3, [1])  # came too late: its client sends it again elsewhere
    bench.settle()
    assert bench.ending(silent) is Ending.MAX_AGE
    assert bench.outputs(busy) == [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10]]
    assert bench.ending(busy) is Ending.MAX_AGE
    assert bench.engine.emptied.is_set()
    assert bench.engine.metrics.ended["MAX_AGE"] == 2
    assert bench.engine.metrics.chunks["dropped"] == 1
    bench.check_at_rest()


def test_a_sequence_that_ends_already_keeps_its_own_ending() -> None:
    bench = Bench()
    one = bench.open()
    retire(bench)
    bench.send(one, 1, [1] * 9)
    bench.engine.finish(one, Ending.END)
    bench.engine.turn()
    bench.now += MAX_AGE_SECONDS
    bench.settle()
    assert bench.ending(one) is Ending.END


def test_past_max_age_nothing_comes_in_any_more() -> None:
    bench = Bench()
    retire(bench)
    bench.now += MAX_AGE_SECONDS
    bench.settle()
    assert bench.engine.past_max_age
    late = bench.open()
    bench.settle()
    assert isinstance(bench.ending(late), ModelNotReady)
    assert bench.engine.metrics.rejected["MODEL_NOT_READY"] == 1


def test_without_a_max_age_they_may_stay() -> None:
    bench = Bench()
    live = bench.open()
    retire(bench, 0)
    bench.now += 1e8
    bench.settle()
    assert bench.ending(live) is None


class Listener(FakeSink):
    """Says when the sequence has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        super().deliver(replies)
        if isinstance(replies[-1][1], Closed | Failed):
            self.ended.set()


def test_max_age_comes_also_when_nothing_else_does() -> None:
    """The thread wakes by itself."""
    engine = Engine(accumulator(), Accumulator(), version=1, max_sequences=1, pending=PendingBytes(1 << 20))
    sink = Listener()
    engine.start()
    engine.open(Sequence(sink, engine.manifest))
    engine.retire(0.001)
    assert sink.ended.wait(30)
    assert sink.replies[-1][1] == Closed(Ending.MAX_AGE, 0)
    engine.stop(Ending.MAX_AGE)


@pytest.fixture
def ended() -> Bench:
    """An engine whose thread is over."""
    bench = Bench(doubler(), Doubler())
    bench.engine.start()
    bench.engine.stop(Ending.MAX_AGE, join_seconds=30)
    return bench


def test_an_open_after_the_end_is_refused(ended: Bench) -> None:
    late = ended.open()
    assert isinstance(ended.ending(late), ModelNotReady)
    ended.check_at_rest()


def test_a_request_after_the_end_is_closed_and_not_run(ended: Bench) -> None:
    late = ended.request([[1, 2]])
    assert ended.ending(late) is Ending.DRAINING
    assert ended.runner.batches == []
    ended.check_at_rest()


def test_chunks_and_endings_after_the_end_are_taken_off_the_count() -> None:
    bench = Bench()
    bench.engine.start()
    live = bench.open()
    bench.engine.stop(Ending.MAX_AGE, join_seconds=30)
    bench.send(live, 1, [1])
    bench.engine.finish(live, Ending.END)
    bench.engine.close(live, Ending.CANCELLED)
    assert bench.ending(live) is Ending.MAX_AGE
    bench.check_at_rest()


def test_only_the_engine_thread_flushes() -> None:
    """A thread that flushes holds back what it sends from then on (Http2Server.flush): the one
    that reads never would send again."""
    flushed: list[str] = []
    engine = Engine(
        doubler(),
        Doubler(),
        version=1,
        max_sequences=1,
        pending=PendingBytes(1 << 20),
        flush=lambda: flushed.append(threading.current_thread().name),
    )
    engine.start()
    engine.stop(Ending.MAX_AGE, join_seconds=30)
    sink = FakeSink()
    engine.open(Sequence(sink, engine.manifest))
    assert isinstance(sink.replies[0][1], Failed)
    assert set(flushed) == {"engine-doubler-1"}
