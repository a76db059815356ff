"""Handlers on a pool's threads: what gRPC promises them, with calls and a pool that are turned by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import grpc
import pytest

from tenuto.serving.call import Listener, Metadata
from tenuto.serving.pooled_method import Methods

Code = grpc.StatusCode
Handler = Callable[[Any, Any], Any]


class Ending(NamedTuple):
    code: grpc.StatusCode
    details: str
    metadata: Metadata


class FakeCall:
    """Keeps what is sent, and how it ended."""

    def __init__(self, path: str = "/tests.Service/Method") -> None:
        self.path = path
        self.metadata: Metadata = (("x-asked", "1"),)
        self.initial_metadata: Metadata = ()
        self.closed: Callable[[], None] | None = None
        self.seconds_left = 12.5
        self.sent: list[bytes] = []
        self.ending: Ending | None = None
        self.cancelled = False
        self.backed_up = False

    def send(self, message: bytes) -> None:
        assert self.ending is None
        self.sent.append(message)

    def finish(self, code: grpc.StatusCode = Code.OK, details: str = "", metadata: Metadata = ()) -> None:
        if self.ending is None:
            self.ending = Ending(code, details, metadata)

    def cancel(self) -> None:
        self.cancelled = True

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


class Later(Executor):
    """A pool that works when it is told to."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], object]] = deque()

    def submit(self, work: Any, /, *args: Any, **named: Any) -> Future[Any]:
        self.waiting.append(lambda: work(*args, **named))
        return Future()

    def work(self) -> None:
        while self.waiting:
            self.waiting.popleft()()


class Bench:
    """One method, a call of it, and what was heard of it."""

    def __init__(self, handler: Any, *, max_calls: int = 4, max_bytes: int = 1000) -> None:
        self.pool = Later()
        self.methods = Methods(self.pool, max_calls, max_bytes)
        self.methods.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("tests.Service", {"Method": handler}),)
        )
        self.call = FakeCall()

    def open(self, call: FakeCall | None = None) -> Listener:
        opened: Any = call or self.call
        return self.methods.open(opened)

    def ask(self, *messages: bytes) -> FakeCall:
        """A whole call."""
        listener = self.open()
        for message in messages:
            listener.received(message)
        listener.half_closed()
        self.pool.work()
        return self.call


def unary(method: Handler) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        method, lambda data: data.decode(), lambda reply: reply.encode()
    )


def test_a_unary_method_gets_its_request_and_answers() -> None:
    call = Bench(unary(lambda request, context: request + "!")).ask(b"hello")
    assert call.sent == [b"hello!"]
    assert call.ending == (Code.OK, "", ())


def test_without_serializers_bytes_go_as_they_are() -> None:
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: request[::-1])
    assert Bench(handler).ask(b"\xff\x00").sent == [b"\x00\xff"]


def test_a_method_begins_with_its_request_and_does_not_wait_for_the_half_close() -> None:
    bench = Bench(unary(lambda request, context: request))
    bench.open().received(b"now")
    bench.pool.work()
    assert bench.call.sent == [b"now"]


def test_a_second_request_of_a_unary_call_is_not_answered() -> None:
    assert Bench(unary(lambda request, context: request)).ask(b"one", b"two").sent == [b"one"]


def test_a_call_without_a_request_is_ended() -> None:
    call = Bench(unary(lambda request, context: request)).ask()
    assert call.ending is not None
    assert (call.ending.code, call.sent) == (Code.UNIMPLEMENTED, [])


def test_an_unknown_method_is_unimplemented() -> None:
    bench = Bench(unary(lambda request, context: request))
    call = FakeCall("/tests.Service/" + "x" * 10_000)
    listener = bench.open(call)
    assert call.ending is not None
    assert call.ending.code is Code.UNIMPLEMENTED
    assert "/tests.Service/xx" in call.ending.details
    assert len(call.ending.details) < 300
    assert listener.wait(lambda: None)  # it is not read
    assert call.closed is None


def test_one_call_too_many_is_refused_and_its_place_comes_back() -> None:
    bench = Bench(unary(lambda request, context: request), max_calls=2)
    calls = [FakeCall() for _ in range(3)]
    for call in calls:
        bench.open(call).received(b"request")
    assert [call.ending is None for call in calls] == [True, True, False]
    refused = calls[2].ending
    assert refused is not None
    assert refused.code is Code.RESOURCE_EXHAUSTED
    assert dict(refused.metadata)["tenuto-reason"] == "POOL_FULL"
    assert calls[2].closed is None
    assert calls[0].closed is not None
    calls[0].closed()
    bench.open(fourth := FakeCall()).received(b"request")
    assert fourth.ending is None


