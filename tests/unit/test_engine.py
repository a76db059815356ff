"""The engine, turned by hand: steps, endings, failures, and that nothing is lost or counted twice."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.engine import Engine
from tenuto.serving.errors import (
    AlreadyOpen,
    NotFinite,
    NotSupported,
    Overloaded,
    PoolFull,
    RunFailed,
    ServerDraining,
    StateNotFinite,
    StepGap,
    TenutoError,
)
from tenuto.serving.pending import PendingBytes
from tenuto.serving.population import COMMAND_BYTES, REPEATS_BYTES
from tenuto.serving.sequence import Closed, Ending, Failed, Opened, Output, Reply, Sequence

from .fakes import (
    BUG,
    EXPLODES,
    FAILS,
    Accumulator,
    Array,
    Bench,
    Doubler,
    FakeSink,
    accumulator,
    doubler,
)


def last_output(bench: Bench, sequence: Sequence) -> Output:
    found = [r for r in bench.replies(sequence) if isinstance(r, Output)]
    return found[-1]


# Opening and answering.


def test_an_admitted_sequence_is_told_its_id_version_step_and_window() -> None:
    bench = Bench()
    one = bench.open(window=7)
    bench.settle()
    assert bench.replies(one) == [Opened(one.id, 3, 1, 7)]


def test_sequences_in_one_batch_do_not_mix() -> None:
    bench = Bench()
    a, b, c = (bench.open() for _ in range(3))
    for step in (1, 2):
        bench.send(a, step, [1])
        bench.send(b, step, [10, 10])
        bench.send(c, step, [100])
    bench.settle()
    assert bench.outputs(a) == [[1], [2]]
    assert bench.outputs(b) == [[10, 20], [30, 40]]
    assert bench.outputs(c) == [[100], [200]]
    assert bench.runner.batches == [3, 3]
    bench.check_at_rest()


def test_a_long_chunk_takes_several_turns_and_gives_one_output() -> None:
    bench = Bench(accumulator(max_frames=4))
    one = bench.open()
    bench.send(one, 1, [1] * 10)
    bench.settle()
    assert bench.outputs(one) == [list(range(1, 11))]
    assert len(bench.runner.batches) == 3
    output = last_output(bench, one)
    assert (output.step, output.part, output.last, output.tensors[0][0]) == (1, 0, True, (10,))
    bench.check_at_rest()


def test_a_long_chunk_lets_others_in_between() -> None:
    bench = Bench(accumulator(max_frames=2, max_batch=1))
    long, short = bench.open(), bench.open(period_seconds=0.01)
    bench.send(long, 1, [1] * 6)
    bench.engine.turn()
    bench.send(short, 1, [1])
    bench.settle()
    answered = [s for s, r in bench.sink.replies if isinstance(r, Output)]
    assert answered == [short, long]


def test_a_chunk_that_completes_no_frame_is_answered_empty() -> None:
    bench = Bench(accumulator(x={"chunk": {"multiple": 3}}))
    one = bench.open()
    bench.send(one, 1, [])
    bench.send(one, 2, [1, 2])
    bench.send(one, 3, [3, 4])
    bench.settle()
    assert bench.outputs(one) == [[], [], [1, 3, 6]]
    assert [r.step for r in bench.replies(one) if isinstance(r, Output)] == [1, 2, 3]
    bench.check_at_rest()


def test_all_replies_of_a_batch_for_one_sink_come_in_one_delivery() -> None:
    bench = Bench()
    sequences = [bench.open() for _ in range(3)]
    bench.settle()
    before = bench.sink.deliveries
    for sequence in sequences:
        bench.send(sequence, 1, [1])
    bench.settle()
    assert bench.sink.deliveries == before + 1


def test_the_timing_says_how_long_a_chunk_waited_and_with_whom() -> None:
    bench = Bench()
    one, other = bench.open(), bench.open()
    bench.send(one, 1, [1])
    bench.send(other, 1, [1])
    bench.now += 0.5
    bench.settle()
    output = last_output(bench, one)
    assert output.queue_seconds == pytest.approx(0.5)
    assert output.batch_size == 2


def test_late_chunks_of_a_declared_period_are_counted() -> None:
    bench = Bench()
    one = bench.open(period_seconds=0.1)
    bench.send(one, 1, [1])
    bench.settle()
    assert bench.engine.metrics.deadline_misses == 0
    bench.send(one, 2, [1])
    bench.now += 0.2
    bench.settle()
    assert bench.engine.metrics.deadline_misses == 1


# Steps.


def test_a_skipped_step_ends_the_sequence_and_names_the_expected_one() -> None:
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [1])
    bench.send(one, 3, [1])
    bench.send(one, 4, [1])
    bench.settle()
    error = bench.ending(one)
    assert isinstance(error, StepGap)
    assert "step 3 came, expected 2" in str(error)
    assert bench.outputs(one) == [[1]]  # what came before the gap is answered
    bench.check_at_rest()


def test_step_zero_is_a_gap() -> None:
    bench = Bench()
    one = bench.open()
    bench.send(one, 0, [1])
    bench.settle()
    assert isinstance(bench.ending(one), StepGap)
    bench.check_at_rest()


def test_the_last_step_repeated_gets_the_same_reply_and_is_not_run() -> None:
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [5])
    bench.settle()
    bench.send(one, 1, [5])
    bench.settle()
    bench.send(one, 2, [1])
    bench.settle()
    outputs = [r for r in bench.replies(one) if isinstance(r, Output)]
    assert outputs[0] is outputs[1]
    assert bench.outputs(one) == [[5], [5], [6]]
    assert len(bench.runner.batches) == 2
    assert bench.engine.metrics.steps_repeated == 1
    bench.check_at_rest()


def test_an_older_step_is_ignored_and_counted() -> None:
    bench = Bench()
    one = bench.open()
    for step in (1, 2):
        bench.send(one, step, [1])
    bench.settle()
    bench.send(one, 1, [1])
    bench.settle()
    assert bench.outputs(one) == [[1], [2]]
    assert bench.engine.metrics.steps_repeated == 1
    assert bench.ending(one) is None
    bench.check_at_rest()


def test_a_step_repeated_before_its_answer_is_answered_once() -> None:
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [1])
    bench.send(one, 1, [1])
    bench.settle()
    assert bench.outputs(one) == [[1]]
    assert bench.engine.metrics.steps_repeated == 1
    bench.check_at_rest()


def test_one_chunk_over_the_window_ends_it_after_the_others_are_answered() -> None:
    bench = Bench()
    one, neighbour = bench.open(window=2), bench.open(window=2)
    for step in (1, 2, 3, 4):
        bench.send(one, step, [1])
    bench.send(neighbour, 1, [7])
    bench.settle()
    assert bench.outputs(one) == [[1], [2]]
    assert bench.replies(one)[-1] == Closed(Ending.WINDOW_EXCEEDED, 2)
    assert bench.ending(neighbour) is None
    assert bench.outputs(neighbour) == [[7]]
    bench.check_at_rest()


def test_an_answered_chunk_makes_room_in_the_window() -> None:
    bench = Bench()
    one = bench.open(window=1)
    for step in (1, 2, 3):
        bench.send(one, step, [1])
        bench.settle()
    assert bench.outputs(one) == [[1], [2], [3]]


# Endings.


def test_end_is_answered_after_all_chunks() -> None:
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [1] * 9)
    bench.engine.finish(one, Ending.END)
    bench.settle()
    assert bench.outputs(one) == [list(range(1, 10))]
    assert bench.replies(one)[-1] == Closed(Ending.END, 1)
    assert bench.engine.metrics.ended == {"END": 1}
    bench.check_at_rest()


def test_what_follows_an_ending_is_ignored() -> None:
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [1])
    bench.engine.finish(one, Ending.END)
    bench.send(one, 2, [1])
    bench.engine.finish(one, NotSupported("later"))
    bench.settle()
    bench.send(one, 3, [1])
    bench.engine.close(one, Ending.EVICTED)
    bench.settle()
    assert bench.ending(one) is Ending.END
    assert bench.outputs(one) == [[1]]
    bench.check_at_rest()


def test_what_follows_an_ending_is_not_kept_until_it_comes() -> None:
    bench = Bench(accumulator(max_frames=1))
    one = bench.open(window=9)
    bench.send(one, 1, [1] * 5)
    bench.engine.finish(one, Ending.END)
    bench.engine.turn()
    before = bench.pending.bytes
    bench.send(one, 2, [1] * 100)
    bench.engine.turn()
    assert bench.pending.bytes == before


def test_a_bad_event_fails_the_sequence_after_what_came_before_it() -> None:
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [1])
    bench.engine.finish(one, NotSupported("no checkpoints"))
    bench.settle()
    assert bench.outputs(one) == [[1]]
    assert isinstance(bench.ending(one), NotSupported)
    assert bench.engine.metrics.ended == {"FAILED": 1}


def test_close_drops_what_is_unanswered_and_counts_it() -> None:
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [1])
    bench.settle()
    for step in (2, 3):
        bench.send(one, step, [1])
    bench.engine.close(one, Ending.CANCELLED)
    bench.settle()
    assert bench.outputs(one) == [[1]]
    assert bench.replies(one)[-1] == Closed(Ending.CANCELLED, 1)
    assert bench.engine.metrics.chunks == {"answered": 1, "dropped": 2}
    bench.check_at_rest()


def test_an_operator_ends_a_live_sequence_by_its_id() -> None:
    bench = Bench()
    one, other = bench.open(), bench.open()
    bench.settle()
    assert bench.engine.sequences() == [one, other]
    assert bench.engine.close_by_id(one.id, Ending.EVICTED)
    bench.settle()
    assert bench.ending(one) is Ending.EVICTED
    assert bench.engine.sequences() == [other]
    assert not bench.engine.close_by_id(one.id, Ending.EVICTED)


def test_a_slot_handed_on_is_clean() -> None:
    bench = Bench(max_sequences=1)
    first = bench.open()
    bench.send(first, 1, [100])
    bench.engine.finish(first, Ending.END)
    bench.settle()
    second = bench.open()
    bench.send(second, 1, [1])
    bench.settle()
    assert bench.outputs(second) == [[1]]


def test_a_slot_handed_on_after_its_state_exploded_is_clean() -> None:
    """Opened in the very turn in which the first one ends."""
    bench = Bench(max_sequences=1)
    first = bench.open()
    bench.send(first, 1, [EXPLODES])
    bench.engine.turn()
    second = bench.open()
    bench.send(second, 1, [1])
    bench.settle()
    assert isinstance(bench.ending(first), StateNotFinite)
    assert bench.outputs(second) == [[1]]
    bench.check_at_rest()


def test_one_more_than_there_are_slots_is_refused_at_once() -> None:
    bench = Bench(max_sequences=2)
    held = [bench.open() for _ in range(2)]
    refused = bench.open()
    bench.send(refused, 1, [1])
    bench.settle()
    error = bench.ending(refused)
    assert isinstance(error, PoolFull)
    assert error.retry_after_ms > 0
    assert bench.engine.metrics.rejected == {"POOL_FULL": 1}
    assert bench.engine.metrics.slots_used == 2
    assert [bench.ending(s) for s in held] == [None, None]
    bench.check_at_rest()


def test_sequences_of_a_stateless_model_are_bounded_too() -> None:
    bench = Bench(doubler(), Doubler(), max_sequences=1)
    bench.open()
    refused = bench.open()
    bench.settle()
    assert isinstance(bench.ending(refused), PoolFull)


def test_what_is_left_over_at_end_is_padded_where_the_manifest_says_so() -> None:
    bench = Bench(accumulator(x={"chunk": {"multiple": 3}, "tail": "pad"}))
    one = bench.open()
    bench.send(one, 1, [1, 1, 1, 1])
    bench.engine.finish(one, Ending.END)
    bench.settle()
    assert bench.outputs(one) == [[1, 2, 3], [4, 4, 4]]
    first, tail = (r for r in bench.replies(one) if isinstance(r, Output))
    assert (first.step, first.part, tail.step, tail.part) == (1, 0, 1, 1)
    assert bench.ending(one) is Ending.END
    bench.check_at_rest()


@pytest.mark.parametrize("tail, ending", [("drop", Ending.END), ("pad", Ending.STREAM_ENDED)])
def test_else_what_is_left_over_is_dropped(tail: str, ending: Ending) -> None:
    bench = Bench(accumulator(x={"chunk": {"multiple": 3}, "tail": tail}))
    one = bench.open()
    bench.send(one, 1, [1, 1, 1, 1])
    bench.engine.finish(one, ending)
    bench.settle()
    assert bench.outputs(one) == [[1, 2, 3]]
    assert bench.ending(one) is ending


def test_nothing_left_over_is_not_padded() -> None:
    bench = Bench(accumulator(x={"chunk": {"multiple": 3}, "tail": "pad"}))
    one = bench.open()
    bench.send(one, 1, [1, 1, 1])
    bench.engine.finish(one, Ending.END)
    bench.settle()
    assert bench.outputs(one) == [[1, 2, 3]]


# Failures.


def test_a_failed_run_fails_only_the_guilty_row_and_the_others_are_exact() -> None:
    bench = Bench()
    sequences = [bench.open() for _ in range(4)]
    for step in (1, 2):
        for number, sequence in enumerate(sequences):
            bench.send(sequence, step, [FAILS if (step, number) == (2, 1) else number + 1])
    bench.settle()
    assert [bench.outputs(s) for s in sequences] == [[[1], [2]], [[2]], [[3], [6]], [[4], [8]]]
    error = bench.ending(sequences[1])
    assert isinstance(error, RunFailed)
    assert str(error).startswith("step 2:")
    assert [bench.ending(s) for s in sequences if s is not sequences[1]] == [None] * 3
    assert bench.runner.batches == [4, 4, 1, 1, 1, 1]
    assert bench.engine.metrics.rows_rerun == 4
    assert bench.engine.metrics.chunks == {"answered": 7, "failed": 1}
    bench.check_at_rest()


def test_a_failed_run_of_requests_fails_only_the_guilty_one() -> None:
    bench = Bench(doubler(), Doubler())
    good, guilty = bench.request([[1, 2]]), bench.request([[FAILS, 0]])
    bench.settle()
    assert bench.outputs(good) == [[2, 4]]
    assert isinstance(bench.ending(guilty), RunFailed)
    bench.check_at_rest()


def test_a_failure_late_in_a_long_chunk_gives_no_half_output() -> None:
    bench = Bench(accumulator(max_frames=2))
    one = bench.open()
    bench.send(one, 1, [1, 1, 1, FAILS])
    bench.send(one, 2, [1])
    bench.settle()
    assert bench.outputs(one) == []
    assert isinstance(bench.ending(one), RunFailed)
    assert bench.engine.metrics.chunks == {"failed": 2}
    bench.check_at_rest()


def test_nan_fails_only_its_own_sequence_before_it_reaches_the_model() -> None:
    bench = Bench()
    good, bad = bench.open(), bench.open()
    bench.send(good, 1, [1])
    bench.send(bad, 1, [np.nan])
    bench.settle()
    error = bench.ending(bad)
    assert isinstance(error, NotFinite)
    assert "input 'x' holds NaN or Inf" in str(error)
    assert "in step 1" in str(error)
    assert bench.outputs(good) == [[1]]
    assert bench.runner.batches == [1]
    bench.check_at_rest()


def test_a_batch_of_nothing_but_nan_does_not_run() -> None:
    bench = Bench()
    bad = [bench.open(), bench.open()]
    for sequence in bad:
        bench.send(sequence, 1, [np.inf])
    bench.settle()
    assert all(isinstance(bench.ending(s), NotFinite) for s in bad)
    assert bench.runner.batches == []
    bench.check_at_rest()


def test_a_state_that_is_no_number_ends_its_sequence_alone() -> None:
    bench = Bench()
    good, bad = bench.open(), bench.open()
    for step in (1, 2):
        bench.send(good, step, [1])
        bench.send(bad, step, [EXPLODES])
    bench.settle()
    assert isinstance(bench.ending(bad), StateNotFinite)
    assert bench.outputs(bad) == []
    assert bench.outputs(good) == [[1], [2]]
    assert bench.engine.metrics.ended == {"STATE_NOT_FINITE": 1}
    bench.check_at_rest()


def test_a_bug_in_a_run_ends_that_batch_and_the_engine_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    batch = [bench.open(), bench.open()]
    bench.send(batch[0], 1, [BUG])
    bench.send(batch[1], 1, [1])
    bench.settle()
    for sequence in batch:
        error = bench.ending(sequence)
        assert isinstance(error, RunFailed)
        assert "an error inside the server" in str(error)
        assert "a bug in the runner" not in str(error)  # that is the log's
    assert "a bug in the runner" in caplog.text
    other = bench.open()
    bench.send(other, 1, [2])
    bench.settle()
    assert bench.outputs(other) == [[2]]
    bench.check_at_rest()


def test_a_run_that_is_over_is_not_seen_as_hanging() -> None:
    bench = Bench()
    seen: list[float] = []

    class Watched(Accumulator):
        def run(self, feeds: dict[str, Array]) -> list[Array]:
            seen.append(bench.engine.running_since)
            return super().run(feeds)

    bench.engine._runner = Watched()
    one = bench.open()
    bench.send(one, 1, [1])
    bench.send(one, 2, [FAILS])
    bench.settle()
    assert seen == [bench.now, bench.now]
    assert bench.engine.running_since == 0.0


# Idle, drain, stop.


def test_a_silent_sequence_expires() -> None:
    bench = Bench()
    silent, busy, patient = (bench.open(idle_seconds=s) for s in (10, 10, 0))
    bench.settle()
    bench.now += 6
    bench.send(busy, 1, [1])
    bench.settle()
    bench.now += 6
    bench.settle()
    assert bench.ending(silent) is Ending.IDLE_EXPIRED
    assert bench.ending(busy) is None
    bench.now += 1e6
    bench.settle()
    assert bench.ending(busy) is Ending.IDLE_EXPIRED
    assert bench.ending(patient) is None
    bench.check_at_rest()


def test_a_sequence_does_not_expire_a_moment_too_early() -> None:
    bench = Bench()
    one = bench.open(idle_seconds=10)
    bench.settle()
    bench.now += 9.99
    bench.settle()
    assert bench.ending(one) is None
    bench.now += 0.01
    bench.settle()
    assert bench.ending(one) is Ending.IDLE_EXPIRED


def test_a_sequence_whose_chunk_still_waits_is_not_idle() -> None:
    bench = Bench(accumulator(max_frames=1, max_batch=1))
    one = bench.open(idle_seconds=1)
    bench.send(one, 1, [1] * 5)
    for _ in range(5):
        bench.now += 10
        bench.engine.turn()
    assert bench.outputs(one) == [[1, 2, 3, 4, 5]]
    assert bench.ending(one) is None


def test_draining_refuses_new_ones_and_ends_the_live_ones_once_they_are_answered() -> None:
    bench = Bench(accumulator(max_frames=1))
    live = bench.open()
    bench.send(live, 1, [1, 1])
    bench.send(live, 2, [1])
    bench.engine.turn()
    bench.engine.drain()
    late = bench.open()
    bench.send(live, 3, [1])
    bench.engine.turn()
    assert isinstance(bench.ending(late), ServerDraining)
    assert not bench.engine.emptied.is_set()
    bench.settle()
    bench.send(live, 4, [1])  # too late, and its client knows from Closed's last step
    bench.settle()
    assert bench.outputs(live) == [[1, 2], [3], [4]]
    assert bench.replies(live)[-1] == Closed(Ending.DRAINING, 3)
    assert bench.engine.emptied.is_set()
    bench.check_at_rest()


def test_draining_an_empty_engine_is_done_at_once() -> None:
    bench = Bench()
    bench.engine.drain()
    bench.settle()
    assert bench.engine.emptied.is_set()


def test_stop_ends_every_sequence() -> None:
    bench = Bench()
    live = [bench.open(), bench.open()]
    bench.send(live[0], 1, [1] * 9)
    bench.engine.stop(Ending.DRAINING)
    bench.engine.turn()
    assert [bench.ending(s) for s in live] == [Ending.DRAINING] * 2
    bench.check_at_rest()


def test_stop_answers_the_requests_that_were_accepted() -> None:
    """In the turn that takes the command: there is no other."""
    bench = Bench(doubler(max_batch=1), Doubler())
    requests = [bench.request([[i, i]]) for i in range(3)]
    bench.engine.drain()
    bench.engine.stop(Ending.DRAINING)
    bench.engine.turn()
    assert [bench.outputs(r) for r in requests] == [[[0, 0]], [[2, 2]], [[4, 4]]]
    bench.check_at_rest()


def test_the_thread_takes_commands_lives_through_bugs_and_ends() -> None:
    """The one test with the engine's own thread."""
    entered = threading.Event()
    answered = threading.Event()

    class Runner(Accumulator):
        def enter_thread(self) -> None:
            entered.set()

    class Sink(FakeSink):
        def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
            super().deliver(replies)
            if any(isinstance(r, Output) for _, r in replies):
                answered.set()
            if any(isinstance(r, Opened) for _, r in replies):
                raise ValueError("a bug in the sink")

    manifest = accumulator()
    engine = Engine(manifest, Runner(), version=1, max_sequences=2, pending=PendingBytes(1 << 20))
    engine.start()
    bench = Bench()  # makes the chunks
    sink = Sink()
    one = Sequence(sink, manifest)
    engine.open(one)
    engine.accept(one, bench.chunk(1, [5]))
    assert answered.wait(30)
    assert entered.is_set()
    engine.stop(Ending.DRAINING, join_seconds=30)
    assert not engine._thread.is_alive()
    assert sink.replies[-1][1] == Closed(Ending.DRAINING, 1)


