"""Imports run one way (docs/architecture.md): by reading the sources, without importing anything."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# serving/, lowest first. A module imports from its own row and from those above it in this table.
SERVING = [
    ["call", "errors", "metrics"],
    [
        "callers",
        "child",
        "config",
        "device_memory",
        "frame",
        "inbox",
        "inflate",
        "layout",
        "link",
        "log_format",
        "manifest",
        "metrics_port",
        "pending",
        "placement",
        "precision",
        "regular_file",
        "routed_call",
        "sampling",
        "status",
        "text",
        "tls",
        "varint",
    ],
    ["external_data", "snapshot", "sequence", "chunk_form", "reply", "tensor", "tracing"],
    ["admission", "resume_token", "delivery", "state_pool", "scheduler", "kept_buffers", "repository"],
    ["model_runner"],
    ["population", "extended_graph", "controls"],
    ["engine", "graph_pool"],
    ["runners"],
    ["catalogue", "golden", "proof"],
    ["http_call", "predict", "vetting", "thread_call", "stream"],
    ["outflow", "pooled_method", "relayed_call", "servicer"],
    ["oip"],
    ["connection"],
    ["http2"],
    ["front_end"],
    ["front_ends"],
    ["transport"],
    ["loader"],
    ["rollout"],
    ["server"],
    ["adoption", "cli"],
]
ROW = {module: row for row, modules in enumerate(SERVING) for module in modules}
# Inside serving/oip.
_OIP = [
    ["refusal"],
    ["datatype", "question"],
    ["shared_memory"],
    ["form"],
    ["description", "session"],
    ["sequences"],
    ["inference"],
    ["servicer"],
]
# Inside serving/manifest.
_MANIFEST = [
    ["part"],
    ["constant", "control", "fault", "graph", "state", "wire"],
    ["tensors"],
    ["generate"],
    ["manifest"],
    ["page", "state_schema"],
]
# Inside serving/adoption.
_ADOPTION = [
    ["dialogue", "graph_facts", "sample_input", "wishes"],
    ["cuda_kernels", "probe", "roles", "runtime", "trials"],
    ["axes", "checking"],
    ["adopting", "proposal"],
    ["report"],
    ["cli"],
]
INSIDE = {
    package: {module: row for row, modules in enumerate(rows) for module in modules}
    for package, rows in (("oip", _OIP), ("manifest", _MANIFEST), ("adoption", _ADOPTION))
}

# Of serving: what a model says of itself, how text becomes ids, and what float16 makes of a graph.
TRAINING_KNOWS = (["manifest"], ["text"], ["precision"])
PACKAGES = {
    "tenuto",
    "tenuto.serving",
    "tenuto.serving.adoption",
    "tenuto.serving.manifest",
    "tenuto.serving.oip",
    "tenuto.training",
    "tenuto.training.datasets",
    "tenuto.training.tasks",
}
CLIENT_NEEDS = {"google", "grpc", "numpy", "tenuto"} | sys.stdlib_module_names
CLIENT_MAY_NEED = {"tenuto/midi.py": {"mido"}}  # of an extra, and imported when it is called
DATASETS_NEED = {"numpy", "pooch", "tenuto"} | sys.stdlib_module_names


def module_name(path: str) -> str:
    """serving/engine.py -> tenuto.serving.engine; tenuto/client.py -> tenuto.client."""
    parts = Path(path).with_suffix("").parts
    parts = parts if parts[0] == "tenuto" else ("tenuto", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: str, source: str) -> Iterator[str]:
    """The absolute names of the modules that a source imports, wherever in it."""
    package = module_name(path).split(".")
    if Path(path).name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(start + (node.module or "").split(".")).strip(".")
            yield from (f"{base}.{n.name}" if base in PACKAGES else base for n in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(path: str, source: str) -> list[str]:
    """What the imports of one source break, in words; empty when nothing."""
    names = set(imported(path, source))
    top = Path(path).parts[0]
    found = []
    if top == "serving":
        package, own = Path(path).parent.name, Path(path).stem
        rows = INSIDE.get(package, {})
        if rows and own != "__init__" and own not in rows:
            found.append(f"{path} has no place in the table INSIDE; give it one")
        own = package if rows else own
        if own != "__init__" and own not in ROW:
            found.append(f"{path} has no place in the table SERVING; give it one")
        for name in names:
            if name.split(".")[0] == "torch" or within(name, "tenuto.training"):
                found.append(f"{path} imports {name}: the server needs no torch and no training")
            elif rows and within(name, f"tenuto.serving.{package}"):
                inner, wanted = Path(path).stem, name.removeprefix(f"tenuto.serving.{package}.").split(".")[0]
                if inner != "__init__" and rows.get(wanted, 0) > rows.get(inner, -1):
                    found.append(f"{path} imports {name}, which lies above it")
            elif within(name, "tenuto.serving"):
                other = name.removeprefix("tenuto.serving").strip(".").split(".")[0]
                if ROW.get(other, 0) > ROW.get(own, len(SERVING)):
                    found.append(f"{path} imports {name}, which lies above it")
            elif (name.startswith("tenuto.") and name != "tenuto.__version__") and not (
                within(name, "tenuto.v1") or within(name, "tenuto.oip")
            ):
                found.append(f"{path} imports {name}: of the client, the server uses the stubs alone")
    elif top == "training":
        known = ", ".join(module for (module,) in TRAINING_KNOWS)
        for name in names:
            if within(name, "tenuto.serving") and name.split(".")[2:3] not in TRAINING_KNOWS:
                found.append(f"{path} imports {name}: training knows {known} of the server")
            if path.startswith("training/datasets/") and name.split(".")[0] not in DATASETS_NEED:
                found.append(f"{path} imports {name}: the data sets need numpy and pooch alone")
    elif top == "tenuto":
        for name in names:
            halves = within(name, "tenuto.serving") or within(name, "tenuto.training")
            if halves and path != "tenuto/cli.py":
                found.append(f"{path} imports {name}: the client stands alone")
            if name.split(".")[0] not in CLIENT_NEEDS | CLIENT_MAY_NEED.get(path, set()):
                found.append(f"{path} imports {name}: the client needs grpcio, protobuf and numpy")
    return found


SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (
        "serving",
        "serving/adoption",
        "serving/manifest",
        "serving/oip",
        "training",
        "training/datasets",
        "training/tasks",
        "tenuto",
    )
    for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("path", SOURCES)
def test_a_module_imports_only_what_lies_below_it(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", ["serving", "training"])
def test_no_two_modules_import_each_other(folder: str) -> None:
    paths = [path for path in SOURCES if path.startswith(f"{folder}/")]
    graph = {
        module_name(path): set(imported(path, (ROOT / path).read_text(encoding="utf-8"))) for path in paths
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "path,source,complaint",
    [
        ("serving/errors.py", "from .manifest import Manifest", "lies above it"),
        ("serving/scheduler.py", "from . import engine", "lies above it"),
        ("serving/scheduler.py", "import tenuto.serving.server", "lies above it"),
        ("serving/engine.py", "def late():\n    from .server import run", "lies above it"),
        ("serving/engine.py", "import torch.nn", "no torch"),
        ("serving/engine.py", "from ..training.digits import Net", "no training"),
        ("serving/engine.py", "from ..client import Client", "the stubs alone"),
        ("serving/utils.py", "import os", "no place in the table"),
        ("serving/manifest/utils.py", "import os", "no place in the table INSIDE"),
        ("serving/manifest/part.py", "from .manifest import Manifest", "lies above it"),
        ("serving/manifest/part.py", "from tenuto.serving.manifest.state import State", "lies above it"),
        ("serving/manifest/part.py", "from tenuto.serving.tensor import Reader", "lies above it"),
        (
            "training/digits.py",
            "from tenuto.serving import engine",
            "training knows manifest, text, precision",
        ),
        (
            "training/digits.py",
            "from ..serving.errors import PoolFull",
            "training knows manifest, text, precision",
        ),
        ("training/datasets/mnist.py", "import torch", "numpy and pooch alone"),
        ("tenuto/client.py", "from .serving.manifest import Manifest", "stands alone"),
        ("tenuto/cli.py", "import pydantic", "grpcio, protobuf and numpy"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str, complaint: str) -> None:
    assert [complaint in found for found in violations(path, source)] == [True]


@pytest.mark.parametrize(
    "path,source",
    [
        ("serving/engine.py", "from .scheduler import Scheduler\nfrom . import errors"),
        (
            "serving/servicer.py",
            "from tenuto.v1 import tenuto_pb2\nfrom ..v1 import tenuto_pb2_grpc",
        ),
        ("training/digits.py", "import torch\nfrom tenuto.serving.manifest import Manifest"),
        ("training/datasets/mnist.py", "import gzip, numpy, pooch\nfrom . import store"),
        ("tenuto/cli.py", "from .serving import cli"),
    ],
)
def test_a_right_import_is_not(path: str, source: str) -> None:
    assert violations(path, source) == []
