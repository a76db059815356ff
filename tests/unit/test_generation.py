"""A sequence goes on by itself: what it says depends on its seed and on what it was sent alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenuto.serving.errors import (
    OutOfRangeValue,
    RunFailed,
    StepGap,
    TenutoError,
    TokenInvalid,
    WrongEncoding,
    WrongInput,
)
from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU, ModelRunner
from tenuto.serving.population import PART_BYTES
from tenuto.serving.resume_token import TokenSealer
from tenuto.serving.sampling import Sampling, Uniforms
from tenuto.serving.sequence import Checkpoint, Chunk, Closed, Ending, Failed, Opened, Output, Sequence
from tenuto.serving.snapshot import Checkpoints, Snapshot
from tenuto.serving.text import Text
from tests import toys
from tests.toys import spoken

from .fakes import Array, Bench, FakeSink

SEALER = TokenSealer()
PROMPT = "abc 😀"


class Stage(Bench):
    """A bench with a real model that generates, and tokens; `every` 0: at endings and wishes alone."""

    def __init__(self, toy: Any = toys.speaker, *, every: int = 0, **settings: Any) -> None:
        model, fields = toy()
        manifest = Manifest.model_validate(fields)
        self.stubborn = Stubborn(ModelRunner(model, manifest, "toy/1", provider=CPU, threads=1))
        sealing = Checkpoints(SEALER.seal, "f", "s", every)
        super().__init__(manifest, self.stubborn, checkpoints=sealing, **({"max_sequences": 64} | settings))

    def begin(
        self, seed: int = 1, temperature: float = 1.0, top_k: int = 0, *, sink: FakeSink | None = None,
        **more: Any,
    ) -> Sequence:  # fmt: skip
        sampling = Sampling(seed, temperature, top_k)
        sequence = Sequence(sink or self.sink, self.manifest, now=self.now, sampling=sampling, **more)
        self.engine.open(sequence)
        return sequence

    def resume(self, snapshot: Snapshot) -> Sequence:
        sequence = Sequence(self.sink, self.manifest, now=self.now, sampling=Sampling(0, 1.0, 0))
        self.engine.open(sequence, snapshot)
        return sequence

    def say(self, sequence: Sequence, step: int, text: str | bytes | Array, generate: int = 0) -> None:
        """Sends one chunk: a text, or samples."""
        data: bytes
        if isinstance(text, np.ndarray):
            data = text.tobytes()
        else:
            data = Text(text.encode() if isinstance(text, str) else text)
        self.pending.add(10)
        self.engine.accept(sequence, Chunk(step, (data,), self.now, 10, generate=generate))

    def go_on(self, sequence: Sequence, step: int, generate: int) -> None:
        """Sends a chunk without samples."""
        self.say(sequence, step, np.array([]), generate)

    def parts(self, sequence: Sequence) -> list[tuple[int, int, bool]]:
        """Step, part and last of all outputs."""
        return [(o.step, o.part, o.last) for o in outputs(self, sequence)]

    def said(self, sequence: Sequence) -> list[int]:
        """The samples that were generated."""
        drawn = [o for o in outputs(self, sequence) if o.drawn]
        assert all(o.tensors[0][0] == (1,) for o in drawn)
        return [int(np.frombuffer(o.tensors[0][1], np.int64)[0]) for o in drawn]

    def last_token(self, sequence: Sequence) -> Snapshot:
        ending = self.replies(sequence)[-1]
        assert isinstance(ending, Closed | Failed)
        assert ending.token
        return SEALER.unseal(ending.token)


class Stubborn:
    """Runs, and fails a batch that holds the id `refused`; or says NaN."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.batches: list[int] = []
        self.refused = -1
        self.spoils_after = 10**9  # runs

    def enter_thread(self) -> None: ...
    def probe(self) -> None: ...

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        first = next(iter(feeds.values()))
        self.batches.append(len(first))
        if (first == self.refused).any():
            raise RunFailed("a row fails the run")
        results = self._runner.run(feeds)
        if len(self.batches) > self.spoils_after:
            results[0] = np.full_like(results[0], np.nan)
        return results


def outputs(bench: Bench, sequence: Sequence) -> list[Output]:
    return [r for r in bench.replies(sequence) if isinstance(r, Output)]


