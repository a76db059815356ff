"""The Open Inference Protocol on a real server: batches, sequences, streams, and what mistakes are told."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from tenuto.oip import inference_pb2 as pb
from tenuto.serving.oip import inference
from tenuto.serving.sequence import Ending
from tenuto.serving.server import Server

from .oip_wire import InferStream, ask, floats, packed, parameter, step, stub
from .running import Counting, Gate, assert_nothing_is_left, engine_of, serving, wait_for
from .wire import connect

Code = grpc.StatusCode


@pytest.fixture
def oip(channel: grpc.Channel) -> Any:
    return stub(channel)


@pytest.fixture
def stream(channel: grpc.Channel) -> Iterator[InferStream]:
    with InferStream(channel) as stream:
        yield stream


def refusal(call: Callable[[], object]) -> tuple[Code, str, str]:
    """Status, text, and our reason behind them."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status: Any = caught.value
    trailing = dict(status.trailing_metadata() or ())
    return status.code(), status.details(), trailing.get("tenuto-reason", "")


def total(oip: Any, request: pb.ModelInferRequest) -> list[float]:
    return list(floats(oip.ModelInfer(request)).ravel().tolist())


# -- what is there ---------------------------------------------------------------------------------


def test_the_server_and_its_models_are_described(oip: Any) -> None:
    assert oip.ServerLive(pb.ServerLiveRequest()).live
    assert oip.ServerReady(pb.ServerReadyRequest()).ready
    ready = [oip.ModelReady(pb.ModelReadyRequest(name=name)).ready for name in ("doubler", "nobody")]
    assert ready == [True, False]
    server = oip.ServerMetadata(pb.ServerMetadataRequest())
    assert server.name == "tenuto"
    # What takes a flag is not said to be there without it.
    assert {"sequence", "statistics", "classification"} <= set(server.extensions)
    assert not {"model_repository", "system_shared_memory", "cuda_shared_memory", "trace"} & set(
        server.extensions
    )


@pytest.mark.parametrize(
    "model,shape,batch,scheduling",
    [
        ("doubler", [-1, 2], 8, "dynamic_batching"),
        ("accumulator", [-1, -1], 64, "sequence_batching"),
    ],
)
def test_metadata_and_configuration_agree(
    oip: Any, model: str, shape: list[int], batch: int, scheduling: str
) -> None:
    said = oip.ModelMetadata(pb.ModelMetadataRequest(name=model))
    config = oip.ModelConfig(pb.ModelConfigRequest(name=model)).config
    assert (said.name, list(said.versions), said.platform) == (model, ["1"], "onnxruntime_onnx")
    assert [(i.name, i.datatype, list(i.shape)) for i in said.inputs] == [("x", "FP32", shape)]
    # Clients strip the first axis where there is a batch.
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", 11, shape[1:])]
    assert [o.name for o in said.outputs] == [o.name for o in config.output] == ["y"]
    assert (config.max_batch_size, config.WhichOneof("scheduling_choice")) == (batch, scheduling)
    assert not config.model_transaction_policy.decoupled


def test_statistics_count_what_was_answered(oip: Any) -> None:
    def stats() -> pb.ModelStatistics:
        answer = oip.ModelStatistics(pb.ModelStatisticsRequest(name="doubler"))
        return answer.model_stats[0]

    before = stats()
    for _ in range(3):
        oip.ModelInfer(ask("doubler", [[1, 2]]))
    wait_for(lambda: stats().inference_count == before.inference_count + 3, "the answers to be counted")
    after = stats()
    assert after.execution_count == before.execution_count + 3
    assert after.inference_stats.success.count == after.inference_count
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    every = oip.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert {"doubler", "accumulator"} <= {one.name for one in every}


def test_the_index_names_what_serves_and_what_does_not(oip: Any) -> None:
    models = oip.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models
    assert {(one.name, one.version, one.state) for one in models} >= {("doubler", "1", "READY")}


@pytest.mark.parametrize(
    "method", ["RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryRegister"]
)
def test_what_takes_a_flag_is_not_there_without_it(oip: Any, method: str) -> None:
    request = getattr(pb, f"{method}Request")()
    assert refusal(lambda: getattr(oip, method)(request))[0] is Code.UNIMPLEMENTED


