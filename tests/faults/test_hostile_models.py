"""Files that were made to do harm: each is refused with a text that says why, and the models that run do not
notice.

Most are checked in this process, which they do nothing to. Those that end, hold up or bloat the process that
loads them are checked as the server does it, in a child.
"""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tenuto import Client
from tenuto.serving import model_runner
from tenuto.serving.log_format import formatter
from tenuto.serving.model_runner import CPU
from tenuto.serving.repository import ModelFolder
from tenuto.serving.runners import RunSettings
from tenuto.serving.vetting import Limits, Verdict, check, vet
from tests import external, toys
from tests.integration.running import number, wait_for
from tests.toys import FLOAT, INT64, value

from .process import server_process

Made = tuple[bytes, toys.Manifest]
ONE_THREAD = RunSettings(CPU, 1)
PATIENT = Limits(seconds=50, memory_bytes=4 << 30)
_X86 = platform.machine() in ("x86_64", "AMD64")


def single(
    nodes: list[Any],
    constants: dict[str, Any] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    kind: TensorProto.DataType = FLOAT,
) -> Made:
    """Stateless: x [batch, 1] -> y [batch, 1], by nodes that nobody checks."""
    ends = [value("x", kind, "batch", 1)], [value("y", FLOAT, "batch", 1)]
    initial = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    graph = helper.make_graph(nodes, "hostile", *ends, initial)
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions or [])
    dtype = {FLOAT: "float32", TensorProto.INT32: "int32"}[kind]
    manifest = {
        "format": 1,
        "name": "hostile",
        "inputs": [{"name": "x", "dtype": dtype, "shape": ["batch", 1]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 1]}],
    }
    return bytes(proto.SerializeToString()), manifest


def added(nodes: list[Any], constants: dict[str, Any]) -> Made:
    """y = x + what the nodes call `more`."""
    return single([*nodes, helper.make_node("Add", ["x", "more"], ["y"])], constants)


def create(root: Path, made: Made) -> ModelFolder:
    return ModelFolder("hostile", 1, toys.write(root, "hostile", made))


@pytest.fixture(autouse=True)
def thread_as_it_was() -> Iterator[None]:
    """`check` makes this thread flush denormals."""
    with model_runner._environment_kept():
        yield


def refusal(folder: ModelFolder) -> str:
    """Why it is refused; whatever that quotes, the line of the log is one, and not long."""
    verdict = check(folder, ONE_THREAD)
    assert verdict.fingerprint == ""
    record = record_of(f"{folder.where} is not served: {verdict.why}")
    line = formatter("console").format(record)
    assert line.isprintable()
    assert len(line) < 1200
    assert len(formatter("json").format(record).splitlines()) == 1
    return verdict.why


def record_of(message: str) -> Any:
    return logging.LogRecord("tenuto.rollout", logging.ERROR, "", 0, message, None, None)


# Files that are no models.


def truncated() -> bytes:
    return toys.accumulator()[0][:-40]


def deep(levels: int) -> bytes:
    """Subgraphs in subgraphs, as bytes, since no library writes that."""
    graph = b""
    for _ in range(levels):
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            graph = field_of(field, graph)
    return b"\x08\x0a" + field_of(7, graph)


def field_of(number: int, contents: bytes) -> bytes:
    length, out = len(contents), bytes([number << 3 | 2])
    while length > 127:
        out, length = out + bytes([length & 127 | 128]), length >> 7
    return out + bytes([length]) + contents


NO_MODELS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "hostile/1: model.onnx is empty"),
    "text": (b"no model at all", "hostile/1: ONNX Runtime does not load it"),
    "zeros": (bytes(1000), "hostile/1: ONNX Runtime does not load it"),
    "truncated": (truncated(), "hostile/1: ONNX Runtime does not load it"),
    "its format, and nothing in it": (
        b"\0\0\0\0ORTM" + bytes(100),
        "hostile/1: ONNX Runtime does not load it",
    ),
    "nested deeper than protobuf goes": (deep(10_000), "hostile/1: ONNX Runtime does not load it"),
    "a length beyond all memory": (b"\x3a\xff\xff\xff\xff\x07", "hostile/1: ONNX Runtime does not load it"),
}


