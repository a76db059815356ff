"""The ONNX graph and manifest of `spoken-digits`: PCM in, log-probabilities and an answer out."""

from tenuto.serving.manifest import METADATA_KEY, Manifest

from .graph import Array, Graph, add_lstm

NAME = "spoken-digits"
LABELS = [str(digit) for digit in range(10)]


def manifest(hear: int, answer: int, step: int, overlap: int) -> Manifest:
    """Describe a model with those hidden sizes; `step` and `overlap` are in samples."""

    def state(name: str, size: int) -> dict[str, object]:
        shape = [1, "batch", size]
        axes = {"shape": shape, "batch_axis": 1, "init": "zeros"}
        return {"input": name, "output": f"{name}_next", "dtype": "float32", **axes}

    def output(name: str) -> dict[str, object]:
        axes = {"shape": ["batch", "frames", 10], "batch_axis": 0, "time_axis": 1, "stride": step}
        meaning = {"labels": LABELS, "activation": "log_softmax"}
        return {"name": name, "dtype": "float32", **axes, **meaning}

    return Manifest.model_validate(
        {
            "format": 1,
            "name": NAME,
            "description": "Spoken digits 0 to 9 from 8 kHz sound. For every 20 ms: "
            "log_probabilities, what is heard now; answer, what digit was spoken last.",
            "licence": "CC-BY-SA-4.0",
            "inputs": [
                {
                    "name": "pcm",
                    "dtype": "int16",
                    "shape": ["batch", "samples"],
                    "batch_axis": 0,
                    "time_axis": 1,
                    "chunk": {"multiple": step},
                    "lengths": "lengths",
                    "tail": "drop",
                    "unit": "PCM",
                    "rate_hz": 8000.0,
                }
            ],
            "states": [
                {
                    "input": "overlap",
                    "output": "overlap_next",
                    "dtype": "float32",
                    "shape": ["batch", overlap],
                    "batch_axis": 0,
                    "init": "zeros",
                },
                *(state(f"hear_{part}", hear) for part in "hc"),
                *(state(f"answer_{part}", answer) for part in "hc"),
            ],
            "outputs": [output("log_probabilities"), output("answer")],
            "max_batch": 64,
            "max_frames": 32,
        }
    )


def build(weights: dict[str, Array], described: Manifest) -> bytes:
    """Return the ONNX file for the weights of a `SpokenDigitNetwork`, with its manifest inside."""
    graph = Graph(NAME)
    for state in described.states:
        graph.input(state.input, state.dtype, state.shape)
    graph.input("pcm", "int16", ["batch", "samples"])
    graph.input("lengths", "int32", ["batch"])
    pairs = _front_end(graph, weights, overlap=described.states[0].slot_shape[0])

    step = graph.constant("step", described.inputs[0].multiple, "int32")
    frames = graph.node("Div", ["lengths", step], "frame_lengths")
    layers = (("hear", pairs, "log_probabilities"), ("answer", "hear_hidden", "answer"))
    for name, features, output in layers:
        before = (f"{name}_h", f"{name}_c")
        after = (f"{name}_h_next", f"{name}_c_next")
        hidden = add_lstm(graph, name, _part(weights, name), features, frames, before, after)
        _head(graph, hidden, _part(weights, f"{name}_head"), output)

    for out in described.outputs:
        graph.output(out.name, out.dtype, out.shape)
    for state in described.states:
        graph.output(state.output, state.dtype, state.shape)
    return graph.model({METADATA_KEY: described.to_json()})


def _part(weights: dict[str, Array], name: str) -> dict[str, Array]:
    return {k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(f"{name}.")}


def _front_end(graph: Graph, weights: dict[str, Array], overlap: int) -> str:
    """Add sound to log-mel; return pairs of frames, float32 [time, batch, 2 * bands].

    Frames are rows of a matrix product: rows do not depend on their neighbours, which a convolution
    does not promise.
    """
    window, waves = weights["dft"].shape
    bands = weights["mel"].shape[1]
    hop = window - overlap
    node, ints = graph.node, graph.integers
    value = node("Cast", ["pcm"], "pcm_float", to=1)
    value = node("Mul", [value, graph.constant("full_scale", 1 / 32768)], "pcm_scaled")
    sound = node("Concat", ["overlap", value], "sound", axis=1)

    # The overlap for the next chunk: the samples before each row's own end, not the padded end.
    ends = node("Cast", ["lengths"], "ends", to=7)
    ends = node("Unsqueeze", [ends, ints(1)], "ends_column")
    kept = node("Add", [ends, graph.constant("overlap_range", range(overlap), "int64")], "kept")
    kept = node("Unsqueeze", [kept, ints(2)], "kept_index")
    node("GatherND", [sound, kept], "overlap_next", batch_dims=1)

    zero, one = (graph.constant(f"scalar_{v}", v, "int64") for v in (0, 1))
    shape = node("Shape", ["pcm"], "pcm_shape")
    samples = node("Gather", [shape, one], "sample_count", axis=0)
    count = node("Div", [samples, graph.constant("hop", hop, "int64")], "frame_count")
    starts = node("Range", [zero, count, one], "frame_index")
    starts = node("Mul", [starts, graph.constant("hop", hop, "int64")], "frame_starts")
    starts = node("Unsqueeze", [starts, ints(1)], "frame_starts_column")
    places = graph.constant("window_range", range(window), "int64")
    places = node("Add", [starts, places], "frame_samples")
    frames = node("Gather", [sound, places], "frames", axis=1)

    spectrum = node("MatMul", [frames, graph.constant("dft", weights["dft"])], "spectrum")
    halves = ["spectrum_cos", "spectrum_sin"]
    graph.nodes("Split", [spectrum, ints(waves // 2, waves // 2)], halves, axis=2)
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
    value = node("Div", [value, graph.constant("band_std", weights["std"])], "log_mel_normal")
    value = node("Reshape", [value, ints(0, -1, 2 * bands)], "pairs")
    return node("Transpose", [value], "pairs_by_time", perm=[1, 0, 2])


def _head(graph: Graph, hidden: str, weights: dict[str, Array], output: str) -> None:
    """Add the classifier: hidden [time, batch, n] to log-probabilities [batch, time, 10]."""
    matrix = graph.constant(f"{output}_head_w", weights["weight"].T)
    bias = graph.constant(f"{output}_head_b", weights["bias"])
    value = graph.node("MatMul", [hidden, matrix], f"{output}_product")
    value = graph.node("Add", [value, bias], f"{output}_logits")
    value = graph.node("LogSoftmax", [value], f"{output}_by_time", axis=-1)
    graph.node("Transpose", [value], output, perm=[1, 0, 2])
