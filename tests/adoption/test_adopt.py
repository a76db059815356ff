"""`tenuto adopt`: a folder that a server serves, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tenuto import Client
from tenuto.serving.adoption import adopting
from tenuto.serving.adoption.cli import main
from tenuto.serving.config import ServerConfig
from tenuto.serving.manifest import Manifest
from tenuto.serving.repository import ModelRepository
from tenuto.serving.server import Server
from tests import toys

from . import graphs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def adopt(path: Path, repository: Path, *options: str, name: str = "mine") -> int:
    return main(["adopt", str(path), "--name", name, "--repository", str(repository), *options])


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_the_file_is_copied_bit_for_bit_and_served(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = graphs.save(tmp_path, graphs.lstm())
    assert adopt(path, repository) == 0
    said = capsys.readouterr().out
    assert everything(repository) == [
        "mine", "mine/1", "mine/1/golden.npz", "mine/1/manifest.json", "mine/1/model.onnx"
    ]  # fmt: skip
    assert (repository / "mine/1/model.onnx").read_bytes() == path.read_bytes()
    assert f"tenuto serve {repository}" in said
    server = Server(ServerConfig.build({"repository": repository, "port": 0, "metrics_port": 0}, {}), "test")
    server.start()
    try:
        snippet = said.split("use it:\n")[1].replace("127.0.0.1:8001", f"127.0.0.1:{server.port}")
        exec(compile("\n".join(line[4:] for line in snippet.splitlines()), "snippet", "exec"), {})
        assert "'y': array" in capsys.readouterr().out
    finally:
        server.stop(0)


def test_the_next_version_is_taken_and_none_is_overwritten(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = graphs.save(tmp_path, graphs.mlp())
    assert [adopt(path, repository), adopt(path, repository, "--version", "7"), adopt(path, repository)] == [
        0
    ] * 3
    assert sorted(p.name for p in (repository / "mine").iterdir()) == ["1", "7", "8"]
    before = hashlib.sha256((repository / "mine/7/manifest.json").read_bytes()).digest()
    assert adopt(graphs.save(tmp_path, graphs.pictures()), repository, "--version", "7") == 1
    assert "is there, and nothing is overwritten" in capsys.readouterr().err
    assert hashlib.sha256((repository / "mine/7/manifest.json").read_bytes()).digest() == before


def test_a_guess_that_fails_is_not_written(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt(graphs.save(tmp_path, graphs.mislabelled()), repository) == 1
    said = capsys.readouterr().out
    assert "FAILED  a sequence cut into chunks gives what it gives whole" in said
    assert "--chunk, --left-context, --time-axis or --state may mend it" in said
    assert said.splitlines()[-1] == "nothing was written"
    assert everything(repository) == []


def test_what_only_the_user_can_say_is_asked_first(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt(graphs.save(tmp_path, graphs.growing()), repository) == 1
    assert "--length past_key=AXIS:N" in capsys.readouterr().err
    assert everything(repository) == []


@pytest.mark.parametrize("name", ["Mine", "../mine", ""])
def test_a_name_that_no_folder_may_have_is_refused(
    tmp_path: Path, repository: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt(graphs.save(tmp_path, graphs.mlp()), repository, name=name) == 1
    assert "name" in capsys.readouterr().err
    assert everything(tmp_path / "models") == []


def test_a_repository_that_is_not_there_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt(graphs.save(tmp_path, graphs.mlp()), tmp_path / "modles") == 1
    assert "modles is no folder; make it" in capsys.readouterr().err


def test_a_server_never_sees_half_of_it(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is checked, the repository holds no version of it; then all files at once."""
    seen: list[list[str]] = []
    publish = adopting._publish

    def look(staging: Path, at: Path) -> None:
        models = ModelRepository(repository).folders()
        seen.append(sorted(models) + sorted(p.name for p in staging.iterdir()))
        publish(staging, at)

    monkeypatch.setattr(adopting, "_publish", look)
    assert adopt(graphs.save(tmp_path, graphs.mlp()), repository) == 0
    assert seen == [["golden.npz", "manifest.json", "model.onnx"]]
    assert list(ModelRepository(repository).folders()) == ["mine"]


