"""A server that speaks the protocol without models; the client's test double.

`accumulator` is stateful: each frame of `total` is the sum of all that this sequence ever sent, so
that a lost, repeated or swapped chunk is a visible number. `brightness` is stateless: label "dark" or
"bright" for each image. What it does wrong is set on the instance before a stream is opened.
"""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np

from tenuto.v1 import tenuto_pb2 as pb
from tenuto.v1.tenuto_pb2_grpc import TenutoServicer, add_TenutoServicer_to_server

LABELS = ["dark", "bright"]
MANIFESTS: dict[str, dict[str, Any]] = {
    "accumulator": {
        "name": "accumulator",
        "description": "Sums what a sequence ever sent.",
        "inputs": [
            {
                "name": "x",
                "dtype": "float32",
                "shape": ["batch", "samples"],
                "batch_axis": 0,
                "time_axis": 1,
                "rate_hz": 8000.0,
                "wire": [{"dtype": "int16", "scale": 1.0, "offset": 0.0}],
            }
        ],
        "states": [{"input": "sum", "output": "sum_next", "dtype": "float32", "shape": ["batch"]}],
        "outputs": [
            {"name": "total", "shape": ["batch", "samples"], "time_axis": 1},
            {
                "name": "sign",
                "shape": ["batch", 2],
                "labels": ["negative", "positive"],
                "activation": "softmax",
            },
        ],
    },
    "brightness": {
        "name": "brightness",
        "description": "Says whether an image is dark or bright.",
        "inputs": [
            {
                "name": "image",
                "dtype": "uint8",
                "shape": ["batch", 2, 2],
                "batch_axis": 0,
                "wire": [{"encoding": "png"}, {"encoding": "jpeg"}],
            }
        ],
        "outputs": [
            {
                "name": "log_probabilities",
                "shape": ["batch", 2],
                "labels": LABELS,
                "activation": "log_softmax",
            }
        ],
    },
}
# Models that generate; no listing has them.
_CHARACTERS = {"encoding": "utf8", "tokens": "characters", "alphabet": "\n abc€"}
_STEPS: dict[str, Any] = {"shape": ["batch", "time"], "time_axis": 1}
GENERATORS: dict[str, dict[str, Any]] = {
    "speaker": {
        "name": "speaker",
        "description": "Spells its alphabet.",
        "inputs": [{"name": "id", "dtype": "int64", "wire": [_CHARACTERS]} | _STEPS],
        "states": [],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", "time", 6], "time_axis": 1}],
        "generate": {"output": "logits", "input": "id", "sampling": "categorical"},
    },
    "piano": {
        "name": "piano",
        "description": "Plays what is set.",
        "inputs": [{"name": "keys", "dtype": "float32", "shape": ["batch", "time", 88], "time_axis": 1}],
        "states": [],
        "outputs": [{"name": "chord", "dtype": "float32", "shape": ["batch", "time", 88], "time_axis": 1}],
        "generate": {"output": "chord", "input": "keys", "sampling": "bernoulli"},
    },
}
GENERATORS["numbers"] = GENERATORS["speaker"] | {
    "name": "numbers",
    "inputs": [{"name": "id", "dtype": "int64"} | _STEPS],
}