def alone(steps: list[tuple[str, int]], **sampling: Any) -> list[int]:
    """What it says when nobody else is there."""
    stage = Stage()
    one = stage.begin(**sampling)
    for step, (text, count) in enumerate(steps, 1):
        stage.say(one, step, text, count)
        stage.settle()
    stage.check_at_rest()
    return stage.said(one)


# What it says.


@pytest.mark.parametrize(
    "sampling", [{}, {"seed": 2**64 - 1}, {"temperature": 0.4}, {"top_k": 3}, {"top_k": 1}]
)
def test_it_says_what_can_be_worked_out_without_a_server(sampling: dict[str, Any]) -> None:
    steps = [(PROMPT, 40), ("", 7), ("cab", 0), ("a" * 30, 25)]
    assert alone(steps, **sampling) == spoken(steps, **sampling)


def test_another_seed_says_something_else() -> None:
    assert len({tuple(alone([(PROMPT, 30)], seed=seed)) for seed in range(5)}) == 5


def test_part_0_is_the_chunk_s_own_output_and_each_other_tells_its_sample() -> None:
    stage = Stage()
    one = stage.begin(seed=3)
    stage.say(one, 1, "ab", 3)
    stage.settle()
    own, *generated = outputs(stage, one)
    assert [shape for shape, _ in own.tensors] == [(2, 8), (2,)]
    assert np.frombuffer(own.tensors[1][1], np.int64).tolist() == [2, 5]
    assert stage.parts(one) == [(1, 0, False), (1, 1, False), (1, 2, False), (1, 3, True)]
    assert all(len(o.tensors) == 1 and o.batch_size == 1 for o in generated)
    stage.say(one, 2, "a")
    stage.settle()
    last = outputs(stage, one)[-1]
    total = 5 + sum(stage.said(one)) + 2
    assert np.frombuffer(last.tensors[1][1], np.int64).tolist() == [total]
    assert (last.step, last.part, last.last, last.drawn) == (2, 0, True, False)
    stage.check_at_rest()


def test_a_chunk_without_samples_goes_on_from_the_last_output() -> None:
    stage = Stage()
    one = stage.begin()
    stage.say(one, 1, PROMPT)
    stage.go_on(one, 2, 5)
    stage.settle()
    assert stage.parts(one)[1:3] == [(2, 0, False), (2, 1, False)]
    assert outputs(stage, one)[1].tensors == ()
    assert stage.said(one) == spoken([(PROMPT, 0), ("", 5)])


class Stepper:
    """`speaker` without a time axis: one id a run, one row of logits."""

    def enter_thread(self) -> None: ...
    def probe(self) -> None: ...

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        assert feeds["id"].shape == (len(feeds["total"]),)
        total = feeds["total"] + feeds["id"][:, None]
        return [toys.SPEECH[total[:, 0] % 97], total]


def test_a_model_without_a_time_axis_goes_on_as_well() -> None:
    fields = toys.speaker()[1] | {
        "inputs": [{"name": "id", "dtype": "int64", "shape": ["batch"]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 8]}],
    }
    bench = Bench(Manifest.model_validate(fields), Stepper())
    crowd = [Sequence(bench.sink, bench.manifest, sampling=Sampling(seed, 1.0, 0)) for seed in range(3)]
    for seed, one in enumerate(crowd):
        bench.engine.open(one)
        for step, (data, count) in enumerate([(np.int64(2).tobytes(), 20), (b"", 10)], 1):
            bench.engine.accept(one, Chunk(step, (data,), bench.now, 0, generate=count + seed))
    bench.settle()
    for seed, one in enumerate(crowd):
        drawn = [o.tensors[0] for o in outputs(bench, one) if o.drawn]
        assert {shape for shape, _ in drawn} == {()}
        ids = [int(np.frombuffer(data, np.int64)[0]) for _, data in drawn]
        assert ids == spoken([("a", 20 + seed), ("", 10 + seed)], seed=seed)
    bench.check_at_rest()


def test_chords_are_struck_key_by_key() -> None:
    stage = Stage(toys.player)
    one = stage.begin(seed=4)
    stage.say(one, 1, np.zeros((1, 6), np.float32), 60)
    stage.settle()
    chords = [np.frombuffer(o.tensors[0][1], np.float32) for o in outputs(stage, one) if o.drawn]
    total = 0
    for part, chord in enumerate(chords, 1):
        expected = Uniforms().draw(4, 1, part, 6) < toys.KEYS[total % 97]
        # The server turns probabilities into logits and back: a number that close to its own may fall.
        assert chord.tolist() == expected.astype(float).tolist()
        total += int((chord * np.arange(1, 7)).sum())
    assert len(chords) == 60
    stage.check_at_rest()


