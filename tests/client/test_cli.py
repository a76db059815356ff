"""The client commands against the fake server, and what is dispatched elsewhere."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import types
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tenuto import Model, cli
from tenuto.cli import main
from tenuto.v1 import tenuto_pb2 as pb
from tests.client.fake_server import MANIFESTS, FakeServer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with FakeServer() as fake:
        monkeypatch.setenv("TENUTO_SERVER", fake.target)
        yield fake


@pytest.fixture
def sound(tmp_path: Path) -> str:
    """50 ms of 8 kHz sound; each sample is 1."""
    return write_wav(tmp_path / "ones.wav", rate=8000)


def write_wav(path: Path, *, rate: int, channels: int = 1, width: int = 2) -> str:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(b"\1\0" * 400)
    return str(path)


TABLE = """\
MODEL          STATE     LIVE/SLOTS  STATES/MOST       FILES     PROVIDER  SHA256        DESCRIPTION
accumulator/3  READY     1/64        512 KiB/32.5 MiB  1.21 KiB  CPU       000000000000  Sums what a sequence ever sent.
brightness/3   READY     -           -                 1.21 KiB  CPU       000000000000  Says whether an image is dark or bright.
broken/1       FAILED    -           -                 -         -         -
  no such operator
away/12        UNLOADED  -           -                 -         -         -
"""  # noqa: E501


def test_models_prints_a_table(server: FakeServer, capsys: Any) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().out == TABLE


def test_on_a_terminal_rows_end_where_its_lines_do(
    server: FakeServer, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a version failed is told in full."""
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["models"]) == 0
    cut = [line if line == "  no such operator" else line[:12].rstrip() for line in TABLE.splitlines()]
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == cut


def test_models_as_json_is_all_that_there_is(server: FakeServer, capsys: Any) -> None:
    assert main(["models", "--json"]) == 0
    first, *_, last = json.loads(capsys.readouterr().out)
    assert set(first) == {field.name for field in dataclasses.fields(Model)} - {"manifest"}
    assert (first["name"], first["sha256"]) == ("accumulator", "0" * 64)
    assert (first["state_bytes_used"], first["state_bytes"], first["file_bytes"]) == (1 << 19, 65 << 19, 1234)
    assert (last["name"], last["version"], last["state"]) == ("away", 12, "UNLOADED")


@pytest.mark.parametrize(
    "count,text",
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1 << 20, "1 MiB"), (3 << 39, "1.5 TiB")],
)
def test_sizes_are_told_in_three_figures(count: int, text: str) -> None:
    assert cli._size(count) == text


@pytest.mark.parametrize(
    "command,is_new,ended,told",
    [
        ("load", True, 0, "accumulator/3 serves now, SHA-256 000000000000\n"),
        ("load", False, 0, "accumulator/3 served already, SHA-256 000000000000\n"),
        ("reload", False, 0, "accumulator/3 served already, SHA-256 000000000000\n"),
        (
            "reload",
            True,
            1,
            "accumulator/3 serves now, SHA-256 000000000000\n1 live sequence of the files before ended\n",
        ),
        ("unload", True, 0, "unloaded accumulator/2, accumulator/3; no live sequences ended\n"),
        ("unload", True, 2, "unloaded accumulator/2, accumulator/3; 2 live sequences ended\n"),
    ],
)
def test_load_unload_and_reload_say_what_came_of_it(
    server: FakeServer, capsys: Any, command: str, is_new: bool, ended: int, told: str
) -> None:
    server.is_new, server.sequences = is_new, [pb.Sequence(sequence_id=f"s-{i}") for i in range(ended)]
    assert main([command, "accumulator"]) == 0
    assert capsys.readouterr().out == told
    assert server.commands == [(f"{command.title()}Model", "accumulator")]


