"""The ONNX graph and manifest of `digits`: an image in, ten log-probabilities out."""

from tenuto.serving.manifest import METADATA_KEY, Manifest

from .graph import Array, Graph

NAME = "digits"
LABELS = [str(digit) for digit in range(10)]


def manifest() -> Manifest:
    """Describe the model; images may also come as uint8, PNG or JPEG."""
    return Manifest.model_validate(
        {
            "format": 1,
            "name": NAME,
            "description": "Handwritten digits 0 to 9: one 28 x 28 image, light ink on dark paper.",
            "licence": "CC-BY-SA-3.0",
            "inputs": [
                {
                    "name": "image",
                    "dtype": "float32",
                    "shape": ["batch", 28, 28],
                    "batch_axis": 0,
                    "unit": "ink, 0 to 1",
                    "wire": [
                        {"dtype": "uint8", "scale": 1 / 255, "offset": 0.0},
                        {"encoding": "png"},
                        {"encoding": "jpeg"},
                    ],
                }
            ],
            "outputs": [
                {
                    "name": "log_probabilities",
                    "dtype": "float32",
                    "shape": ["batch", 10],
                    "batch_axis": 0,
                    "labels": LABELS,
                    "activation": "log_softmax",
                }
            ],
            "max_batch": 64,
        }
    )


def build(weights: dict[str, Array], pooled: list[bool], described: Manifest) -> bytes:
    """Return the ONNX file for the weights of a `DigitNetwork`; `pooled` says which blocks pool."""
    graph = Graph(NAME)
    entry, out = described.inputs[0], described.outputs[0]
    node, ints = graph.node, graph.integers
    value = graph.input(entry.name, entry.dtype, entry.shape)
    value = node("Sub", [value, graph.constant("pixel_mean", weights["pixel_mean"])], "centred")
    value = node("Div", [value, graph.constant("pixel_std", weights["pixel_std"])], "normal")
    value = node("Unsqueeze", [value, ints(1)], "planes")
    for block, pool in enumerate(pooled):
        value = _block(graph, value, weights, block, pool)
    value = node("Flatten", [value], "features", axis=1)
    matrix = graph.constant("head_w", weights["head.weight"].T)
    value = node("MatMul", [value, matrix], "head_product")
    value = node("Add", [value, graph.constant("head_b", weights["head.bias"])], "logits")
    node("LogSoftmax", [value], out.name, axis=-1)
    graph.output(out.name, out.dtype, out.shape)
    return graph.model({METADATA_KEY: described.to_json()})


def _block(graph: Graph, value: str, weights: dict[str, Array], block: int, pool: bool) -> str:
    """Add a convolution, pooling if asked, normalisation and rectification."""
    name, key = f"block{block}", f"blocks.{block}"
    kernel = graph.constant(f"{name}_w", weights[f"{key}.convolution.weight"])
    value = graph.node("Conv", [value, kernel], f"{name}_convolution", pads=[1, 1, 1, 1])
    if pool:
        value = graph.node("MaxPool", [value], f"{name}_pooled", kernel_shape=[2, 2], strides=[2, 2])
    statistics = [
        graph.constant(f"{name}_{part}", weights[f"{key}.normalisation.{part}"])
        for part in ("weight", "bias", "running_mean", "running_var")
    ]
    value = graph.node("BatchNormalization", [value, *statistics], f"{name}_normal", epsilon=1e-5)
    return graph.node("Relu", [value], f"{name}_relu")
