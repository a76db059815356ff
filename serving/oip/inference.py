"""ModelInfer and ModelStreamInfer on any transport: requests become steps of sequences, or predictions.

On our own server the thread that reads takes a request and an engine's thread answers it; no thread waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

import grpc
from google.protobuf.message import DecodeError

from tenuto.oip import inference_pb2 as pb
from tenuto.serving.call import GONE, Call, Listener
from tenuto.serving.callers import Caller, Callers, Pacer
from tenuto.serving.catalogue import Catalogue, Served
from tenuto.serving.errors import ModelNotReady, PoolFull, TenutoError, UnknownModel
from tenuto.serving.pending import PendingBytes
from tenuto.serving.predict import Prediction, Predicts
from tenuto.serving.sequence import Ending
from tenuto.serving.sequence import Output as Answer
from tenuto.serving.status import code_of, metadata_of
from tenuto.serving.varint import varint

from .form import Form, Tensors, form_of
from .question import Question, version_of
from .refusal import LEAVING, Code, Refusal
from .sequences import Sequences
from .session import Asker, Key
from .shared_memory import Regions

log = logging.getLogger("tenuto.oip")
P = ParamSpec("P")

# What takes longer to read than that would hold up all others who are read by the same thread.
_MOST_AT_ONCE = 64 << 10
# Of one stream, requests that are not answered; above that it is not read.
_MOST_UNANSWERED_BYTES = 16 << 20
_REQUEST_BYTES = 512  # what one costs beside its message
_PATIENCE_SECONDS = 5.0
# Requests of a stream that are known by their bytes; and that are learnt in vain before none is any more.
_MOST_KNOWN, _MOST_TRIES = 64, 16
_MOST_REST_BYTES = 4 << 10
_ID, _RAW = b"\x1a", b"\x3a"  # the fields id and raw_input_contents of a ModelInferRequest


@dataclass(frozen=True, slots=True)
class Shared:
    """What every call of this protocol needs."""

    catalogue: Catalogue
    sequences: Sequences
    predicts: Predicts  # has the threads that read what takes long to read
    regions: Regions
    pending: PendingBytes
    refused: Callable[[str], None]  # counts, by reason
    is_draining: Callable[[], bool]


def served_of(catalogue: Catalogue, model: str, version: str) -> Served:
    """Raises: Refusal, in Triton's words."""
    number = version_of(version)
    try:
        return catalogue.find(model, number)
    except ModelNotReady as error:
        refused = catalogue.refusal(model, number)
        told = refused.version if refused is not None else number
        text = f"Request for unknown model: '{model}' version {told} is not at ready state"
        raise Refusal(text, Code.UNAVAILABLE, error.reason) from error
    except UnknownModel as error:
        known = {one.manifest.name for one in (*catalogue.served, *catalogue.retiring)}
        if model not in known and model not in catalogue.withdrawn:
            text = f"Request for unknown model: '{model}' is not found"
        elif number:
            text = f"Request for unknown model: '{model}' version {number} is not found"
        else:
            text = f"Request for unknown model: '{model}' has no available versions"
        raise Refusal(text, Code.NOT_FOUND, error.reason) from error


@dataclass(frozen=True, slots=True)
class Known:
    """What was found in a request, for those behind it that are the same up to their last field, the data."""

    key: Key
    form: Form
    question: Question
    head: bytes