@pytest.mark.parametrize("contents, why", NO_MODELS.values(), ids=NO_MODELS.keys())
def test_a_file_that_is_no_model_is_refused(contents: bytes, why: str, tmp_path: Path) -> None:
    assert refusal(create(tmp_path, (contents, toys.doubler()[1]))).startswith(why)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def giant(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 42)  # it takes nothing on disk


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "cannot be read: it is a folder, and must be a file"),
    "FIFO": (os.mkfifo, "cannot be read: it is a FIFO, and must be a file"),
    "device": (device, "cannot be read: it is a device, and must be a file"),
    "link to itself": (loop, "cannot be read: Too many levels of symbolic links"),
    "link to nothing": (lambda path: path.symlink_to("none"), "cannot be read: No such file or directory"),
    "giant": (giant, "cannot be read: it has 4398046511104 bytes, of which at most"),
}


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "golden.npz"])
@pytest.mark.parametrize("make, why", ODD_FILES.values(), ids=ODD_FILES.keys())
def test_what_is_no_file_or_too_large_is_refused_and_named(
    make: Callable[[Path], object], why: str, name: str, tmp_path: Path
) -> None:
    folder = create(tmp_path, toys.doubler(name="hostile"))
    (folder.path / name).unlink(missing_ok=True)
    make(folder.path / name)
    assert refusal(folder).startswith(f"hostile/1: {name} {why}")
    assert folder.signature() is not None  # so that a server that runs looks at it


# Graphs that are refused by what they say.


def renamed(old: str, new: str) -> Made:
    """The doubler with another name, in graph and manifest, for one of its ends."""
    made, manifest = toys.doubler(name="hostile")
    proto = onnx.load_model_from_string(made)
    for tensor in (*proto.graph.input, *proto.graph.output):
        tensor.name = new if tensor.name == old else tensor.name
    for names in (proto.graph.node[0].input, proto.graph.node[0].output):
        names[:] = [new if name == old else name for name in names]
    return bytes(proto.SerializeToString()), json.loads(
        json.dumps(manifest).replace(f'"{old}"', json.dumps(new))
    )


def no_utf8() -> Made:
    made, manifest = toys.doubler(name="hostile")
    return made.replace(b"\x01x", b"\x01\xff"), manifest


def custom(domain: str, imported: bool = True) -> Made:
    made, manifest = single([helper.make_node("Nice", ["x"], ["y"], domain=domain)])
    proto = onnx.load_model_from_string(made)
    if imported:
        proto.opset_import.add(domain=domain, version=1)
    return bytes(proto.SerializeToString()), manifest


def dims(*lengths: int) -> Made:
    """An initializer that says it has these."""
    made, manifest = added([], {"more": np.ones(1, np.float32)})
    proto = onnx.load_model_from_string(made)
    proto.graph.initializer[0].dims[:] = lengths
    return bytes(proto.SerializeToString()), manifest


def recursive() -> Made:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    calls = [("A", "B"), ("B", "A")]
    functions = [
        helper.make_function(
            "own", name, ["x"], ["y"], [helper.make_node(other, ["x"], ["y"], domain="own")], imports
        )
        for name, other in calls
    ]
    return single([helper.make_node("A", ["x"], ["y"], domain="own")], functions=functions)


OTHERS = "there are ONNX's operators and ONNX Runtime's, and no others"
GRAPHS: dict[str, tuple[Made, str]] = {
    "an operator of a domain of its own": (custom("my.ops"), OTHERS),
    "a domain that is not imported": (custom("my.ops", imported=False), OTHERS),
    "an operator that ONNX has not": (custom("", imported=False), OTHERS),
    "an operator with a name of 1 MB": (custom("x" * (1 << 20)), OTHERS[:0]),
    "functions that call each other": (recursive(), "ONNX Runtime does not load it"),
    "a negative length": (dims(-1), "ONNX Runtime does not load it"),
    "more numbers than there are": (dims(1 << 32, 1 << 32), "ONNX Runtime does not load it"),
    "other numbers than it says": (dims(1 << 30), "ONNX Runtime does not load it"),
    "a name with a line of its own": (renamed("x", "x\nINFO all is well"), "cannot be printed"),
    "a name that steers a terminal": (renamed("y", "y\x1b[2J"), "cannot be printed"),
    "a name that turns text around": (renamed("y", "y\u202e"), "cannot be printed"),
    "a name of 1 MB": (renamed("x", "x" * (1 << 20)), "inputs.0.name: String should have at most 256"),
    "a name that is no UTF-8": (no_utf8(), "is no UTF-8"),
    "memory of the process": (
        external.offsetter(external.tensor("w", "*/_ORT_MEM_ADDR_/*", 4096), name="hostile"),
        "cannot be read: No such file",
    ),
}