class FakeServer(TenutoServicer):
    """An in-process server on a free loopback port; use it in a `with`."""

    def __init__(self) -> None:
        self.window = 4
        self.abort: tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]] | None = None
        self.on_open: pb.Reply | None = None  # instead of Opened
        self.on_step: dict[int, pb.Reply | None] = {}  # instead of that step's Output; None: nothing
        self.gate: threading.Semaphore | None = None  # one permit for each answered chunk
        self.reads: int | None = None  # so many chunks of a stream, and then nothing more of it
        self.hang_up = 0  # the stream ends, status OK, before it answers this step
        self.tail = False  # whether End gives a further part of the last step
        self.checkpoint_every = 0  # a token after that many steps
        self.refusals: list[grpc.StatusCode | pb.Failed] = []  # of the next openings; a code ends the call
        # Instead of the step's Output, each once: a code ends the call.
        self.accidents: dict[int, list[grpc.StatusCode | pb.Reply]] = {}
        self.tokens_asked = 0  # CheckpointNow
        self.hang = False  # unary calls are never answered
        self.opens: list[pb.Open] = []
        self.requests: list[pb.PredictRequest] = []
        self.chunks: list[pb.Chunk] = []  # that generate
        self.chords: list[list[int]] = [[]]  # the keys of each part that `piano` plays, again and again
        self.inputs: list[pb.Tensor] = []  # of all chunks, in the order of arrival
        self.unanswered_max = 0
        self.half_closed = threading.Event()  # the client said that nothing follows
        self.left = threading.Event()  # a stream's call is over
        self.cancelled = False  # and was so although the client had not sent End
        self.called = threading.Event()  # a call came in
        self.sequences: list[pb.Sequence] = []  # the live ones, as operators see them
        self.asked_model = ""  # by ListSequences
        self.commands: list[tuple[str, str]] = []  # what operators asked for: method and model
        self.is_new = True  # what LoadModel and ReloadModel answer
        self._release = threading.Event()
        # Pings every 10 s are welcome: gRPC's default answers them with too_many_pings.
        options = [("grpc.http2.min_ping_interval_without_data_ms", 10_000)]
        self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="fake")
        self._server = grpc.server(self._pool, options=options)
        add_TenutoServicer_to_server(self, self._server)  # type: ignore[no-untyped-call,unused-ignore]
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> "FakeServer":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._release.set()
        if self.gate is not None:
            self.gate.release(10_000)
        self.stop()
        self._pool.shutdown()

    def stop(self) -> None:
        """Break every connection and listen no more."""
        self._server.stop(0).wait()

    # -- unary calls -------------------------------------------------------------------------------

    def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
        self._refuse(context)
        self.requests.append(request)
        tensor = request.inputs[0]
        if tensor.dtype in ("png", "jpeg"):
            count = tensor.shape[0] if tensor.shape else 1
            mean = np.zeros(count)
        else:
            images = np.frombuffer(tensor.data, tensor.dtype).reshape(tuple(tensor.shape))
            mean = images.reshape(len(images), -1).mean(1) / 255
        bright = np.clip(mean, 1e-3, 1 - 1e-3).astype(np.float32)
        answer = np.log(np.stack([1 - bright, bright], 1))
        return pb.PredictResponse(
            outputs=[_tensor("log_probabilities", answer)],
            version=request.version or 3,
            timing=pb.Timing(queue_us=11, compute_us=22, batch_size=len(mean)),
        )

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._refuse(context)
        broken = pb.Model(name="broken", version=1, state=pb.Model.FAILED, why="no such operator")
        away = pb.Model(name="away", version=12, state=pb.Model.UNLOADED)
        return pb.ListModelsResponse(models=[*(_model(name) for name in MANIFESTS), broken, away])

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        self._refuse(context)
        models = MANIFESTS | GENERATORS
        if request.model not in models:
            context.set_trailing_metadata((("tenuto-reason", "UNKNOWN_MODEL"),))
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model!r}; see ListModels")
        text = json.dumps(models[request.model])
        return pb.GetModelResponse(model=_model(request.model), manifest_json=text)

    def ListSequences(self, request: pb.ListSequencesRequest, context: Any) -> pb.ListSequencesResponse:
        self._refuse(context)
        self.asked_model = request.model
        return pb.ListSequencesResponse(sequences=self.sequences)

    def EndSequence(self, request: pb.EndSequenceRequest, context: Any) -> pb.EndSequenceResponse:
        self._refuse(context)
        left = [one for one in self.sequences if one.sequence_id != request.sequence_id]
        if len(left) == len(self.sequences):
            context.set_trailing_metadata((("tenuto-reason", "UNKNOWN_SEQUENCE"),))
            context.abort(grpc.StatusCode.NOT_FOUND, f"no live sequence {request.sequence_id!r} here")
        self.sequences = left
        return pb.EndSequenceResponse()

    def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        model = self._commanded("LoadModel", request.model, context)
        return pb.LoadModelResponse(model=model, changed=self.is_new)

    def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        self._commanded("UnloadModel", request.model, context)
        ended, self.sequences = len(self.sequences), []
        return pb.UnloadModelResponse(versions=[2, 3], sequences=ended)

    def ReloadModel(self, request: pb.ReloadModelRequest, context: Any) -> pb.ReloadModelResponse:
        model = self._commanded("ReloadModel", request.model, context)
        ended, self.sequences = len(self.sequences), []
        return pb.ReloadModelResponse(model=model, changed=self.is_new, sequences=ended)

    def _commanded(self, method: str, model: str, context: Any) -> pb.Model:
        self._refuse(context)
        self.commands.append((method, model))
        if model not in MANIFESTS:
            context.set_trailing_metadata((("tenuto-reason", "MODEL_NOT_READY"),))
            context.abort(grpc.StatusCode.UNAVAILABLE, f"failed to load {model!r}: it is bad")
        return _model(model)

    def _refuse(self, context: Any) -> None:
        self.called.set()
        if self.hang:
            self._release.wait()
        if self.abort is not None:
            code, details, metadata = self.abort
            context.set_trailing_metadata(metadata)
            context.abort(code, details)

    # -- the stream --------------------------------------------------------------------------------

    def Stream(self, requests: Iterator[pb.StreamRequest], context: Any) -> Iterator[Any]:
        call = _Call()
        context.add_callback(lambda: self._over(call))
        self._refuse(context)
        threading.Thread(target=self._receive, args=(requests, call), daemon=True).start()
        total = np.float32(0)
        step, model = 0, ""
        while (event := call.events.get()) is not None:
            kind = event.WhichOneof("event")
            if kind == "open":
                self.opens.append(event.open)
                if self.refusals:
                    yield _refused(self.refusals.pop(0), context)
                    continue
                step, total = _unsealed(event.open.resume_token)
                model = event.open.model
                yield _response(self.on_open or _opened(self.window, step + 1, event.open))
                if self.on_open is not None and self.on_open.HasField("failed"):
                    continue
            elif kind == "chunk":
                step = event.chunk.step
                if step == self.hang_up:
                    call.finished = True
                    break
                if self.accidents.get(step):
                    yield _happened(self.accidents[step].pop(0), context)
                    continue
                if self.gate is not None:
                    self.gate.acquire()
                if event.chunk.generate:
                    call.answered += 1
                    yield from map(_response, self._generated(model, event.chunk))
                    continue
                tensor = event.chunk.inputs[0]
                x = np.frombuffer(tensor.data, tensor.dtype).astype(np.float32).reshape(-1)
                totals = total + np.cumsum(x, dtype=np.float32)
                total = totals[-1] if len(totals) else total
                call.answered += 1
                reply = self.on_step.get(step, _output(step, totals, total))
                if reply is not None:
                    yield _response(reply)
                if self.checkpoint_every and step % self.checkpoint_every == 0:
                    yield _response(checkpoint(step, total))
            elif kind == "checkpoint":
                self.tokens_asked += 1
                yield _response(checkpoint(step, total))
            elif kind == "end":
                call.finished = True
                if self.tail:
                    yield _response(_output(step, np.array([total], np.float32), total, part=1))
                yield _response(pb.Reply(closed=pb.Closed(reason=pb.END, last_step=step)))

    def _generated(self, model: str, chunk: pb.Chunk) -> Iterator[pb.Reply]:
        """Part 0, and the others: `speaker` spells its ids in turn, `piano` plays its chords."""
        self.chunks.append(chunk)
        for part in range(chunk.generate + 1):
            output = pb.Output(step=chunk.step, part=part, last=part == chunk.generate)
            if part and model == "piano":
                keys = np.zeros((1, 88), np.float32)
                keys[0, self.chords[(part - 1) % len(self.chords)]] = 1
                output.outputs.append(_tensor("keys", keys))
            elif part:
                output.outputs.append(_tensor("id", np.array([(part - 1) % 6], np.int64)))
            yield pb.Reply(output=output)

    def _receive(self, requests: Iterator[pb.StreamRequest], call: "_Call") -> None:
        try:
            for request in requests:
                for event in request.events:
                    if event.WhichOneof("event") == "chunk":
                        self.inputs.extend(event.chunk.inputs)
                        call.received += 1
                        unanswered = call.received - call.answered
                        self.unanswered_max = max(self.unanswered_max, unanswered)
                    call.events.put(event)
                if self.reads is not None and call.received >= self.reads:
                    self._release.wait()
            self.half_closed.set()
        except grpc.RpcError:
            pass  # the client is gone
        call.events.put(None)

    def _over(self, call: "_Call") -> None:
        self.cancelled = not call.finished
        self.left.set()


