"""What the ONNX Runtime that is installed here loads, against what a file needs."""

from __future__ import annotations

from dataclasses import dataclass

import onnxruntime

from .graph_facts import Facts

# Of ONNX Runtime 1.31: newer opsets are refused at load, older ones not promised.
OPSETS = (7, 26)
NEWEST_IR = 13
_OWN_DOMAINS = frozenset(
    ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft")
)


@dataclass(frozen=True)
class Fit:
    """`obstacles`: why it cannot be loaded, or may not be."""

    version: str
    obstacles: tuple[str, ...]
    custom_domains: tuple[str, ...]


def fit(facts: Facts) -> Fit:
    version, found = onnxruntime.__version__, []
    opset, used = facts.opsets.get("ai.onnx", 0), {name.rpartition(".")[0] for name in facts.operators}
    if opset > OPSETS[1]:
        found.append(
            f"opset {opset}: ONNX Runtime {version} knows those up to {OPSETS[1]}; export it with a lower one"
        )
    elif 0 < opset < OPSETS[0]:
        found.append(f"opset {opset}: ONNX Runtime promises those from {OPSETS[0]} alone")
    if facts.ir_version > NEWEST_IR:
        found.append(f"IR version {facts.ir_version}: ONNX Runtime {version} reads those up to {NEWEST_IR}")
    custom = tuple(sorted({*facts.opsets, *used} - _OWN_DOMAINS))
    return Fit(version, tuple(found), tuple(d for d in custom if d in used))
