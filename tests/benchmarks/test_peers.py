"""What is written for other people's servers fits the benchmark's models. None of them is started."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import model, suites
from benchmarks.peers import (
    analyzer,
    comparison,
    comparison_chart,
    launch,
    mlserver,
    runner,
    setup,
    torchserve,
    torchserve_handler,
    triton,
)
from benchmarks.report import write
from benchmarks.scenario import Case, Measurement, Seen, Taken
from benchmarks.server_process import command
from benchmarks.suites import Settings


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    lstm, images = tmp_path / "lstm.onnx", tmp_path / "images.onnx"
    lstm.write_bytes(b"sequences")
    images.write_bytes(b"images")
    return lstm, images


# -- what they are told ----------------------------------------------------------------------------


def test_tritons_configurations_are_those_of_the_models(tmp_path: Path, files: tuple[Path, Path]) -> None:
    triton.write_repository(tmp_path / "models", *files)
    for name, inner, dims in (
        (model.NAME, b"sequences", [f"-1, {model.INPUTS}", f"-1, {model.OUTPUTS}"]),
        (model.IMAGES, b"images", [", ".join(map(str, model.IMAGE)), "10"]),
    ):
        folder = tmp_path / "models" / name
        text = (folder / "config.pbtxt").read_text()
        assert f'name: "{name}"' in text
        assert re.findall(r"dims: \[ (.+?) \]", text) == dims
        assert f"max_batch_size: {model.manifest()['max_batch']}" in text
        assert (folder / "1" / "model.onnx").read_bytes() == inner
        assert "class TritonPythonModel" in (folder / "1" / "model.py").read_text()


def test_the_backend_gets_the_stub_of_this_python(tmp_path: Path) -> None:
    server = tmp_path / "wheel" / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for stub in (version, "2.7"):
        (server / "python_backend_stubs" / stub).mkdir(parents=True)
        (server / "python_backend_stubs" / stub / "triton_python_backend_stub").write_text(stub)
    (server / "backends" / "python").mkdir(parents=True)
    there = triton.backends(tmp_path / "wheel", tmp_path / "run")
    stub_file = there / "python" / "triton_python_backend_stub"
    assert stub_file.read_text() == version
    assert stub_file.stat().st_mode & 0o100


def test_torchserve_finds_a_handler_for_each_model(tmp_path: Path, files: tuple[Path, Path]) -> None:
    for name, file in zip((model.NAME, model.IMAGES), files, strict=True):
        torchserve.write_store(tmp_path / "models", name, file)
        folder = tmp_path / "models" / name
        told = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
        module, _, function = told["handler"].partition(":")
        assert module == torchserve_handler.__name__
        assert callable(getattr(torchserve_handler, function))
        assert told["modelName"] == name
        assert (folder / "model.onnx").read_bytes() == file.read_bytes()
        settings = yaml.safe_load((folder / told["configFile"]).read_text())
        assert settings["maxWorkers"] == 1
        assert settings.get("sequenceBatching", False) == (name == model.NAME)


def test_torchserve_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    text = torchserve.properties([1, 2, 3, 4, 5])
    assert "grpc_inference_port=1\n" in text
    addresses = re.findall(r"_address=(?:http://)?([\d.]+)", text)
    assert addresses == ["127.0.0.1"] * 5
    words = torchserve.command(Path("/wheel"), tmp_path, model.NAME)
    assert words[0] == "java"
    assert f"-Djava.io.tmpdir={tmp_path}" in words


def test_mlserver_finds_a_runtime_for_each_model(tmp_path: Path, files: tuple[Path, Path]) -> None:
    mlserver.write_models(tmp_path, *files)
    source = Path(mlserver.__file__).with_name("mlserver_model.py").read_text()
    for name, file in zip((model.NAME, model.IMAGES), files, strict=True):
        told = json.loads((tmp_path / name / "model-settings.json").read_text())
        assert f"class {told['implementation'].rpartition('.')[2]}(MLModel)" in source
        assert told["name"] == name
        assert told["parameters"]["uri"] == str(file)
        assert told["max_batch_size"] == model.manifest()["max_batch"]
    settings = json.loads(mlserver.settings(1, 2))
    assert (settings["host"], settings["grpc_port"], settings["http_port"]) == ("127.0.0.1", 1, 2)


# -- what they run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> model.Repository:
    return model.write_repository(tmp_path_factory.mktemp("peers") / "repository")


class Context:
    """What TorchServe says of a batch: sequences 0, 1, 2 …"""

    def __init__(self, file: Path) -> None:
        self.system_properties = {"model_dir": str(file.parent)}

    def get_sequence_id(self, place: int) -> str:
        return str(place)


def test_sequences_of_the_peers_get_what_they_get_alone(repository: model.Repository) -> None:
    assert (runner.STATES, runner.LAYERS, runner.WIDTH) == (model.STATES, model.LAYERS, model.WIDTH)
    inputs = np.random.default_rng(0).standard_normal((5, 8, model.INPUTS), np.float32)
    lstm = runner.Lstm(repository.lstm)
    cuts = [[0, 2, 8], [0, 2, 8], [0, 3, 8], [0, 2, 8], [0, 5, 8]]  # some of one length, some not
    pieces: list[list[np.ndarray]] = [[] for _ in inputs]
    for turn, last in ((0, False), (1, True)):
        steps = [
            runner.Step(n, x[cut[turn] : cut[turn + 1]], first=not last, last=last)
            for n, (x, cut) in enumerate(zip(inputs, cuts, strict=True))
        ]
        for own, y in zip(pieces, lstm.run(steps), strict=True):
            own.append(y)
    session = model.session(repository.lstm)
    for x, own in zip(inputs, pieces, strict=True):
        assert np.concatenate(own).tobytes() == model.alone(session, x).tobytes()
    assert not lstm.states  # which the last steps ended


def test_torchserves_handlers_answer_bytes_with_bytes(repository: model.Repository) -> None:
    inputs = np.random.default_rng(0).standard_normal((3, 4, model.INPUTS), np.float32)
    context = Context(repository.lstm)
    assert torchserve_handler.lstm(None, context) == []
    answers = torchserve_handler.lstm([{"data": x.tobytes(), "first": b"1"} for x in inputs], context)
    session = model.session(repository.lstm)
    assert answers == [model.alone(session, x).tobytes() for x in inputs]
    pictures = np.random.default_rng(0).random((3, *model.IMAGE), np.float32)
    context = Context(repository.images)
    assert torchserve_handler.digits(None, context) == []
    answers = torchserve_handler.digits([{"data": x.tobytes()} for x in pictures], context)
    rows = model.session(repository.images).run(None, {"image": pictures})[0]
    assert answers == [row.tobytes() for row in rows]


# -- setting up and starting -----------------------------------------------------------------------


def test_each_peer_is_started_with_its_models(tmp_path: Path) -> None:
    lstm, images = (str(tmp_path / part / "1" / "model.onnx") for part in (model.NAME, model.IMAGES))
    for name, words in (
        (suites.TRITON, ["benchmarks.peers.triton", lstm, images]),
        (suites.MLSERVER, ["benchmarks.peers.mlserver", lstm, images]),
        (suites.TORCHSERVE, ["benchmarks.peers.torchserve", model.NAME, lstm]),
        (suites.TORCHSERVE_IMAGES, ["benchmarks.peers.torchserve", model.IMAGES, images]),
    ):
        assert command(name, model.Repository(tmp_path))[-3:] == words


def test_a_server_that_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (port,) = launch.free_ports(1)
    words = [sys.executable, "-c", "raise SystemExit('no model')"]
    with pytest.raises(RuntimeError, match="peer did not become ready; it said at last: no model"):
        launch.serve("peer", words, os.environ, launch.Ready(port, f"http://127.0.0.1:{port}/"))


def test_a_server_is_ready_when_it_says_the_words() -> None:
    says = iter(["starting", "starting", "READY"])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(next(says).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server, subprocess.Popen(["sleep", "60"]) as process:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        ready = launch.Ready(port, f"http://127.0.0.1:{port}/", "READY")
        try:
            assert launch.becomes_ready(process, ready)
        finally:
            process.terminate()
            server.shutdown()
    assert not list(says)


@pytest.mark.parametrize(
    "name, module",
    [
        ("triton", triton),
        ("torchserve", torchserve),
        ("mlserver", mlserver),
        ("perf_analyzer", analyzer),
    ],
)
def test_what_sets_a_peer_up_is_what_its_module_says(name: str, module: object) -> None:
    peer = setup.PEERS[name]
    text = str(module.__doc__)
    assert f"{peer.variable} names a folder" in text
    for words in peer.installs:
        assert re.search(f"pip install .*--target FOLDER .*{words.split()[-1]}", text)
        assert all(word in text for word in words.split())


def test_peers_are_found_by_folder_and_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    for peer in setup.PEERS.values():  # set first, so that the test leaves none behind
        monkeypatch.setenv(peer.variable, "")
        monkeypatch.delenv(peer.variable)
    assert setup.find(None) == []
    for name in ("triton", "torchserve"):
        (tmp_path / name).mkdir()
    assert setup.find(tmp_path) == ["triton"]  # the other one needs Java
    assert os.environ["PYTRITON"] == str(tmp_path / "triton")
    monkeypatch.setenv("MLSERVER", "elsewhere")
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    assert setup.find(tmp_path) == ["triton", "torchserve", "mlserver"]


def test_a_peer_half_installed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], *, check: bool) -> None:
        ran.append(words)
        Path(words[words.index("--target") + 1]).mkdir(exist_ok=True, parents=True)
        if len(ran) == 2:
            raise subprocess.CalledProcessError(1, words)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        setup.install(tmp_path, ["triton"])
    assert not (tmp_path / "triton").exists()
    setup.install(tmp_path, ["triton"])
    setup.install(tmp_path, ["triton"])
    assert (tmp_path / "triton").is_dir()
    assert len(ran) == 4


def test_what_perf_analyzer_says_is_read() -> None:
    said = "Throughput: 1234.5 infer/sec\n p50 latency: 1500 usec\n p99 latency: 20000 usec\n"
    found = analyzer.parse(said, server_us=12.3)
    assert found == analyzer.Found(12.3, 1234.5, 1.5, 20.0)
    with pytest.raises(RuntimeError, match="did not say"):
        analyzer.parse("Failed", server_us=1.0)
    (sequence, images) = analyzer.loads([16], [10], [64])
    assert (sequence.name, images.name) == ("10, 16", "images, 64")
    assert f"x:10,{model.INPUTS}" in sequence.words
    cells = analyzer.table([{("10, 16", "tenuto"): found}]).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:5]] == ["10, 16", "tenuto", "12 (12..12)", "1,234.50"]


# -- the page --------------------------------------------------------------------------------------


def rounds(*servers: str) -> list[Taken]:
    settings = Settings((suites.BATCHER,), (1, 16), (1, 10), 0.0, servers)
    cases = [case for table in suites.open_inference(settings) for case in table]

    def measured(case: Case, factor: int) -> Measurement:
        cost = factor * (3 if case.server == suites.TRITON else 1)
        seen = Seen(100, 100, 1.234, 22.34, least=9, most=10)
        return Measurement(1.0, 0.01 * cost, 0.01, 7, (seen,))

    return [{case: measured(case, factor) for case in cases} for factor in (1, 2, 4)]


def test_the_tables_have_a_line_for_each_load_and_a_column_for_each_server() -> None:
    sequences, images, checked = comparison.text(rounds(*suites.PEERS)).split("\n\n")
    titles = ("Tenuto, own protocol", "Tenuto, OIP", "Triton", "TorchServe", "MLServer", "batcher")
    head = [cell.strip() for cell in sequences.splitlines()[0].split("|")[2:-1]]
    assert head == [*titles, "OIP / Triton", "p50 ms: OIP, Triton", "p99 ms: OIP, Triton"]
    lines = {cells[1].strip(): cells[2:-1] for cells in (x.split("|") for x in sequences.splitlines()[2:])}
    assert list(lines) == ["1, 1", "1, 16", "10, 1", "10, 16"]
    found = [cell.strip() for cell in lines["10, 16"]]
    assert found[1:3] == ["200 (100..400)", "600 (300..1200)"]
    assert found[-3:] == ["0.33", "1.23, 1.23", "22.3, 22.3"]
    assert [x.split("|")[1].strip() for x in images.splitlines()[2:]] == ["1", "16", "64"]
    assert "OIP stream / Triton" in images
    assert checked.startswith(f"{7 * 3 * len(rounds(*suites.PEERS)[0]):,} replies")


def test_servers_that_took_no_part_have_no_column() -> None:
    text = comparison.text(rounds(suites.MLSERVER))
    assert "Triton" not in text
    assert "TorchServe" not in text
    assert "MLServer" in text


def test_the_chart_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        comparison_chart.draw(rounds(*suites.PEERS), tmp_path / name)
    picture = (tmp_path / "one.svg").read_text()
    assert picture == (tmp_path / "two.svg").read_text()
    assert "<!-- TorchServe -->" in picture


def test_the_page_has_a_place_for_the_comparison(tmp_path: Path) -> None:
    page = tmp_path / "oip.md"
    page.write_text((Path(__file__).parents[2] / "docs" / "oip.md").read_text())
    write(page, "figures", comparison.MARKS)
    begin, end = comparison.MARKS
    assert f"{begin}\n\nfigures\n\n{end}" in page.read_text()
