"""No node of a graph runs where nobody would look for it."""

from __future__ import annotations

import onnx

from tenuto.serving.manifest import Manifest
from tenuto.serving.model_runner import CPU, CUDA, ModelRunner, session
from tenuto.serving.placement import Placement
from tests import toys


def test_the_nodes_of_a_session_are_known_by_provider() -> None:
    model, fields = toys.accumulator()
    manifest = Manifest.model_validate(fields)
    placement = ModelRunner(model, manifest, "toy/1", provider=CPU, threads=1).placement
    assert list(placement.nodes) == [CPU]
    assert placement.counts() == {CPU: len(placement.nodes[CPU])}
    assert any(node.startswith("CumSum ") for node in placement.nodes[CPU])
    assert placement.elsewhere(CPU) == ""


def test_what_runs_elsewhere_is_named_and_counted() -> None:
    placement = Placement({CUDA: ("LSTM 'hear'", "MatMul 'head'"), CPU: ("Loop 'until'",)})
    assert placement.elsewhere(CUDA) == f"1 of 3 nodes run on {CPU}: Loop 'until'"
    assert placement.elsewhere(CPU) == f"2 of 3 nodes run on {CUDA}: LSTM 'hear', MatMul 'head'"


def test_a_long_list_is_cut_and_says_how_long_it_is() -> None:
    placement = Placement({CPU: tuple(f"Add '{n}'" for n in range(10))})
    assert placement.elsewhere(CUDA).endswith("Add '6', Add '7' and 2 more")
    assert placement.elsewhere(CUDA).startswith(f"10 of 10 nodes run on {CPU}: Add '0', ")


def test_a_long_name_of_a_node_is_cut() -> None:
    made, _ = toys.doubler()
    proto = onnx.load_model_from_string(made)
    proto.graph.node[0].name = "x" * 1000
    loaded = session(proto.SerializeToString(), "toy/1", CPU, 1)
    assert Placement.of(loaded).nodes == {CPU: (f"Add '{'x' * 64}'",)}
