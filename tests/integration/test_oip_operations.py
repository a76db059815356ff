"""The Open Inference Protocol beside inference: shared memory, loading and unloading, and callers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto.oip import inference_pb2 as pb
from tenuto.serving.oip.question import Place
from tenuto.serving.oip.refusal import Refusal
from tenuto.serving.oip.shared_memory import Regions
from tenuto.serving.server import Server
from tests import toys

from .oip_wire import InferStream, ask, floats, parameter, step, stub
from .running import Gate, engine_of, serving, wait_for
from .test_oip import refusal
from .wire import connect

Code = grpc.StatusCode
NEAR = "ipv4:127.0.0.1:1"


# -- shared memory ---------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Path]:
    """A file as shm_open makes it, of 64 bytes."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("shared memory by file is Linux's")
    file = folder / f"tenuto-test-{secrets.token_hex(8)}"
    file.write_bytes(bytes(64))
    yield file
    file.unlink()


@pytest.fixture
def sharing(toy_repository: Path, transport: str) -> Iterator[Server]:
    with serving(toy_repository, transport=transport, shared_memory="/tenuto-test-") as server:
        yield server


def register(oip: Any, file: Path, name: str = "r", offset: int = 0, byte_size: int = 64) -> None:
    oip.SystemSharedMemoryRegister(
        pb.SystemSharedMemoryRegisterRequest(
            name=name, key=f"/{file.name}", offset=offset, byte_size=byte_size
        )
    )


def put(tensor: Any, region: str, offset: int, nbytes: int) -> None:
    tensor.parameters["shared_memory_region"].CopyFrom(parameter(region))
    tensor.parameters["shared_memory_offset"].CopyFrom(parameter(offset))
    tensor.parameters["shared_memory_byte_size"].CopyFrom(parameter(nbytes))


def shared_request(offset: int = 8, nbytes: int = 8, out_bytes: int = 8) -> pb.ModelInferRequest:
    """doubler of two floats there; the answer goes to offset 32."""
    request = pb.ModelInferRequest(model_name="doubler")
    put(request.inputs.add(name="x", datatype="FP32", shape=[1, 2]), "r", offset, nbytes)
    put(request.outputs.add(name="y"), "r", 32, out_bytes)
    return request


def test_tensors_travel_through_shared_memory(sharing: Server, memory: Path) -> None:
    with connect(sharing.port) as channel:
        oip = stub(channel)
        assert "system_shared_memory" in oip.ServerMetadata(pb.ServerMetadataRequest()).extensions
        register(oip, memory)
        content = bytearray(64)
        content[8:16] = np.array([1.5, 2], np.float32).tobytes()
        memory.write_bytes(content)
        response = oip.ModelInfer(shared_request())
        (output,) = response.outputs
        assert list(response.raw_output_contents) == [b""]
        assert output.parameters["shared_memory_region"].string_param == "r"
        assert output.parameters["shared_memory_byte_size"].int64_param == 8
        assert np.frombuffer(memory.read_bytes()[32:40], np.float32).tolist() == [3, 4]
        status = oip.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest())
        assert {n: (r.key, r.offset, r.byte_size) for n, r in status.regions.items()} == {
            "r": (f"/{memory.name}", 0, 64)
        }
        oip.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
        told = refusal(lambda: oip.ModelInfer(shared_request()))
        assert told[:2] == (Code.NOT_FOUND, "Unable to find shared memory region: 'r'")


def test_mistakes_with_shared_memory(sharing: Server, memory: Path) -> None:
    mistakes = [
        (shared_request(offset=64), Code.INVALID_ARGUMENT, "Invalid offset for shared memory region: 'r'"),
        (
            shared_request(offset=60),
            Code.INVALID_ARGUMENT,
            "Invalid offset + byte size for shared memory region: 'r'",
        ),
        (
            shared_request(out_bytes=4),
            Code.INTERNAL,
            (
                "shared memory size specified with the request for output 'y' (4 bytes) should be at least 8 "
                "bytes to hold the results"
            ),
        ),
    ]
    content = shared_request()
    content.inputs[0].contents.fp32_contents.extend([1, 2])
    text = "unexpected 'content' provided when using shared memory for input tensor 'x' for model 'doubler'"
    with connect(sharing.port) as channel:
        oip = stub(channel)
        register(oip, memory)
        for request, code, words in [*mistakes, (content, Code.INVALID_ARGUMENT, text)]:
            told = refusal(lambda request=request: oip.ModelInfer(request))  # type: ignore[misc]
            assert told[:2] == (code, words)
        told = refusal(lambda: register(oip, memory))
        assert told[:2] == (Code.ALREADY_EXISTS, "shared memory region 'r' already in manager")
        assert refusal(lambda: register(oip, memory, "q", byte_size=65))[0] is Code.INVALID_ARGUMENT