def test_before_any_output_it_is_refused_by_name() -> None:
    stage = Stage()
    one, other = stage.begin(), stage.begin()
    stage.go_on(one, 1, 1)
    stage.say(other, 1, "a", 2)
    stage.settle()
    error = stage.ending(one)
    assert isinstance(error, WrongInput)
    assert str(error) == "it generates before there is any output; send a sample first, in part 1 of step 1"
    assert len(stage.said(other)) == 2


def test_what_is_no_distribution_ends_that_sequence_alone() -> None:
    stage = Stage()
    one = stage.begin()
    stage.say(one, 1, "a", 9)
    stage.stubborn.spoils_after = 3
    stage.settle()
    error = stage.ending(one)
    assert isinstance(error, RunFailed)
    assert str(error) == "output 'logits' holds nan, of which nothing can be drawn, in part 4 of step 1"
    assert stage.parts(one)[-1] == (1, 3, False)


def test_a_run_that_fails_on_a_sample_ends_its_sequence_alone() -> None:
    said = spoken([("a", 40)], seed=1)
    other_said = spoken([("b", 3)], seed=2, top_k=1)
    refused = next(i for i in said if i not in other_said and i not in (2, 3))  # nor in what they were sent
    stage = Stage()
    one, other = stage.begin(seed=1), stage.begin(seed=2, top_k=1)
    stage.say(one, 1, "a", 40)
    stage.say(other, 1, "b", 3)
    stage.stubborn.refused = refused
    stage.settle()
    assert stage.said(other) == other_said
    assert isinstance(stage.ending(one), RunFailed)
    assert stage.said(one) == said[: said.index(refused)]


# In a crowd.


@given(st.integers(0, 2**32))
def test_a_crowd_says_what_each_says_alone(seed: int) -> None:
    """Some generate, some send text in pieces of any size, some both, in batches of four at most."""
    chance = random.Random(seed)
    plans = []
    for number in range(chance.randint(2, 12)):
        steps = [
            (
                "".join(chance.choices(toys.ALPHABET, k=chance.choice((0, 1, 3, 20)))),
                chance.choice((0, 0, 1, 9)),
            )
            for _ in range(chance.randint(1, 4))
        ]
        steps[0] = ("a" + steps[0][0], steps[0][1])
        plans.append((number, steps))
    stage = Stage(lambda: toys.speaker(max_batch=4))
    crowd = [(stage.begin(seed=number), steps) for number, steps in plans]
    waiting = [(one, step, *of) for one, steps in crowd for step, of in enumerate(steps, 1)]
    waiting.sort(key=lambda entry: (entry[1], chance.random()))
    for one, step, text, count in waiting:
        stage.say(one, step, text, count)
        if chance.random() < 0.5:
            stage.engine.turn()
    stage.settle()
    for (number, steps), (one, _) in zip(plans, crowd, strict=True):
        assert stage.said(one) == spoken(steps, seed=number)
    assert max(stage.stubborn.batches) <= 4
    stage.check_at_rest()


def test_generating_sequences_share_their_batches() -> None:
    stage = Stage()
    crowd = [stage.begin(seed=seed) for seed in range(8)]
    for one in crowd:
        stage.say(one, 1, "a", 20)
    stage.settle()
    assert stage.stubborn.batches == [8] * 21
    assert stage.engine.metrics.generated_parts == 160
    assert stage.engine.metrics.chunks == {"answered": 8}


def test_a_newcomer_does_not_wait_for_those_who_generate() -> None:
    """They have only one place a batch, and are due after it, however long they have been at it."""
    stage = Stage(lambda: toys.speaker(max_batch=2))
    crowd = [stage.begin(seed=seed) for seed in range(6)]
    for one in crowd:
        stage.say(one, 1, "a", 1000)
    for _ in range(50):
        stage.now += 0.01
        stage.engine.turn()
    newcomer = stage.begin()
    stage.say(newcomer, 1, "b")
    for _ in range(4):  # those six that are ready are due before it, two a batch
        stage.now += 0.01
        stage.engine.turn()
    assert stage.parts(newcomer) == [(1, 0, True)]