def test_when_no_run_succeeds_any_more_nobody_is_to_blame(caplog: pytest.LogCaptureFixture) -> None:
    """The server leaves, and its sequences go on elsewhere: none may end here by an error of its own."""
    bench = Bench()
    one, two = bench.open(), bench.open()
    bench.settle()
    bench.runner.broken = True
    bench.send(one, 1, [1])
    bench.send(two, 1, [1])
    bench.settle()
    assert [bench.ending(s) for s in (one, two)] == [None, None]
    assert bench.engine.broken == "a run failed, and so does a run of zeros: the device is gone"
    assert bench.engine.broken in caplog.text


# Stateless requests and constants.


def test_small_requests_are_joined_and_large_ones_split() -> None:
    bench = Bench(doubler(max_batch=4), Doubler())
    large, small = bench.request([[i, -10 * i] for i in range(1, 8)]), bench.request([[50, 60]])
    bench.settle()
    assert bench.outputs(large) == [[v for i in range(1, 8) for v in (2 * i, -20 * i)]]
    assert last_output(bench, large).tensors[0][0] == (7, 2)
    assert bench.outputs(small) == [[100, 120]]
    assert bench.runner.batches == [4, 4]
    bench.check_at_rest()


def test_a_request_without_rows_is_answered_empty() -> None:
    bench = Bench(doubler(), Doubler())
    empty = bench.request([])
    bench.settle()
    assert bench.outputs(empty) == [[]]
    bench.check_at_rest()