def test_a_region_that_its_client_cuts_off_costs_one_request(sharing: Server, memory: Path) -> None:
    with connect(sharing.port) as channel:
        oip = stub(channel)
        register(oip, memory)
        memory.write_bytes(b"")
        assert "cut off" in refusal(lambda: oip.ModelInfer(shared_request()))[1]
        request = ask("doubler", [[1, 2]])
        put(request.outputs.add(name="y"), "r", 32, 8)
        assert "cut off" in refusal(lambda: oip.ModelInfer(request))[1]
        assert memory.stat().st_size == 0
        assert floats(oip.ModelInfer(ask("doubler", [[1, 2]]))).tolist() == [[2, 4]]


@pytest.mark.parametrize("key", ["/other", "/tenuto-test-/../../etc/passwd", "", "/tenuto-test-\0"])
def test_only_keys_with_the_prefix_are_opened(key: str) -> None:
    memory = Regions("/tenuto-test-", 64).of("", NEAR)
    with pytest.raises(Refusal, match="does not begin with|Unable to open"):
        memory.register("r", key, 0, 1)


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.7:55", "ipv6:[fe80::1]:55", ""])
def test_shared_memory_is_for_this_machine(memory: Path, peer: str) -> None:
    regions = Regions("/tenuto-test-", 64)
    regions.of("", NEAR).register("r", memory.name, 0, 64)
    far, place = regions.of("", peer), Place("r", 0, 8)
    steps: list[Callable[[], object]] = [
        lambda: far.register("q", memory.name, 0, 64),
        lambda: far.read(place),
        lambda: far.check(place),
        lambda: far.status(""),
        lambda: far.unregister(""),
    ]
    for one in steps:
        with pytest.raises(Refusal, match="on the server's machine"):
            one()
    regions.close()


@pytest.mark.parametrize(
    "peer", [NEAR, "ipv6:[::1]:5", "ipv6:%5B::1%5D:5", "ipv6:[::ffff:127.0.0.1]:5", "unix:"]
)
def test_a_region_is_its_callers(memory: Path, peer: str) -> None:
    regions, place = Regions("/tenuto-test-", 16), Place("r", 0, 8)
    ann, bob = regions.of("ann", peer), regions.of("bob", peer)
    ann.register("r", memory.name, 0, 64)
    for mine in (lambda: bob.read(place), lambda: bob.check(place), lambda: bob.status("r")):
        with pytest.raises(Refusal, match="Unable to find"):
            mine()
    bob.unregister("")
    assert ann.read(place) == bytes(8)
    with pytest.raises(Refusal, match="32 bytes of shared memory region 'r', the limit is 16"):
        ann.read(Place("r", 0, 32))
    regions.close()


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture
def controlled(tmp_path: Path, transport: str) -> Iterator[tuple[Server, Any, Path]]:
    toys.write(tmp_path, "accumulator", toys.accumulator())
    toys.write(tmp_path, "doubler", toys.doubler())
    with (
        serving(tmp_path, transport=transport, model_control=True, vetted=True) as server,
        connect(server.port) as channel,
    ):
        yield server, stub(channel), tmp_path


def load(oip: Any, model: str) -> None:
    oip.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model))


def unload(oip: Any, model: str) -> None:
    oip.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=model))


