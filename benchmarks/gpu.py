"""What one step costs on a device, and what moves for it, with both pools; and a CNN beside PyTorch's.

python -m benchmarks.gpu [--device cuda] [--seconds 0.5] [--rounds 3]

Steps: the 2x128 LSTM, one frame, 1 to 4096 rows, through the server's own pool and runner; the pools take
turns, that of the graph with fresh and with kept buffers. `bytes` are counted from the tensors' sizes, both
ways, and `share` is the arithmetic of the step over what a large product reaches on the same device in the
same precision. Images: the digits CNN through the
server's runner, and the same network in PyTorch, eager and, on CUDA, compiled. --device cpu shows it runs.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CUDA, ModelRunner, choose_provider, flush_denormals
from tenuto.serving.repository import ModelFolder
from tenuto.serving.runners import BufferKind, PoolKind, RunSettings, open_runner
from tenuto.serving.state_pool import HostPool

from . import model
from .report import aligned

# What takes turns: where the states are, and whether what is read and written stays where it is.
KINDS: dict[str, tuple[PoolKind, BufferKind]] = {
    "numpy": ("numpy", "fresh"),
    "graph": ("graph", "fresh"),
    "kept": ("graph", "kept"),
}
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
IMAGES = (1, 64, 1024)
Step = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where (cuda)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (0.5)")
    parser.add_argument("--rounds", type=int, default=3, help="the pools take turns so often (3)")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of a step")
    options = parser.parse_args(arguments)
    provider = choose_provider(options.device)
    flush_denormals()
    with TemporaryDirectory(prefix="tenuto-gpu-") as name:
        model.write_repository(Path(name) / "models")
        print(steps(Path(name) / "models", provider, options))
        print(images(Path(name) / "models", provider, options))


def steps(repository: Path, provider: str, options: argparse.Namespace) -> str:
    """Microseconds of a step by rows and kind, medians over the rounds."""
    folder = ModelFolder(model.NAME, 1, repository / model.NAME / "1")
    peak = flops_per_second(provider)
    heads = ("rows", "numpy pool, µs", "graph pool, µs", "kept, µs", "numpy / graph", "numpy / kept")
    lines: list[tuple[str, ...]] = [(*heads, "bytes, numpy", "graph", "share")]
    for rows in options.rows:
        every: dict[str, Step] = {kind: step_of(folder, provider, kind, rows) for kind in KINDS}
        spent = rounds(every, options)
        host, graph, kept = (1e6 * median(spent[kind]) for kind in KINDS)
        share = rows * step_flops() / (min(graph, kept) / 1e6) / peak
        lines.append(
            (f"{rows:,}", f"{host:,.0f}", f"{graph:,.0f}", f"{kept:,.0f}", f"{host / graph:.2f}",
             f"{host / kept:.2f}", f"{moved(rows, 'numpy'):,}", f"{moved(rows, 'graph'):,}", f"{share:.2%}")
        )  # fmt: skip
    return aligned(lines)


def step_of(folder: ModelFolder, provider: str, kind: str, rows: int) -> Step:
    """One gather, run, check and scatter, as the engine makes them."""
    runner = open_runner(folder.read(), RunSettings(provider, 1, *KINDS[kind]), max_sequences=rows)
    manifest = runner.manifest
    pool = runner.pool or HostPool(manifest.states, rows)
    slots = np.array([pool.allocate(f"{row}") for row in range(rows)], np.intp)
    x = np.random.default_rng(model.SEED).standard_normal((rows, 1, model.INPUTS), np.float32)
    lengths = np.ones(rows, np.int32)

    def step() -> None:
        results = runner.run({"x": x, "lengths": lengths} | pool.gather(slots))
        states = results[len(manifest.outputs) :]
        if pool.not_finite(states, rows):
            raise RuntimeError("a state of the benchmark is not finite. This is a bug.")
        pool.scatter(slots, states)

    return step


def moved(rows: int, kind: PoolKind) -> int:
    """Bytes between host and device for one step, both ways."""
    described = Manifest.model_validate(model.manifest())
    every = rows * 4 * (model.INPUTS + model.OUTPUTS + 1)  # x, y, lengths
    return every + rows * (2 * described.slot_bytes if kind == "numpy" else 8 + 4)  # states; slot and flag


def step_flops() -> int:
    """Of one row and frame: multiplications and additions of both layers and the head."""
    first, second = model.INPUTS + model.WIDTH, 2 * model.WIDTH
    return 2 * (4 * model.WIDTH * (first + second) + model.WIDTH * model.OUTPUTS)


def flops_per_second(provider: str) -> float:
    """What a product of two large float32 matrices reaches, without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    size, device = (8192, "cuda") if provider == CUDA else (1024, "cpu")
    a = torch.randn(size, size, device=device)
    seconds = timed(lambda: settled(a @ a), 0.5)
    return 2 * size**3 / seconds


def images(repository: Path, provider: str, options: argparse.Namespace) -> str:
    """Images a second by batch, through the runner and in PyTorch, host to host."""
    file = repository / model.IMAGES / "1" / "model.onnx"
    runner = ModelRunner(file.read_bytes(), None, "digits/1", provider=provider, threads=0)
    network = torch_network().eval().to("cuda" if provider == CUDA else "cpu")
    lines: list[tuple[str, ...]] = []
    for rows in IMAGES:
        picture = np.random.default_rng(0).random((rows, *model.IMAGE), np.float32)
        every: dict[str, Step] = {
            "ours, images/s": partial(runner.run, {"image": picture}),
            "PyTorch eager": partial(seen, network, picture),
        }
        if provider == CUDA:
            every["torch.compile"] = partial(seen, torch.compile(network), picture)
        spent = rounds(every, options)
        lines = lines or [("images", *every)]
        lines.append((f"{rows:,}", *(f"{rows / median(spent[name]):,.0f}" for name in every)))
    return aligned(lines)


def seen(network: Callable[[torch.Tensor], torch.Tensor], picture: model.Floats) -> object:
    """What PyTorch says of a batch, from the host and back to it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        return network(torch.from_numpy(picture).to(device)).cpu().numpy()


def torch_network() -> nn.Module:
    """The digits CNN, with random weights."""
    from tenuto.training.tasks.digits import DigitsTask

    return DigitsTask().network()


def settled(value: torch.Tensor) -> torch.Tensor:
    """After the device is done with it."""
    if value.is_cuda:
        torch.cuda.synchronize()
    return value


def rounds(every: dict[str, Step], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of one call of each, once a round, in turns."""
    spent: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(options.rounds):
        for name, step in every.items():
            spent[name].append(timed(step, options.seconds))
    return spent


def timed(step: Step, seconds: float) -> float:
    """Seconds of one call, the median of as many as fit."""
    for _ in range(3):
        step()
    taken: list[float] = []
    began = time.perf_counter()
    while (at := time.perf_counter()) < began + seconds or len(taken) < 3:
        step()
        taken.append(time.perf_counter() - at)
    return median(taken)


if __name__ == "__main__":
    main()
