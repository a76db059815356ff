"""What the commands say, as text for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenuto.serving.manifest import Manifest, State

from .adopting import Adopted
from .checking import Table
from .cuda_kernels import left_to_cpu
from .graph_facts import Facts
from .proposal import Proposal
from .runtime import NEWEST_IR, OPSETS, fit
from .sample_input import drawn

_HELD = {True: "held", False: "FAILED", None: "-"}


@dataclass(frozen=True)
class Inspection:
    """A file, and what is made of it."""

    facts: Facts
    proposal: Proposal

    def to_json(self) -> dict[str, Any]:
        facts, proposal, suits = self.facts, self.proposal, fit(self.facts)
        return {
            "file": str(facts.path), "bytes": facts.nbytes, "sha256": facts.sha256,
            "producer": facts.producer, "parameters": facts.parameters, "ir_version": facts.ir_version,
            "opsets": facts.opsets,
            "onnxruntime": suits.version, "obstacles": list(suits.obstacles),
            "custom_domains": list(suits.custom_domains), "operators": facts.operators,
            "external_data": facts.external, "own_manifest": facts.manifest is not None,
            "inputs": [asdict(t) for t in facts.inputs], "outputs": [asdict(t) for t in facts.outputs],
            "left_to_cpu": left_to_cpu(facts.nodes),
            "left_to_cpu_here": None if proposal.left_to_cpu is None else list(proposal.left_to_cpu),
            "guesses": [asdict(g) for g in proposal.guesses],
            "questions": [asdict(q) for q in proposal.questions],
            "faults": list(proposal.faults),
            "manifest": None if proposal.manifest is None else json.loads(proposal.manifest.to_json()),
        }  # fmt: skip

    def to_text(self) -> str:
        facts, proposal, suits = self.facts, self.proposal, fit(self.facts)
        opsets = ", ".join(f"{d} {n}" if d != "ai.onnx" else f"opset {n}" for d, n in facts.opsets.items())
        lines = [
            f"{facts.path.name}: {facts.nbytes:,} bytes, {facts.parameters:,} parameters, {opsets}, "
            f"IR {facts.ir_version}" + (f", by {facts.producer}" if facts.producer else ""),
            f"sha256 {facts.sha256}",
            f"ONNX Runtime {suits.version} loads opsets {OPSETS[0]} to {OPSETS[1]}, IR up to {NEWEST_IR}",
            *suits.obstacles,
        ]
        if suits.custom_domains:
            lines.append(f"operators of others' domains: {', '.join(suits.custom_domains)}")
        lines += [f"weights in {name}: {size:,} bytes" for name, size in facts.external.items()]
        if facts.manifest is not None:
            lines.append("it carries a manifest, which is not looked at here; tenuto check does")
        for kind, tensors in (("input", facts.inputs), ("output", facts.outputs)):
            lines += [f"{kind} {t.name!r}: {t.dtype} {_shape(t.shape)}" for t in tensors]
        lines += ["", "taken to hold:"] if proposal.guesses else []
        lines += [f"  {g.subject}: {g.says} ({g.reason})" for g in proposal.guesses]
        lines += self._questions()
        lines += ["", "on CUDA:", *(f"  {line}" for line in self._cuda())]
        lines += ["", *(f"fault: {fault}" for fault in proposal.faults)] if proposal.faults else []
        if proposal.manifest is not None:
            lines += ["", "a manifest for it:", proposal.manifest.to_json()]
        else:
            lines += [
                "",
                "no manifest can be proposed: " + ("see the faults" if proposal.faults else "answer first"),
            ]
        return "\n".join(lines)

    def _questions(self) -> list[str]:
        lines: list[str] = []
        for needed, title in ((True, "only you can say:"), (False, "you may want to say:")):
            asked = [q for q in self.proposal.questions if q.needed is needed]
            if asked:
                lines += ["", title]
            for q in asked:
                lines.append(f"  {q.subject}: {q.asks}" + (f"  ->  {q.option}" if q.option else ""))
        return lines

    def _cuda(self) -> list[str]:
        here = self.proposal.left_to_cpu
        if here is not None:
            return [f"left to the CPU, as ONNX Runtime here says: {', '.join(here) or 'nothing'}"]
        left = left_to_cpu(self.facts.nodes)
        if not left:
            return ["no operator is known to be left to the CPU (by a list; there is no CUDA here to ask)"]
        counts = self.facts.operators
        return [f"left to the CPU: {name} ({counts.get(name, 0)}): {why}" for name, why in left.items()]


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def table_text(table: Table) -> str:
    width = max(len(row.check) for row in table.rows)
    lines = [f"{_HELD[row.held]:6}  {row.check:{width}}  {row.says}" for row in table.rows]
    lines += [f"{row.check}: {row.may_mend} may mend it" for row in table.failed if row.may_mend]
    return "\n".join(lines)


def table_json(table: Table) -> list[dict[str, Any]]:
    return [asdict(row) for row in table.rows]


def adopted_text(adopted: Adopted, manifest: Manifest, repository: Path) -> str:
    """What was written, how it is served, and how a client uses it."""
    if adopted.folder is None:
        return f"{table_text(adopted.table)}\nnothing was written"
    return "\n".join([
        table_text(adopted.table), "", f"written: {adopted.folder.path}", "", "serve it:",
        f"    tenuto serve {repository}", "", "use it:", client_snippet(manifest),
    ])  # fmt: skip


def adopted_json(adopted: Adopted, manifest: Manifest) -> dict[str, Any]:
    return {
        "folder": None if adopted.folder is None else str(adopted.folder.path),
        "version": None if adopted.folder is None else adopted.folder.version,
        "checks": table_json(adopted.table),
        "manifest": json.loads(manifest.to_json()),
    }


def client_snippet(manifest: Manifest) -> str:
    """Python that sends zeros of the right shapes and prints what comes."""
    arrays = drawn(manifest, 1 if manifest.alone and not manifest.stateful else 2, 0)
    zeros = {name: f"np.zeros({list(a.shape)}, np.{_numpy(a.dtype)})" for name, a in arrays.items()}
    only = next(iter(zeros.values()))
    sent = only if len(zeros) == 1 else "{" + ", ".join(f"{n!r}: {z}" for n, z in zeros.items()) + "}"
    lines = [
        "import numpy as np",
        "from tenuto import Client",
        "",
        'with Client("127.0.0.1:8001") as client:',
    ]
    if not manifest.stateful:
        lines += [f"    print(client.predict({manifest.name!r}, {sent}).outputs)"]
    else:
        given = "".join(f"{s.input!r}: {_zeros(s)}, " for s in manifest.given)
        initial = f", initial={{{given}}}" if given else ""
        lines += [
            f"    with client.stream({manifest.name!r}{initial}) as stream:",
            f"        for output in stream.run([{sent}]):",
            "            print(output.outputs)",
        ]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _zeros(state: State) -> str:
    return f"np.zeros({list(state.slot_shape)}, np.{_numpy(np.dtype(state.dtype))})"


def _numpy(dtype: np.dtype[Any]) -> str:
    return "bool_" if dtype.kind == "b" else dtype.name