def test_those_who_generate_have_their_share_beside_those_who_always_send() -> None:
    stage = Stage(lambda: toys.speaker(max_batch=2))
    one, crowd = stage.begin(), [stage.begin() for _ in range(6)]
    stage.say(one, 1, "a", 1000)
    for _ in range(70):  # seven want to be in each batch of two
        stage.now += 0.01
        for other in crowd:
            if other.accepted == other.answered:
                stage.say(other, other.accepted + 1, "b")
        stage.engine.turn()
    assert len(stage.said(one)) >= 70 * 2 / 7 - 2


# A caller who does not read.


def test_nobody_generates_for_a_caller_who_does_not_read() -> None:
    stage, slow = Stage(), FakeSink()
    one, other = stage.begin(sink=slow), stage.begin()
    stage.say(one, 1, "a", 50)
    stage.say(other, 1, "b", 50)
    for _ in range(10):
        stage.engine.turn()
    slow.full = True
    before = len(slow.replies)
    stage.settle()
    assert len(slow.replies) <= before + 1
    assert stage.parts(other)[-1] == (1, 50, True)
    assert stage.engine._population.next_look() <= stage.now + 0.02
    slow.full = False
    stage.now += 0.03
    stage.settle()
    said = [o for _, o in slow.replies if isinstance(o, Output) and o.drawn]
    assert [int(np.frombuffer(o.tensors[0][1], np.int64)[0]) for o in said] == spoken([("a", 50)])
    stage.check_at_rest()


def test_a_caller_who_never_reads_again_is_idle() -> None:
    stage, slow = Stage(), FakeSink()
    one = stage.begin(sink=slow, idle_seconds=5.0)
    stage.say(one, 1, "a", 50)
    stage.engine.turn()
    slow.full = True
    stage.settle()
    stage.now += 4.9
    stage.settle()
    assert not one.ended
    stage.now += 2.0
    stage.settle()
    assert slow.replies[-1][1] == Closed(Ending.IDLE_EXPIRED, 0)
    stage.check_at_rest()


def test_nobody_is_idle_while_parts_go_out() -> None:
    stage = Stage()
    one = stage.begin(idle_seconds=5.0)
    stage.say(one, 1, "a", 50)
    for _ in range(51):
        stage.now += 1.0
        stage.engine.turn()
    stage.now += 4.0
    stage.settle()
    assert stage.parts(one)[-1] == (1, 50, True)
    assert not one.ended


def test_a_cancelled_sequence_generates_no_more_and_its_slot_is_free() -> None:
    stage = Stage(max_sequences=1)
    for full in (False, True):
        sink = FakeSink()
        one = stage.begin(sink=sink)
        stage.say(one, 1, "a", 50)
        stage.engine.turn()
        stage.engine.turn()
        sink.full = full
        stage.engine.turn()
        stage.engine.close(one, Ending.CANCELLED)
        stage.settle()
        assert len([o for _, o in sink.replies if isinstance(o, Output)]) < 5
        stage.check_at_rest()
    other = stage.begin()
    stage.settle()
    assert isinstance(stage.replies(other)[0], Opened)


# Endings, in the middle of it.


@pytest.mark.parametrize("ending", [Ending.END, Ending.STREAM_ENDED])
def test_an_end_waits_for_all_parts(ending: Ending) -> None:
    stage = Stage()
    one = stage.begin()
    stage.say(one, 1, "a", 20)
    stage.go_on(one, 2, 5)
    stage.engine.turn()
    stage.engine.finish(one, ending)
    stage.settle()
    assert stage.said(one) == spoken([("a", 20), ("", 5)])
    assert stage.ending(one) is ending


@pytest.mark.parametrize("leave", ["drain", "max_age", "evict", "drain behind the end"])
def test_who_is_to_leave_does_so_between_two_parts_and_says_the_others_elsewhere(leave: str) -> None:
    stage, other = Stage(), Stage()
    one = stage.begin(seed=7)
    stage.say(one, 1, PROMPT, 60)
    stage.go_on(one, 2, 3)
    if leave == "drain behind the end":
        stage.engine.finish(one, Ending.END)
    for _ in range(20):
        stage.engine.turn()
    if leave.startswith("drain"):
        stage.engine.drain()
    elif leave == "max_age":
        stage.engine.retire(1.0)
        stage.engine.turn()
        stage.now += 1.5
    else:
        assert stage.engine.close_by_id(one.id, Ending.EVICTED)
    stage.settle()
    said = stage.said(one)
    assert 15 < len(said) < 25
    closed = stage.replies(one)[-1]
    assert isinstance(closed, Closed)
    assert closed.last_step == 0
    stage.check_at_rest()

    again = other.resume(stage.last_token(one))
    other.settle()
    assert other.replies(again)[0] == Opened(one.id, 3, 1, 4, Sampling(7, 1.0, 0))
    other.say(again, 1, PROMPT, 60)
    other.go_on(again, 2, 3)
    other.settle()
    assert other.parts(again)[0] == (1, len(said) + 1, False)
    assert said + other.said(again) == spoken([(PROMPT, 60), ("", 3)], seed=7)
    other.check_at_rest()


