"""Networks that read one image of a digit, as ONNX graphs: a convolutional one and a perceptron."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tenuto.serving.manifest import METADATA_KEY, Manifest

from .candidate import AnyArray, Candidate, Tensors
from .graph import Array, Graph
from .handwriting import strokes
from .weights import count, exported

LABELS = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class Block:
    """A 3x3 convolution, then 2x2 pooling if asked, then normalisation and rectification."""

    inputs: int
    outputs: int
    pool: bool = False
    padding: int = 1


def manifest(name: str, description: str) -> Manifest:
    """Describe a model of one image in, ten log-probabilities out; uint8, PNG and JPEG may come too."""
    return Manifest.model_validate(
        {
            "format": 1,
            "name": name,
            "description": description,
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


def candidate(network: nn.Module, described: Manifest, model: bytes, seed: int, card: str) -> Candidate:
    """Return `model` with the network that it was made of, and synthetic images to compare them on."""

    def reference(batches: Sequence[AnyArray]) -> list[Tensors]:
        with torch.no_grad():
            answers = [network(torch.from_numpy(batch)).numpy() for batch in batches]
        return [{"log_probabilities": answer} for answer in answers]

    return Candidate(
        manifest=described,
        model=model,
        reference=reference,
        golden=[strokes(8, seed)],
        probe=strokes(200, seed + 1),
        tolerance=1e-4,
        golden_tolerance=1e-3,
        parameters=count(network),
        card=card,
    )


def convolutional(network: nn.Module, blocks: Sequence[Block], described: Manifest) -> bytes:
    """Return the ONNX file of a `digits` network: `blocks.<i>.{convolution,normalisation}`, then `head`."""
    weights, graph = exported(network), Graph(described.name)
    value = graph.node("Unsqueeze", [_normal(graph, weights, described), graph.integers(1)], "planes")
    for index, block in enumerate(blocks):
        value = _block(graph, value, weights, f"blocks.{index}", block)
    value = graph.node("Flatten", [value], "features", axis=1)
    return _answer(graph, value, weights, described)


def perceptron(network: nn.Module, layers: int, described: Manifest) -> bytes:
    """Return the ONNX file of a `digits-mlp` network: `layers.<i>.{linear,normalisation}`, then `head`."""
    weights, graph = exported(network), Graph(described.name)
    value = graph.node("Flatten", [_normal(graph, weights, described)], "pixels", axis=1)
    for index in range(layers):
        key, name = f"layers.{index}", f"layer{index}"
        matrix = graph.constant(f"{name}_w", weights[f"{key}.linear.weight"].T)
        value = graph.node("MatMul", [value, matrix], f"{name}_product")
        value = _normalised(graph, value, weights, f"{key}.normalisation", name)
    return _answer(graph, value, weights, described)


def _normal(graph: Graph, weights: dict[str, Array], described: Manifest) -> str:
    """Add the input, and what is taken off its pixels and what they are divided by."""
    entry = described.inputs[0]
    value = graph.input(entry.name, entry.dtype, entry.shape)
    value = graph.node("Sub", [value, graph.constant("pixel_mean", weights["pixel_mean"])], "centred")
    return graph.node("Div", [value, graph.constant("pixel_std", weights["pixel_std"])], "normal")


def _block(graph: Graph, value: str, weights: dict[str, Array], key: str, block: Block) -> str:
    name = key.replace("s.", "")
    kernel = graph.constant(f"{name}_w", weights[f"{key}.convolution.weight"])
    value = graph.node("Conv", [value, kernel], f"{name}_convolution", pads=[block.padding] * 4)
    if block.pool:
        value = graph.node("MaxPool", [value], f"{name}_pooled", kernel_shape=[2, 2], strides=[2, 2])
    return _normalised(graph, value, weights, f"{key}.normalisation", name)


def _normalised(graph: Graph, value: str, weights: dict[str, Array], key: str, name: str) -> str:
    """Add batch normalisation with the statistics of training, and rectification."""
    statistics = [
        graph.constant(f"{name}_{part}", weights[f"{key}.{part}"])
        for part in ("weight", "bias", "running_mean", "running_var")
    ]
    value = graph.node("BatchNormalization", [value, *statistics], f"{name}_normal", epsilon=1e-5)
    return graph.node("Relu", [value], f"{name}_relu")


def _answer(graph: Graph, value: str, weights: dict[str, Array], described: Manifest) -> bytes:
    """Add the linear map to ten log-probabilities; return the file."""
    out = described.outputs[0]
    value = graph.node("MatMul", [value, graph.constant("head_w", weights["head.weight"].T)], "head_product")
    value = graph.node("Add", [value, graph.constant("head_b", weights["head.bias"])], "logits")
    graph.node("LogSoftmax", [value], out.name, axis=-1)
    graph.output(out.name, out.dtype, out.shape)
    return graph.model({METADATA_KEY: described.to_json()})