def test_clients_that_unregister_what_they_never_had_go_on(oip: Any) -> None:
    oip.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
    oip.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest())


# -- batches ---------------------------------------------------------------------------------------


def test_a_batch_is_answered_with_its_id_and_raw_contents(oip: Any) -> None:
    response = oip.ModelInfer(
        ask("doubler", [[1, 2], [3, 4], [5, 6]], request_id="mine", version="1", colour="blue")
    )
    assert (response.model_name, response.model_version, response.id) == ("doubler", "1", "mine")
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", "FP32", [3, 2])
    assert not output.HasField("contents")
    assert floats(response).tolist() == [[2, 4], [6, 8], [10, 12]]


def test_elements_may_stand_in_the_message(oip: Any) -> None:
    request = pb.ModelInferRequest(model_name="doubler")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend([4, 5])
    assert floats(oip.ModelInfer(request)).tolist() == [[8, 10]]


def test_an_empty_batch_has_an_empty_answer(oip: Any) -> None:
    request = pb.ModelInferRequest(model_name="doubler")
    request.inputs.add(name="x", datatype="FP32", shape=[0, 2])
    assert list(oip.ModelInfer(request).outputs[0].shape) == [0, 2]


def test_images_come_as_pixels_and_as_files(oip: Any) -> None:
    pixels = np.full((2, 4, 4), 51, np.uint8)
    request = ask("brightness", pixels, name="image", dtype="uint8")
    assert floats(oip.ModelInfer(request)).tolist() == pytest.approx([0.2, 0.2])
    file = io.BytesIO()
    Image.fromarray(pixels[0]).save(file, "PNG")
    request = pb.ModelInferRequest(model_name="brightness")
    request.inputs.add(name="image", datatype="BYTES", shape=[2, 1])
    request.raw_input_contents.append(packed(file.getvalue(), file.getvalue()))
    assert floats(oip.ModelInfer(request)).tolist() == pytest.approx([0.2, 0.2])


def test_classes_come_as_value_index_and_label(oip: Any) -> None:
    request = ask("doubler", [[1, 5], [7, 3]])
    request.outputs.add(name="y").parameters["classification"].int64_param = 1
    response = oip.ModelInfer(request)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [2, 1])
    assert response.raw_output_contents[0] == packed(b"10.000000:1", b"14.000000:0")


def test_a_large_batch_is_read_by_another_thread(oip: Any) -> None:
    values = np.arange(16, dtype=np.float32).reshape(8, 2)
    request = ask("doubler", values, request_id="x" * (1 << 17))
    assert floats(oip.ModelInfer(request)).tolist() == (2 * values).tolist()


# -- mistakes --------------------------------------------------------------------------------------


def both(request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    return request


def wrong_kind() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="doubler")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.int_contents.extend([1, 2])
    return request


def no_data() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="doubler")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    return request


def wanting(output: str, **parameters: object) -> pb.ModelInferRequest:
    request = ask("doubler", [[1, 2]])
    wanted = request.outputs.add(name=output)
    for key, value in parameters.items():
        wanted.parameters[key].CopyFrom(parameter(value))
    return request