def test_load_unload_and_reload_as_json(server: FakeServer, capsys: Any) -> None:
    server.sequences = [pb.Sequence(sequence_id="s-1")]
    for command in ("reload", "load", "unload"):
        assert main([command, "accumulator", "--json"]) == 0
    reloaded, loaded, unloaded = map(json.loads, capsys.readouterr().out.splitlines())
    assert (reloaded["model"]["name"], reloaded["changed"], reloaded["sequences"]) == ("accumulator", True, 1)
    assert loaded == reloaded | {"sequences": 0}
    assert unloaded == {"model": "accumulator", "versions": [2, 3], "sequences": 0}


@pytest.mark.parametrize("command", ["load", "unload", "reload"])
def test_what_is_refused_is_one_line_and_exit_code_1(
    server: FakeServer, capsys: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([command, "none"]) == 1
    text = f"tenuto {command}: MODEL_NOT_READY: failed to load 'none': it is bad\n"
    assert capsys.readouterr().err == text
    monkeypatch.setenv("TENUTO_SERVER", f"{server.target},{server.target}")
    assert main([command, "accumulator"]) == 1
    assert "name one" in capsys.readouterr().err


def test_the_outcome_of_a_load_is_waited_for_as_long_as_is_said(server: FakeServer, capsys: Any) -> None:
    server.hang = True
    assert main(["load", "accumulator", "--wait-seconds", "0.05"]) == 1
    assert "did not answer within 0.05 s" in capsys.readouterr().err


def test_sequences_prints_a_line_for_each(server: FakeServer, capsys: Any) -> None:
    server.sequences = [
        pb.Sequence(
            sequence_id="s-1",
            model="accumulator",
            version=3,
            label="kitchen",
            last_step=7,
            age_seconds=61.25,
            idle_seconds=0.5,
        ),
        pb.Sequence(sequence_id="s-2", model="accumulator", version=2),
    ]
    assert main(["sequences", "--model", "accumulator"]) == 0
    assert server.asked_model == "accumulator"
    assert capsys.readouterr().out.splitlines() == [
        "s-1  accumulator/3  step 7  61.2 s old  0.5 s idle  kitchen",
        "s-2  accumulator/2  step 0  0.0 s old  0.0 s idle",
    ]
    assert main(["sequences", "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)
    assert first == {
        "id": "s-1",
        "model": "accumulator",
        "version": 3,
        "label": "kitchen",
        "last_step": 7,
        "age_seconds": 61.25,
        "idle_seconds": 0.5,
    }


def test_end_ends_one_sequence(server: FakeServer, capsys: Any) -> None:
    server.sequences = [pb.Sequence(sequence_id="s-1"), pb.Sequence(sequence_id="s-2")]
    assert main(["end", "s-1"]) == 0
    assert [one.sequence_id for one in server.sequences] == ["s-2"]
    assert main(["end", "s-1"]) == 1
    assert "tenuto end: UNKNOWN_SEQUENCE: no live sequence 's-1'" in capsys.readouterr().err


def test_a_stream_may_be_given_several_servers(
    server: FakeServer, capsys: Any, sound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeServer() as second:
        server.accidents = {2: [grpc.StatusCode.UNAVAILABLE]}
        words = ["stream", "accumulator", sound, "--json", "--server", f"{second.target},{server.target}"]
        assert main(words) == 0  # the model is asked of the first, the stream begins at the second
        assert (len(server.opens), len(second.opens)) == (1, 1)
    *outputs, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert [output["outputs"]["total"][-1] for output in outputs] == [160, 320, 400]


def test_predict_sends_images_as_one_batch(server: FakeServer, capsys: Any, tmp_path: Path) -> None:
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    for file in files:
        Path(file).write_bytes(PNG)
    assert main(["predict", "brightness", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{file}: log_probabilities dark 99.9 %, bright 0.1 %" for file in files]
    (request,) = server.requests
    assert request.inputs[0].shape == [2]


def test_predict_joins_rows_and_batches_of_npy(server: FakeServer, capsys: Any, tmp_path: Path) -> None:
    one, many = str(tmp_path / "one.npy"), str(tmp_path / "many.npy")
    np.save(one, np.full((2, 2), 255, np.uint8))
    np.save(many, np.zeros((2, 2, 2), np.uint8))
    assert main(["predict", "brightness", one, many, "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{one}: log_probabilities bright 99.9 %",
        f"{many}[0]: log_probabilities dark 99.9 %",
        f"{many}[1]: log_probabilities dark 99.9 %",
    ]


def test_predict_as_json(server: FakeServer, capsys: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "one.npy")
    np.save(file, np.zeros((2, 2), np.uint8))
    assert main(["predict", "brightness", file, "--json", "--model-version", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["model"], printed["version"]) == ("brightness", 3)
    assert len(printed["answers"][0]["outputs"]["log_probabilities"]) == 2


def test_stream_sends_sound_in_chunks_and_sums_up(server: FakeServer, capsys: Any, sound: str) -> None:
    assert main(["stream", "accumulator", sound, "--realtime"]) == 0
    *told, summary = capsys.readouterr().out.splitlines()
    assert told == ["step 1: total 160; sign positive 100.0 %"]  # a line when the label changes
    assert summary.startswith("3 outputs in ")
    assert "latency p50 " in summary
    assert "real-time factor " in summary
    assert [len(tensor.data) // 2 for tensor in server.inputs] == [160, 160, 80]
    assert {tensor.dtype for tensor in server.inputs} == {"int16"}
    assert (server.opens[0].period_ms, server.opens[0].label) == (20, "ones.wav")


def test_stream_as_json(server: FakeServer, capsys: Any, sound: str) -> None:
    assert main(["stream", "accumulator", sound, "--chunk-ms", "25", "--json"]) == 0
    *outputs, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [output["step"] for output in outputs] == [1, 2]
    assert outputs[1]["outputs"]["total"][-1] == 400
    assert summary["summary"]["outputs"] == 2


def test_stream_sends_rows_of_csv_in_the_models_order(
    server: FakeServer, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensors: dict[str, Any] = {
        "name": "x",
        "dtype": "float32",
        "shape": ["batch", "time", 2],
        "batch_axis": 0,
        "time_axis": 1,
        "columns": ["load", "oil"],
    }
    plain = [{"name": "total", "shape": ["batch", "samples"], "time_axis": 1}]
    manifest = {**MANIFESTS["accumulator"], "inputs": [sensors], "outputs": plain}
    monkeypatch.setitem(MANIFESTS, "accumulator", manifest)
    table = tmp_path / "year.csv"
    table.write_text("date,oil,load\n2016-07-01,1,2\n2016-07-02,3,4\n2016-07-03,5,6\n")
    assert main(["stream", "accumulator", str(table), "--chunk-rows", "2"]) == 0
    rows = [np.frombuffer(tensor.data, np.float32).tolist() for tensor in server.inputs]
    assert rows == [[2, 1, 4, 3], [6, 5]]
    assert [list(tensor.shape) for tensor in server.inputs] == [[2, 2], [1, 2]]
    first, second, _ = capsys.readouterr().out.splitlines()
    assert (first, second) == ("step 1: total 10", "step 2: total 21")

    table.write_text("date,oil\n2016-07-01,1\n")
    assert main(["stream", "accumulator", str(table)]) == 1
    assert "has no column load" in capsys.readouterr().err
    table.write_text("date,oil,load\n2016-07-01,1,much\n")
    assert main(["stream", "accumulator", str(table)]) == 1
    assert "row 1 after the header" in capsys.readouterr().err
    table.write_text("")
    assert main(["stream", "accumulator", str(table)]) == 1
    assert "no CSV file with a header row" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rate,channels,width,text",
    [
        (16000, 1, 2, "has 16000 Hz, the model's input 'x' takes 8000 Hz"),
        (8000, 2, 2, "has 2 channels of 16 bits; expected 1 of 16 bits"),
        (8000, 1, 1, "has 1 channels of 8 bits"),
    ],
)
def test_sound_of_another_kind_is_an_error_of_one_line(
    server: FakeServer, capsys: Any, tmp_path: Path, rate: int, channels: int, width: int, text: str
) -> None:
    file = write_wav(tmp_path / "a.wav", rate=rate, channels=channels, width=width)
    assert main(["stream", "accumulator", file]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tenuto stream: ")
    assert text in error
    assert error.count("\n") == 1
    assert server.inputs == []


@pytest.mark.parametrize(
    "words,text",
    [
        (["stream", "accumulator", "none.wav"], "none.wav: No such file"),
        (["stream", "accumulator", "note.txt"], "expected a file named .wav or .csv"),
        (["stream", "accumulator", "fake.wav"], "fake.wav is no PCM WAV file"),
        (["stream", "brightness", "ones.wav"], "no time axis to stream along; use tenuto predict"),
        (["stream", "none", "ones.wav"], "UNKNOWN_MODEL: no model 'none'"),
        (["predict", "brightness", "note.txt"], "WRONG_ENCODING: note.txt begins with 6e 6f"),
        (["predict", "brightness", "note.txt", "a.npy"], "mixed"),
        (["predict", "brightness", "fake.npy"], "fake.npy is no .npy file"),
        (["predict", "brightness", "a.npy", "b.npy"], "make no one batch: a.npy [1, 2, 2]"),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value, list) else None,
)
def test_an_error_is_one_line_and_exit_code_1(
    server: FakeServer,
    capsys: Any,
    tmp_path: Path,
    sound: str,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("note.txt", "fake.wav", "fake.npy"):
        Path(name).write_text("no recording at all, but long enough to be read as one")
    np.save("a.npy", np.zeros((2, 2), np.uint8))
    np.save("b.npy", np.zeros((3, 3), np.uint8))
    assert main(words) == 1
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_no_server_is_an_error_that_says_where(server: FakeServer, capsys: Any) -> None:
    server.stop()
    assert main(["models"]) == 1
    assert capsys.readouterr().err.startswith(f"tenuto models: UNAVAILABLE: {server.target}: ")


def test_an_option_comes_before_its_variable(server: FakeServer, capsys: Any) -> None:
    assert main(["models", "--server", "nowhere"]) == 1
    assert "setting target: expected 'host:port'" in capsys.readouterr().err


def test_a_wrong_variable_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TENUTO_TIMEOUT_SECONDS", "-1")
    with pytest.raises(SystemExit, match="2"):
        main(["models"])
    assert "--timeout-seconds: expected seconds above 0, got '-1'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command,module,received",
    [
        ("serve", "tenuto.serving.cli", ["--port", "0", "--help"]),
        ("train", "tenuto.training.cli", ["train", "--port", "0", "--help"]),
        ("evaluate", "tenuto.training.cli", ["evaluate", "--port", "0", "--help"]),
    ],
)
def test_other_commands_go_to_their_extra(
    monkeypatch: pytest.MonkeyPatch, command: str, module: str, received: list[str]
) -> None:
    seen: list[str] = []
    fake = types.ModuleType(module)

    def run(argv: list[str]) -> int:
        seen.extend(argv)
        return 7

    fake.__dict__["main"] = run
    monkeypatch.setitem(sys.modules, module, fake)
    assert main([command, "--port", "0", "--help"]) == 7
    assert seen == received


@pytest.mark.parametrize("command,extra", [("serve", "serving"), ("train", "training")])
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, f"tenuto.{extra}.cli", None)  # so that importing it fails
    assert main([command]) == 2
    assert f"pip install 'tenuto[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["stream", "--help"], ["sequences", "--help"], ["--version"]])
def test_help_and_version_leave_with_0(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert "tenuto" in capsys.readouterr().out


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_leaves_with_130(server: FakeServer, sound: str) -> None:
    server.gate = threading.Semaphore(1)  # the command waits for a second answer that does not come
    command = [sys.executable, "-m", "tenuto.cli", "stream", "accumulator", sound]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("step 1")
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read() == ""
    assert server.left.wait(10)
