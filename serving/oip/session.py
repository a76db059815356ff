"""One sequence of this protocol, whoever sends its steps: what was taken, what is answered, how it ended."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, Protocol

from tenuto.serving.callers import Caller
from tenuto.serving.engine import Engine
from tenuto.serving.pending import PendingBytes
from tenuto.serving.population import COMMAND_BYTES
from tenuto.serving.sequence import CHUNK_BYTES, Chunk, Closed, Ending, Failed, Reply, Sequence
from tenuto.serving.sequence import Output as Answer

from .form import Form, Tensors
from .question import Question
from .refusal import Code, Refusal

log = logging.getLogger("tenuto.oip")
P = ParamSpec("P")

# A larger answer is not kept for whoever asks again.
_KEPT_BYTES = 64 << 10
_CODES = {
    Ending.DRAINING: Code.UNAVAILABLE,
    Ending.REBALANCE: Code.UNAVAILABLE,
    Ending.MAX_AGE: Code.UNAVAILABLE,
}

Key = tuple[object, str, int | str]  # whose, the model's name, and the sequence's


class Asker(Protocol):
    """Who waits for one answer. Any thread; nothing may block."""

    def answer(self, form: Form, tensors: Tensors, question: Question) -> None: ...

    def refuse(self, refusal: Refusal) -> None: ...


@dataclass(slots=True)
class _Step:
    """One that was accepted and is not answered."""

    number: int
    ends: bool
    askers: list[tuple[Asker, Question]]
    answers: list[Answer] = field(default_factory=list)  # of the last step, until the sequence has ended


class Session:
    """One sequence. Implements sequence.Sink."""

    full = False
    share = None

    def __init__(
        self, key: Key, form: Form, sequence: Callable[[Session], Sequence], over: Callable[[Session], None]
    ) -> None:
        self.key = key
        self.form = form
        self.sequence = sequence(self)
        self.caller: Caller | None = None  # who asked last
        self.ended_well = False  # by END, all of it answered
        self._over_now = over
        self._engine: Engine | None = form.served.engine  # until it is over
        self._lock = threading.RLock()
        self._steps: deque[_Step] = deque()
        self._next = 1
        self._begun = False  # the engine has it, or will
        self._held: list[Callable[[], None]] | None = None  # what it is told when the one before has ended
        self._before: Session | None = None  # that one
        self._next_one: Session | None = None  # waits for this one
        self._pending: PendingBytes | None = None  # where what is held is counted
        self._first = b""  # the digest of step 1, where steps are numbered
        self._last: tuple[int, Tensors | None] | None = None  # answered, where steps are numbered
        self._ending: Refusal | None = None  # what later requests hear

    @property
    def is_over(self) -> bool:
        """Whether it takes no more steps."""
        return self._ending is not None

    @property
    def ending(self) -> Refusal:
        """What is said of its end."""
        return self._ending or no_start(self.form.name, self.key[2])

    @property
    def numbered(self) -> bool:
        """Whether its client numbers the steps, so that one that is sent again is known."""
        return bool(self._first)

    def is_begun_by(self, question: Question, data: tuple[bytes, ...]) -> bool:
        """Whether that request is the one that began it, sent once more: while it lives, or, of a sequence
        that has ended, if it was its only one."""
        if question.step != 1 or not self._first or self._first != _digest(data):
            return False
        return not self.is_over or (question.end and self._next == 2)

    def ask(
        self,
        question: Question,
        data: tuple[bytes, ...],
        caller: Caller,
        pending: PendingBytes,
        asker: Asker,
    ) -> None:
        """Takes the next step, or one that was taken already. Raises: Refusal."""
        with self._lock:
            if question.step and question.step != self._next:
                self._again(question, asker)
                return
            if self._ending is not None or self._engine is None:
                raise self.ending
            self.caller, self._pending = caller, pending
            engine = self._engine
            if not self._begun:
                self._begun = True
                self._tell(engine.open, self.sequence)
                if self._engine is None:  # it had ended, and said so meanwhile
                    raise self.ending
            number, self._next = self._next, self._next + 1
            if question.step and number == 1:
                self._first = _digest(data)
            self._steps.append(_Step(number, question.end, [(asker, question)]))
            nbytes = (len(data[0]) if len(data) == 1 else sum(map(len, data))) + CHUNK_BYTES
            pending.add(nbytes)
            chunk = Chunk(number, data, time.monotonic(), nbytes, last=question.end)
            self._tell(engine.accept, self.sequence, chunk)
            if question.end:
                self._ending = no_start(self.form.name, self.key[2])
                self._tell(engine.finish, self.sequence, Ending.END)

    def _tell(self, command: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Under the lock, which keeps the order."""
        if self._held is None:
            command(*args, **kwargs)
            return
        assert self._pending is not None
        self._pending.add(COMMAND_BYTES)
        self._held.append(partial(command, *args, **kwargs))

    def follow(self, before: Session) -> None:
        """Begins when that one, which has its END, is answered: it may need its slot. For one that is new."""
        with before._lock:
            if before._engine is not None:
                before._next_one, self._before, self._held = self, before, []

    @property
    def follows(self) -> Session | None:
        """Whose end it waits for."""
        return self._before

    def _release(self) -> None:
        with self._lock:
            held, self._held, self._before = self._held or [], None, None
            for command in held:
                command()
        if held and self._pending is not None:
            self._pending.remove(COMMAND_BYTES * len(held))

    def _again(self, question: Question, asker: Asker) -> None:
        """A step that was taken: it is answered once more, and not run again. Raises: Refusal."""
        for step in self._steps:
            if step.number == question.step:
                step.askers.append((asker, question))
                return
        if self._last is None or self._last[0] != question.step:
            raise Refusal(
                f"sequence_step {question.step} of sequence {self.key[2]} to model '{self.form.name}': "
                f"expected {self._next}, or {self._next - 1} once more",
                reason="STEP_GAP",
            )
        tensors = self._last[1]
        if tensors is None:
            raise Refusal(
                f"sequence_step {question.step} of sequence {self.key[2]} to model '{self.form.name}' was "
                f"run; its answer was too large to be kept ({_KEPT_BYTES} bytes)",
                Code.UNAVAILABLE,
                "TOO_LARGE",
            )
        asker.answer(self.form, tensors, question)

    def leave(self, ending: Ending, refusal: Refusal) -> None:
        """Ends it now. Who waits for an answer gets the refusal."""
        with self._lock:
            self._ending = self._ending or refusal
            steps, self._steps = list(self._steps), deque()
            engine, begun = self._engine, self._begun
            if not begun:
                self._engine = None
        if engine is not None and begun:
            engine.close(self.sequence, ending)
            self._release()
        elif engine is not None:
            self._over_now(self)
        for step in steps:
            for asker, _ in step.askers:
                asker.refuse(refusal)

    # sequence.Sink

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        for _, reply in replies:  # Opened says nothing new, and there are no checkpoints
            if isinstance(reply, Answer):
                self._answered(reply)
            elif isinstance(reply, Closed | Failed):
                self._end(reply)

    def _answered(self, answer: Answer) -> None:
        with self._lock:
            step = self._steps[0] if self._steps else None
            if step is None or step.number != answer.step:
                return
            if step.ends or not answer.last:  # what is left over may become one more part
                step.answers.append(answer)
                return
            self._steps.popleft()
            tensors = self.form.joined([*step.answers, answer]) if step.answers else answer.tensors
            self._keep(step.number, tensors)
        for asker, question in step.askers:
            asker.answer(self.form, tensors, question)

    def _keep(self, number: int, tensors: Tensors) -> None:
        if self._first:
            small = sum(len(data) for _, data in tensors) <= _KEPT_BYTES
            self._last = number, tensors if small else None

    def _end(self, reply: Closed | Failed) -> None:
        tensors: Tensors = ()
        with self._lock:
            steps, self._steps, self._engine = list(self._steps), deque(), None
            refusal = _refusal(reply, self.form.name, self.key[2])
            self._ending = self._ending or refusal
            answered = steps[0] if steps and steps[0].answers else None
            try:
                tensors = self.form.joined(answered.answers) if answered is not None else ()
            except Exception:  # whoever waits must hear of it, and the place be free
                log.exception("the last answer of a sequence could not be put together")
                answered, refusal = None, Refusal.of_bug()
            if answered is not None:
                self._keep(answered.number, tensors)
            self.ended_well = isinstance(reply, Closed) and reply.reason is Ending.END
        self._over_now(self)
        if self._next_one is not None:
            self._next_one._release()
        for step in steps:
            for asker, question in step.askers:
                if step is answered:
                    asker.answer(self.form, tensors, question)
                else:
                    asker.refuse(refusal)


def no_start(model: str, sequence: object) -> Refusal:
    return Refusal(
        f"inference request for sequence {sequence} to model '{model}' must specify the START flag on the "
        "first request of the sequence",
        reason="NOT_OPEN",
    )


def _digest(data: tuple[bytes, ...]) -> bytes:
    return hashlib.blake2b(b"".join([len(one).to_bytes(8) + one for one in data]), digest_size=16).digest()


def _refusal(reply: Closed | Failed, model: str, sequence: object) -> Refusal:
    if isinstance(reply, Failed):
        refusal = Refusal.of(reply.error)
    else:
        text = f"sequence {sequence} to model '{model}' has ended: {reply.reason.name}, after step "
        text += str(reply.last_step)
        refusal = Refusal(text, _CODES.get(reply.reason, Code.INVALID_ARGUMENT), reply.reason.name)
    refusal.counted = True  # by its model
    return refusal