def test_somebody_who_was_faster_is_not_overwritten(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = adopting._publish

    def late(staging: Path, at: Path) -> None:
        at.mkdir()
        (at / "model.onnx").write_bytes(b"theirs")
        publish(staging, at)

    monkeypatch.setattr(adopting, "_publish", late)
    assert adopt(graphs.save(tmp_path, graphs.mlp()), repository) == 1
    assert "could not be made" in capsys.readouterr().err
    assert everything(repository) == ["mine", "mine/1", "mine/1/model.onnx"]


def test_weights_in_other_files_come_along(tmp_path: Path, repository: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    onnx.save_model(
        graphs.mlp(), source / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0
    )
    assert adopt(source / "a.onnx", repository) == 0
    assert (repository / "mine/1/a.data").read_bytes() == (source / "a.data").read_bytes()


def test_weights_outside_of_the_folder_do_not(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    onnx.save_model(
        graphs.mlp(), source / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0
    )
    shutil.move(source / "a.data", tmp_path / "a.data")
    (source / "a.data").symlink_to(tmp_path / "a.data")
    assert adopt(source / "a.onnx", repository) == 1
    assert "out of" in capsys.readouterr().err
    assert everything(repository) == []


@pytest.mark.parametrize("kind", ["link", "name"])
def test_nor_are_they_copied_for_a_manifest_that_is_given(
    tmp_path: Path, repository: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    model = graphs.mlp()
    onnx.external_data_helper.convert_model_to_external_data(model, location="a.data", size_threshold=0)
    onnx.save_model(model, source / "a.onnx")
    shutil.move(source / "a.data", tmp_path / "a.data")
    if kind == "link":
        (source / "a.data").symlink_to(tmp_path / "a.data")
    else:
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = "../a.data"
        (source / "a.onnx").write_bytes(model.SerializeToString())
    made = {"name": "m", "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 4]}]}
    made["outputs"] = [{"name": "y", "dtype": "float32", "shape": ["N", 2]}]
    (tmp_path / "m.json").write_text(json.dumps(made))
    assert adopt(source / "a.onnx", repository, "--manifest", str(tmp_path / "m.json")) == 1
    assert "lie outside of its folder; nothing was copied" in capsys.readouterr().err
    assert everything(repository) == []


def test_a_manifest_that_is_given_is_taken_whole_but_for_its_name(tmp_path: Path, repository: Path) -> None:
    made, manifest = toys.accumulator(max_frames=3, description="adds up")
    (tmp_path / "sum.onnx").write_bytes(made)
    (tmp_path / "sum.json").write_text(json.dumps(manifest))
    assert adopt(tmp_path / "sum.onnx", repository, "--manifest", str(tmp_path / "sum.json")) == 0
    written = Manifest.parse((repository / "mine/1/manifest.json").read_bytes(), "written")
    assert written == Manifest.model_validate(manifest | {"name": "mine"})


def test_what_a_file_says_of_itself_is_taken_unless_options_say_more(
    tmp_path: Path, repository: Path
) -> None:
    source = ROOT / "exported/gestures/1/model.onnx"
    assert adopt(source, repository) == 0
    written = Manifest.parse((repository / "mine/1/manifest.json").read_bytes(), "written")
    assert len(written.outputs[0].labels) == 10
    assert adopt(source, repository, "--chunk", "points=multiple:2") == 0
    written = Manifest.parse((repository / "mine/2/manifest.json").read_bytes(), "written")
    assert (written.inputs[0].multiple, written.outputs[0].labels) == (2, ())


def test_as_json(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adopt(graphs.save(tmp_path, graphs.mlp()), repository, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["folder"], told["version"]) == (str(repository / "mine/1"), 1)
    assert told["manifest"]["name"] == "mine"
    assert {row["held"] for row in told["checks"]} == {True, None}
    assert adopt(graphs.save(tmp_path, graphs.mislabelled()), repository, "--json", name="other") == 1
    assert json.loads(capsys.readouterr().out)["folder"] is None


def test_the_golden_steps_are_those_of_the_run_that_was_checked(tmp_path: Path, repository: Path) -> None:
    """The server replays them; here they are compared with what the graph is written to do."""
    assert adopt(graphs.save(tmp_path, graphs.controlled()), repository) == 0
    with np.load(repository / "mine/1/golden.npz") as golden:
        steps = [golden[f"{n}.in.INPUT"] for n in range(1, 7)]
        sums = np.cumsum(np.stack(steps), axis=0, dtype=np.float32)
        for number, total in enumerate(sums, 1):
            np.testing.assert_allclose(golden[f"{number}.out.OUTPUT"], total, rtol=0, atol=1e-6)


OURS = ["spoken-digits", "digit-strings", "gestures"]


@pytest.mark.parametrize("name", OURS)
def test_of_our_own_models_without_their_manifest_the_same_is_found(
    name: str, tmp_path: Path, repository: Path
) -> None:
    """States, axes and lengths as our exporter wrote them; what is for people alone no file tells."""
    source = ROOT / "exported" / name / "1"
    model = onnx.load(source / "model.onnx")
    del model.metadata_props[:]
    assert adopt(graphs.save(tmp_path, model), repository, name=name) == 0
    found = Manifest.parse((repository / name / "1/manifest.json").read_bytes(), "found")
    own = Manifest.parse((source / "manifest.json").read_bytes(), "own")

    def told(manifest: Manifest) -> Any:
        inputs = [
            (i.name, i.dtype, i.shape, i.batch_axis, i.time_axis, i.multiple, i.lengths)
            for i in manifest.inputs
        ]
        outputs = [(o.name, o.dtype, o.shape, o.batch_axis, o.time_axis, o.stride) for o in manifest.outputs]
        states = [(s.input, s.output, s.dtype, s.shape, s.batch_axis) for s in manifest.states]
        return sorted(states), inputs, sorted(outputs)

    assert told(found) == told(own)


def test_a_sequence_of_an_adopted_model_goes_on_over_chunks_of_any_length(
    tmp_path: Path, repository: Path
) -> None:
    """Frames of 5 samples, 2 apart, of a sound that comes in pieces: as numpy has them of the whole."""
    model = graphs.convolution()
    assert adopt(graphs.save(tmp_path, model), repository) == 0
    [kernel] = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "kernel"]
    sound = np.random.default_rng(2).uniform(-1, 1, 41).astype(np.float32)
    padded = np.concatenate([np.zeros(3, np.float32), sound])
    expected = np.stack([kernel[:, 0] @ padded[at : at + 5] for at in range(0, 40, 2)], axis=1)
    server = Server(ServerConfig.build({"repository": repository, "port": 0, "metrics_port": 0}, {}), "test")
    server.start()
    try:
        with Client(f"127.0.0.1:{server.port}") as client, client.stream("mine") as stream:
            pieces = [sound[None, at : at + 7] for at in range(0, 41, 7)]
            got = np.concatenate([output["frames"] for output in stream.run(pieces)], axis=1)
    finally:
        server.stop(0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