@pytest.mark.parametrize("made, why", GRAPHS.values(), ids=GRAPHS.keys())
def test_a_graph_that_says_too_much_is_refused(made: Made, why: str, tmp_path: Path) -> None:
    assert why in refusal(create(tmp_path, made))


def test_a_path_in_a_name_is_a_name(tmp_path: Path) -> None:
    folder = create(tmp_path, renamed("x", "../../etc/passwd"))
    assert check(folder, ONE_THREAD) == Verdict(folder.read().fingerprint)


def test_an_operator_that_asks_for_terabytes_is_refused(tmp_path: Path) -> None:
    """Those that the system grants without having them are a matter of the child's limits."""
    cases = {
        "ConstantOfShape": added(
            [helper.make_node("ConstantOfShape", ["shape"], ["more"])], {"shape": np.array([1 << 46])}
        ),
        "Tile": added(
            [helper.make_node("Tile", ["x", "times"], ["more"])], {"times": np.array([1, 1 << 61])}
        ),
        "Expand": added(
            [helper.make_node("Expand", ["x", "shape"], ["more"])], {"shape": np.array([1 << 23, 1 << 23])}
        ),
    }
    for name, made in cases.items():
        assert "its run on zeros failed" in refusal(create(tmp_path / name, made)), name


# Manifests and metadata.


@pytest.mark.parametrize("width", [1 << 40, 1 << 62])
def test_a_manifest_that_says_terabytes_is_refused(width: int, tmp_path: Path) -> None:
    ends = [value("x", FLOAT, "batch", "width")], [value("y", FLOAT, "batch", "width")]
    made = toys.model([helper.make_node("Add", ["x", "x"], ["y"])], *ends)
    side = {"dtype": "float32", "shape": ["batch", width]}
    manifest = {"name": "hostile", "inputs": [{"name": "x"} | side], "outputs": [{"name": "y"} | side]}
    assert "hostile/1: its check failed: " in refusal(create(tmp_path, (made, manifest)))


def test_a_manifest_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    folder = create(tmp_path, toys.doubler(name="hostile"))
    (folder.path / "manifest.json").write_text('{"inputs": ' + "[" * 200_000 + "]" * 200_000 + "}")
    assert "hostile/1/manifest.json: the manifest is no JSON: maximum recursion depth" in refusal(folder)


def described(text: str) -> bytes:
    """The doubler with a manifest in its metadata."""
    proto = onnx.load_model_from_string(toys.doubler()[0])
    proto.metadata_props.add(key="tenuto.manifest", value=text)
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    "text, why",
    [
        ("[" * 200_000, "the manifest is no JSON: maximum recursion depth"),
        ("x" * (1 << 20), "the manifest is no JSON"),
        (json.dumps({"x\n\x1b[31m" * 100_000: 1}), "the manifest is not valid"),
        (json.dumps(toys.doubler(name="hostile", description="\ud800")[1]), "holds half a surrogate pair"),
    ],
    ids=["nested", "long", "a strange key", "half a character"],
)
def test_a_manifest_in_the_metadata_that_is_none_is_refused(text: str, why: str, tmp_path: Path) -> None:
    folder = create(tmp_path, (described(text), toys.doubler()[1]))
    (folder.path / "manifest.json").unlink()
    assert why in refusal(folder)


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = create(tmp_path, toys.doubler(name="hostile"))
    text = (folder.path / "manifest.json").read_bytes()
    (folder.path / "manifest.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert check(folder, ONE_THREAD) == Verdict(folder.read().fingerprint)


# Golden files.


def bomb(path: Path) -> None:
    """A few hundred kilobytes that are 300 MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("1.in.x.npy", "w") as member:
        for _ in range(300):
            member.write(bytes(1 << 20))


def members(**arrays: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, contents in arrays.items():
                file.writestr(name, contents)

    return make


def array(shape: str, dtype: str = "<f4") -> bytes:
    """A header, and no numbers."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def pickled(path: Path) -> None:
    """What would leave a file behind if it were read."""

    class Harm:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(path.parent / "harm"),))

    buffer = io.BytesIO()
    np.save(buffer, np.array([Harm()], dtype=object), allow_pickle=True)
    members(**{"1.in.x.npy": buffer.getvalue()})(path)