class KnownRequests:
    """Of one stream, the steps whose bytes need not be parsed again. The reading thread's.

    Fields come in the order of their numbers: model and version, the id, which may differ, then what is the
    same, then the data.
    """

    __slots__ = ("_by_rest", "_heads", "_sizes", "_tries")

    def __init__(self) -> None:
        self._by_rest: dict[bytes, Known] = {}  # between id and data
        self._heads: tuple[bytes, ...] = ()  # models and versions
        self._sizes: tuple[int, ...] = ()  # of the data
        self._tries = _MOST_TRIES

    def find(self, message: bytes) -> tuple[Known, str, bytes] | None:
        """What the message asks, its id, and its data."""
        for head in self._heads:
            if not message.startswith(head):
                continue
            at, request_id = len(head), b""
            if message.startswith(_ID, at):
                size = message[at + 1] if len(message) > at + 1 else 0x80
                at += 2 + size
                request_id = message[len(head) + 2 : at]
                if size > 0x7F or not request_id.isascii():
                    continue
            for size in self._sizes:
                known = self._by_rest.get(message[at:-size])
                if known is not None and known.head is head:
                    self._tries = _MOST_TRIES
                    return known, request_id.decode(), message[-size:]
        return None

    def learn(self, message: bytes, request: pb.ModelInferRequest, asked: _Asked) -> None:
        """Takes in a step that was handed on, if others may look like it."""
        if self._tries <= 0 or len(request.raw_input_contents) != 1 or len(request.inputs) != 1:
            return
        question = Question.of(request)
        plain = not (question.start or question.end or question.step or request.inputs[0].parameters)
        key = asked.key_of(request, question)
        form, size = asked.form_of(key), len(request.raw_input_contents[0])
        if form is None or not plain or not form.takes_as_it_is(request.inputs[0]):
            return
        head = pb.ModelInferRequest(
            model_name=request.model_name, model_version=request.model_version
        ).SerializeToString()
        told = request.id.encode()
        begin = head + (_ID + varint(len(told)) + told if told else b"")
        rest = message[len(begin) : -size]
        if not message.startswith(begin) or len(told) > 127 or not rest.endswith(_RAW + varint(size)):
            return
        request.DiscardUnknownFields()
        if len(rest) > _MOST_REST_BYTES or request.ByteSize() != len(message):
            return
        self._tries -= 1
        if len(self._by_rest) >= _MOST_KNOWN:
            self._by_rest, self._heads, self._sizes = {}, (), ()
        head = next((one for one in self._heads if one == head), head)
        self._by_rest[rest] = Known(key, form, question, head)
        self._heads = self._heads if head in self._heads else (*self._heads, head)
        self._sizes = self._sizes if size in self._sizes else (*self._sizes, size)


class _Asked:
    """One request, whoever waits for it."""

    def __init__(self, shared: Shared, caller: Caller, peer: str, stream: object) -> None:
        self._shared = shared
        self._caller = caller
        self.memory = shared.regions.of(caller.name, peer)
        self._stream = stream  # None: a unary call

    def take(self, request: pb.ModelInferRequest, asker: Asker) -> Prediction | None:
        """Hands the request on. What may be left before it is answered; None for a sequence's step.

        Raises: Refusal, TenutoError.
        """
        shared = self._shared
        if shared.is_draining():
            raise Refusal(LEAVING, Code.UNAVAILABLE, "DRAINING")
        question = Question.of(request)
        key = self.key_of(request, question)
        form = None if question.start else shared.sequences.form_of(key)
        if form is not None and request.model_version not in ("", form.version):
            version_of(request.model_version)
            text = f"sequence {key[2]} to model '{form.name}' is one of version {form.version}, not of "
            raise Refusal(f"{text}{request.model_version}")
        if form is None:
            served = served_of(shared.catalogue, request.model_name, request.model_version)
            form = form_of(served)
        if not form.manifest.stateful:
            return self._predict(request, form, question, asker)
        if not question.sequence and self._stream is None:
            raise Refusal(
                f"inference request to model '{form.name}' must specify a non-zero or non-empty "
                "correlation ID"
            )
        if form.manifest.given:
            raise Refusal(
                f"sequences of model '{form.name}' begin with states that their clients give; this protocol "
                "has no word for it, tenuto.v1.Open has",
                Code.UNIMPLEMENTED,
                "NOT_SUPPORTED",
            )
        if self._stream is None and shared.pending.full:  # on a stream, it is not read
            raise PoolFull(f"more than {shared.pending.limit_bytes} bytes are pending; retry")
        data = self._read(request, form, question)
        shared.sequences.ask(key, form, question, data, self._caller, asker)
        return None

    def key_of(self, request: pb.ModelInferRequest, question: Question) -> Key:
        """A sequence with a name is its caller's, one without is its stream's."""
        if question.sequence or self._stream is None:
            return (self._caller.name, request.model_name, question.sequence)
        return (self._stream, request.model_name, 0)

    def form_of(self, key: Key) -> Form | None:
        return self._shared.sequences.form_of(key)

    def step(self, known: Known, data: bytes, asker: Asker) -> bool:
        """Hands on one more step like that one. Whether it could; else the request is to be read.

        Raises: Refusal.
        """
        shared = self._shared
        if shared.is_draining() or shared.sequences.form_of(known.key) is not known.form:
            return False
        shared.sequences.ask(known.key, known.form, known.question, (data,), self._caller, asker)
        return True

    def _read(self, request: pb.ModelInferRequest, form: Form, question: Question) -> tuple[bytes, ...]:
        try:
            if question.wanted:
                form.check_wanted(question, self.memory)
            return form.read(request, self.memory)
        except Refusal as refusal:
            raise refusal.about(request.id) from refusal

    def _predict(
        self, request: pb.ModelInferRequest, form: Form, question: Question, asker: Asker
    ) -> Prediction:
        def done(answer: Answer | TenutoError) -> None:
            if isinstance(answer, TenutoError):
                refusal = Refusal.of(answer)
                refusal.counted = True  # by its model
                asker.refuse(refusal)
            else:
                asker.answer(form, answer.tensors, question)

        if self._stream is None:
            prediction = self._shared.predicts.admit(form.served, done)
        else:  # it is held back by what it owes
            prediction = Prediction(form.served, self._shared.pending, done, lambda: None)
        try:
            data = self._read(request, form, question)
        except BaseException:
            prediction.leave()
            raise
        prediction.start(data)
        return prediction


