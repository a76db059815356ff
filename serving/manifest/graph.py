"""What a graph declares, compared with what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .part import Dim


@dataclass(frozen=True)
class GraphTensor:
    """One input or output as the graph declares it. An unknown axis is None or a name."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


def differences(
    graph: Mapping[str, GraphTensor], kind: str, name: str, dtype: str, shape: tuple[Dim, ...] | None
) -> list[str]:
    """A line for each way in which `name` is not that in the graph. `shape` None: it may have any."""
    tensor = graph.get(name)
    if tensor is None:
        return [f"{kind} {name!r} is not in the graph, which has {', '.join(sorted(graph)) or 'none'}"]
    found = []
    if tensor.dtype != dtype:
        found.append(f"{kind} {name!r} is {tensor.dtype} in the graph, {dtype} in the manifest")
    if shape is not None and not _agree(tensor, shape):
        found.append(f"{kind} {name!r} is {list(tensor.shape)} in the graph, {list(shape)} in the manifest")
    return found


def _agree(tensor: GraphTensor, shape: tuple[Dim, ...]) -> bool:
    """A fixed axis in the graph must be the same in the manifest; a named one may be anything. Some exporters
    leave shapes out."""
    if not tensor.shape:
        return True
    pairs = zip(tensor.shape, shape, strict=False)
    return len(tensor.shape) == len(shape) and all(not isinstance(g, int) or g == m for g, m in pairs)