def test_a_stateless_model_on_a_stream_answers_each_chunk_on_its_own() -> None:
    bench = Bench(doubler(), Doubler())
    one = bench.open()
    bench.send(one, 1, [[1, 1]])
    bench.send(one, 2, [[1, 1], [2, 2]])
    bench.engine.finish(one, Ending.END)
    bench.settle()
    assert bench.outputs(one) == [[2, 2], [2, 2, 4, 4]]
    assert bench.ending(one) is Ending.END
    bench.check_at_rest()


def test_a_cancelled_request_is_not_answered_twice() -> None:
    bench = Bench(doubler(max_batch=1), Doubler())
    one = bench.request([[1, 1], [2, 2]])
    bench.engine.turn()
    bench.engine.close(one, Ending.CANCELLED)
    bench.settle()
    assert bench.replies(one) == [Closed(Ending.CANCELLED, 0)]
    bench.check_at_rest()


def test_a_graph_of_fixed_batch_gets_its_size_and_padding_touches_nobody() -> None:
    bench = Bench(accumulator(fixed_batch=4))
    one = bench.open()
    for step in (1, 2):
        bench.send(one, step, [1, 1])
    bench.settle()
    assert bench.runner.batches == [4, 4]
    assert bench.outputs(one) == [[1, 2], [3, 4]]


