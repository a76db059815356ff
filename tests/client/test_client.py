"""Unary calls over the sync client: values, errors, settings."""

import pickle
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import tenuto
from tenuto import (
    Client,
    InvalidInput,
    NotFound,
    Overloaded,
    Refused,
    ReplyTimeout,
    SequenceEnded,
    ServerError,
    TenutoError,
    Unavailable,
    errors,
)
from tenuto.settings import Settings
from tenuto.v1 import tenuto_pb2 as pb
from tests.client.fake_server import FakeServer

PNG = b"\x89PNG\r\n\x1a\n" + b"image"
JPEG = b"\xff\xd8\xff\xe0" + b"image"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as one:
        yield one


def test_a_prediction_holds_arrays_version_and_timing(client: Client) -> None:
    images = np.array([[[0, 0], [0, 0]], [[255, 255], [255, 255]]], np.uint8)
    prediction = client.predict("brightness", images)
    assert prediction["log_probabilities"].shape == (2, 2)
    assert prediction["log_probabilities"].argmax(1).tolist() == [0, 1]
    assert prediction.version == 3
    assert prediction.timing == tenuto.Timing(queue_us=11, compute_us=22, batch_size=2)
    prediction["log_probabilities"][0] = 0  # the caller's own to change


def test_an_array_travels_little_endian_and_row_major(server: FakeServer, client: Client) -> None:
    array = np.arange(4, dtype=">f4").reshape(2, 2).T
    client.predict("brightness", {"image": array}, version=2)
    (request,) = server.requests
    assert (request.model, request.version) == ("brightness", 2)
    (tensor,) = request.inputs
    assert (tensor.name, tensor.dtype, list(tensor.shape)) == ("image", "float32", [2, 2])
    assert tensor.data == struct.pack("<4f", 0, 2, 1, 3)


@pytest.mark.parametrize("image,encoding", [(PNG, "png"), (JPEG, "jpeg")], ids=["png", "jpeg"])
def test_one_encoded_image_travels_as_it_is(
    server: FakeServer, client: Client, image: bytes, encoding: str
) -> None:
    client.predict("brightness", image)
    (tensor,) = server.requests[0].inputs
    assert (tensor.dtype, list(tensor.shape), tensor.data) == (encoding, [], image)


def test_several_encoded_images_travel_behind_their_lengths(server: FakeServer, client: Client) -> None:
    assert client.predict("brightness", [PNG, PNG + b"!"])["log_probabilities"].shape == (2, 2)
    (tensor,) = server.requests[0].inputs
    assert (tensor.dtype, list(tensor.shape)) == ("png", [2])
    assert tensor.data == b"\x0d\0\0\0" + PNG + b"\x0e\0\0\0" + PNG + b"!"


@pytest.mark.parametrize(
    "inputs,reason,text",
    [
        (b"GIF89a", "WRONG_ENCODING", "47 49 46 38 39 61"),
        (b"", "WRONG_ENCODING", "begins with nothing"),
        ([PNG, JPEG], "WRONG_ENCODING", "jpeg and png"),
        ([], "WRONG_DTYPE", "a list"),
        ([1.0, 2.0], "WRONG_DTYPE", "numpy.asarray"),
        (np.array(["a"]), "WRONG_DTYPE", "str"),
        (np.zeros(2, np.complex64), "WRONG_DTYPE", "complex64"),
    ],
    ids=["gif", "empty", "mixed", "none", "list", "strings", "complex"],
)
def test_what_cannot_travel_is_invalid_input(
    server: FakeServer, client: Client, inputs: Any, reason: str, text: str
) -> None:
    with pytest.raises(InvalidInput, match=text) as caught:
        client.predict("brightness", inputs)
    assert caught.value.reason == reason
    assert isinstance(caught.value, ValueError)
    assert server.requests == []


@pytest.mark.parametrize("version", [-1, 2**32, "1"])
def test_a_version_that_is_none_is_invalid_input(client: Client, version: Any) -> None:
    with pytest.raises(InvalidInput, match="WRONG_SETTING"):
        client.predict("brightness", np.zeros((1, 2, 2), np.uint8), version)
    with pytest.raises(InvalidInput, match="WRONG_SETTING"):
        client.model("brightness", version)
    with pytest.raises(InvalidInput, match="WRONG_SETTING"):
        client.stream("brightness", version=version)


def test_models_are_listed_with_their_state(client: Client) -> None:
    accumulator, brightness, broken, away = client.models()
    assert (accumulator.name, accumulator.version, accumulator.state) == ("accumulator", 3, "READY")
    assert (accumulator.stateful, brightness.stateful) == (True, False)
    assert (broken.state, broken.why) == ("FAILED", "no such operator")
    assert (away.state, away.version) == ("UNLOADED", 12)
    assert (accumulator.sha256, accumulator.fingerprint) == ("0" * 64, "f" * 64)
    memory = accumulator.state_bytes_used, accumulator.state_bytes, accumulator.file_bytes
    assert memory == (1 << 19, 65 << 19, 1234)
    assert accumulator.manifest == {}