def test_a_model_is_unloaded_and_loaded_again(controlled: tuple[Server, Any, Path]) -> None:
    server, oip, root = controlled
    assert "model_repository" in oip.ServerMetadata(pb.ServerMetadataRequest()).extensions
    oip.ModelInfer(step(1, 5, start=True))
    unload(oip, "accumulator")
    assert refusal(lambda: oip.ModelInfer(step(1, 1)))[0] is Code.NOT_FOUND
    assert not oip.ModelReady(pb.ModelReadyRequest(name="accumulator")).ready
    assert floats(oip.ModelInfer(ask("doubler", [[1, 2]]))).tolist() == [[2, 4]]  # the others go on
    toys.write(root, "accumulator", toys.accumulator(scale=2.0), version=2)
    for _ in range(3):
        server.rollout.poll()  # nobody but an operator brings it back, however new it is
    assert not oip.ModelReady(pb.ModelReadyRequest(name="accumulator")).ready
    load(oip, "accumulator")
    load(oip, "accumulator")  # as it is
    assert floats(oip.ModelInfer(step(1, 1, start=True, end=True))).tolist() == [[2]]
    models = oip.RepositoryIndex(pb.RepositoryIndexRequest()).models
    assert [(m.name, m.state) for m in models] == [("doubler", "READY"), ("accumulator", "READY")]


def test_a_new_version_is_loaded_when_it_is_asked_for(controlled: tuple[Server, Any, Path]) -> None:
    _, oip, root = controlled
    toys.write(root, "doubler", toys.doubler(description="newer"), version=2)
    load(oip, "doubler")
    assert list(oip.ModelMetadata(pb.ModelMetadataRequest(name="doubler")).versions)[-1] == "2"
    assert oip.ModelInfer(ask("doubler", [[1, 2]])).model_version == "2"


def test_what_cannot_be_loaded_says_why(controlled: tuple[Server, Any, Path]) -> None:
    _, oip, root = controlled
    code, text, _ = refusal(lambda: load(oip, "nobody"))
    assert (code, text) == (
        Code.NOT_FOUND,
        "failed to load 'nobody', failed to poll from model repository",
    )
    assert refusal(lambda: unload(oip, "nobody"))[0] is Code.NOT_FOUND
    toys.write(root, "broken", (b"no graph", toys.doubler()[1]))
    code, text, _ = refusal(lambda: load(oip, "broken"))
    assert (code, text[:24]) == (Code.UNAVAILABLE, "failed to load 'broken':")
    request = pb.RepositoryModelLoadRequest(model_name="doubler")
    request.parameters["file:1/model.onnx"].bytes_param = b"mine"
    assert "no parameters are taken" in refusal(lambda: oip.RepositoryModelLoad(request))[1]
    toys.write(root, "doubler", (b"no graph", toys.doubler()[1]), version=2)
    assert "failed to load 'doubler'" in refusal(lambda: load(oip, "doubler"))[1]
    assert oip.ModelInfer(ask("doubler", [[1, 2]])).model_version == "1"
    oip.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="accumulator"))
    text = "Request for unknown model: 'accumulator' has no available versions"
    assert refusal(lambda: oip.ModelInfer(step(1, 1, start=True)))[:2] == (Code.NOT_FOUND, text)
    models = oip.RepositoryIndex(pb.RepositoryIndexRequest()).models
    reasons = {(m.name, m.version): m.reason for m in models if m.state == "UNAVAILABLE"}
    assert set(reasons) == {("broken", "1"), ("doubler", "2"), ("accumulator", "")}
    assert all(reasons.values())


# -- callers ---------------------------------------------------------------------------------------

TOKENS = {"ann": "a" * 32, "bob": "b" * 32, "ops": "o" * 32}


@pytest.fixture
def guarded(toy_repository: Path, tmp_path: Path, transport: str) -> Iterator[Server]:
    file = tmp_path / "callers.toml"
    file.write_text(
        f'[ann]\ntokens = ["{TOKENS["ann"]}"]\nmax_sequences = 1\n'
        f'[bob]\ntokens = ["{TOKENS["bob"]}"]\n[ops]\ntokens = ["{TOKENS["ops"]}"]\noperator = true\n'
    )
    settings: dict[str, Any] = {"transport": transport, "callers": file, "model_control": True}
    with serving(toy_repository, **settings) as server:
        yield server