class Inferences:
    """All calls of this protocol that infer. Any thread."""

    def __init__(self, shared: Shared, callers: Callers) -> None:
        self.shared = shared
        self._callers = callers
        self._pacer = Pacer()
        self._lock = threading.Lock()
        self._streams: set[StreamInfer] = set()

    def open_unary(self, call: Call) -> Listener:
        try:
            caller, now = self._callers.identify(lambda: call.metadata), time.monotonic()
            caller.check_rate(now)
            caller.spend(1, now)
        except TenutoError as error:
            self.shared.refused(error.reason)
            call.finish(code_of(error), str(error), metadata_of(error))
            return GONE
        return UnaryInfer(call, self.shared, caller)

    def open_stream(self, call: Call) -> Listener:
        try:
            caller = self._callers.identify(lambda: call.metadata)
            caller.check_rate(time.monotonic(), _PATIENCE_SECONDS)
        except TenutoError as error:
            call.finish(code_of(error), str(error), metadata_of(error))
            return GONE
        stream = StreamInfer(call, self.shared, caller, self._pacer, self._gone)
        with self._lock:
            self._streams.add(stream)
        stream.drop_if_unknown()
        return stream

    def _gone(self, stream: StreamInfer) -> None:
        with self._lock:
            self._streams.discard(stream)

    def leave(self) -> None:
        """Ends every stream behind its last answers: the server goes."""
        self._pacer.close()
        for stream in self._all():
            stream.leave()

    def drop_unknown(self) -> None:
        """Ends streams and sequences whose callers are known no more."""
        for stream in self._all():
            stream.drop_if_unknown()
        self.shared.sequences.drop_unknown()

    def _all(self) -> list[StreamInfer]:
        with self._lock:
            return list(self._streams)


class UnaryInfer:
    """One ModelInfer. A Listener, and an Asker."""

    def __init__(self, call: Call, shared: Shared, caller: Caller) -> None:
        self._call = call
        self._shared = shared
        self._asked = _Asked(shared, caller, call.peer(), None)
        self._prediction: Prediction | None = None
        self._came = self._gone = False
        self._request_id = ""

    def received(self, message: bytes) -> None:
        if self._came:
            return
        self._came = True
        if len(message) <= _MOST_AT_ONCE:
            self._take(message)
            return
        try:
            self._shared.predicts.read_later(lambda: self._take(message), len(message))
        except TenutoError as error:
            self.refuse(Refusal.of(error))

    def _take(self, message: bytes) -> None:
        if self._left():
            return
        try:
            request = pb.ModelInferRequest.FromString(message)
            self._request_id = request.id
            self._prediction = self._asked.take(request, self)
            if self._left() and self._prediction is not None:  # meanwhile, and did not see it
                self._prediction.leave()
        except Refusal as refusal:
            self.refuse(refusal)
        except TenutoError as error:
            self.refuse(Refusal.of(error))
        except DecodeError:
            self.refuse(
                Refusal(f"{len(message)} bytes are no ModelInferRequest", Code.INTERNAL, "WRONG_MESSAGE")
            )
        except Exception:
            log.exception("a call met a bug")
            self.refuse(Refusal.of_bug())

    def _left(self) -> bool:
        """Whether the call is over. On any thread, and at any moment."""
        return self._gone

    def half_closed(self) -> None:
        if not self._came:
            self._call.finish(grpc.StatusCode.UNIMPLEMENTED, "the call brought no request")

    def terminated(self) -> None:
        self._gone = True
        prediction, self._prediction = self._prediction, None  # or each would keep the other alive
        if prediction is not None:
            prediction.leave()

    def wait(self, resume: Callable[[], None]) -> bool:
        return False

    # session.Asker

    def answer(self, form: Form, tensors: Tensors, question: Question) -> None:
        try:
            message = form.write(tensors, question, self._request_id, self._asked.memory, streamed=False)
        except Refusal as refusal:
            self.refuse(refusal)
            return
        except Exception:
            log.exception("an answer could not be written")
            self.refuse(Refusal.of_bug())
            return
        self._call.send(message)
        self._call.finish()

    def refuse(self, refusal: Refusal) -> None:
        if not refusal.counted:
            self._shared.refused(refusal.reason)
        self._call.finish(refusal.code, str(refusal), refusal.metadata)