TWICE = ask("doubler", [[1, 2]])
TWICE.inputs.append(TWICE.inputs[0])
INVALID, MISSING = Code.INVALID_ARGUMENT, Code.NOT_FOUND
ROW = [[1, 2]]
MISTAKES = {
    "unknown model": (ask("foo", ROW), MISSING, "Request for unknown model: 'foo' is not found"),
    "unknown version": (
        ask("doubler", ROW, version="99"),
        MISSING,
        "Request for unknown model: 'doubler' version 99 is not found",
    ),
    "no number": (
        ask("doubler", ROW, version="x"),
        INVALID,
        (
            "failed to get model version from specified version string 'x' (details: stol), version "
            "should be an "
            "integral value > 0"
        ),
    ),
    "negative version": (
        ask("doubler", ROW, version="-1"),
        INVALID,
        "invalid model version specified '-1' , version should be an integral value > 0",
    ),
    "datatype": (
        ask("doubler", ROW, dtype="int32", request_id="7"),
        INVALID,
        "[request id: 7] inference input 'x' data-type is 'INT32', but model 'doubler' expects 'FP32'",
    ),
    "shape": (
        ask("doubler", [[1, 2, 3]]),
        INVALID,
        "unexpected shape for input 'x' for model 'doubler'. Expected [-1,2], got [1,3].",
    ),
    "open shape": (
        ask("doubler", ROW, shape=[-1, 2]),
        INVALID,
        "All input dimensions should be specified for input 'x' for model 'doubler', got [-1,2]",
    ),
    "batch": (
        ask("doubler", [[1, 2]] * 9),
        INVALID,
        "inference request batch-size must be <= 8 for 'doubler'",
    ),
    "bytes": (
        ask("doubler", ROW, shape=[2, 2]),
        INVALID,
        "input byte size mismatch for input 'x' for model 'doubler'. Expected 16, got 8",
    ),
    "unknown input": (
        ask("doubler", ROW, name="z"),
        INVALID,
        "unexpected inference input 'z' for model 'doubler'",
    ),
    "an input twice": (
        TWICE,
        INVALID,
        (
            "expected 1 inputs but got 2 inputs for model 'doubler'. Got input(s) ['x', 'x']. Please "
            "provide all "
            "required input(s)."
        ),
    ),
    "no input": (
        pb.ModelInferRequest(model_name="doubler"),
        INVALID,
        (
            "expected 1 inputs but got 0 inputs for model 'doubler'. Got input(s) [], but missing required "
            "input(s) ['x']. Please provide all required input(s)."
        ),
    ),
    "no data": (
        no_data(),
        INVALID,
        "unable to find data for input tensor 'x' for model 'doubler' in request.",
    ),
    "both contents": (
        both(ask("doubler", ROW)),
        INVALID,
        "contents field must not be specified when using raw_input_contents for 'x' for model 'doubler'",
    ),
    "another kind of contents": (
        wrong_kind(),
        INVALID,
        (
            "unexpected explicit tensor data for input tensor 'x' for model 'doubler' of type "
            "'INT32', expected "
            "datatype 'FP32'"
        ),
    ),
    "unknown output": (wanting("q"), INVALID, "unexpected inference output 'q' for model 'doubler'"),
    "no classes": (
        wanting("y", classification=0),
        INVALID,
        "invalid value for 'classification' parameter, expected >= 0",
    ),
    "classes in words": (
        wanting("y", classification="1"),
        INVALID,
        "invalid value type for 'classification' parameter, expected int64_param",
    ),
    "no sequence": (
        ask("accumulator", ROW),
        INVALID,
        "inference request to model 'accumulator' must specify a non-zero or non-empty correlation ID",
    ),
    "no start": (
        step(42, 1),
        INVALID,
        (
            "inference request for sequence 42 to model 'accumulator' must specify the START flag on "
            "the first "
            "request of the sequence"
        ),
    ),
    "a batch in a sequence": (
        ask("accumulator", [[1], [2]], sequence_id=1, sequence_start=True),
        INVALID,
        (
            "inference request to model 'accumulator' must specify batch-size 1 due to requirements "
            "of sequence "
            "batcher"
        ),
    ),
    "a long id": (
        step("x" * 129, 1),
        Code.UNIMPLEMENTED,
        "string correlation ID cannot be longer than 128 characters",
    ),
    "an id of another kind": (
        ask("accumulator", ROW, sequence_id=1.5),
        INVALID,
        "invalid value type for 'sequence_id' parameter, expected int64_param or string_param.",
    ),
    "a flag of another kind": (
        step(1, 1, start=1),
        INVALID,
        "invalid value type for 'sequence_start' parameter, expected bool_param.",
    ),
    "priority": (
        ask("doubler", ROW, priority=-1),
        INVALID,
        "invalid value for 'priority', expected value >= 0.",
    ),
    "priority in words": (
        ask("doubler", ROW, priority="1"),
        INVALID,
        "invalid value type for 'priority' parameter, expected int64_param or uint64_param.",
    ),
    "timeout": (
        ask("doubler", ROW, timeout="1"),
        INVALID,
        "invalid value type for 'timeout' parameter, expected int64_param.",
    ),
    "a reserved key": (
        ask("doubler", ROW, triton_mood=True),
        INVALID,
        (
            "parameter keys starting with 'triton_' are reserved for Triton usage. Only the "
            "following keys starting "
            "with 'triton_' are allowed: triton_enable_empty_final_response"
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_tritons_words(oip: Any, stream: InferStream, mistake: str) -> None:
    request, code, text = MISTAKES[mistake]
    assert refusal(lambda: oip.ModelInfer(request))[:2] == (code, text)
    if mistake == "no sequence":  # on a stream, the stream is the sequence
        return
    stream.send(request, ask("doubler", ROW, request_id="after"))
    told, after = stream.next(), stream.next()
    assert (told.error_message, told.infer_response.id) == (text, request.id)
    parameters = told.infer_response.parameters
    assert parameters["tenuto_code"].string_param == code.name
    assert parameters["tenuto_reason"].string_param
    assert (after.error_message, after.infer_response.id) == ("", "after")  # the stream lives on


def test_our_own_refusals_keep_their_reason(oip: Any) -> None:
    code, text, reason = refusal(lambda: oip.ModelInfer(ask("doubler", [[1, float("nan")]])))
    assert (code, reason) == (INVALID, "NOT_FINITE")
    assert "NaN" in text


def test_bytes_that_are_no_request_end_the_call(channel: grpc.Channel) -> None:
    call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    assert refusal(lambda: call(b"\xff\xff"))[0] is Code.INTERNAL
    stream: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    assert refusal(lambda: list(stream(iter([b"\xff\xff"]))))[0] is Code.INTERNAL


# -- sequences -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [42, "kitchen"])
def test_a_sequence_keeps_its_state_between_unary_calls(oip: Any, sequence: int | str) -> None:
    assert total(oip, step(sequence, 1, 2, start=True, end=False)) == [1, 3]
    assert total(oip, step(sequence, 3)) == [6]  # several time steps in a message, or one
    response = oip.ModelInfer(step(sequence, 4, end=True, request_id="last"))
    assert (response.id, list(response.outputs[0].shape)) == ("last", [1, 1])
    assert floats(response).tolist() == [[10]]
    assert "START flag" in refusal(lambda: oip.ModelInfer(step(sequence, 1)))[1]


def test_a_number_and_its_text_are_two_sequences(oip: Any) -> None:
    assert total(oip, step(1, 5, start=True)) == [5]
    assert total(oip, step("1", 7, start=True)) == [7]
    assert total(oip, step(1, 1, end=True)) == [6]
    assert total(oip, step("1", 1, end=True)) == [8]


def test_start_on_a_live_sequence_ends_the_old_one_with_a_reason(server: Server, oip: Any) -> None:
    counting = Counting(server)
    assert total(oip, step(9, 5, start=True)) == [5]
    assert total(oip, step(9, 1, start=True)) == [1]
    assert total(oip, step(9, 1, end=True)) == [2]
    counting.wait_for_rise(1, "tenuto_sequences_ended_total", model="accumulator", reason="SUPERSEDED")


def test_what_is_left_over_at_the_end_is_in_the_last_answer(oip: Any) -> None:
    """Four samples make a frame, and the last one is filled up."""
    assert total(oip, step(3, 1, 1, 1, model="fours", start=True)) == []
    assert total(oip, step(3, 1, 1, 1, model="fours", end=True)) == [1, 2, 3, 4, 5, 6, 6, 6]


def test_a_sequence_outlives_the_stream_that_began_it(oip: Any, channel: grpc.Channel) -> None:
    with InferStream(channel) as one:
        one.send(step("s", 1, start=True))
        assert one.totals(1) == [[1]]
    assert total(oip, step("s", 2)) == [3]
    with InferStream(channel) as other:
        other.send(step("s", 3, end=True))
        assert other.totals(1) == [[6]]


def test_without_an_id_the_stream_is_the_sequence(channel: grpc.Channel) -> None:
    with InferStream(channel) as one, InferStream(channel) as other:
        for stream in (one, other):
            stream.send(*[ask("accumulator", [[n]]) for n in (1, 2, 3)])
        assert one.totals(3) == other.totals(3) == [[1], [3], [6]]
        one.half_close()
        assert list(one.rest()) == []


def test_answers_of_a_stream_come_in_the_order_of_their_requests(server: Server, stream: InferStream) -> None:
    with Gate(engine_of(server, "accumulator")) as gate:
        stream.send(
            step(5, 1, start=True, end=True, request_id="slow"), ask("doubler", [[1, 2]], request_id="quick")
        )
        gate.wait_for_arrival()
        wait_for(lambda: engine_of(server, "doubler").metrics.pending_chunks == 0, "the quick one to be run")
        gate.open()
        answers = [stream.next().infer_response for _ in range(2)]
    assert [answer.id for answer in answers] == ["slow", "quick"]
    assert all(answer.parameters["triton_final_response"].bool_param for answer in answers)


@pytest.mark.parametrize("ids", [["", ""], ["same", "same"], ["one", "another"]])
def test_steps_that_look_alike_are_parsed_once(
    stream: InferStream, monkeypatch: pytest.MonkeyPatch, ids: list[str]
) -> None:
    parsed = []
    take = inference._Asked.take

    def counted(asked: Any, request: pb.ModelInferRequest, asker: Any) -> Any:
        parsed.append(request.id)
        return take(asked, request, asker)

    monkeypatch.setattr(inference._Asked, "take", counted)
    for n in range(1, 21):
        for sequence in (1, 2):
            more: dict[str, Any] = {"start": True} if n == 1 else {}
            stream.send(step(sequence, n * sequence, request_id=ids[n % 2], **more))
    answers = [stream.next().infer_response for _ in range(40)]
    assert [answer.id for answer in answers] == [ids[n % 2] for n in range(1, 21) for _ in range(2)]
    sums = [n * (n + 1) // 2 for n in range(1, 21)]
    assert [floats(a).item() for a in answers] == [float(s * sequence) for s in sums for sequence in (1, 2)]
    assert len(parsed) == 4  # the first of each with its flag, and the first without
    stream.send(step(1, 1, 1), step(1, 0, end=True), step(1, 5), step(2, 0, end=True))
    after = [stream.next() for _ in range(4)]
    assert [floats(a.infer_response).ravel().tolist() for a in after[:2]] == [[211, 212], [212]]
    assert "START flag" in after[2].error_message  # though it looks as the known ones do
    assert floats(after[3].infer_response).tolist() == [[420]]


def test_with_the_header_an_error_ends_the_stream(channel: grpc.Channel) -> None:
    with InferStream(channel, triton_grpc_error="true") as stream:
        stream.send(step(1, 1))
        code, text, reason = refusal(stream.next)
    assert (code, reason) == (INVALID, "NOT_OPEN")
    assert "START flag" in text


def test_a_step_that_is_sent_again_is_answered_again_and_not_run(oip: Any) -> None:
    """Exactly once, for clients that number their steps: a call whose answer was lost is repeated."""
    assert total(oip, step("r", 1, start=True, step=1)) == [1]
    assert total(oip, step("r", 1, start=True, step=1)) == [1]  # its answer was lost, not its request
    assert total(oip, step("r", 2, step=2)) == [3]
    assert total(oip, step("r", 2, step=2)) == [3]
    code, text, reason = refusal(lambda: oip.ModelInfer(step("r", 1, step=9)))
    assert (code, reason) == (INVALID, "STEP_GAP")
    assert "expected 3, or 2 once more" in text
    assert total(oip, step("r", 4, end=True, step=3)) == [7]
    assert total(oip, step("r", 4, end=True, step=3)) == [7]  # after its end, too
    assert total(oip, step("r", 9, start=True, end=True, step=1)) == [9]


def test_a_step_that_is_sent_again_while_it_runs_is_run_once(server: Server, channel: grpc.Channel) -> None:
    oip = stub(channel)
    assert total(oip, step("w", 1, start=True, step=1)) == [1]
    with Gate(engine_of(server, "accumulator")) as gate, InferStream(channel) as stream:
        stream.send(step("w", 2, step=2))
        gate.wait_for_arrival()
        future = oip.ModelInfer.future(step("w", 2, step=2))
        stream.send(step("w", 2, step=2))
        gate.open()
        assert stream.totals(2) == [[3], [3]]
        assert floats(future.result(30)).tolist() == [[3]]
    assert total(oip, step("w", 0, end=True, step=3)) == [3]


def test_a_failed_sequence_says_why_and_is_gone(oip: Any) -> None:
    oip.ModelInfer(step(8, 1, start=True))
    code, _, reason = refusal(lambda: oip.ModelInfer(step(8, float("inf"))))
    assert (code, reason) == (INVALID, "NOT_FINITE")
    assert "START flag" in refusal(lambda: oip.ModelInfer(step(8, 1)))[1]


def test_an_idle_sequence_ends(toy_repository: Path, transport: str) -> None:
    with (
        serving(toy_repository, transport=transport, idle_seconds=0.05) as server,
        connect(server.port) as channel,
    ):
        oip = stub(channel)
        oip.ModelInfer(step(8, 1, start=True))
        engine = engine_of(server, "accumulator")
        wait_for(lambda: engine.metrics.ended["IDLE_EXPIRED"] == 1, "the sequence to expire")
        assert "START flag" in refusal(lambda: oip.ModelInfer(step(8, 1)))[1]


def test_a_full_pool_refuses_at_once(toy_repository: Path, transport: str) -> None:
    settings: dict[str, Any] = {"max_sequences": 1, "resume_reserve": 0.0}
    with serving(toy_repository, transport=transport, **settings) as server, connect(server.port) as channel:
        oip = stub(channel)
        oip.ModelInfer(step(1, 1, start=True))
        code, _, reason = refusal(lambda: oip.ModelInfer(step(2, 1, start=True)))
        assert (code, reason) == (Code.UNAVAILABLE, "POOL_FULL")
        assert total(oip, step(1, 1, end=True)) == [2]
        assert total(oip, step(2, 1, start=True, end=True)) == [1]


@contextmanager
def one_slot(toy_repository: Path, transport: str) -> Iterator[tuple[Server, Gate, InferStream]]:
    """A server with room for one sequence, whose runs wait, and a stream."""
    settings: dict[str, Any] = {"max_sequences": 1, "resume_reserve": 0.0}
    with (
        serving(toy_repository, transport=transport, **settings) as server,
        connect(server.port) as channel,
        Gate(engine_of(server, "accumulator")) as gate,
        InferStream(channel) as stream,
    ):
        yield server, gate, stream


def assert_nothing_is_left_but_the_end(server: Server, stream: InferStream) -> None:
    stream.half_close()
    assert list(stream.rest()) == []
    assert_nothing_is_left(server)


def test_what_begins_behind_an_end_waits_for_its_slot(toy_repository: Path, transport: str) -> None:
    """The same id again at once, where all slots are taken: the one that ends has to be answered first."""
    with one_slot(toy_repository, transport) as (server, gate, stream):
        stream.send(step(7, 1, start=True, end=True))
        stream.send(step(7, 10, start=True), step(7, 5), step(7, 5, end=True))
        stream.send(step(7, 100, start=True, end=True))
        wait_until_taken(server, stream)
        gate.open()
        assert stream.totals(5) == [[1], [10], [15], [20], [100]]
        assert "START flag" in stream.next().error_message
        assert_nothing_is_left_but_the_end(server, stream)


def wait_until_taken(server: Server, stream: InferStream) -> None:
    """Until the server has read all that was sent: one more, that it refuses at once. (It is answered in its
    place, behind all others.)"""
    refused = server.metrics.requests_refused
    before = refused["NOT_OPEN"]
    stream.send(step(99, 1))
    wait_for(lambda: refused["NOT_OPEN"] == before + 1, "the last request to be read")


def test_what_begins_anew_while_it_waits_for_a_slot_waits_on(toy_repository: Path, transport: str) -> None:
    with one_slot(toy_repository, transport) as (server, gate, stream):
        stream.send(step(7, 1, start=True), step(7, 1, end=True), step(7, 10, start=True))
        stream.send(step(7, 100, start=True, end=True))
        wait_until_taken(server, stream)
        gate.open()
        assert stream.totals(2) == [[1], [2]]
        assert "began anew" in stream.next().error_message
        assert stream.totals(1) == [[100]]
        assert "START flag" in stream.next().error_message
        assert_nothing_is_left_but_the_end(server, stream)


def test_a_text_of_which_nothing_is_left_at_its_end_is_answered_empty(oip: Any) -> None:
    """Neither the last step nor what follows END completes a word."""

    def words(text: bytes, **flags: Any) -> Any:
        request = ask("reader", name="id", shape=[1, 1], sequence_id=4, **flags)
        request.inputs[0].datatype, request.raw_input_contents[0] = "BYTES", packed(text)
        return oip.ModelInfer(request)

    shapes = [list(words(b"ab ", sequence_start=True).outputs[0].shape)]
    shapes += [list(words(b"", sequence_end=True).outputs[0].shape)]
    assert shapes == [[1, 1, 8], [1, 0, 8]]


def test_a_draining_server_takes_no_more_and_loses_nothing(toy_repository: Path, transport: str) -> None:
    leaving = "GRPC server is shutting down and has stopped accepting new requests."
    with serving(toy_repository, transport=transport) as server, connect(server.port) as channel:
        oip = stub(channel)
        with Gate(engine_of(server, "accumulator")) as gate, InferStream(channel) as stream:
            stream.send(step(1, 1, start=True))
            gate.wait_for_arrival()
            server.metrics.draining = True  # what `stop` does first
            for engine in server.catalogue.engines:
                engine.drain()
            assert refusal(lambda: oip.ModelInfer(step(2, 1, start=True)))[:2] == (Code.UNAVAILABLE, leaving)
            gate.open()
            assert stream.totals(1) == [[1]]


def test_a_refused_beginning_may_be_tried_again(toy_repository: Path, transport: str) -> None:
    """It never began: what is sent once more is no repetition."""
    settings: dict[str, Any] = {"max_sequences": 1, "resume_reserve": 0.0}
    with serving(toy_repository, transport=transport, **settings) as server, connect(server.port) as channel:
        oip = stub(channel)
        oip.ModelInfer(step(1, 1, start=True))
        for _ in range(2):
            told = refusal(lambda: oip.ModelInfer(step(2, 1, start=True, step=1)))
            assert told[2] == "POOL_FULL"
        oip.ModelInfer(step(1, 1, end=True))
        assert total(oip, step(2, 1, start=True, step=1)) == [1]
        assert total(oip, step(2, 1, start=True)) == [1]  # in its own place, though all are taken
        assert total(oip, step(2, 1, end=True)) == [2]


def test_a_sequence_that_expired_begins_anew(toy_repository: Path, transport: str) -> None:
    with (
        serving(toy_repository, transport=transport, idle_seconds=0.05) as server,
        connect(server.port) as channel,
        InferStream(channel) as stream,
    ):
        oip, metrics = stub(channel), engine_of(server, "accumulator").metrics
        assert total(oip, step(8, 5, start=True, step=1)) == [5]
        stream.send(ask("accumulator", [[7]]))
        assert stream.totals(1) == [[7]]
        wait_for(lambda: metrics.ended["IDLE_EXPIRED"] == 2, "both to expire")
        assert total(oip, step(8, 5, start=True, end=True, step=1)) == [5]  # run, and not remembered
        assert metrics.chunks["answered"] == 3
        # Without a name nothing says that it begins: its stream is told once that it ended.
        stream.send(ask("accumulator", [[1]]), ask("accumulator", [[2]]))
        assert "IDLE_EXPIRED" in stream.next().error_message
        assert stream.totals(1) == [[2]]


def test_only_what_began_it_is_a_repetition_of_its_beginning(oip: Any) -> None:
    assert total(oip, step("a", 5, start=True, end=True, step=1)) == [5]
    assert total(oip, step("a", 5, start=True, step=1)) == [5]  # another one, which goes on
    assert total(oip, step("a", 1, step=2)) == [6]
    told = refusal(lambda: oip.ModelInfer(step("a", 5, start=True, step=1)))  # late, and a duplicate
    assert told[2] == "STEP_GAP"
    assert total(oip, step("a", 1, end=True, step=3)) == [7]


def test_a_large_answer_is_not_kept(oip: Any) -> None:
    values = [1.0] * (20 << 10)
    assert len(total(oip, step("l", *values, start=True, step=1))) == len(values)
    told = refusal(lambda: oip.ModelInfer(step("l", *values, start=True, step=1)))
    assert told[::2] == (Code.UNAVAILABLE, "TOO_LARGE")
    assert total(oip, step("l", 1, end=True, step=2)) == [len(values) + 1.0]


@pytest.mark.parametrize("model", ["accumulator", "doubler"])
def test_whoever_asks_while_the_engine_ends_is_answered(
    toy_repository: Path, transport: str, model: str
) -> None:
    """He may have looked it up just before."""
    with serving(toy_repository, transport=transport) as server, connect(server.port) as channel:
        oip = stub(channel)
        engine_of(server, model).stop(Ending.DRAINING)
        request = step(1, 1, start=True) if model == "accumulator" else ask("doubler", [[1, 2]])
        with InferStream(channel) as stream:
            stream.send(request, request)
            assert all(stream.next().error_message for _ in range(2))
        assert refusal(lambda: oip.ModelInfer(request, timeout=10))[0] is Code.UNAVAILABLE
        assert len(server._inferences.shared.sequences) == 0


def test_a_large_request_on_a_stream_is_read_by_another_thread(stream: InferStream) -> None:
    values = [1.0] * (40 << 10)
    stream.send(step(1, *values, start=True), step(1, 1), step(1, *values, end=True))
    first, second, third = stream.totals(3)
    assert (first[-1], second, third[-1]) == (len(values), [len(values) + 1.0], 2 * len(values) + 1.0)
    stream.half_close()
    assert list(stream.rest()) == []


def test_an_output_is_asked_for_once(oip: Any) -> None:
    request = ask("doubler", [[1, 2]])
    for _ in range(2):
        request.outputs.add(name="y")
    assert refusal(lambda: oip.ModelInfer(request))[:2] == (
        INVALID,
        "an output is requested twice; once is enough for each",
    )


@pytest.mark.parametrize(
    "shape,data",
    [([], packed(b"x")), ([1 << 40, 1], packed(b"")), ([2], packed(b"x")), ([1], b"\1\0\0")],
)
def test_strange_bytes_are_refused(oip: Any, shape: list[int], data: bytes) -> None:
    request = pb.ModelInferRequest(model_name="brightness")
    request.inputs.add(name="image", datatype="BYTES", shape=shape)
    request.raw_input_contents.append(data)
    assert refusal(lambda: oip.ModelInfer(request))[0] is INVALID


def test_elements_beyond_their_datatype_are_refused(oip: Any) -> None:
    request = pb.ModelInferRequest(model_name="brightness")
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 4, 4])
    tensor.contents.uint_contents.extend([300] * 16)
    assert refusal(lambda: oip.ModelInfer(request))[0] is INVALID


@pytest.mark.parametrize("message", [b"\n\x07doubler\x1a", b"\n\x07doubler\x1a\x02\xff\xfe:\x01x"])
def test_bytes_that_begin_like_known_ones_and_are_none_end_the_stream(
    channel: grpc.Channel, message: bytes
) -> None:
    known = [ask("accumulator", [[n]]).SerializeToString() for n in (1, 2)]
    method = "/inference.GRPCInferenceService/ModelStreamInfer"
    call: Any = channel.stream_stream(method)
    cut = message.replace(b"\x07doubler", b"\x0baccumulator")
    assert refusal(lambda: list(call(iter([*known, cut]))))[0] is Code.INTERNAL


# -- what belongs to whom --------------------------------------------------------------------------


def test_many_sequences_at_once_are_as_each_alone(channel: grpc.Channel) -> None:
    with InferStream(channel) as stream:
        for n in range(1, 4):
            stream.send(*[step(100 + s, s, start=n == 1, end=n == 3) for s in range(1, 33)])
        answers = stream.totals(96)
    assert answers == [[float(s * n)] for n in range(1, 4) for s in range(1, 33)]