def test_calls_that_bring_nothing_take_no_place() -> None:
    bench = Bench(unary(lambda request, context: request), max_calls=1)
    for _ in range(10):
        bench.open(FakeCall())
    bench.open(call := FakeCall()).received(b"request")
    assert call.ending is None


def test_calls_that_stream_their_requests_leave_threads_to_the_others() -> None:
    handler: Any = grpc.stream_unary_rpc_method_handler(lambda requests, context: b"")
    bench = Bench(handler, max_calls=100)
    calls = [FakeCall() for _ in range(100)]
    for call in calls:
        bench.open(call).received(b"request")
    taken = [call for call in calls if call.ending is None]
    assert 0 < len(taken) < 10
    assert taken[0].closed is not None
    taken[0].closed()
    bench.open(another := FakeCall()).received(b"request")
    assert another.ending is None


def test_calls_are_refused_while_too_many_bytes_wait() -> None:
    bench = Bench(unary(lambda request, context: ""), max_bytes=100)
    bench.open().received(bytes(101))
    bench.open(refused := FakeCall()).received(b"request")
    assert refused.ending is not None
    assert dict(refused.ending.metadata)["tenuto-reason"] == "POOL_FULL"
    bench.pool.work()
    bench.open(taken := FakeCall()).received(b"request")
    assert taken.ending is None


def test_a_method_may_stream_its_replies() -> None:
    def count(request: bytes, context: Any) -> Iterator[bytes]:
        for n in range(int(request)):
            yield b"%d" % n

    call = Bench(grpc.unary_stream_rpc_method_handler(count)).ask(b"3")
    assert call.sent == [b"0", b"1", b"2"]
    assert call.ending == (Code.OK, "", ())


def test_a_method_that_streams_stops_when_its_client_has_left() -> None:
    made = []

    def endless(request: bytes, context: Any) -> Iterator[bytes]:
        for n in range(1000):
            made.append(n)
            if n == 3:
                listener.terminated()
            yield b""

    bench = Bench(grpc.unary_stream_rpc_method_handler(endless))
    listener = bench.open()
    listener.received(b"")
    bench.pool.work()
    assert len(made) <= 5


