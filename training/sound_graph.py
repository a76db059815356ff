"""What every model that listens has in its manifest and ONNX graph: PCM in, log-mel steps, heads."""

from collections.abc import Mapping, Sequence
from typing import Any

from .datasets.fsdd import RATE_HZ
from .graph import Array, Graph, add_gru, add_lstm, add_rnn
from .recurrent import Cell
from .sound import BANDS, HOP, OVERLAP, STEP, WINDOW

PCM: Mapping[str, Any] = {
    "name": "pcm",
    "dtype": "int16",
    "shape": ["batch", "samples"],
    "batch_axis": 0,
    "time_axis": 1,
    "chunk": {"multiple": STEP},
    "lengths": "lengths",
    "tail": "drop",
    "unit": "PCM",
    "rate_hz": float(RATE_HZ),
}
OVERLAP_STATE: Mapping[str, Any] = {
    "input": "overlap",
    "output": "overlap_next",
    "dtype": "float32",
    "shape": ["batch", OVERLAP],
    "batch_axis": 0,
    "init": "zeros",
}


def state_names(layer: str, cell: Cell) -> tuple[str, ...]:
    """Return the inputs' names of a layer's states: h and c of an LSTM, h alone of the others."""
    return tuple(f"{layer}_{part}" for part in ("hc" if cell == "lstm" else "h"))


def layer_states(layer: str, cell: Cell, hidden: int) -> list[dict[str, Any]]:
    """Return the manifest's entries for the states of one recurrent layer."""
    axes = {"dtype": "float32", "shape": [1, "batch", hidden], "batch_axis": 1, "init": "zeros"}
    return [{"input": name, "output": f"{name}_next", **axes} for name in state_names(layer, cell)]


def log_probabilities(name: str, labels: Sequence[str]) -> dict[str, Any]:
    """Return the manifest's entry for an output [batch, frames, labels], one frame for each 20 ms."""
    axes = {"shape": ["batch", "frames", len(labels)], "batch_axis": 0, "time_axis": 1, "stride": STEP}
    return {
        "name": name,
        "dtype": "float32",
        **axes,
        "labels": list(labels),
        "activation": "log_softmax",
    }


def add_steps(graph: Graph, weights: Mapping[str, Array]) -> tuple[str, str]:
    """Add an `Ear` between the inputs pcm, lengths and overlap and steps, float32 [time, batch, 80].

    Returns the names of the steps and of their number in each row, int32 [batch]. Frames are rows of a
    matrix product: rows do not depend on their neighbours, which a convolution does not promise.
    """
    node, ints = graph.node, graph.integers
    value = node("Cast", ["pcm"], "pcm_float", to=1)
    value = node("Mul", [value, graph.constant("full_scale", 1 / 32768)], "pcm_scaled")
    sound = node("Concat", ["overlap", value], "sound", axis=1)
    _add_overlap(graph, sound)
    frames = _add_frames(graph, sound)

    spectrum = node("MatMul", [frames, graph.constant("dft", weights["dft"])], "spectrum")
    half = weights["dft"].shape[1] // 2
    halves = ["spectrum_cos", "spectrum_sin"]
    graph.nodes("Split", [spectrum, ints(half, half)], halves, axis=2)
    squares = [node("Mul", [half, half], f"{half}_squared") for half in halves]
    power = node("Add", squares, "power")
    value = node("MatMul", [power, graph.constant("mel", weights["mel"])], "mel_power")
    value = node("Add", [value, graph.constant("floor", weights["floor"])], "mel_floored")
    # The logarithm in double, then rounded. ONNX Runtime takes 8 floats at once and what is left at the
    # end, or where it splits the work between threads, with another function: in float the last bit
    # of a frame would depend on its neighbours (measured: 1e-5 in the output with two threads).
    value = node("Cast", [value], "mel_double", to=11)
    value = node("Log", [value], "log_double")
    value = node("Cast", [value], "log_mel", to=1)
    value = node("Sub", [value, graph.constant("band_mean", weights["mean"])], "log_mel_centred")
    value = node("MatMul", [value, graph.constant("white", weights["white"])], "log_mel_white")
    value = node("Reshape", [value, ints(0, -1, 2 * BANDS)], "steps")
    steps = node("Transpose", [value], "steps_by_time", perm=[1, 0, 2])
    return steps, node("Div", ["lengths", graph.constant("step", STEP, "int32")], "step_lengths")


def _add_overlap(graph: Graph, sound: str) -> None:
    """Add the overlap for the next chunk: the samples before each row's own end, not the padded end."""
    ends = graph.node("Cast", ["lengths"], "ends", to=7)
    ends = graph.node("Unsqueeze", [ends, graph.integers(1)], "ends_column")
    kept = graph.node("Add", [ends, graph.constant("overlap_range", range(OVERLAP), "int64")], "kept")
    kept = graph.node("Unsqueeze", [kept, graph.integers(2)], "kept_index")
    graph.node("GatherND", [sound, kept], "overlap_next", batch_dims=1)


def _add_frames(graph: Graph, sound: str) -> str:
    """Add the windows of the sound, [batch, frames, 200]."""
    zero, one = (graph.constant(f"scalar_{v}", v, "int64") for v in (0, 1))
    hop = graph.constant("hop", HOP, "int64")
    shape = graph.node("Shape", ["pcm"], "pcm_shape")
    samples = graph.node("Gather", [shape, one], "sample_count", axis=0)
    count = graph.node("Div", [samples, hop], "frame_count")
    starts = graph.node("Range", [zero, count, one], "frame_index")
    starts = graph.node("Mul", [starts, hop], "frame_starts")
    starts = graph.node("Unsqueeze", [starts, graph.integers(1)], "frame_starts_column")
    places = graph.constant("window_range", range(WINDOW), "int64")
    places = graph.node("Add", [starts, places], "frame_samples")
    return graph.node("Gather", [sound, places], "frames", axis=1)


def add_layer(
    graph: Graph, layer: str, cell: Cell, weights: dict[str, Array], inputs: str, steps: str
) -> str:
    """Add a recurrent layer [time, batch, n] to [time, batch, hidden]; `steps` is each row's length."""
    before = state_names(layer, cell)
    after = tuple(f"{name}_next" for name in before)
    if cell == "lstm":
        return add_lstm(graph, layer, weights, inputs, steps, (before[0], before[1]), (after[0], after[1]))
    add = add_gru if cell == "gru" else add_rnn
    return add(graph, layer, weights, inputs, steps, before[0], after[0])


def add_head(graph: Graph, hidden: str, weights: Mapping[str, Array], output: str) -> None:
    """Add a classifier: hidden [time, batch, n] to log-probabilities [batch, time, labels]."""
    matrix = graph.constant(f"{output}_head_w", weights["weight"].T)
    bias = graph.constant(f"{output}_head_b", weights["bias"])
    value = graph.node("MatMul", [hidden, matrix], f"{output}_product")
    value = graph.node("Add", [value, bias], f"{output}_logits")
    value = graph.node("LogSoftmax", [value], f"{output}_by_time", axis=-1)
    graph.node("Transpose", [value], output, perm=[1, 0, 2])


def part(weights: Mapping[str, Array], name: str) -> dict[str, Array]:
    """Return the weights of the module `name`, by their names inside it."""
    return {k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(f"{name}.")}