def test_another_chunk_than_the_one_that_was_begun_is_refused() -> None:
    stage = Stage()
    one = stage.begin()
    stage.say(one, 1, "abc", 60)
    for _ in range(5):
        stage.engine.turn()
    stage.engine.drain()
    stage.settle()
    snapshot = stage.last_token(one)
    for text, count in (("abc", 61), ("abb", 60), ("abc", 0), ("", 60)):
        other = Stage()
        again = other.resume(snapshot)
        other.say(again, 1, text, count)
        other.settle()
        error = other.ending(again)
        assert isinstance(error, WrongInput)
        assert f"parts 0 to {len(stage.said(one))} of it were answered" in str(error)
        assert str(error).endswith("in step 1")
        other.check_at_rest()


def test_a_drain_does_not_wait_for_who_does_not_read_and_gives_the_token_once_he_does() -> None:
    stage, slow = Stage(), FakeSink()
    one = stage.begin(sink=slow)
    stage.say(one, 1, "a", 50)
    for _ in range(5):
        stage.engine.turn()
    slow.full = True
    stage.settle()
    stage.engine.drain()
    stage.settle()
    assert not one.ended
    slow.full = False
    stage.now += 0.03
    stage.settle()
    closed = slow.replies[-1][1]
    assert isinstance(closed, Closed)
    assert (closed.reason, bool(closed.token)) == (Ending.DRAINING, True)
    assert stage.engine.emptied.is_set()


def test_a_server_that_stops_at_once_leaves_the_last_token_to_go_on_from() -> None:
    stage = Stage(every=1)
    one = stage.begin()
    stage.say(one, 1, "a", 3)
    stage.settle()
    stage.go_on(one, 2, 50)
    for _ in range(9):
        stage.engine.turn()
    stage.engine.stop(Ending.DRAINING)
    stage.settle()
    tokens = [r for r in stage.replies(one) if isinstance(r, Checkpoint)]
    other = Stage()
    again = other.resume(SEALER.unseal(tokens[-1].token))
    other.go_on(again, 2, 50)
    other.settle()
    assert stage.said(one)[:3] + other.said(again) == spoken([("a", 3), ("", 50)])


# Resumed between two chunks.


@given(st.integers(0, 2**32))
def test_it_says_the_same_wherever_it_is_resumed(seed: int) -> None:
    """Moved between two chunks, and in the middle of one, again and again."""
    chance = random.Random(seed)
    steps = [("a", 4)] + [
        ("".join(chance.choices(toys.ALPHABET, k=chance.randint(0, 4))), chance.choice((0, 3, 12)))
        for _ in range(6)
    ]
    said: list[int] = []
    snapshot: Snapshot | None = None
    moves = 0
    while True:
        stage = Stage()
        one = stage.resume(snapshot) if snapshot else stage.begin(seed=5, top_k=5)
        stage.settle()
        opened = stage.replies(one)[0]
        assert isinstance(opened, Opened)
        for step in range(opened.next_step, min(opened.next_step + 3, len(steps) + 1)):
            stage.say(one, step, *steps[step - 1])
        for _ in range(chance.randint(3, 12)):
            stage.engine.turn()
        stage.engine.drain()
        stage.settle()
        said += stage.said(one)
        snapshot = stage.last_token(one)
        stage.check_at_rest()
        moves += 1
        if snapshot.step == len(steps):
            break
    assert said == spoken(steps, seed=5, top_k=5)
    assert moves > 1