def of(caller: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {TOKENS[caller]}"),)}


def test_a_sequence_is_its_callers(guarded: Server) -> None:
    with connect(guarded.port) as channel:
        oip = stub(channel)
        assert floats(oip.ModelInfer(step(1, 5, start=True), **of("ann"))).tolist() == [[5]]
        assert "START flag" in refusal(lambda: oip.ModelInfer(step(1, 1), **of("bob")))[1]
        assert floats(oip.ModelInfer(step(1, 7, start=True), **of("bob"))).tolist() == [[7]]
        assert floats(oip.ModelInfer(step(1, 1), **of("ann"))).tolist() == [[6]]
        code, text, reason = refusal(lambda: oip.ModelInfer(step(2, 1, start=True), **of("ann")))
        assert (code, reason) == (Code.UNAVAILABLE, "POOL_FULL")
        assert "'ann' has 1 live sequences here, its limit" in text
        oip.ModelInfer(step(1, 1, start=True), **of("ann"))  # instead of the one it had
        oip.ModelInfer(step(1, 1, end=True), **of("ann"))
        live = guarded._inferences.shared.sequences
        wait_for(lambda: len(live) == 1, "her place to be free again")
        oip.ModelInfer(step(3, 1, start=True, end=True), **of("ann"))


def test_a_token_that_is_revoked_ends_what_was_last_asked_with_it(guarded: Server, tmp_path: Path) -> None:
    file, second = tmp_path / "callers.toml", "c" * 32
    both = f'[ann]\ntokens = ["{TOKENS["ann"]}", "{second}"]\n'
    file.write_text(both)
    wait_for(lambda: guarded._callers.reload(), "the second token")
    other: dict[str, Any] = {"metadata": (("authorization", f"Bearer {second}"),)}
    with connect(guarded.port) as channel:
        oip = stub(channel)
        oip.ModelInfer(step("old", 1, start=True), **of("ann"))
        oip.ModelInfer(step("moved", 1, start=True), **of("ann"))
        oip.ModelInfer(step("moved", 1), **other)
        file.write_text(f'[ann]\ntokens = ["{second}"]\n')
        wait_for(lambda: guarded._callers.reload(), "the first one to go")
        with Gate(engine_of(guarded, "accumulator")) as gate:
            waiting = oip.ModelInfer.future(step("moved", 1), **other)
            gate.wait_for_arrival()
            guarded._inferences.drop_unknown()
            gate.open()
            assert floats(waiting.result(30)).tolist() == [[3]]
        assert "START flag" in refusal(lambda: oip.ModelInfer(step("old", 1), **other))[1]
        oip.ModelInfer(step("moved", 0, end=True), **other)


def test_strangers_are_told_nothing(guarded: Server) -> None:
    with connect(guarded.port) as channel:
        oip = stub(channel)
        calls: list[Callable[[], object]] = [
            lambda: oip.ModelInfer(ask("doubler", [[1, 2]])),
            lambda: oip.ServerMetadata(pb.ServerMetadataRequest()),
            lambda: oip.RepositoryIndex(pb.RepositoryIndexRequest()),
        ]
        for call in calls:
            assert refusal(call)[0] is Code.UNAUTHENTICATED
        with InferStream(channel) as stream:
            stream.send(ask("doubler", [[1, 2]]))
            assert refusal(stream.next)[0] is Code.UNAUTHENTICATED


def test_only_operators_load_and_unload(guarded: Server) -> None:
    request = pb.RepositoryModelUnloadRequest(model_name="doubler")
    with connect(guarded.port) as channel:
        oip = stub(channel)
        code, text, reason = refusal(lambda: oip.RepositoryModelUnload(request, **of("ann")))
        assert (code, reason) == (Code.UNAVAILABLE, "NOT_AN_OPERATOR")
        assert "only operators" in text
        assert oip.ModelReady(pb.ModelReadyRequest(name="doubler"), **of("ann")).ready
        oip.RepositoryModelUnload(request, **of("ops"))
        assert not oip.ModelReady(pb.ModelReadyRequest(name="doubler"), **of("ann")).ready


def test_who_is_known_no_more_loses_streams_and_sequences(guarded: Server, tmp_path: Path) -> None:
    with connect(guarded.port) as channel, InferStream(channel, **dict(of("ann")["metadata"])) as stream:
        stream.send(step("s", 1, start=True))
        assert stream.totals(1) == [[1]]
        file = tmp_path / "callers.toml"
        file.write_text(f'[bob]\ntokens = ["{TOKENS["bob"]}"]\n')
        wait_for(lambda: guarded._callers.reload(), "the file to be taken")
        guarded._inferences.drop_unknown()
        assert refusal(stream.next)[0] is Code.UNAUTHENTICATED
        wait_for(lambda: engine_of(guarded, "accumulator").metrics.active_sequences == 0, "it to end")