def test_one_model_comes_with_its_manifest(client: Client) -> None:
    assert client.model("accumulator").manifest["inputs"][0]["rate_hz"] == 8000.0


def test_models_are_loaded_unloaded_and_reloaded(server: FakeServer, client: Client) -> None:
    loaded = client.load("accumulator")
    assert (loaded.model, loaded.changed, loaded.sequences) == (client.models()[0], True, 0)
    server.is_new, server.sequences = False, [pb.Sequence(sequence_id="a")]
    assert client.unload("accumulator") == tenuto.Unloaded(versions=(2, 3), sequences=1)
    server.sequences = [pb.Sequence(sequence_id="a"), pb.Sequence(sequence_id="b")]
    reloaded = client.reload("brightness")
    assert (reloaded.model.name, reloaded.changed, reloaded.sequences) == ("brightness", False, 2)
    with pytest.raises(Unavailable, match="MODEL_NOT_READY: failed to load 'none': it is bad"):
        client.load("none")
    assert [name for name, _ in server.commands] == ["LoadModel", "UnloadModel", "ReloadModel", "LoadModel"]


def test_a_model_is_loaded_at_one_server_that_is_named(server: FakeServer) -> None:
    with Client(f"{server.target},{server.target}") as client:
        for call in (client.load, client.unload, client.reload):
            with pytest.raises(InvalidInput, match="at one server, got 2 .*name one"):
                call("accumulator")
    server.abort = (grpc.StatusCode.UNAVAILABLE, "leaving", (("tenuto-reason", "DRAINING"),))
    with Client(server.target) as client:  # behind the same name there may be another one: it is not asked
        server.called.clear()
        with pytest.raises(Unavailable, match="DRAINING"):
            client.unload("accumulator")
    assert server.commands == []


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), None])
def test_a_time_to_wait_that_is_none_is_invalid_input(client: Client, seconds: Any) -> None:
    with pytest.raises(InvalidInput, match="setting timeout_seconds: expected a number of seconds above 0"):
        client.load("accumulator", timeout_seconds=seconds)


def test_an_unknown_model_is_not_found(client: Client) -> None:
    with pytest.raises(NotFound, match="^UNKNOWN_MODEL: no model 'none'") as caught:
        client.model("none")
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "UNKNOWN_MODEL")
    assert caught.value.retry_after_seconds is None


@pytest.mark.parametrize(
    "code,metadata,kind",
    [
        ("INVALID_ARGUMENT", {"tenuto-reason": "WRONG_SHAPE"}, InvalidInput),
        ("RESOURCE_EXHAUSTED", {"tenuto-reason": "TOO_LARGE"}, InvalidInput),
        ("RESOURCE_EXHAUSTED", {"tenuto-reason": "POOL_FULL"}, Overloaded),
        ("RESOURCE_EXHAUSTED", {"tenuto-reason": "OVERLOADED"}, Overloaded),
        ("FAILED_PRECONDITION", {"tenuto-reason": "NOT_STATELESS"}, Refused),
        ("UNAUTHENTICATED", {}, Refused),
        ("UNAVAILABLE", {"tenuto-reason": "DRAINING"}, Unavailable),
        ("INTERNAL", {"tenuto-reason": "RUN_FAILED"}, ServerError),
        ("DATA_LOSS", {}, ServerError),
        ("INTERNAL", {"tenuto-retry-after-ms": "soon"}, ServerError),
    ],
)
def test_a_status_maps_by_reason_and_code(
    server: FakeServer, client: Client, code: str, metadata: dict[str, str], kind: type[ServerError]
) -> None:
    server.abort = (grpc.StatusCode[code], "text", tuple(metadata.items()))
    for call in (client.models, lambda: client.stream("accumulator").__enter__()):
        with pytest.raises(ServerError, match="text") as caught:
            call()
        assert type(caught.value) is kind
        assert caught.value.code == code
        assert caught.value.reason == metadata.get("tenuto-reason", "")
        assert caught.value.retry_after_seconds is None
        assert grpc.RpcError not in type(caught.value).__mro__