def test_a_token_holds_the_sampling_and_the_last_output() -> None:
    stage = Stage(every=1)
    one = stage.begin(seed=9, temperature=0.7, top_k=2)
    stage.say(one, 1, "ab", 2)
    stage.settle()
    (checkpoint,) = [r for r in stage.replies(one) if isinstance(r, Checkpoint)]
    snapshot = SEALER.unseal(checkpoint.token)
    assert snapshot.generation is not None
    assert snapshot.generation.sampling == Sampling(9, 0.7, 2)
    total = 5 + sum(stage.said(one))
    assert snapshot.generation.frame == toys.SPEECH[total % 97].tobytes()
    assert (snapshot.step, snapshot.generation.done) == (1, 0)
    assert Snapshot.from_bytes(snapshot.to_bytes()) == snapshot


def test_a_token_of_a_model_with_other_outputs_is_refused() -> None:
    stage = Stage(every=1)
    one = stage.begin()
    stage.say(one, 1, "ab", 2)
    stage.settle()
    (checkpoint,) = [r for r in stage.replies(one) if isinstance(r, Checkpoint)]
    snapshot = SEALER.unseal(checkpoint.token)
    assert snapshot.generation is not None
    snapshot.generation.frame = snapshot.generation.frame[4:]
    other = Stage()
    again = other.resume(snapshot)
    other.settle()
    assert isinstance(other.ending(again), TokenInvalid)


# A step sent again.


def test_the_last_step_sent_again_gets_all_its_parts_again() -> None:
    stage = Stage(max_sequences=4)
    one = stage.begin()
    for _ in range(2):
        stage.say(one, 1, "a", 10)
        stage.settle()
    first, second = stage.said(one)[:10], stage.said(one)[10:]
    assert first == second == spoken([("a", 10)])
    assert stage.parts(one)[:11] == stage.parts(one)[11:]
    assert stage.engine.metrics.steps_repeated == 1
    stage.check_at_rest()


def test_a_step_sent_again_while_it_is_generated_is_not_generated_twice() -> None:
    stage = Stage()
    one = stage.begin()
    stage.say(one, 1, "a", 10)
    for _ in range(4):
        stage.engine.turn()
        stage.say(one, 1, "a", 10)
    stage.settle()
    assert stage.parts(one) == [(1, part, part == 10) for part in range(11)]


def test_many_parts_are_not_kept() -> None:
    stage = Stage(max_sequences=4)
    stage.engine._population._kept_bytes = 8 * PART_BYTES
    few, many = stage.begin(), stage.begin()
    stage.say(few, 1, "a", 5)
    stage.say(many, 1, "a", 50)
    stage.settle()
    assert len(few.last_outputs) == 6
    assert many.last_outputs == ()
    stage.say(many, 2, "a", 1)
    stage.settle()
    assert len(many.last_outputs) == 2


def test_a_gap_ends_it_behind_its_parts() -> None:
    stage = Stage()
    one = stage.begin()
    stage.say(one, 1, "a", 10)
    stage.say(one, 3, "a")
    stage.settle()
    assert isinstance(stage.ending(one), StepGap)
    assert len(stage.said(one)) == 10


# Text.