class _Slot:
    """One request of a stream, in the order of their coming. An Asker."""

    __slots__ = ("_request_id", "_stream", "message", "nbytes", "status")

    def __init__(self, stream: StreamInfer, request_id: str, nbytes: int) -> None:
        self._stream = stream
        self._request_id = request_id
        self.nbytes = nbytes  # owed until it is sent
        self.message: bytes | None = None  # once it is answered
        self.status: Refusal | None = None  # ends the stream instead

    def answer(self, form: Form, tensors: Tensors, question: Question) -> None:
        try:
            message = form.write(tensors, question, self._request_id, self._stream.memory, streamed=True)
        except Refusal as refusal:
            self.refuse(refusal)
        except Exception:
            log.exception("an answer could not be written")
            self.refuse(Refusal.of_bug())
        else:
            self._stream.answered(self, message)

    def refuse(self, refusal: Refusal) -> None:
        if self._stream.ends_by_errors:
            self.status = refusal
        self._stream.refused(refusal)
        self._stream.answered(self, _in_band(refusal, self._request_id))


class StreamInfer:
    """One ModelStreamInfer: answers go out in the order of their requests. A Listener."""

    def __init__(
        self,
        call: Call,
        shared: Shared,
        caller: Caller,
        pacer: Pacer,
        gone: Callable[[StreamInfer], None],
    ) -> None:
        self._call = call
        self._shared = shared
        self._caller = caller
        self._pacer = pacer
        self._gone = gone
        self._asked = _Asked(shared, caller, call.peer(), self)
        self.memory = self._asked.memory
        self.ends_by_errors = dict(call.metadata).get("triton_grpc_error") == "true"
        self.owed = PendingBytes(_MOST_UNANSWERED_BYTES)
        self._lock = threading.Lock()
        self._slots: deque[_Slot] = deque()
        self._known = KnownRequests()
        self._half_closed = False
        self._pause = 0.0  # seconds until it is read on: its caller is too fast
        self._resume: Callable[[], None] | None = None
        self._reading = False  # another thread reads a large request; until then no other is read
        self._over = False

    def received(self, message: bytes) -> None:
        if self._caller.rate:
            self._pause = self._caller.spend(1, time.monotonic())
        if len(message) <= _MOST_AT_ONCE:
            self._take(message)
        else:
            self._take_later(message)

    def _take_later(self, message: bytes) -> None:
        self._reading = True

        def read() -> None:
            try:
                self._take(message)
            finally:
                with self._lock:
                    self._reading = False
                    resume, self._resume = self._resume, None
                if resume is not None:
                    resume()

        try:
            self._shared.predicts.read_later(read, len(message))
        except TenutoError as error:
            self._reading = False
            slot = _Slot(self, "", _REQUEST_BYTES)
            self.owed.add(slot.nbytes)
            self._slots.append(slot)
            slot.refuse(Refusal.of(error))

    def _take(self, message: bytes) -> None:
        nbytes = len(message) + _REQUEST_BYTES
        self.owed.add(nbytes)
        found = self._known.find(message) if len(message) <= _MOST_AT_ONCE else None
        if found is not None:
            known, request_id, data = found
            slot = _Slot(self, request_id, nbytes)
            self._slots.append(slot)
            if self._guarded(slot, self._asked.step, known, data, slot):
                return
            self._slots.pop()  # it is the last: nobody else puts one
        try:
            request = pb.ModelInferRequest.FromString(message)
        except DecodeError:
            text = f"{len(message)} bytes are no ModelInferRequest"
            self._shared.refused("WRONG_MESSAGE")
            self._shared.sequences.leave(self, Ending.CANCELLED)
            self._call.finish(Code.INTERNAL, text)
            return
        slot = _Slot(self, request.id, nbytes)
        self._slots.append(slot)

        self._guarded(slot, self._take_parsed, message, request, slot)

    def _take_parsed(self, message: bytes, request: pb.ModelInferRequest, slot: _Slot) -> bool:
        if self._asked.take(request, slot) is None:
            self._known.learn(message, request, self._asked)
        return True

    def _guarded(self, slot: _Slot, take: Callable[P, bool], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether the request was dealt with: what it raises is its answer."""
        try:
            return take(*args, **kwargs)
        except Refusal as refusal:
            slot.refuse(refusal)
        except TenutoError as error:
            slot.refuse(Refusal.of(error))
        except Exception:
            log.exception("a request met a bug")
            slot.refuse(Refusal.of_bug())
        finally:
            if self._over:  # meanwhile, and it did not see what begins here
                self._shared.sequences.leave(self, Ending.CANCELLED)
        return True

    def answered(self, slot: _Slot, message: bytes) -> None:
        """Sends what is due. On any thread."""
        paid = -len(message)  # nothing but its request's bytes where it goes out now
        with self._lock:
            slot.message = message
            slots = self._slots
            while slots and (due := slots[0].message) is not None:
                first = slots.popleft()
                paid += first.nbytes + len(due)
                if first.status is not None:
                    self._call.finish(first.status.code, str(first.status), first.status.metadata)
                else:
                    self._call.send(due)
            done = self._half_closed and not slots
        self.owed.remove(paid)
        if done:
            self._finish()

    def refused(self, refusal: Refusal) -> None:
        if not refusal.counted:
            self._shared.refused(refusal.reason)

    def half_closed(self) -> None:
        with self._lock:
            self._half_closed = True
            done = not self._slots
        if done:
            self._finish()

    def _finish(self) -> None:
        self._shared.sequences.leave(self, Ending.STREAM_ENDED)
        self._call.finish()

    def terminated(self) -> None:
        self._over = True
        self._shared.sequences.leave(self, Ending.CANCELLED)
        if self._resume is not None:
            self.owed.forget(self._resume)
            self._shared.pending.forget(self._resume)
            self._pacer.forget(self._resume)
        self._gone(self)

    def wait(self, resume: Callable[[], None]) -> bool:
        with self._lock:
            if self._reading:
                self._resume = resume
                return True
        if self._pause:
            self._resume, seconds, self._pause = resume, self._pause, 0.0
            self._pacer.later(seconds, resume)
            return True
        if not self.owed.full and not self._shared.pending.full:
            return False
        self._resume = resume
        return self.owed.wait(resume) or self._shared.pending.wait(resume)

    def leave(self) -> None:
        self._call.finish(Code.UNAVAILABLE, LEAVING, (("tenuto-reason", "DRAINING"),))

    def drop_if_unknown(self) -> None:
        """Ends the stream if its caller is known no more."""
        if not self._caller.is_known:
            self.terminated()
            self._call.finish(Code.UNAUTHENTICATED, "the caller of this stream is not known here any more")


def _in_band(refusal: Refusal, request_id: str) -> bytes:
    response = pb.ModelStreamInferResponse(error_message=str(refusal))
    response.infer_response.id = request_id
    parameters = response.infer_response.parameters
    parameters["triton_final_response"].bool_param = True
    parameters["tenuto_code"].string_param = refusal.code.name
    if refusal.reason:
        parameters["tenuto_reason"].string_param = refusal.reason
    if refusal.retry_after_ms:
        parameters["tenuto_retry_after_ms"].int64_param = refusal.retry_after_ms
    return response.SerializeToString()