class _Call:
    """One stream's call."""

    def __init__(self) -> None:
        self.events: SimpleQueue[pb.Event | None] = SimpleQueue()
        self.received = 0
        self.answered = 0
        self.finished = False  # End was received, or the server hung up


def _response(reply: pb.Reply) -> pb.StreamResponse:
    return pb.StreamResponse(replies=[reply])


def _opened(window: int, next_step: int, wish: pb.Open) -> pb.Reply:
    opened = pb.Opened(sequence_id="s-1", version=3, next_step=next_step, window=window)
    if wish.model in GENERATORS:
        seed = wish.sampling.seed if wish.sampling.HasField("seed") else 42
        sampling = pb.Sampling(seed=seed, temperature=wish.sampling.temperature or 1.0)
        opened.sampling.CopyFrom(sampling)
    return pb.Reply(opened=opened)


def _refused(how: grpc.StatusCode | pb.Failed, context: Any) -> pb.StreamResponse:
    if isinstance(how, grpc.StatusCode):
        context.abort(how, "refused")
        raise AssertionError  # abort raises
    return _response(pb.Reply(failed=how))


def _happened(what: grpc.StatusCode | pb.Reply, context: Any) -> pb.StreamResponse:
    if isinstance(what, grpc.StatusCode):
        context.abort(what, "an accident")
        raise AssertionError  # abort raises
    return _response(what)