class Lines:
    """What one sequence of `toy` answers to pieces of bytes, the tail included: the sums of its ids."""

    def __init__(self, toy: Any) -> None:
        self.stage = Stage(toy)

    def sums(self, pieces: list[bytes]) -> list[int]:
        one = self.stage.begin()
        for step, piece in enumerate(pieces, 1):
            self.stage.say(one, step, piece)
            self.stage.settle()
        self.stage.engine.finish(one, Ending.END)
        self.stage.settle()
        assert self.stage.ending(one) is Ending.END
        answers = [o.tensors[1][1] for o in outputs(self.stage, one) if o.tensors]
        self.stage.check_at_rest()
        return [int(i) for i in np.frombuffer(b"".join(answers), np.int64)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted({min(place, len(data)) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(ends)]


@given(st.text(alphabet="ab'’ .ß😀\n", max_size=60), st.lists(st.integers(0, 120), max_size=8))
def test_words_that_come_in_pieces_equal_the_whole(text: str, places: list[int]) -> None:
    ids = Stage(toys.reader).manifest.inputs[0].text
    assert ids is not None
    lines = Lines(toys.reader)
    expected = np.cumsum(ids.ids(text)).tolist()
    assert lines.sums([text.encode()]) == expected
    assert lines.sums(cut(text.encode(), places)) == expected


@given(st.text(alphabet=toys.ALPHABET, max_size=40), st.lists(st.integers(0, 120), max_size=8))
def test_characters_that_come_in_pieces_equal_the_whole(text: str, places: list[int]) -> None:
    expected = np.cumsum([toys.ALPHABET.index(c) for c in text]).astype(int).tolist()
    assert Lines(toys.speaker).sums(cut(text.encode(), places)) == expected


def test_the_last_word_is_a_further_part_of_the_last_step() -> None:
    stage = Stage(toys.reader)
    one = stage.begin()
    stage.say(one, 1, "one tw")
    stage.say(one, 2, "o")
    stage.engine.finish(one, Ending.END)
    stage.settle()
    assert stage.parts(one) == [(1, 0, True), (2, 0, True), (2, 1, True)]
    assert [bool(o.tensors) for o in outputs(stage, one)] == [True, False, True]


def test_a_text_that_waits_moves_with_its_sequence() -> None:
    stage, other = Stage(toys.reader), Stage(toys.reader)
    one = stage.begin()
    stage.say(one, 1, b"one tw" + "ö".encode()[:1])
    stage.settle()
    stage.engine.drain()
    stage.settle()
    snapshot = stage.last_token(one)
    assert snapshot.text == b"tw\xc3"
    again = other.resume(snapshot)
    other.say(again, 2, "ö".encode()[1:] + b" x")
    other.engine.finish(again, Ending.END)
    other.settle()
    sums = [np.frombuffer(o.tensors[1][1], np.int64) for o in outputs(other, again) if o.tensors]
    ids = other.manifest.inputs[0].text
    assert ids is not None
    assert np.concatenate(sums).tolist() == np.cumsum(ids.ids("one twö x")).tolist()[1:]


def test_ids_end_the_word_before_them() -> None:
    stage = Stage(toys.reader)
    one = stage.begin()
    stage.say(one, 1, "one")
    stage.say(one, 2, np.array([5, 6], np.int64))
    stage.settle()
    ids = stage.manifest.inputs[0].text
    assert ids is not None
    word = int(ids.ids("one")[0])
    answer = np.frombuffer(outputs(stage, one)[-1].tensors[1][1], np.int64)
    assert answer.tolist() == [word, word + 5, word + 11]


def test_a_model_that_goes_on_takes_the_text_so_far_as_ended() -> None:
    def toy() -> tuple[bytes, dict[str, Any]]:
        model, fields = toys.reader()
        rule = {"output": "logits", "input": "id", "sampling": "categorical"}
        return model, fields | {"generate": rule}

    stage = Stage(toy)
    one = stage.begin(seed=6)
    stage.say(one, 1, "one two", 4)
    stage.settle()
    ids = stage.manifest.inputs[0].text
    assert ids is not None
    own = outputs(stage, one)[0]
    assert np.frombuffer(own.tensors[1][1], np.int64).tolist() == np.cumsum(ids.ids("one two")).tolist()
    stage.engine.finish(one, Ending.END)
    stage.settle()
    assert stage.parts(one)[-1] == (1, 4, True)


@pytest.mark.parametrize(
    "pieces, kind, text",
    [
        ([b"a\xff"], WrongEncoding, "byte 1 .*, in step 1"),
        ([b"a", b"b", b"cd"], OutOfRangeValue, "character 2 of the text is 'd' .*, in step 3"),
        ([b"a\xf0\x9f", b"a"], WrongEncoding, "byte 0 .*, in step 2"),
        ([b"a\xf0\x9f"], WrongEncoding, "ends in the middle of a character"),
    ],
)
def test_what_is_no_text_of_the_model_ends_that_sequence_alone(
    pieces: list[bytes], kind: type[TenutoError], text: str
) -> None:
    stage = Stage()
    one, other = stage.begin(), stage.begin()
    for step, piece in enumerate(pieces, 1):
        stage.say(one, step, piece)
        stage.say(other, step, "a")
    stage.engine.finish(one, Ending.END)
    stage.settle()
    error = stage.ending(one)
    assert isinstance(error, kind)
    with pytest.raises(kind, match=text):
        raise error
    assert len(outputs(stage, other)) == len(pieces)
    assert stage.ending(other) is None


def test_a_sequence_that_failed_at_a_text_goes_on_before_it() -> None:
    stage, other = Stage(), Stage()
    one = stage.begin()
    stage.say(one, 1, "ab")
    stage.say(one, 2, "a?b")
    stage.settle()
    again = other.resume(stage.last_token(one))
    other.say(again, 2, "ab")
    other.settle()
    assert np.frombuffer(outputs(other, again)[0].tensors[1][1], np.int64).tolist() == [7, 10]
