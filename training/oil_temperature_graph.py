"""The ONNX graph and manifest of `oil-temperature`: an hour in, the next 96 hours out."""

from tenuto.serving.manifest import METADATA_KEY, Manifest

from .datasets.etth1 import COLUMNS
from .graph import Array, Graph, add_lstm

NAME = "oil-temperature"


def manifest(window: int, horizon: int, hidden: int) -> Manifest:
    """Describe a model that looks `window` hours back and `horizon` hours ahead."""
    series = len(COLUMNS)

    def state(name: str, shape: list[object], batch_axis: int) -> dict[str, object]:
        axes = {"shape": shape, "batch_axis": batch_axis, "init": "zeros"}
        return {"input": name, "output": f"{name}_next", "dtype": "float32", **axes}

    return Manifest.model_validate(
        {
            "format": 1,
            "name": NAME,
            "description": "Loads and oil temperature of an electricity transformer: each hour "
            f"in gives a forecast of the next {horizon} hours, in the units given. It normalises "
            f"by the last {window} hours; until so many were seen, the missing ones count as "
            "equal to the first.",
            "licence": "CC-BY-4.0",
            "inputs": [
                {
                    "name": "hours",
                    "dtype": "float32",
                    "shape": ["batch", "time", series],
                    "batch_axis": 0,
                    "time_axis": 1,
                    "chunk": {"multiple": 1},
                    "lengths": "lengths",
                    "rate_hz": 1 / 3600,
                    "columns": COLUMNS,
                }
            ],
            "states": [
                state("window", ["batch", window - 1, series], 0),
                state("seen", ["batch", 1], 0),
                state("h", [1, "batch", hidden], 1),
                state("c", [1, "batch", hidden], 1),
            ],
            "outputs": [
                {
                    "name": "forecast",
                    "dtype": "float32",
                    "shape": ["batch", "time", horizon, series],
                    "batch_axis": 0,
                    "time_axis": 1,
                    "stride": 1,
                    "columns": COLUMNS,
                }
            ],
            "max_batch": 32,
            "max_frames": 24,
        }
    )


def build(weights: dict[str, Array], described: Manifest) -> bytes:
    """Return the ONNX file for the weights of an `OilNetwork`, with its manifest inside."""
    graph = Graph(NAME)
    for state in described.states:
        graph.input(state.input, state.dtype, state.shape)
    graph.input("hours", "float32", described.inputs[0].shape)
    graph.input("lengths", "int32", ["batch"])
    normal, scale, level = _windows(graph, weights, described.states[0].slot_shape[0])
    answer = _forecast(graph, weights, normal)

    node = graph.node
    value = node("Mul", [answer, scale], "answer_scaled")
    value = node("Add", [value, level], "answer_levelled")
    value = node("Transpose", [value], "answer_by_time", perm=[0, 2, 3, 1])
    value = node("Mul", [value, graph.constant("std", weights["std"])], "answer_in_units")
    node("Add", [value, graph.constant("mean", weights["mean"])], "forecast")

    for out in described.outputs:
        graph.output(out.name, out.dtype, out.shape)
    for state in described.states:
        graph.output(state.output, state.dtype, state.shape)
    return graph.model({METADATA_KEY: described.to_json()})


def _windows(graph: Graph, weights: dict[str, Array], past: int) -> tuple[str, str, str]:
    """Add the states' update and each hour's normalised window.

    Returns the windows [batch, 7, time, past + 1], their scale and their level [batch, 7, time, 1].
    """
    node, ints = graph.node, graph.integers
    first = node("Slice", ["hours", ints(0), ints(1), ints(1)], "first_hour")
    zero = graph.constant("zero", 0.0)
    begun = node("Greater", ["seen", zero], "begun_flag")
    begun = node("Unsqueeze", [begun, ints(2)], "begun")
    filled = node("Where", [begun, "window", first], "window_filled")
    known = node("Concat", [filled, "hours"], "known", axis=1)
    node("Max", ["seen", graph.constant("one", 1.0)], "seen_next")

    # The next window ends at each row's own last hour, not at the padded end.
    ends = node("Cast", ["lengths"], "ends", to=7)
    ends = node("Unsqueeze", [ends, ints(1)], "ends_column")
    kept = node("Add", [ends, graph.constant("past_range", range(past), "int64")], "kept")
    kept = node("Unsqueeze", [kept, ints(2)], "kept_index")
    node("GatherND", [known, kept], "window_next", batch_dims=1)

    value = node("Sub", [known, graph.constant("mean", weights["mean"])], "known_centred")
    value = node("Div", [value, graph.constant("std", weights["std"])], "known_z")
    series = node("Transpose", [value], "series", perm=[0, 2, 1])
    none, one = (graph.constant(f"scalar_{v}", v, "int64") for v in (0, 1))
    count = node("Gather", [node("Shape", ["hours"], "hours_shape"), one], "hour_count", axis=0)
    starts = node("Range", [none, count, one], "window_starts")
    starts = node("Unsqueeze", [starts, ints(1)], "window_starts_column")
    places = graph.constant("window_range", range(past + 1), "int64")
    windows = node("Gather", [series, node("Add", [starts, places], "window_hours")], "windows", axis=2)
    level = node("ReduceMean", [windows], "level", axes=[3])
    deviation = node("Sub", [windows, level], "deviation")
    square = node("Mul", [deviation, deviation], "deviation_squared")
    variance = node("ReduceMean", [square], "variance", axes=[3])
    variance = node("Add", [variance, graph.constant("variance_floor", weights["floor"])], "floored")
    scale = node("Sqrt", [variance], "scale")
    return node("Div", [deviation, scale], "normal"), scale, level


def _forecast(graph: Graph, weights: dict[str, Array], normal: str) -> str:
    """Add the shared linear map and the LSTM's correction; return [batch, 7, time, horizon]."""
    node, ints = graph.node, graph.integers
    horizon, window = weights["linear.weight"].shape
    matrix = graph.constant("linear_w", weights["linear.weight"].T)
    value = node("MatMul", [normal, matrix], "linear_product")
    linear = node("Add", [value, graph.constant("linear_b", weights["linear.bias"])], "linear")

    last = graph.constant("last", window - 1, "int64")
    newest = node("Gather", [normal, last], "newest", axis=3)
    newest = node("Transpose", [newest], "newest_by_time", perm=[2, 0, 1])
    lstm = {k.removeprefix("lstm."): w for k, w in weights.items() if k.startswith("lstm.")}
    hidden = add_lstm(graph, "lstm", lstm, newest, "lengths", ("h", "c"), ("h_next", "c_next"))
    value = node("MatMul", [hidden, graph.constant("head_w", weights["head.weight"].T)], "head_product")
    value = node("Add", [value, graph.constant("head_b", weights["head.bias"])], "head")
    value = node("Reshape", [value, ints(0, 0, -1, horizon)], "correction_by_time")
    correction = node("Transpose", [value], "correction", perm=[1, 2, 0, 3])
    return node("Add", [linear, correction], "answer")
