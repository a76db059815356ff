"""The sequences by name. They are the server's, not a stream's, until END or until they are idle."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from tenuto.serving.callers import Caller
from tenuto.serving.pending import PendingBytes
from tenuto.serving.sequence import Ending, Sequence

from .form import Form
from .question import Question
from .refusal import Code, Refusal
from .session import Asker, Key, Session, no_start

# Of sequences that ended and whose last step may be asked for again.
_REMEMBERED = 1024
# What holds callers back here are the pending bytes, not the number of chunks.
_WINDOW = 1 << 30


class Sequences:
    """All of a server. Any thread."""

    def __init__(self, idle_seconds: float, pending: PendingBytes) -> None:
        self._idle_seconds = idle_seconds
        self._pending = pending
        self._lock = threading.Lock()
        self._live: dict[Key, Session] = {}
        self._ended: OrderedDict[Key, Session] = OrderedDict()
        # Of streams whose sequences have no names: those that live, and what is to be said of those that were
        # ended by the server.
        self._unnamed: dict[object, set[Key]] = {}
        self._lost: dict[Key, Refusal] = {}

    def __len__(self) -> int:
        return len(self._live)

    def form_of(self, key: Key) -> Form | None:
        """That of the version on which the live sequence runs."""
        session = self._live.get(key)
        return session.form if session is not None else None

    def ask(
        self,
        key: Key,
        form: Form,
        question: Question,
        data: tuple[bytes, ...],
        caller: Caller,
        asker: Asker,
    ) -> None:
        """One step of that sequence; it begins with START, or if it has no name, by itself.

        Raises: Refusal, PoolFull for a caller at the limit.
        """
        session = self._live.get(key)
        if session is None or question.start or question.step or session.is_over:
            session = self._session(key, form, question, data, caller)
        session.ask(question, data, caller, self._pending, asker)

    def _session(
        self, key: Key, form: Form, question: Question, data: tuple[bytes, ...], caller: Caller
    ) -> Session:
        named = bool(key[2])
        with self._lock:
            live = self._live.get(key)
            session = live or self._ended.get(key)
            if session is not None and session.is_begun_by(question, data):
                return session
            if session is not None and not question.start:
                again = session.numbered and question.step > 0
                if not session.is_over or again:
                    return session
            lost = self._lost.pop(key, None)
            if lost is not None:
                raise lost
            if not question.start and named:
                raise no_start(form.name, key[2])
            if question.step > 1:
                text = f"sequence_step {question.step} begins sequence {key[2]}; expected 1"
                raise Refusal(text, reason="STEP_GAP")
            caller.take_place(instead=live is not None)
            session = self._begun(key, form, caller)
            self._live[key] = session
            self._ended.pop(key, None)
            if not named:
                self._unnamed.setdefault(key[0], set()).add(key)
        before = live
        if live is not None and not live.is_over:  # in front of the new one, which may need its slot
            before = live.follows
            text = f"sequence {key[2]} to model '{form.name}' began anew, and this step was dropped"
            live.leave(Ending.SUPERSEDED, Refusal(text, reason=Ending.SUPERSEDED.name))
        if before is not None:
            session.follow(before)
        return session

    def _begun(self, key: Key, form: Form, caller: Caller) -> Session:
        def sequence(session: Session) -> Sequence:
            return Sequence(
                session,
                form.manifest,
                now=time.monotonic(),
                idle_seconds=self._idle_seconds,
                window=_WINDOW,
                movable=False,  # its client knows of no tokens
                label=str(key[2])[:128],
                caller=caller.name,
            )

        return Session(key, form, sequence, lambda session: self._over(session, caller))

    def _over(self, session: Session, caller: Caller) -> None:
        caller.leave_places(1)
        key, named = session.key, bool(session.key[2])
        with self._lock:
            if self._live.get(key) is not session:
                return
            del self._live[key]
            if not named:
                if not session.ended_well and key[0] in self._unnamed:
                    self._lost[key] = session.ending
            elif session.numbered and session.ended_well:
                self._ended[key] = session
                if len(self._ended) > _REMEMBERED:
                    self._ended.popitem(last=False)

    def leave(self, stream: object, ending: Ending) -> None:
        """Ends those of a stream that is over. (Those that have a name go on.)"""
        with self._lock:
            keys = self._unnamed.pop(stream, set())
            sessions = [self._live[key] for key in keys if key in self._live]
            for key in keys:
                self._lost.pop(key, None)
        for session in sessions:
            session.leave(ending, Refusal("the stream is over", Code.CANCELLED, ending.name))

    def drop_unknown(self) -> None:
        """Ends those whose last step came with a token that is known no more. To be called when the callers
        changed."""
        with self._lock:
            sessions = list(self._live.values())
        for session in sessions:
            if session.caller is not None and not session.caller.is_known:
                text = "the token that this step came with is not known here any more"
                session.leave(Ending.CANCELLED, Refusal(text, Code.UNAUTHENTICATED, "UNAUTHENTICATED"))
