"""A `RecurrentNetwork` as a model: its manifest, its ONNX graph, and all that is needed to check it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tenuto.serving.manifest import METADATA_KEY, Manifest

from .candidate import AnyArray, Candidate, Tensors
from .graph import Array, Graph, add_gru, add_lstm, add_rnn
from .recurrent import RecurrentNetwork, Shape
from .weights import count, exported

OPERATORS = {"": "Identity", "log_softmax": "LogSoftmax", "sigmoid": "Sigmoid"}


def manifest(shape: Shape, *, entry: Mapping[str, Any], output: Mapping[str, Any], **about: Any) -> Manifest:
    """Describe a network of that shape.

    `about` are the manifest's own keys (name, description, licence, max_batch, max_frames, generate...);
    `entry` (the input) and `output` need a name, and may have what the manifest knows beside axes and dtype.
    """
    axes = {"batch_axis": 0, "time_axis": 1}
    steps = ["batch", "time"] if shape.symbols is not None else ["batch", "time", shape.inputs]
    took: dict[str, Any] = {
        "dtype": "float32",
        "shape": steps,
        "chunk": {"multiple": 1},
        "lengths": "lengths",
    }
    if shape.symbols is not None:
        took |= {"dtype": "int64", "range": [0, shape.symbols - 1]}
    answer = {"dtype": "float32", "shape": ["batch", "time", shape.outputs], "activation": shape.activation}
    whole = {"inputs": [took | axes | dict(entry)], "outputs": [answer | axes | dict(output)]}
    return Manifest.model_validate({"format": 1, "states": states(shape), **whole, **about})


def candidate(
    network: RecurrentNetwork,
    described: Manifest,
    *,
    golden: Sequence[AnyArray],
    probe: AnyArray,
    card: str,
    tolerance: float = 1e-4,
) -> Candidate:
    """Return the network as an ONNX file, with synthetic `golden` chunks and `probe` [time, ...]."""
    name = described.outputs[0].name

    def reference(chunks: Sequence[AnyArray]) -> list[Tensors]:
        state, outputs = network.initial_state(1), []
        for chunk in chunks:
            with torch.no_grad():
                y, state = network(torch.from_numpy(chunk)[None], state)
            outputs.append({name: y[0].numpy()})
        return outputs

    return Candidate(
        manifest=described,
        model=build(exported(network), network.shape, described),
        reference=reference,
        golden=golden,
        probe=probe,
        tolerance=tolerance,
        golden_tolerance=10 * tolerance,
        parameters=count(network),
        card=card,
    )


def states(shape: Shape) -> list[dict[str, Any]]:
    """Return the manifest's entries for the states of a network of that shape."""
    return [
        {
            "input": name,
            "output": f"{name}_next",
            "dtype": "float32",
            "shape": [1, "batch", hidden],
            "batch_axis": 1,
            "init": "zeros",
        }
        for layer, hidden in enumerate(shape.hidden)
        for name in _state_names(shape, layer)
    ]


def _state_names(shape: Shape, layer: int) -> tuple[str, ...]:
    return tuple(f"{part}{layer}" for part in ("hc" if shape.cell == "lstm" else "h"))


def build(weights: dict[str, Array], shape: Shape, described: Manifest) -> bytes:
    """Return the ONNX file for the weights of a `RecurrentNetwork`, with its manifest inside.

    The manifest has one input, of [batch, time, inputs] or of symbols [batch, time], with `lengths`; the
    states that `states` gives; and one output [batch, time, outputs].
    """
    graph = Graph(described.name)
    entry, out = described.inputs[0], described.outputs[0]
    for state in described.states:
        graph.input(state.input, state.dtype, state.shape)
    graph.input(entry.name, entry.dtype, entry.shape)
    graph.input("lengths", "int32", ["batch"])
    value = _by_time(graph, weights, shape, entry.name)
    for layer in range(len(shape.hidden)):
        value = _layer(graph, weights, shape, layer, value)
    value = graph.node("MatMul", [value, graph.constant("head_w", weights["head.weight"].T)], "head_product")
    value = graph.node("Add", [value, graph.constant("head_b", weights["head.bias"])], "head_sum")
    axis = {"axis": -1} if shape.activation == "log_softmax" else {}
    value = graph.node(OPERATORS[shape.activation], [value], "head_by_time", **axis)
    graph.node("Transpose", [value], out.name, perm=[1, 0, 2])
    graph.output(out.name, out.dtype, out.shape)
    for state in described.states:
        graph.output(state.output, state.dtype, state.shape)
    return graph.model({METADATA_KEY: described.to_json()})


def _by_time(graph: Graph, weights: dict[str, Array], shape: Shape, name: str) -> str:
    """Add what is before the first layer; return [time, batch, inputs]."""
    if shape.symbols is not None:
        symbols = graph.node("Transpose", [name], "symbols_by_time", perm=[1, 0])
        table = graph.constant("embedding", weights["embedding.weight"])
        return graph.node("Gather", [table, symbols], "vectors", axis=0)
    value = graph.node("Sub", [name, graph.constant("inputs_mean", weights["mean"])], "centred")
    value = graph.node("Div", [value, graph.constant("inputs_std", weights["std"])], "normal")
    return graph.node("Transpose", [value], "normal_by_time", perm=[1, 0, 2])


def _layer(graph: Graph, weights: dict[str, Array], shape: Shape, layer: int, value: str) -> str:
    prefix = f"layers.{layer}."
    part = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
    before = _state_names(shape, layer)
    after = tuple(f"{name}_next" for name in before)
    name = f"{shape.cell}{layer}"
    if shape.cell == "lstm":
        return add_lstm(graph, name, part, value, "lengths", (before[0], before[1]), (after[0], after[1]))
    add = add_gru if shape.cell == "gru" else add_rnn
    return add(graph, name, part, value, "lengths", before[0], after[0])
