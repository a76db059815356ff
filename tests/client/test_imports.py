"""What importing the client loads; each in a fresh interpreter."""

import subprocess
import sys

import pytest

# Beyond Python's own, the client may load what its base dependencies bring, and no more.
FOREIGN = (
    "onnxruntime",
    "pydantic",
    "prometheus_client",
    "torch",
    "PIL",
    "onnx",
    "pooch",
    "google.rpc",
    "mido",
)


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("module", ["tenuto", "tenuto.cli", "tenuto.errors"])
def test_grpc_is_not_loaded_before_it_is_used(module: str) -> None:
    assert run(f"import sys, {module}; print('grpc' in sys.modules)") == "False"


def test_the_client_loads_its_base_dependencies_alone() -> None:
    code = "import sys, tenuto, tenuto.aio; tenuto.Client; tenuto.Stream; print(*sys.modules)"
    loaded = run(code).split()
    assert "grpc" in loaded
    assert not [name for name in FOREIGN if name in loaded]
    assert not [name for name in loaded if name.startswith(("tenuto.serving", "tenuto.training"))]


def test_every_exported_name_is_there() -> None:
    code = "import tenuto; print(*[n for n in tenuto.__all__ if not hasattr(tenuto, n)])"
    assert run(code) == ""


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert run("import tenuto; print(hasattr(tenuto, 'Klient'))") == "False"
