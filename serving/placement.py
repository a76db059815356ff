"""What runs where: ONNX Runtime places each node of a graph on a provider, and none of it silently here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RECORD = "session.record_ep_graph_assignment_info"  # the session option without which nothing is known
_NAMED = 8  # of the nodes that run elsewhere, so many stand in the log
_SHOWN = 64  # characters of a node's name


@dataclass(frozen=True)
class Placement:
    """By provider, the nodes that it runs, `LSTM 'hear'` each. Nodes that optimisations took away are in
    none, those that they made are."""

    nodes: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, session: Any) -> Placement:
        """Of an onnxruntime.InferenceSession that was built with `RECORD`."""
        nodes: dict[str, list[str]] = {}
        for part in session.get_provider_graph_assignment_info():
            named = [f"{node.op_type} {node.name[:_SHOWN]!r}" for node in part.get_nodes()]
            nodes.setdefault(part.ep_name, []).extend(named)
        return cls({provider: tuple(names) for provider, names in nodes.items()})

    def counts(self) -> dict[str, int]:
        """Nodes by provider."""
        return {provider: len(names) for provider, names in self.nodes.items()}

    def elsewhere(self, provider: str) -> str:
        """Which nodes do not run on that one, and where they do; empty if all run there."""
        total = sum(self.counts().values())
        parts = []
        for other, names in self.nodes.items():
            if other == provider:
                continue
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{len(names)} of {total} nodes run on {other}: {', '.join(names[:_NAMED])}{more}")
        return "; ".join(parts)