def test_padding_rows_begin_anew_in_each_batch() -> None:
    """A state that counts, say, would count on there, and leave the table that it is an index of."""
    states: list[Array] = []

    class Carrying(Accumulator):
        def run(self, feeds: dict[str, Array]) -> list[Array]:
            states.append(feeds["total"].copy())
            y, total = super().run(feeds)
            return [y, total + 1]

    bench = Bench(accumulator(fixed_batch=3), Carrying())
    one = bench.open()
    for step in (1, 2, 3):
        bench.send(one, step, [1])
    bench.settle()
    assert [total[:, 0].tolist() for total in states] == [[0, 0, 0], [2, 0, 0], [4, 0, 0]]


def test_chosen_constants_reach_the_run_and_no_other_sequence() -> None:
    class Gained(Accumulator):
        def run(self, feeds: dict[str, Array]) -> list[Array]:
            return super().run(feeds | {"x": feeds["x"] * feeds["gain"]})

    constants = [{"name": "gain", "dtype": "float32", "value": 1.0, "allowed": [1.0, 10.0]}]
    bench = Bench(accumulator(constants=constants), Gained())
    plain, loud = bench.open(), bench.open(constants={"gain": 10.0})
    bench.send(plain, 1, [3])
    bench.send(loud, 1, [3])
    bench.settle()
    assert (bench.outputs(plain), bench.outputs(loud)) == ([[3]], [[30]])


