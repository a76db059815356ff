"""The ONNX graph and manifest of `gestures`: points of a stroke in, log-probabilities at each out."""

from tenuto.serving.manifest import METADATA_KEY, Manifest

from . import recurrent_graph
from .graph import Array, Graph
from .recurrent import Shape

PEN = ("first", "last", "drawing")  # states beside those of the LSTM, of 2, 2 and 1 numbers


def manifest(shape: Shape) -> Manifest:
    """Describe a model whose LSTM has that shape."""
    pen = [
        {
            "input": name,
            "output": f"{name}_next",
            "dtype": "float32",
            "shape": ["batch", size],
            "batch_axis": 0,
            "init": "zeros",
        }
        for name, size in zip(PEN, (2, 2, 1), strict=True)
    ]
    axes = {"dtype": "float32", "batch_axis": 0, "time_axis": 1}
    return Manifest.model_validate(
        {
            "format": 1,
            "name": "gestures",
            "description": "Digits 0 to 9 drawn in the air, point by point; the answer counts after the "
            "last point of a stroke. One sequence is one stroke.",
            "licence": "Apache-2.0",
            "inputs": [
                {
                    "name": "points",
                    "shape": ["batch", "time", 2],
                    "chunk": {"multiple": 1},
                    "lengths": "lengths",
                    "unit": "x to the right, y up; a digit is about 0.6 high",
                    **axes,
                }
            ],
            "states": [*pen, *recurrent_graph.states(shape)],
            "outputs": [
                {
                    "name": "log_probabilities",
                    "shape": ["batch", "time", shape.outputs],
                    "labels": [str(digit) for digit in range(10)],
                    "activation": "log_softmax",
                    **axes,
                }
            ],
            "max_batch": 64,
            "max_frames": 32,
        }
    )


def build(weights: dict[str, Array], shape: Shape, described: Manifest) -> bytes:
    """Return the ONNX file for the weights of a `GestureNetwork`, with its manifest inside."""
    graph = Graph(described.name)
    entry, out = described.inputs[0], described.outputs[0]
    for state in described.states:
        graph.input(state.input, state.dtype, state.shape)
    graph.input(entry.name, entry.dtype, entry.shape)
    graph.input("lengths", "int32", ["batch"])
    features = _features(graph, entry.name)
    reader = {key.removeprefix("reader."): w for key, w in weights.items() if key.startswith("reader.")}
    recurrent_graph.add_network(graph, reader, shape, features, out.name)
    graph.output(out.name, out.dtype, out.shape)
    for state in described.states:
        graph.output(state.output, state.dtype, state.shape)
    return graph.model({METADATA_KEY: described.to_json()})


def _features(graph: Graph, points: str) -> str:
    """Add the way from the last point and from the first; return [batch, time, 4]."""
    node, ints = graph.node, graph.integers
    zero = graph.constant("zero", 0.0)
    began = node("Greater", ["drawing", zero], "began")
    start = node("Gather", [points, graph.constant("index_0", 0, "int64")], "start", axis=1)
    first = node("Where", [began, "first", start], "first_next")
    last = node("Where", [began, "last", start], "last_point")
    path = node("Concat", [node("Unsqueeze", [last, ints(1)], "last_row"), points], "path", axis=1)
    before = node("Slice", [path, ints(0), ints(-1), ints(1)], "before")
    step = node("Sub", [points, before], "step")
    away = node("Sub", [points, node("Unsqueeze", [first, ints(1)], "first_row")], "away")

    # The last point of each row's own length, not of the padded one: `path` has one more before it.
    ends = node("Unsqueeze", [node("Cast", ["lengths"], "ends", to=7), ints(1)], "ends_column")
    node("GatherND", [path, ends], "last_next", batch_dims=1)
    node("Expand", [graph.constant("one", [[1.0]]), node("Shape", ["drawing"], "rows")], "drawing_next")
    return node("Concat", [step, away], "features", axis=2)
