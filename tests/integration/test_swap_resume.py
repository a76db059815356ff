"""What a caller of the client sees of a version swap: nothing, where the new version takes the state over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenuto import Client, errors
from tenuto.serving import loader
from tenuto.serving.server import Server
from tests import toys

from .running import Counting, assert_nothing_is_left, engine_of, serving, unvetted, wait_for

MAX_AGE_SECONDS = 0.3


@pytest.fixture(autouse=True)
def without_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "vet", unvetted)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    toys.write(tmp_path, "accumulator", toys.accumulator())
    with serving(tmp_path, max_age_seconds=MAX_AGE_SECONDS) as server:
        yield server
        assert_nothing_is_left(server)


def swap(server: Server, **changes: Any) -> str:
    """Version 2 takes over; its graph multiplies by ten. The fingerprint of version 1."""
    (old,) = server.catalogue.served
    made = toys.accumulator(scale=10)
    toys.write(server.config.repository, "accumulator", (made[0], made[1] | changes), 2)
    for _ in range(2):
        server.rollout.poll()
    assert engine_of(server, "accumulator").version == 2
    return old.fingerprint


def wait_until_sent_away(server: Server) -> None:
    ended = {"model": "accumulator", "reason": "MAX_AGE"}
    counting = Counting(server)
    wait_for(
        lambda: counting.rise("tenuto_sequences_ended_total", **ended) > 0 or _retired(server),
        "max age to be over",
    )


def _retired(server: Server) -> bool:
    return all(one.engine.emptied.is_set() for one in server.catalogue.retiring)


def one() -> Any:
    return np.array([1.0], np.float32)


def test_a_sequence_goes_on_on_the_new_version_with_the_state_of_the_old(server: Server) -> None:
    (old,) = server.catalogue.served
    with Client(f"127.0.0.1:{server.port}") as client, client.stream("accumulator") as stream:
        stream.send(one())
        assert next(stream).outputs["y"] == [1]
        swap(server, resumes_from=[old.fingerprint])
        stream.send(one())
        assert next(stream).outputs["y"] == [2]
        assert stream.version == 1
        wait_until_sent_away(server)
        stream.send(one())
        assert next(stream).outputs["y"] == [30]  # the sum so far, and the graph of version 2
        assert (stream.version, stream.resumes) == (2, 1)
        stream.end()
        assert list(stream) == []


@pytest.mark.parametrize(
    "changes, words",
    [({}, "version 2 does not take it over"), ({"resumes_from": ["0" * 64]}, "does not take it over")],
)
def test_else_it_ends_and_the_error_says_why(server: Server, changes: dict[str, Any], words: str) -> None:
    with Client(f"127.0.0.1:{server.port}") as client, client.stream("accumulator") as stream:
        stream.send(one())
        next(stream)
        swap(server, **changes)
        wait_until_sent_away(server)
        stream.send(one())
        with pytest.raises(errors.TenutoError, match=words) as caught:
            next(stream)
        assert getattr(caught.value, "reason", "") == "TOKEN_INVALID"


def test_a_copy_that_a_full_disk_cut_off_replaces_nothing(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """It stands still, so it is tried; and it is no model."""
    model, manifest = toys.accumulator(scale=10)
    folder = toys.write(server.config.repository, "accumulator", (model, manifest), 2)
    (folder / "model.onnx").write_bytes(model[: len(model) // 2])
    counting = Counting(server)
    for _ in range(2):
        server.rollout.poll()
    loads = {"model": "accumulator", "result": "failed"}
    assert counting.rise("tenuto_model_loads_total", **loads) == 1
    assert "accumulator/2 is not served" in caplog.text
    with Client(f"127.0.0.1:{server.port}") as client, client.stream("accumulator") as stream:
        stream.send(one())
        assert next(stream).outputs["y"] == [1]
    (folder / "model.onnx").write_bytes(model)  # space was made, and it is copied again
    for _ in range(2):
        server.rollout.poll()
    with Client(f"127.0.0.1:{server.port}") as client, client.stream("accumulator") as stream:
        stream.send(one())
        assert next(stream).outputs["y"] == [10]
