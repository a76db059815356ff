"""`tenuto inspect`: what it makes of files that say nothing of themselves, and what it asks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tenuto.serving.adoption import cuda_kernels, graph_facts, runtime
from tenuto.serving.adoption.cli import main
from tenuto.serving.adoption.proposal import Proposal, default_name, propose
from tenuto.serving.adoption.wishes import Wishes
from tenuto.serving.errors import ModelInvalid
from tenuto.serving.manifest import Exact, Multiple
from tenuto.serving.model_runner import CPU, session
from tenuto.serving.vetting import Limits
from tests import toys

from . import graphs

LIMITS = Limits(50.0, 4 << 30)


def proposed(folder: Path, model: onnx.ModelProto, **wishes: Any) -> Proposal:
    return propose(graph_facts.read(graphs.save(folder, model)), Wishes(**wishes), "m", LIMITS)


def manifest(folder: Path, model: onnx.ModelProto, **wishes: Any) -> dict[str, Any]:
    found = proposed(folder, model, **wishes)
    assert found.manifest is not None, (found.questions, found.faults)
    made: dict[str, Any] = json.loads(found.manifest.to_json())
    return made


def asked(found: Proposal) -> dict[str, str]:
    """The options of the questions that must be answered, by what they are about."""
    assert found.manifest is None
    return {q.subject: q.option for q in found.questions if q.needed}


FLOAT = {"dtype": "float32"}


@pytest.mark.parametrize("named", [True, False])
def test_an_lstm_is_known_by_its_layer_with_and_without_names(tmp_path: Path, named: bool) -> None:
    model = graphs.lstm() if named else graphs.lstm(batch=None, time=None)
    made = manifest(tmp_path, model)
    assert made["inputs"] == [{"name": "x", **FLOAT, "shape": ["batch", "time", 3], "time_axis": 1}]
    assert made["states"] == [
        {"input": f"{s}0", "output": f"{s}n", **FLOAT, "shape": [1, "batch", 4], "batch_axis": 1}
        for s in "hc"
    ]
    assert made["outputs"] == [{"name": "y", **FLOAT, "shape": ["batch", "time", 4], "time_axis": 1}]
    assert "fixed_batch" not in made


def test_a_gru_with_time_first_and_names_that_tell_nothing(tmp_path: Path) -> None:
    made = manifest(tmp_path, graphs.gru())
    axes = {"batch_axis": 1, "time_axis": 0}
    assert made["inputs"] == [{"name": "1", **FLOAT, "shape": ["time", "batch", 3], **axes}]
    assert made["outputs"] == [{"name": "3", **FLOAT, "shape": ["time", "batch", 4], **axes}]
    assert [(s["input"], s["output"], s["batch_axis"]) for s in made["states"]] == [("2", "4", 1)]


def test_of_one_row_the_time_of_one_sample_is_not_taken_for_the_batch(tmp_path: Path) -> None:
    """Both have the length 1 in the first run."""
    made = manifest(tmp_path, graphs.gru(batch=1))
    axes = {"batch_axis": 1, "time_axis": 0}
    assert made["fixed_batch"] == 1
    assert {key: made["outputs"][0].get(key) for key in axes} == axes


def test_caches_of_rank_5_5_and_4_in_a_graph_for_one_row(tmp_path: Path) -> None:
    made = manifest(tmp_path, graphs.denoiser())
    assert made["fixed_batch"] == 1
    pairs = {s["input"]: (s["output"], s["shape"], s.get("batch_axis", 0)) for s in made["states"]}
    assert pairs == {
        "conv_cache": ("conv_cache_out", [2, 1, 3, 3, 5], 1),
        "tra_cache": ("tra_cache_out", [2, 3, 1, 1, 3], 2),
        "inter_cache": ("inter_cache_out", [2, 1, 5, 3], 1),
    }


def test_a_frame_axis_of_a_fixed_graph_is_asked_for_and_not_needed(tmp_path: Path) -> None:
    found = proposed(tmp_path, graphs.denoiser())
    assert [(q.option, q.needed) for q in found.questions] == [("--time-axis mix=AXIS", False)]
    made = manifest(tmp_path, graphs.denoiser(), time_axes={"mix": 2})
    assert made["inputs"][0] | {"shape": []} == {
        "name": "mix", **FLOAT, "shape": [], "time_axis": 2, "chunk": {"exact": 1}
    }  # fmt: skip
    assert made["outputs"][0]["time_axis"] == 2


def test_a_state_is_found_by_its_shape_where_names_and_layers_tell_nothing(tmp_path: Path) -> None:
    found = proposed(tmp_path, graphs.enhancement())
    assert found.manifest is not None
    assert [(s.input, s.output) for s in found.manifest.states] == [("input_3", "stack_2")]
    [reason] = [g.reason for g in found.guesses if g.says == "comes back from 'stack_2'"]
    assert "which no other has" in reason


def test_controls_are_known_by_their_names(tmp_path: Path) -> None:
    made = manifest(tmp_path, graphs.controlled())
    assert made["controls"] == [
        {"name": "START", "kind": "start", **FLOAT, "shape": ["batch", 1]},
        {"name": "READY", "kind": "ready", **FLOAT, "shape": ["batch", 1]},
    ]
    assert [i["name"] for i in made["inputs"]] == ["INPUT"]
    others = manifest(tmp_path, graphs.controlled(), controls={"READY": "none"})
    assert [i["name"] for i in others["inputs"]] == ["INPUT", "READY"]


def test_an_old_model_of_one_picture(tmp_path: Path) -> None:
    facts = graph_facts.read(graphs.save(tmp_path, graphs.pictures()))
    assert [t.name for t in facts.inputs] == ["data_0"]  # its weights are inputs too, and have values
    assert facts.parameters == 5 * 3 * 9 + 5 * 4 + 4
    made = manifest(tmp_path, graphs.pictures())
    assert (made["fixed_batch"], made["inputs"][0]["shape"]) == (1, [1, 3, 8, 8])
    assert "states" not in made


def test_a_stateless_model_with_a_free_batch(tmp_path: Path) -> None:
    made = manifest(tmp_path, graphs.mlp())
    assert made == {
        "format": 1, "name": "m", "inputs": [{"name": "x", **FLOAT, "shape": ["N", 4]}],
        "outputs": [{"name": "y", **FLOAT, "shape": ["N", 2]}],
    }  # fmt: skip


def test_frames_and_left_context_are_found_by_trying(tmp_path: Path) -> None:
    """A convolution over 5 samples, 2 apart, without padding: 3 samples of the frame before are needed."""
    made = manifest(tmp_path, graphs.convolution())
    sound, frames = made["inputs"][0], made["outputs"][0]
    assert (sound["time_axis"], sound["chunk"], sound["left_context"]) == (2, {"multiple": 2}, 3)
    assert (frames["time_axis"], frames["stride"]) == (2, 2)


def test_options_come_before_guesses(tmp_path: Path) -> None:
    made = manifest(
        tmp_path,
        graphs.rated(),
        chunks={"input": Exact(exact=4)},
        left_context={"input": 2},
        constants={"sr": (8000.0, 16000.0)},
    )
    [sound] = made["inputs"]
    assert (sound["chunk"], sound["left_context"], sound["rate_hz"]) == ({"exact": 4}, 2, 8000.0)
    assert made["constants"] == [
        {"name": "sr", "dtype": "int64", "value": 8000.0, "allowed": [8000.0, 16000.0]}
    ]
    assert made["outputs"][0] | FLOAT == {
        "name": "output", **FLOAT, "shape": ["batch", "time"], "time_axis": 1, "stride": 4
    }  # fmt: skip
    made = manifest(
        tmp_path, graphs.convolution(), chunks={"sound": Multiple(multiple=4)}, left_context={"sound": 3}
    )
    assert made["outputs"][0]["stride"] == 2
    made = manifest(tmp_path, graphs.unused_state(), states={"x": "mem_out"}, no_states=frozenset({"mem_in"}))
    assert [(s["input"], s["output"]) for s in made["states"]] == [("x", "mem_out")]
    assert [i["name"] for i in made["inputs"]] == ["mem_in"]


def test_a_constant_is_read_off_what_the_graph_compares_it_with(tmp_path: Path) -> None:
    found = proposed(tmp_path, graphs.rated())
    assert found.manifest is not None
    assert [(c.name, c.value) for c in found.manifest.constants] == [("sr", 16000.0)]
    assert [q.option for q in found.questions if not q.needed] == ["--constant sr=VALUE"]


def test_a_constant_on_which_nothing_depends_may_be_anything(tmp_path: Path) -> None:
    row: tuple[int, graphs.Dims] = (graphs.FLOAT, ["batch", 2])
    nodes = [graphs.node("Neg", ["x"], ["y"]), graphs.node("Neg", ["unused"], ["nothing"])]
    model = graphs.build(nodes, {"x": row, "unused": (graphs.FLOAT, [])}, {"y": row})
    [constant] = manifest(tmp_path, model)["constants"]
    assert constant == {"name": "unused", **FLOAT, "value": 0.0}


def test_of_two_values_one_must_be_chosen(tmp_path: Path) -> None:
    found = proposed(tmp_path, graphs.rated((8000, 16000)))
    [(subject, option)] = asked(found).items()
    assert (subject, option.split(",")[0]) == ("input 'sr'", "--constant sr=VALUE")
    assert "compares it with 8000, 16000" in found.questions[0].asks


def test_a_cache_that_grows_is_no_state(tmp_path: Path) -> None:
    assert asked(proposed(tmp_path, graphs.growing())) == {"state 'past_key'": "--length past_key=AXIS:N"}
    found = proposed(tmp_path, graphs.growing(), lengths={("past_key", 1): 3})
    assert set(asked(found)) == {"state 'past_key'"}
    assert "[1, 3, 4] was fed and [1, 4, 4] came back" in next(q.asks for q in found.questions if q.needed)


def test_an_axis_that_the_graph_leaves_open_is_asked_for(tmp_path: Path) -> None:
    row: tuple[int, graphs.Dims] = (graphs.FLOAT, ["batch", "width"])
    model = graphs.build([graphs.node("Neg", ["x"], ["y"])], {"x": row}, {"y": row})
    assert asked(proposed(tmp_path, model)) == {"input 'x'": "--length x=1:N"}
    assert manifest(tmp_path, model, lengths={("x", 1): 6})["inputs"][0]["shape"] == ["batch", 6]


def test_what_looks_alike_but_has_a_plain_name_is_asked_about(tmp_path: Path) -> None:
    """Audio in and audio out are what clients send and get, however alike they are."""
    row: tuple[int, graphs.Dims] = (graphs.FLOAT, ["batch", 4])
    nodes = [graphs.node("Neg", ["audio_in"], ["audio_out"]), graphs.node("Abs", ["tone"], ["level"])]
    model = graphs.build(nodes, {"tone": row, "audio_in": row}, {"level": row, "audio_out": row})
    found = proposed(tmp_path, model)
    assert found.manifest is not None
    assert not found.manifest.states
    assert [q.option for q in found.questions] == ["--state audio_in=audio_out"]


def test_inputs_with_different_fixed_lengths_have_no_batch(tmp_path: Path) -> None:
    """A graph that takes its weights as inputs: a run takes one of each."""
    nodes = [graphs.node("MatMul", ["x", "W"], ["y"])]
    model = graphs.build(
        nodes,
        {"x": (graphs.FLOAT, [2, 3]), "W": (graphs.FLOAT, [3, 4])},
        {"y": (graphs.FLOAT, [2, 4])},
    )
    made = manifest(tmp_path, model)
    assert [t["batch_axis"] for t in made["inputs"] + made["outputs"]] == [None] * 3
    assert "fixed_batch" not in made


def test_an_option_that_names_no_tensor_is_a_fault(tmp_path: Path) -> None:
    found = proposed(tmp_path, graphs.mlp(), chunks={"y2": Exact(exact=1)})
    assert found.faults == ("the options name 'y2'; the graph has the inputs x and the outputs y",)


def test_a_file_that_the_runtime_refuses_says_so(tmp_path: Path) -> None:
    model = graphs.mlp()
    model.opset_import[0].version = runtime.OPSETS[1] + 1
    found = proposed(tmp_path, model)
    assert found.manifest is None
    assert "ONNX Runtime does not load it" in found.faults[0]
    assert "opset 27" in runtime.fit(graph_facts.read(tmp_path / "other.onnx")).obstacles[0]


def test_a_graph_that_never_ends_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "endless.onnx"
    path.write_bytes(toys.endless()[0])
    found = propose(graph_facts.read(path), Wishes(), "m", Limits(2.0, 4 << 30))
    assert "it took more than 2 s" in found.questions[-1].asks
    assert found.manifest is None


@pytest.mark.parametrize("content", [b"", b"no protobuf", b"\x08\x0a", b"PK\x03\x04"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelInvalid, match="is no ONNX file"):
        graph_facts.read(path)


def test_weights_in_other_files_are_named(tmp_path: Path) -> None:
    onnx.save_model(
        graphs.mlp(), tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0
    )
    facts = graph_facts.read(tmp_path / "big.onnx")
    assert facts.external == {"big.data": 4 * 2 * 4}
    found = propose(facts, Wishes(), "m", LIMITS)
    assert found.manifest is not None


def test_the_opsets_and_ir_that_are_told_are_those_that_load() -> None:
    def loads(opset: int, ir_version: int) -> bool:
        row = (graphs.FLOAT, [1])
        tensors = [helper.make_tensor_value_info(n, *row) for n in "xy"]
        graph = helper.make_graph([graphs.node("Neg", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        try:
            session(made.SerializeToString(), "x", CPU, 1)
        except ModelInvalid:
            return False
        return True

    assert [loads(n, 8) for n in (runtime.OPSETS[0], runtime.OPSETS[1], runtime.OPSETS[1] + 1)] == [
        True, True, False
    ]  # fmt: skip
    assert [loads(17, n) for n in (runtime.NEWEST_IR, runtime.NEWEST_IR + 1)] == [True, False]


def test_what_cuda_leaves_to_the_cpu() -> None:
    def recurrent(kind: str, **attributes: Any) -> Any:
        return graphs.node(kind, ["x", "W", "R"], ["y"], hidden_size=1, **attributes)

    nodes = [
        graphs.node("MatMul", ["a", "b"], ["c"]),
        graphs.node("Celu", ["a"], ["b"]),  # ONNX says how others make it up
        graphs.node("STFT", ["a", "b"], ["c"]),
        recurrent("LSTM"),
        recurrent("GRU"),
        recurrent("RNN", activations=["Relu"]),
        graphs.node("Odd", ["a"], ["b"], domain="org.example"),
    ]
    assert set(cuda_kernels.left_to_cpu(nodes)) == {"STFT", "GRU", "RNN", "org.example.Odd"}
    fit = [recurrent("GRU", linear_before_reset=1), recurrent("RNN", activations=["Tanh"])]
    assert cuda_kernels.left_to_cpu(fit) == {}
    assert set(cuda_kernels.left_to_cpu([recurrent("LSTM", clip=1.0)])) == {"LSTM"}


def test_the_command_says_it_in_words_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = graphs.save(tmp_path, graphs.lstm(), "Talk Model.onnx")
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    for words in (
        "opset 17",
        "IR 8",
        "state 'h0': comes back from 'hn' (LSTM",
        "a manifest for it",
        "on CUDA:",
    ):
        assert words in said
    assert main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["manifest"]["name"] == default_name(path) == "talk-model"
    assert told["operators"]["Transpose"] == 2
    assert {g["subject"] for g in told["guesses"]} >= {"state 'h0'", "state 'c0'", "input 'x'", "output 'y'"}
    assert told["inputs"][0] == {"name": "x", "dtype": "float32", "shape": ["batch", "time", 3]}


def test_the_command_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    level = logging.getLogger("tenuto").level
    assert main(["inspect", str(graphs.save(tmp_path, graphs.gru()))]) == 0
    assert logging.getLogger("tenuto").level == level


def test_a_question_that_is_open_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = graphs.save(tmp_path, graphs.growing())
    assert main(["inspect", str(path)]) == 1
    assert "only you can say:" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "none.onnx")]) == 1
    assert "none.onnx cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option,value,complaint",
    [
        ("--chunk", "x=exactly:3", "expected exact:N, multiple:N or free"),
        ("--chunk", "x=exact:0", "expected a whole number from 1"),
        ("--time-axis", "1", "expected NAME=VALUE"),
        ("--length", "x=3", "expected TENSOR=AXIS:N"),
        ("--control", "x=begin", "expected start, end, ready"),
    ],
)
def test_an_option_that_says_nothing_is_wrong_usage(
    option: str, value: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "x.onnx", option, value])
    assert complaint in capsys.readouterr().err


def test_random_numbers_of_a_table_stay_within_it(tmp_path: Path) -> None:
    """Or the runs that find out the axes would fail: an index past the end fails a whole run."""
    nodes = [
        graphs.node("Gather", ["table", "token"], ["seen"], axis=0),
        graphs.node("Add", ["seen", "memory"], ["y"]),
        graphs.node("ReduceSum", ["y", "one"], ["memory_out"], keepdims=1),
    ]
    made = {"table": np.ones((7, 3), np.float32), "one": np.array([1])}
    inputs: graphs.Tensors = {
        "token": (graphs.INT64, ["batch", "time"]),
        "memory": (graphs.FLOAT, ["batch", 1, 3]),
    }
    outputs: graphs.Tensors = {
        "y": (graphs.FLOAT, ["batch", "time", 3]),
        "memory_out": (graphs.FLOAT, ["batch", 1, 3]),
    }
    [token] = manifest(tmp_path, graphs.build(nodes, inputs, outputs, made))["inputs"]
    assert token["range"] == [0, 6]