def test_overloaded_says_when_to_come_back(server: FakeServer, client: Client) -> None:
    metadata = (("tenuto-reason", "POOL_FULL"), ("tenuto-retry-after-ms", "1500"))
    server.abort = (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", metadata)
    with pytest.raises(Overloaded) as caught:
        client.models()
    assert caught.value.retry_after_seconds == 1.5


def test_a_call_has_a_deadline(server: FakeServer) -> None:
    server.hang = True
    with (
        Client(server.target, timeout_seconds=0.05) as client,
        pytest.raises(ReplyTimeout, match=rf"{server.target} did not answer within 0\.05 s"),
    ):
        client.models()


def test_a_message_over_the_limit_is_invalid_input(server: FakeServer) -> None:
    with (
        Client(server.target, max_message_bytes=1000) as client,
        pytest.raises(InvalidInput, match="TOO_LARGE: .*larger than max") as caught,
    ):
        client.predict("brightness", np.zeros((500, 2, 2), np.uint8))
    assert caught.value.code == "RESOURCE_EXHAUSTED"


def test_a_closed_client_is_unavailable(server: FakeServer) -> None:
    client = Client(server.target)
    client.close()
    with pytest.raises(Unavailable, match=f"CLIENT_CLOSED: the client of {server.target} is closed"):
        client.models()
    with pytest.raises(Unavailable, match="CLIENT_CLOSED"):
        client.stream("accumulator").__enter__()


def test_no_server_is_unavailable_and_says_where(server: FakeServer) -> None:
    server.stop()
    with (
        Client(server.target) as client,
        pytest.raises(Unavailable, match=f"^UNAVAILABLE: {server.target}: "),
    ):
        client.models()


@pytest.mark.parametrize("target", ["localhost:1", "127.0.0.1:8001", "[::1]:8001", "dns:///a:1"])
def test_a_target_is_a_host_and_port_or_a_grpc_name(target: str) -> None:
    assert Settings(target).target == target


@pytest.mark.parametrize(
    "target,targets",
    [
        ("a:1", ("a:1",)),
        ("a:1,b:2, c:3", ("a:1", "b:2", "c:3")),
        ("dns:///a:1,unix:/b", ("dns:///a:1", "unix:/b")),
        ("ipv6:[::1]:1,[::2]:1", ("ipv6:[::1]:1,[::2]:1",)),  # one name of gRPC's own
    ],
)
def test_several_targets_stand_behind_commas(target: str, targets: tuple[str, ...]) -> None:
    assert Settings(target).targets == targets


def test_a_name_with_several_addresses_is_spread_and_found_again() -> None:
    options = dict(Settings("a:1,127.0.0.1:1").channel_options("a:1"))
    assert options["grpc.lb_policy_name"] == "round_robin"
    assert options["grpc.max_reconnect_backoff_ms"] == 1000
    assert options["grpc.dns_min_time_between_resolutions_ms"] == 2000
    assert "grpc.enable_http_proxy" not in options
    assert dict(Settings("a:1,127.0.0.1:1").channel_options("127.0.0.1:1"))["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize(
    "target", ["", "localhost", "a:1,", "a:1,b", "localhost:0", "localhost:99999", ":8001"]
)
def test_a_wrong_target_is_refused_when_built(target: str) -> None:
    with pytest.raises(InvalidInput, match=r"target: expected 'host:port'.* behind commas, got "):
        Client(target)


@pytest.mark.parametrize(
    "name,value",
    [
        ("timeout_seconds", 0),
        ("timeout_seconds", None),
        ("reply_seconds", -1.0),
        ("keepalive_seconds", float("nan")),
        ("max_message_bytes", 1.5),
        ("buffer_bytes", 0),
        ("resume_seconds", -1),
        ("resume_seconds", None),
        ("replay_bytes", 0),
        ("poison_losses", 0),
    ],
)
def test_a_wrong_setting_is_refused_when_built(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"setting {name}: expected .* got {value!r}") as caught:
        Client("127.0.0.1:1", **{name: value})
    assert caught.value.reason == "WRONG_SETTING"


def test_keepalive_pings_only_while_a_call_is_open() -> None:
    options = dict(Settings("example.org:1", keepalive_seconds=5).channel_options("example.org:1"))
    assert options["grpc.keepalive_time_ms"] == 5000
    assert options["grpc.keepalive_permit_without_calls"] == 0
    assert "grpc.enable_http_proxy" not in options


def test_a_server_on_this_machine_is_not_asked_for_through_a_proxy() -> None:
    assert dict(Settings("127.0.0.1:1").channel_options("127.0.0.1:1"))["grpc.enable_http_proxy"] == 0


def test_every_error_is_in_the_tree_and_survives_pickling() -> None:
    kinds = [getattr(tenuto, name) for name in tenuto.__all__]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) == 13
    for kind in kinds:
        assert issubclass(kind, TenutoError)
        assert kind.__name__ in (errors.__doc__ or "")
        assert str(pickle.loads(pickle.dumps(kind("text")))).endswith("text")
    ended = SequenceEnded("text", reason="DRAINING", last_step=4, resume_token=b"token")
    assert vars(pickle.loads(pickle.dumps(ended))) == vars(ended)


@pytest.mark.parametrize("token", [None, b"bytes", lambda: None, "two words", "ü"])
def test_a_token_that_is_none_is_named_and_not_quoted(token: Any) -> None:
    with pytest.raises(InvalidInput, match="setting token") as wrong:
        Client("127.0.0.1:1", token=token).models()
    assert "two words" not in str(wrong.value)
    assert "ü" not in str(wrong.value)