def test_a_method_may_stream_both_ways() -> None:
    def echo(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for request in requests:
            yield request * 2

    call = Bench(grpc.stream_stream_rpc_method_handler(echo)).ask(b"a", b"b")
    assert call.sent == [b"aa", b"bb"]
    assert call.ending == (Code.OK, "", ())


def test_a_method_may_take_a_stream() -> None:
    handler: Any = grpc.stream_unary_rpc_method_handler(lambda requests, context: b"".join(requests))
    assert Bench(handler).ask(b"a", b"b").sent == [b"ab"]
    assert Bench(handler).ask().sent == [b""]


def test_a_stream_of_requests_ends_when_the_client_leaves() -> None:
    bench = Bench(grpc.stream_unary_rpc_method_handler(lambda requests, context: b"%d" % len(list(requests))))
    requests = bench.open()
    requests.received(b"")
    (work,) = bench.pool.waiting
    requests.terminated()
    work()  # or this would hang
    assert bench.call.sent == []


def test_a_client_is_not_read_while_its_requests_wait_and_then_is() -> None:
    resumed = []
    bench = Bench(grpc.stream_unary_rpc_method_handler(lambda requests, context: b"%d" % len(list(requests))))
    listener = bench.open()
    sent = 0
    while not listener.wait(lambda: resumed.append(1)):
        listener.received(b"")
        sent += 1
        assert sent < 1000
    listener.half_closed()
    assert resumed == []
    bench.pool.work()
    assert resumed == [1]
    assert bench.call.sent == [b"%d" % sent]


def test_a_handler_that_takes_no_thread_replies_until_it_says_so() -> None:
    kept: list[Callable[[bytes | None], None]] = []

    def watch(request: bytes, context: Any, reply: Callable[[bytes | None], None]) -> None:
        kept.append(reply)

    watch.experimental_non_blocking = True  # type: ignore[attr-defined]
    call = Bench(grpc.unary_stream_rpc_method_handler(watch)).ask(b"")
    (reply,) = kept
    reply(b"one")
    reply(b"two")
    assert (call.sent, call.ending) == ([b"one", b"two"], None)
    reply(None)
    assert call.ending == (Code.OK, "", ())


# The context.


def aborting(_: str, context: Any) -> None:
    context.set_trailing_metadata((("x-why", "1"),))
    context.abort(Code.NOT_FOUND, "not here")


def setting(_: str, context: Any) -> str:
    context.set_code(Code.OUT_OF_RANGE)
    context.set_details("too far")
    context.set_trailing_metadata([("x-why", b"1")])
    assert (context.code(), context.details()) == (Code.OUT_OF_RANGE, "too far")
    assert context.trailing_metadata() == (("x-why", b"1"),)
    return "an answer all the same"


class _Status(NamedTuple):
    code: grpc.StatusCode
    details: str
    trailing_metadata: Metadata | None


@pytest.mark.parametrize(
    "method, sent, ending",
    [
        (aborting, [], (Code.NOT_FOUND, "not here", (("x-why", "1"),))),
        (setting, [b"an answer all the same"], (Code.OUT_OF_RANGE, "too far", (("x-why", b"1"),))),
        (lambda _, context: context.abort(Code.OK, "no"), [], (Code.UNKNOWN, "no", ())),
        (
            lambda _, context: context.abort_with_status(_Status(Code.DATA_LOSS, "gone", (("a", "b"),))),
            [],
            (Code.DATA_LOSS, "gone", (("a", "b"),)),
        ),
    ],
    ids=["abort", "set", "abort with OK", "abort with a status"],
)
def test_a_handler_chooses_its_status(method: Handler, sent: list[bytes], ending: Ending) -> None:
    call = Bench(unary(method)).ask(b"")
    assert (call.sent, call.ending) == (sent, ending)


def test_replies_before_an_abort_arrive() -> None:
    def method(request: bytes, context: Any) -> Iterator[bytes]:
        yield b"one"
        context.abort(Code.ABORTED, "no more")

    call = Bench(grpc.unary_stream_rpc_method_handler(method)).ask(b"")
    assert (call.sent, call.ending) == ([b"one"], (Code.ABORTED, "no more", ()))


def secret(*_: Any) -> Any:
    raise ValueError("a secret")


@pytest.mark.parametrize(
    "handler",
    [
        grpc.unary_unary_rpc_method_handler(secret),
        grpc.unary_unary_rpc_method_handler(lambda *_: b"", response_serializer=secret),
        grpc.unary_stream_rpc_method_handler(secret),
        grpc.stream_stream_rpc_method_handler(secret),
    ],
    ids=["method", "serializer", "stream", "both streams"],
)
def test_a_bug_is_logged_and_its_text_stays_here(handler: Any, caplog: pytest.LogCaptureFixture) -> None:
    call = Bench(handler).ask(b"request")
    assert call.ending is not None
    assert call.ending.code is Code.UNKNOWN
    assert "secret" not in call.ending.details
    assert "a secret" in caplog.text


@pytest.mark.parametrize(
    "handler",
    [
        grpc.unary_unary_rpc_method_handler(lambda *_: b"", request_deserializer=secret),
        grpc.stream_unary_rpc_method_handler(lambda requests, _: list(requests), secret),
    ],
    ids=["one", "a stream"],
)
def test_bytes_that_are_no_request_are_their_clients_matter(
    handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    call = Bench(handler).ask(b"request")
    assert call.ending is not None
    assert (call.ending.code, call.ending.details) == (
        Code.INTERNAL,
        "the bytes are no request of this method",
    )
    assert caplog.text == ""


def test_a_handler_may_ask_about_its_call() -> None:
    def method(_: str, context: Any) -> str:
        assert context.is_active()
        assert context.time_remaining() == 12.5
        assert context.invocation_metadata() == (("x-asked", "1"),)
        assert context.peer() == "ipv4:127.0.0.1:1"
        assert (context.peer_identities(), context.peer_identity_key()) == (None, None)
        assert context.auth_context() == {}
        context.send_initial_metadata([("x-first", "1")])
        context.cancel()
        return "asked"

    call = Bench(unary(method)).ask(b"")
    assert (call.sent, call.initial_metadata) == ([b"asked"], (("x-first", "1"),))
    assert call.cancelled


@pytest.mark.parametrize("fails", [False, True])
def test_callbacks_are_called_once_at_the_end_even_if_one_of_them_fails(fails: bool) -> None:
    heard: list[Any] = []

    def method(_: str, context: Any) -> str:
        if fails:
            assert context.add_callback(secret)
        assert context.add_callback(lambda: heard.append("over"))
        heard.append(context)
        return ""

    bench = Bench(unary(method))
    listener = bench.open()
    listener.received(b"")
    bench.pool.work()
    (context,) = heard
    listener.terminated()
    listener.terminated()
    assert heard[1:] == ["over"]
    assert not context.is_active()
    assert not context.add_callback(lambda: heard.append("too late"))


def test_a_call_that_left_while_it_waited_for_a_thread_is_not_run() -> None:
    run: list[str] = []
    bench = Bench(unary(lambda request, context: run.append(request)))
    listener = bench.open()
    listener.received(b"")
    listener.terminated()
    bench.pool.work()
    assert run == []