STRAY = "golden.npz holds {}, no part of its steps 1 to 1"
STEP = array("(0, 2)")
GOLDEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "bomb": (bomb, "its arrays have 314572800 bytes, at most 268435456 are read"),
    "pickle": (pickled, "golden.npz cannot be read: Object arrays cannot be loaded"),
    "a shape of terabytes": (members(**{"1.in.x.npy": array("(1 << 40,)")}), "golden.npz cannot be read"),
    "a shape beyond it": (members(**{"1.in.x.npy": array(f"({1 << 44}, 2)")}), "golden.npz cannot be read"),
    "no array": (members(**{"1.in.x": b"text"}), "'1.in.x' is no array (.npy)"),
    "a way out": (
        members(**{"1.in.x.npy": STEP, "../../out.npy": STEP}),
        STRAY.format("'../../out'"),
    ),
    "a strange name": (
        members(**{"1.in.x.npy": STEP, "\x1b[2J\nline.npy": STEP}),
        STRAY.format(r"'\\x1b[2J\\nline'".replace("\\\\", "\\")),
    ),
    "a thousand names": (
        members(**{"1.in.x.npy": STEP, **{f"{n:04d}.npy": STEP for n in range(1000)}}),
        STRAY.format("'0000', '0001', '0002', '0003', '0004' and 995 more"),
    ),
}