# Metrics.


def test_a_batch_is_measured_once_in_every_stage() -> None:
    bench = Bench(accumulator(max_batch=4))
    one, other = bench.open(), bench.open()
    bench.send(one, 1, [1, 1, 1, 1])
    bench.send(other, 1, [1, 1])
    bench.settle()
    m = bench.engine.metrics
    assert m.batches == 1
    per_batch = {s: sum(m.stages[s].counts) for s in ("gather", "compute", "scatter", "reply")}
    assert per_batch == dict.fromkeys(per_batch, 1)
    assert m.batch_size.total == 2
    assert m.occupancy.total == 0.5
    assert m.padding.total == 0.25
    assert sum(m.chunk_latency.counts) == 2
    assert (m.sequences_started, m.active_sequences, m.slots, m.slots_used) == (2, 2, 4, 2)


def test_the_time_to_the_first_output_is_taken_once_a_sequence() -> None:
    bench = Bench()
    one = bench.open()
    bench.now += 2
    for step in (1, 2):
        bench.send(one, step, [1])
    bench.settle()
    assert sum(bench.engine.metrics.first_output.counts) == 1
    assert bench.engine.metrics.first_output.total == pytest.approx(2)


# Overload.


class Slow(Accumulator):
    """Each run takes so many seconds of the bench's clock."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.bench: Bench | None = None

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        assert self.bench
        self.bench.now += self.seconds
        return super().run(feeds)


def create_slow(seconds: float) -> Bench:
    """An engine that runs one row at a time, each for so long."""
    runner = Slow(seconds)
    bench = runner.bench = Bench(accumulator(max_batch=1), runner, max_sequences=64)
    return bench


def overload(bench: Bench) -> list[Sequence]:
    """Four sequences that ask for 0.3 s and of which the last is answered after a second."""
    four = [bench.open(period_seconds=0.3) for _ in range(4)]
    bench.settle()
    for sequence in four:
        bench.send(sequence, 1, [1])
    bench.settle()
    return four


def run_for(bench: Bench, sequence: Sequence, chunks: int, idle: float = 0.0) -> None:
    """So many chunks, one a run, with so many idle seconds after each."""
    for _ in range(chunks):
        bench.send(sequence, sequence.accepted + 1, [1])
        bench.settle()
        bench.now += idle


def open_one(bench: Bench) -> Ending | TenutoError | None:
    """How a newcomer that ends at once if it is admitted has ended."""
    newcomer = bench.open()
    bench.engine.finish(newcomer, Ending.END)
    bench.settle()
    return bench.ending(newcomer)


def test_an_engine_that_answers_too_late_refuses_newcomers_and_goes_on_with_the_others() -> None:
    bench = create_slow(0.25)
    four = overload(bench)
    for period in (0.0, 0.1, 10.0):
        newcomer = bench.open(period_seconds=period)
        bench.send(newcomer, 1, [1])
        bench.settle()
        error = bench.ending(newcomer)
        assert isinstance(error, Overloaded)
        assert error.retry_after_ms == 1000
        assert str(error) == (
            "accumulator/3 was busy for 100% of the last second, and 50% of the chunks that have a period "
            "came or were answered later than that; retry, or go to another server"
        )
        assert bench.outputs(newcomer) == []
    m = bench.engine.metrics
    assert m.rejected == {"OVERLOADED": 3}
    assert (m.sequences_started, m.slots_used, m.busy_ratio()) == (4, 4, 1.0)
    run_for(bench, four[0], 4)
    assert bench.outputs(four[0]) == [[n] for n in range(1, 6)]
    bench.check_at_rest()


def test_chunks_that_come_late_are_counted_and_count() -> None:
    """Answered in time: the server was too busy to read them."""
    bench = create_slow(0.25)
    paced = [bench.open(period_seconds=0.3) for _ in range(2)]
    others = bench.open()
    for _ in range(4):  # each has its turn after 0.75 s instead of 0.3
        for sequence in [*paced, others]:
            run_for(bench, sequence, 1)
    m = bench.engine.metrics
    assert m.deadline_misses == 0
    assert m.late_arrivals > 0
    assert isinstance(open_one(bench), Overloaded)


def test_a_late_chunk_counts_once() -> None:
    """It came late and was answered late: one of the four of that second."""
    bench = create_slow(0.25)
    run_for(bench, bench.open(), 1)
    four = overload(bench)
    assert bench.engine._population.late == 2
    bench.now += 0.4
    for sequence in four:
        bench.send(sequence, 2, [1])
    bench.settle()
    assert (bench.engine._population.paced, bench.engine._population.late) == (8, 6)
    assert bench.engine.metrics.late_arrivals == 4


def test_newcomers_come_in_again_once_the_answers_are_in_time() -> None:
    bench = create_slow(0.25)
    paced = bench.open(period_seconds=0.3)
    overload(bench)
    assert isinstance(open_one(bench), Overloaded)
    run_for(bench, paced, 5)  # as busy as before
    assert open_one(bench) is Ending.END
    assert bench.engine.metrics.busy_ratio() == 1.0


def test_newcomers_come_in_again_once_the_engine_had_nothing_to_do() -> None:
    bench = create_slow(0.25)
    overload(bench)
    bench.now += 0.75
    assert isinstance(open_one(bench), Overloaded)
    bench.now += 0.25
    assert open_one(bench) is Ending.END


def test_an_absurd_period_locks_nobody_out_of_an_engine_that_has_time_left() -> None:
    bench = create_slow(0.25)
    absurd = bench.open(period_seconds=0.001)
    run_for(bench, absurd, 4, idle=0.25)
    assert bench.engine.metrics.deadline_misses == 4
    assert bench.engine.metrics.busy_ratio() == 0.6  # three runs in 1.25 s
    assert open_one(bench) is Ending.END


def test_an_absurd_period_locks_nobody_out_of_an_engine_that_is_busy_for_others() -> None:
    """No answer comes sooner than the turn in progress and its own."""
    bench = create_slow(0.25)
    absurd, other = bench.open(period_seconds=0.001), bench.open()
    run_for(bench, other, 1)
    for _ in range(4):
        bench.send(absurd, absurd.accepted + 1, [1])
        run_for(bench, other, 1)
    assert bench.engine.metrics.busy_ratio() == 1.0
    assert bench.engine.metrics.deadline_misses == 4
    assert open_one(bench) is Ending.END


def test_waiting_for_work_is_not_being_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = create_slow(0.5)

    def late(_seconds: float | None) -> None:
        """Commands come half a second after the engine begins to wait."""
        bench.now += 0.5

    monkeypatch.setattr(bench.engine._inbox, "wait", late)
    one = bench.open()
    bench.engine.turn()
    for step in (1, 2, 3):
        bench.send(one, step, [1])
        bench.engine.turn(wait=True)
    assert bench.engine.metrics.busy_ratio() == 0.5


def test_an_engine_that_is_busy_and_in_time_takes_newcomers() -> None:
    """Those who declared no period, and wait for longer than 200 ms, are not late."""
    bench = create_slow(0.25)
    run_for(bench, bench.open(), 4)
    assert bench.engine.metrics.busy_ratio() == 1.0
    assert open_one(bench) is Ending.END


def test_a_single_request_is_answered_however_late_the_sequences_are() -> None:
    bench = Bench(doubler(), Doubler())
    own = bench.runner.run

    def run(feeds: dict[str, Array]) -> list[Array]:
        bench.now += 2
        results: list[Array] = own(feeds)
        return results

    bench.runner.run = run  # type: ignore[method-assign]
    late = bench.open(period_seconds=0.1)
    bench.send(late, 1, [[1, 1]])
    bench.settle()
    assert isinstance(open_one(bench), Overloaded)
    request = bench.request([[1, 2]])
    bench.settle()
    assert bench.outputs(request) == [[2, 4]]


# Whatever happens.


@dataclass(frozen=True)
class Command:
    """One thing that a client, an operator or the clock does to the sequence of that number."""

    kind: str
    who: int
    values: tuple[float, ...] = ()
    skip: int = 0  # steps beyond the next one; negative: repeats


SAMPLES = st.one_of(st.integers(1, 9).map(float), st.sampled_from([FAILS, BUG, EXPLODES, np.nan]))
GOOD = st.integers(1, 9).map(float)
COMMANDS = st.lists(
    st.one_of(
        st.builds(Command, st.just("open"), st.integers(0, 5)),
        st.builds(
            Command,
            st.just("send"),
            st.integers(0, 5),
            st.one_of(st.lists(GOOD, max_size=7), st.lists(SAMPLES, max_size=7)).map(tuple),
            st.sampled_from([0, 0, 0, 0, 0, 0, -1, -2, 1]),
        ),
        st.builds(Command, st.sampled_from(["end", "fail", "close"]), st.integers(0, 5)),
        st.builds(Command, st.sampled_from(["turn", "wait"]), st.just(0)),
    ),
    max_size=50,
)  # fmt: skip


@given(
    commands=COMMANDS,
    multiple=st.integers(1, 3),
    ragged=st.booleans(),
    drain=st.booleans(),
)
def test_whatever_happens_answers_are_exact_endings_final_and_nothing_is_lost(
    commands: list[Command], multiple: int, ragged: bool, drain: bool
) -> None:
    x = {"chunk": {"multiple": multiple}, "tail": "pad"}
    bench = Bench(accumulator(x=x, ragged=ragged, max_frames=2, max_batch=3), max_sequences=3)
    current: dict[int, Sequence] = {}
    everyone: list[Sequence] = []
    sent: dict[Sequence, list[tuple[float, ...]]] = {}
    for command in commands:
        sequence = current.get(command.who)
        if command.kind == "open":
            if sequence is None or sequence.ended:
                current[command.who] = new = bench.open(idle_seconds=30, window=3)
                everyone.append(new)
                sent[new] = []
        elif command.kind == "turn":
            bench.engine.turn()
        elif command.kind == "wait":
            bench.now += 20
        elif sequence is None:
            continue
        elif command.kind == "send":
            step = len(sent[sequence]) + 1 + command.skip
            if step == len(sent[sequence]) + 1:
                sent[sequence].append(command.values)
            bench.send(sequence, max(step, 0), command.values)
        elif command.kind == "end":
            bench.engine.finish(sequence, Ending.END)
        elif command.kind == "fail":
            bench.engine.finish(sequence, NotSupported("of its own"))
        else:
            bench.engine.close(sequence, Ending.CANCELLED)
    if drain:
        bench.engine.drain()
    bench.settle()
    bench.check_at_rest()
    check_replies(bench, everyone, sent, multiple)
    bench.engine.stop(Ending.DRAINING)
    bench.settle()
    bench.check_at_rest()
    m = bench.engine.metrics
    assert m.active_sequences == m.slots_used == 0
    assert m.sequences_started == sum(m.ended.values())
    assert all(bench.ending(s) is not None for s in everyone)


def check_replies(
    bench: Bench, everyone: list[Sequence], sent: dict[Sequence, list[tuple[float, ...]]], multiple: int
) -> None:
    """Each reply in order, each output the sums that the sequence alone would have got."""
    for sequence in everyone:
        replies = bench.replies(sequence)
        bench.ending(sequence)  # nothing follows it
        outputs = [r for r in replies if isinstance(r, Output) and r.part == 0]
        fresh = [o for i, o in enumerate(outputs) if o is not outputs[i - 1] or i == 0]
        assert [o.step for o in fresh] == list(range(1, len(fresh) + 1))
        whole = [v for values in sent[sequence] for v in values]
        sums = list(itertools.accumulate(whole))
        ends = list(itertools.accumulate(len(values) for values in sent[sequence]))
        done = 0
        for output in fresh:
            end = ends[output.step - 1] // multiple * multiple
            got = np.frombuffer(output.tensors[0][1], np.float32).tolist() if output.tensors else []
            assert got == sums[done:end]
            done = end


@given(
    requests=st.lists(st.lists(st.sampled_from([1.0, 2.0, 3.0, FAILS, np.nan]), max_size=9), max_size=8),
    cancelled=st.sets(st.integers(0, 7)),
    max_batch=st.integers(1, 5),
)
def test_every_request_gets_its_own_rows_or_its_own_error(
    requests: list[list[float]], cancelled: set[int], max_batch: int
) -> None:
    bench = Bench(doubler(max_batch=max_batch), Doubler())
    made = [bench.request([[v, v] for v in rows]) for rows in requests]
    for number in cancelled:
        if number < len(made):
            bench.engine.close(made[number], Ending.CANCELLED)
    bench.settle()
    bench.check_at_rest()
    for number, (sequence, rows) in enumerate(zip(made, requests, strict=True)):
        reply = bench.replies(sequence)[0]  # a close that comes later adds nothing
        if number in cancelled and isinstance(reply, Closed):
            continue
        if FAILS in rows or any(np.isnan(rows)):
            assert isinstance(reply, Failed)
        else:
            assert bench.outputs(sequence) == [[2 * v for v in rows for _ in "xy"]]


def test_check_finds_slots_without_sequences() -> None:
    bench = Bench()
    bench.open()
    bench.settle()
    bench.engine._population.live.clear()
    with pytest.raises(TenutoError, match="1 slots used, 0 sequences live. This is a bug"):
        bench.engine.check()


def test_helpers_see_a_leak() -> None:
    """The checks of this module can fail."""
    bench = Bench()
    bench.chunk(1, [1])
    with pytest.raises(AssertionError):
        bench.check_at_rest()


def test_many_repeats_of_a_step_are_answered_once_a_delivery() -> None:
    """Or a message of many small repeats would become as many large outputs."""
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [5])
    bench.settle()
    for _ in range(100):
        bench.send(one, 1, [])
    bench.settle()
    assert bench.outputs(one) == [[5], [5]]
    assert bench.engine.metrics.steps_repeated == 100
    bench.send(one, 1, [])
    bench.settle()
    assert bench.outputs(one) == [[5], [5], [5]]
    bench.check_at_rest()


def test_only_small_outputs_are_kept_for_a_step_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' step, sent again, is counted and not answered."""
    bench = Bench()
    monkeypatch.setattr(bench.engine._population, "_kept_bytes", 2 * 4)
    small, large = bench.open(), bench.open()
    for _ in range(2):
        bench.send(small, 1, [7, 7])
        bench.send(large, 1, [7, 7, 7])
        bench.settle()
    assert [len(bench.outputs(s)) for s in (small, large)] == [2, 1]
    assert bench.engine.metrics.steps_repeated == 2
    bench.send(small, 2, [1, 1, 1])
    bench.settle()
    assert small.last_outputs == ()
    bench.check_at_rest()