def token(step: int, total: Any) -> bytes:
    """A sealed snapshot, good on every fake server."""
    return b"%d:%d" % (step, total)


def _unsealed(sealed: bytes) -> tuple[int, np.float32]:
    step, _, total = sealed.partition(b":")
    return (int(step), np.float32(int(total))) if total else (0, np.float32(0))


def checkpoint(step: int, total: Any) -> pb.Reply:
    return pb.Reply(checkpoint=pb.Checkpoint(step=step, resume_token=token(step, total)))


def closed(reason: str, step: int, total: float) -> pb.Reply:
    """An ending with the token of the state after `step`."""
    return pb.Reply(closed=pb.Closed(reason=reason, last_step=step, resume_token=token(step, total)))


def _output(step: int, totals: Any, total: Any, part: int = 0) -> pb.Reply:
    sign = np.array([total < 0, total >= 0], np.float32)
    output = pb.Output(
        step=step,
        part=part,
        last=True,
        outputs=[_tensor("total", totals), _tensor("sign", sign)] if len(totals) else [],
        timing=pb.Timing(queue_us=7, compute_us=8, batch_size=1),
    )
    return pb.Reply(output=output)


def _tensor(name: str, array: Any) -> pb.Tensor:
    return pb.Tensor(name=name, dtype=array.dtype.name, shape=array.shape, data=array.tobytes())


def _model(name: str) -> pb.Model:
    manifest = (MANIFESTS | GENERATORS)[name]
    return pb.Model(
        name=name,
        version=3,
        state=pb.Model.READY,
        stateful="states" in manifest,
        provider="CPUExecutionProvider",
        sha256="0" * 64,
        fingerprint="f" * 64,
        description=manifest["description"],
        sequences=1,
        slots=64,
        state_bytes=65 << 19 if "states" in manifest else 0,
        state_bytes_used=1 << 19 if "states" in manifest else 0,
        file_bytes=1234,
    )
