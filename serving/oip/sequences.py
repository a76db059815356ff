"""Sequences that clients name. They are the server's, not a stream's, until END or until they are idle."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tenuto.serving.callers import Caller
from tenuto.serving.engine import Engine
from tenuto.serving.pending import PendingBytes
from tenuto.serving.sequence import CHUNK_BYTES, Chunk, Closed, Ending, Failed, Opened, Reply, Sequence
from tenuto.serving.sequence import Output as Answer

from .form import Form, Tensors
from .question import Question
from .refusal import Code, Refusal

# Of sequences that ended and whose last step may be asked for again.
_REMEMBERED = 1024
# What holds callers back here are the pending bytes, not the number of chunks.
_WINDOW = 1 << 30
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
        self._over_now = over
        self._engine: Engine | None = form.served.engine  # until it is over
        self._lock = threading.RLock()
        self._steps: deque[_Step] = deque()
        self._next = 1
        self._begun = False  # the engine has it
        self._last_data: tuple[bytes, ...] = ()  # of the step before `_next`, where steps are numbered
        self._last: tuple[int, Tensors] | None = None  # answered, where steps are numbered
        self._numbered = False
        self._ending: Refusal | None = None  # what later requests hear

    @property
    def is_over(self) -> bool:
        """Whether it takes no more steps."""
        return self._ending is not None

    @property
    def repeats_last(self) -> bool:
        """Whether its last answer may be asked for again."""
        return self._numbered

    def may_repeat(self, question: Question) -> bool:
        """Whether that request may be one that was answered, sent once more."""
        return self._numbered and question.step > 0

    def is_begun_by(self, question: Question, data: tuple[bytes, ...]) -> bool:
        """Whether that request is the one that began it, sent once more."""
        return question.step == 1 and self._numbered and self._next == 2 and self._last_data == data

    def ask(
        self, question: Question, data: tuple[bytes, ...], nbytes: int, pending: PendingBytes, asker: Asker
    ) -> None:
        """Takes the next step, or one that was taken already. Raises: Refusal."""
        with self._lock:
            if question.step and question.step != self._next:
                self._again(question, asker)
                return
            engine = self._engine
            if self._ending is not None or engine is None:
                raise self._ending or _no_start(self.form.name, self.key[2])
            if not self._begun:
                self._begun = True
                engine.open(self.sequence)
            number, self._next = self._next, self._next + 1
            if question.step:
                self._numbered, self._last_data = True, data
            self._steps.append(_Step(number, question.end, [(asker, question)]))
            pending.add(nbytes)
            engine.accept(self.sequence, Chunk(number, data, time.monotonic(), nbytes))
            if question.end:
                self._ending = _no_start(self.form.name, self.key[2])
                engine.finish(self.sequence, Ending.END)

    def _again(self, question: Question, asker: Asker) -> None:
        """A step that was taken: it is answered once more, and not run again."""
        for step in self._steps:
            if step.number == question.step:
                step.askers.append((asker, question))
                return
        if self._last is not None and self._last[0] == question.step:
            asker.answer(self.form, self._last[1], question)
            return
        raise Refusal(
            f"sequence_step {question.step} of sequence {self.key[2]} to model '{self.form.name}': expected "
            f"{self._next}, or {self._next - 1} once more",
            reason="STEP_GAP",
        )

    def restart(self) -> None:
        """It ends once its accepted steps are answered: another one takes its name."""
        with self._lock:
            if self._ending is None and self._engine is not None:
                self._ending = _no_start(self.form.name, self.key[2])
                self._engine.finish(self.sequence, Ending.SUPERSEDED)

    def leave(self, ending: Ending) -> None:
        """Ends it now; nobody waits for its answers."""
        with self._lock:
            self._ending = self._ending or _no_start(self.form.name, self.key[2])
            self._steps.clear()
            engine = self._engine
        if engine is not None:
            engine.close(self.sequence, ending)

    # sequence.Sink

    def deliver(self, replies: list[tuple[Sequence, Reply]]) -> None:
        for _, reply in replies:
            if isinstance(reply, Answer):
                self._answered(reply)
            elif isinstance(reply, Closed | Failed):
                self._end(reply)
            else:
                assert isinstance(reply, Opened)  # it asked for no checkpoint

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
            if self._numbered:
                self._last = step.number, tensors
        for asker, question in step.askers:
            asker.answer(self.form, tensors, question)

    def _end(self, reply: Closed | Failed) -> None:
        with self._lock:
            steps, self._steps, self._engine = list(self._steps), deque(), None
            refusal = _refusal(reply, self.form.name, self.key[2])
            self._ending = self._ending or refusal
            answered = steps[0] if steps and steps[0].answers else None
            if answered is not None:
                tensors = self.form.joined(answered.answers)
                self._last = answered.number, tensors
        self._over_now(self)
        for step in steps:
            for asker, question in step.askers:
                if step is answered:
                    asker.answer(self.form, tensors, question)
                else:
                    asker.refuse(refusal)


class Sequences:
    """All of a server. Any thread."""

    def __init__(self, idle_seconds: float, pending: PendingBytes) -> None:
        self._idle_seconds = idle_seconds
        self._pending = pending
        self._lock = threading.Lock()
        self._live: dict[Key, tuple[Session, Caller]] = {}
        self._ended: OrderedDict[Key, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def form_of(self, key: Key) -> Form | None:
        """That of the version on which the live sequence runs."""
        found = self._live.get(key)
        return found[0].form if found is not None else None

    def ask(
        self,
        key: Key,
        form: Form,
        question: Question,
        data: tuple[bytes, ...],
        caller: Caller,
        asker: Asker,
        *,
        named: bool,
    ) -> None:
        """One step of that sequence; it begins with START, or if it is not `named`, by itself.

        Raises: Refusal, PoolFull for a caller at the limit.
        """
        nbytes = sum(map(len, data)) + CHUNK_BYTES
        session = self._session(key, form, question, data, caller, named)
        session.ask(question, data, nbytes, self._pending, asker)

    def _session(
        self,
        key: Key,
        form: Form,
        question: Question,
        data: tuple[bytes, ...],
        caller: Caller,
        named: bool,
    ) -> Session:
        with self._lock:
            found = self._live.get(key)
            session = found[0] if found is not None else self._ended.get(key)
            if session is not None and session.is_begun_by(question, data):
                return session
            begins = question.start or not named
            on = session is not None and (not session.is_over or session.may_repeat(question))
            if session is not None and on and not question.start:
                return session
            if not begins:
                raise _no_start(form.name, key[2])
            if question.step > 1:
                raise Refusal(
                    f"sequence_step {question.step} begins sequence {key[2]}; expected 1", reason="STEP_GAP"
                )
            caller.take_place(instead=found is not None)
            old, session = session, self._begun(key, form, caller)
            self._live[key] = session, caller
            self._ended.pop(key, None)
        if old is not None:
            old.restart()
        return session

    def _begun(self, key: Key, form: Form, caller: Caller) -> Session:
        def sequence(session: Session) -> Sequence:
            return Sequence(
                session,
                form.manifest,
                now=time.monotonic(),
                idle_seconds=self._idle_seconds,
                window=_WINDOW,
                checkpoint_every=-1,  # its client knows of no tokens
                label=str(key[2])[:128],
                caller=caller.name,
            )

        return Session(key, form, sequence, lambda session: self._over(session, caller))

    def _over(self, session: Session, caller: Caller) -> None:
        caller.leave_places(1)
        with self._lock:
            found = self._live.get(session.key)
            if found is not None and found[0] is session:
                del self._live[session.key]
                if session.repeats_last:
                    self._ended[session.key] = session
                    if len(self._ended) > _REMEMBERED:
                        self._ended.popitem(last=False)

    def leave(self, whose: object, ending: Ending) -> None:
        """Ends those of a stream that is over. (Those that have a name go on.)"""
        with self._lock:
            sessions = [session for session, _ in self._live.values() if session.key[0] is whose]
        for session in sessions:
            session.leave(ending)

    def drop_unknown(self) -> None:
        """Ends those whose callers are known no more. To be called when the callers changed."""
        with self._lock:
            gone = [session for session, caller in self._live.values() if not caller.is_known]
        for session in gone:
            session.leave(Ending.CANCELLED)


def _no_start(model: str, sequence: object) -> Refusal:
    return Refusal(
        f"inference request for sequence {sequence} to model '{model}' must specify the START flag on the "
        "first request of the sequence",
        reason="NOT_OPEN",
    )


def _refusal(reply: Closed | Failed, model: str, sequence: object) -> Refusal:
    if isinstance(reply, Failed):
        return Refusal.of(reply.error)
    text = (
        f"sequence {sequence} to model '{model}' has ended: {reply.reason.name}, after step {reply.last_step}"
    )
    return Refusal(text, _CODES.get(reply.reason, Code.INVALID_ARGUMENT), reply.reason.name)