def test_the_outputs_kept_have_a_budget() -> None:
    assert Bench(max_sequences=4).engine._population._kept_bytes == REPEATS_BYTES // 4


def test_a_single_request_is_not_kept() -> None:
    bench = Bench(doubler(), Doubler())
    request = bench.request([[1, 2]])
    bench.settle()
    assert bench.outputs(request) == [[2, 4]]
    assert request.last_outputs == ()


def test_sequences_that_ended_do_not_stay_until_they_are_due() -> None:
    bench = Bench()
    for _ in range(500):
        one = bench.open(idle_seconds=300.0)
        bench.engine.finish(one, Ending.END)
        bench.settle()
    assert len(bench.engine._population._idle) <= 2 + 64


def test_opening_again_before_closed_came_is_told() -> None:
    """The number still belongs to the sequence that is ending; silence would leave the caller waiting."""
    bench = Bench()
    one = bench.open()
    bench.send(one, 1, [1])
    bench.engine.finish(one, Ending.END)
    bench.engine.finish(one, AlreadyOpen("opened too early"))
    bench.settle()
    assert bench.outputs(one) == [[1]]
    assert isinstance(bench.ending(one), AlreadyOpen)
    bench.check_at_rest()


def test_every_command_counts_as_pending_until_it_is_carried_out() -> None:
    bench = Bench()
    one = bench.open()
    assert bench.pending.bytes == COMMAND_BYTES
    bench.engine.finish(one, Ending.END)
    assert bench.pending.bytes == 2 * COMMAND_BYTES
    bench.settle()
    assert bench.pending.bytes == 0
    assert bench.sink.settled == 2 * COMMAND_BYTES


