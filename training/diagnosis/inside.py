"""Looks into an exported ONNX file: its constants, and what its nodes say between input and output."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from tenuto.training.candidate import AnyArray, Tensors


class Inside:
    """An exported model whose inner tensors can be read."""

    def __init__(self, model: bytes) -> None:
        self._proto = onnx.load_from_string(model)
        self.constants = {t.name: numpy_helper.to_array(t) for t in self._proto.graph.initializer}

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        """Return the nodes of that operator, in the file's order."""
        return [node for node in self._proto.graph.node if node.op_type == operator]

    def values(self, names: list[str], feeds: Mapping[str, AnyArray]) -> Tensors:
        """Run the model and return the tensors called `names`, inner ones included."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        declared = {output.name for output in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@dataclass(frozen=True, eq=False)
class Gates:
    """What an LSTM's gates did, each [time, hidden]: 0 is shut, 1 is open; `cell` is what it holds."""

    input: AnyArray
    forget: AnyArray
    output: AnyArray
    cell: AnyArray

    @classmethod
    def of(cls, model: Inside, node: onnx.NodeProto, feeds: Mapping[str, AnyArray]) -> "Gates":
        """Compute one sequence's gates from the node's weights, which ONNX stacks as i, o, f, c.

        Hochreiter and Schmidhuber 1997 with the forget gate of Gers 2000. Raises ValueError if the hidden
        values that follow are not those of the model.
        """
        x, said = model.values([node.input[0], node.output[0]], feeds).values()
        w, r, b = (model.constants[name][0] for name in node.input[1:4])
        h = np.zeros(r.shape[1])
        c = np.zeros_like(h)
        parts: list[list[AnyArray]] = [[], [], [], []]
        for step in x[:, 0]:
            i, o, f, g = np.split(w @ step + r @ h + b[: len(w)] + b[len(w) :], 4)
            i, o, f = (1 / (1 + np.exp(-gate)) for gate in (i, o, f))
            c = f * c + i * np.tanh(g)
            h = o * np.tanh(c)
            for part, value in zip(parts, (i, f, o, c), strict=True):
                part.append(value)
            if not np.allclose(h, said[len(parts[0]) - 1, 0, 0], atol=1e-3):
                raise ValueError(f"{node.name}: step {len(parts[0])} of the gates is not what the model says")
        return cls(*(np.array(part) for part in parts))