@pytest.mark.parametrize("make, why", GOLDEN.values(), ids=GOLDEN.keys())
def test_a_golden_file_that_was_made_to_harm_is_refused(
    make: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    folder = create(tmp_path, toys.doubler(name="hostile"))
    make(folder.path / "golden.npz")
    assert why in refusal(folder)
    assert not (folder.path / "harm").exists()


# What ends, holds up or bloats the process that loads it.


def least_by_minus_one() -> Made:
    """The one division of whole numbers that has no answer, folded at load: SIGFPE on x86."""
    nodes = [
        helper.make_node("Div", ["least", "minus_one"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["more"], to=FLOAT),
    ]
    return added(nodes, {"least": np.array([-(2**31)], np.int32), "minus_one": np.array([-1], np.int32)})


def least_by_input() -> Made:
    """The same at the first run: of x = 0, least / (x - 1)."""
    nodes = [
        helper.make_node("Add", ["x", "minus_one"], ["by"]),
        helper.make_node("Div", ["least", "by"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["y"], to=FLOAT),
    ]
    constants = {"least": np.array([-(2**31)], np.int32), "minus_one": np.array([-1], np.int32)}
    return single(nodes, constants, kind=TensorProto.INT32)


def no_groups() -> Made:
    """A convolution of no groups at all, found out by dividing by them."""
    made, manifest = single(
        [
            helper.make_node("Unsqueeze", ["x", "axes"], ["image"]),
            helper.make_node("ConvTranspose", ["image", "w"], ["wide"], group=0),
            helper.make_node("Squeeze", ["wide", "axes"], ["y"]),
        ],
        {"axes": np.array([2, 3]), "w": np.ones((1, 1, 1, 1), np.float32)},
    )
    return made, manifest


def functions(count: int, calls: int) -> Made:
    """Each calls the one before it, so often."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    made = [
        helper.make_function("own", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], imports)
    ]
    for n in range(1, count):
        names = ["a", *(f"t{i}" for i in range(1, calls)), "b"]
        body = [helper.make_node(f"F{n - 1}", [one], [other], domain="own") for one, other in pairwise(names)]
        made.append(helper.make_function("own", f"F{n}", ["a"], ["b"], body, imports))
    return single([helper.make_node(f"F{count - 1}", ["x"], ["y"], domain="own")], functions=made)


def growing() -> Made:
    """A loop that keeps a megabyte of each of its turns, of which there are very many."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("ConstantOfShape", ["shape"], ["kept"]),
        ],
        "body",
        [value("i", INT64), value("go_in", TensorProto.BOOL)],
        [value("go_out", TensorProto.BOOL), value("kept", FLOAT, 1 << 18)],
    )
    nodes = [
        helper.make_node("Loop", ["turns", ""], ["all"], body=body),
        helper.make_node("ReduceSum", ["all"], ["more"], keepdims=0),
    ]
    return added(nodes, {"turns": np.array(1 << 62), "shape": np.array([1 << 18])})


KILLERS: dict[str, tuple[Callable[[], Made], signal.Signals]] = {
    "functions": (lambda: functions(20_000, 1), signal.SIGSEGV),
    **(
        {
            "folded": (least_by_minus_one, signal.SIGFPE),
            "run": (least_by_input, signal.SIGFPE),
            "groups": (no_groups, signal.SIGFPE),
        }
        if _X86  # others give some number
        else {}
    ),
}


def publish(root: Path, name: str, made: Made, version: int = 1) -> ModelFolder:
    """The folder appears whole."""
    staging = toys.write(root / ".staging", name, made, version)
    (root / name).mkdir(parents=True, exist_ok=True)
    return ModelFolder(name, version, staging.rename(root / name / str(version)))


def test_models_that_kill_the_process_that_loads_them_are_named(tmp_path: Path) -> None:
    folders = [publish(tmp_path, name, make()) for name, (make, _) in KILLERS.items()]
    folders.append(publish(tmp_path, "doubler", toys.doubler()))
    verdicts = vet(folders, ONE_THREAD, PATIENT)
    for folder in folders[:-1]:
        number_, name = KILLERS[folder.model][1].value, KILLERS[folder.model][1].name
        why = verdicts[folder].why
        assert why.startswith(f"loading it ends the process that checks it (signal {number_}, {name}"), why
        assert "export model.onnx anew" in why
    assert verdicts[folders[-1]] == Verdict(folders[-1].read().fingerprint)


@pytest.mark.timeout(180)
def test_a_model_that_is_never_done_is_ended(tmp_path: Path) -> None:
    folders = [
        publish(tmp_path, "endless", toys.endless()),
        publish(tmp_path, "functions", functions(40, 2)),  # 2^39 of the innermost
    ]
    verdicts = vet(folders, ONE_THREAD, Limits(seconds=15, memory_bytes=1 << 31))
    assert verdicts[folders[0]].why == "its check took more than 15 s (--vet-seconds)"
    assert verdicts[folders[1]].why.startswith("its check took more than ")  # time, or memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_model_that_takes_more_and_more_memory_is_ended(tmp_path: Path) -> None:
    folder = publish(tmp_path, "growing", growing())
    verdict = vet([folder], ONE_THREAD, Limits(seconds=50, memory_bytes=1 << 30))[folder]
    assert verdict.why == "its check took more than 1024 MiB of memory (--vet-memory-bytes)"


# The models that run.


@pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")
@pytest.mark.timeout(300)
def test_a_stream_goes_on_while_hostile_models_come(tmp_path: Path) -> None:
    """One stream sends a number after each of them, and gets the exact sum; its server serves what is good
    among them, with its weights in a file beside it."""
    repository = tmp_path / "models"
    publish(repository, "accumulator", toys.accumulator())
    hostile = {name: make() for name, (make, _) in KILLERS.items()}
    hostile |= {"endless": toys.endless(), "noise": (b"\xff" * 1000, toys.doubler()[1])}
    hostile["secret"] = external.offsetter(external.tensor("w", "../../../secret"))
    (tmp_path / "secret").write_bytes(external.WEIGHTS.tobytes())
    settings = {"poll_seconds": 0.05, "vet_seconds": 15, "threads": 1, "drain_seconds": 0}
    with (
        server_process(repository, tmp_path, **settings) as server,
        Client(f"127.0.0.1:{server.port}") as client,
        client.stream("accumulator") as stream,
    ):
        answers = iter(stream)
        for step, (name, made) in enumerate(hostile.items(), 1):
            publish(repository, name, made)
            wait_for(lambda: f"{name}/1 is not served" in server.log, f"{name} to be refused")  # noqa: B023
            stream.send(np.full(1, step, np.float32))
            assert next(answers)["y"].tolist() == [step * (step + 1) / 2]
        graph, manifest, contents = external.accumulator("w.bin")
        good = toys.write(repository / ".staging", "beside", (graph, manifest))
        (good / "w.bin").write_bytes(contents)
        good.parent.rename(repository / "beside")
        serving = {"accumulator": "READY", "beside": "READY"}
        states = dict.fromkeys(hostile, "FAILED") | serving
        wait_for(lambda: {m.name: m.state for m in client.models()} == states, f"these states: {states}")
        with client.stream("beside") as other:
            assert [a["y"].tolist() for a in other.run([np.array([1, 2], np.float32)])] == [[1.0, 3.0]]
        metrics = server.metrics()
        assert number(metrics, "tenuto_model_loads_total", result="failed") == len(hostile)
        assert number(metrics, "tenuto_sequences_resumed_total") == 0  # it is the same stream all the time
        assert not server.ended
        assert "Traceback" not in server.log