def test_bytes_are_settled_after_their_replies_were_delivered() -> None:
    """A reader that goes on before would find its outbox empty, and read once more."""
    bench = Bench()
    one = bench.open()
    bench.settle()
    bench.send(one, 1, [1])
    held = bench.pending.bytes
    seen: list[tuple[int, int]] = []
    own = bench.sink.deliver

    def deliver(replies: list[tuple[Sequence, Reply]]) -> None:
        seen.append((bench.pending.bytes, bench.sink.settled))
        own(replies)

    bench.sink.deliver = deliver  # type: ignore[method-assign]
    bench.settle()
    assert seen == [(held, COMMAND_BYTES)]
    assert bench.sink.settled == COMMAND_BYTES + held
    bench.check_at_rest()


def test_a_sink_that_raises_costs_its_own_replies_alone(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    broken = FakeSink()
    broken.deliver = lambda replies: 1 / 0  # type: ignore[method-assign,assignment]
    bad = Sequence(broken, bench.manifest)
    bench.engine.open(bad)
    good = bench.open()
    bench.settle()
    assert isinstance(bench.replies(good)[0], Opened)
    assert "replies could not be handed over" in caplog.text


def test_a_sequence_whose_call_was_over_before_it_was_opened_takes_no_slot() -> None:
    """On gRPC's own server a call ends on another thread than the one that reads it."""
    bench = Bench()
    late = Sequence(bench.sink, bench.manifest, now=bench.now)
    bench.engine.close(late, Ending.CANCELLED)
    bench.engine.open(late)
    bench.settle()
    assert bench.engine.metrics.slots_used == 0
    assert bench.engine.sequences() == []
    assert bench.pending.bytes == 0
