"""The manifest refuses what it does not know, says all that is wrong, and agrees with the graph."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tenuto.serving.errors import ManifestInvalid
from tenuto.serving.manifest import GraphTensor, Manifest, state_schema

EXPORTED = Path(__file__).parents[2] / "exported"

X: dict[str, Any] = {"name": "x", "dtype": "float32", "shape": ["batch", "time", 3], "time_axis": 1}
Y: dict[str, Any] = {"name": "y", "dtype": "float32", "shape": ["batch", "time"], "time_axis": 1}
H: dict[str, Any] = {"input": "h", "output": "h_next", "dtype": "float32", "shape": [2, "batch", 4],
                     "batch_axis": 1}  # fmt: skip


def create_fields(*, x: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    whole = {"format": 1, "name": "toy", "inputs": [X | (x or {})], "states": [H], "outputs": [Y]}
    return {key: value for key, value in (whole | changes).items() if value is not None}


def parse(fields: dict[str, Any]) -> Manifest:
    return Manifest.parse(json.dumps(fields), "toy/1/manifest.json")


def create_manifest(**changes: Any) -> Manifest:
    return parse(create_fields(**changes))


def stateless(**x: Any) -> dict[str, Any]:
    image = {"name": "x", "dtype": "float32", "shape": ["batch", 4, 4]} | x
    y = {"name": "y", "dtype": "float32", "shape": ["batch", 10]}
    return {"name": "toy", "inputs": [image], "outputs": [y]}


# Refused.


@pytest.mark.parametrize(
    "fields, told",
    [
        (create_fields() | {"max_bach": 3}, "max_bach: no such key; did you mean 'max_batch'?"),
        (create_fields(x={"timeaxis": 1}), "inputs.0.timeaxis: no such key; did you mean 'time_axis'?"),
        (create_fields(states=[H | {"initial": 0}]), "initial: no such key; did you mean 'init'?"),
        (create_fields(x={"chunk": {"multiple": 3, "exact": 3}}), "no such key"),
        (
            create_fields(x={"wire": [{"dtype": "int8", "ofset": 1}]}),
            "ofset: no such key; did you mean 'offset'?",
        ),
        (create_fields(generate={"temprature": 1}), "temprature: no such key; did you mean 'temperature'?"),
        (
            create_fields(outputs=[Y | {"softmax": True}]),
            "softmax: no such key; there are name, dtype, shape,",
        ),
    ],
    ids=["manifest", "input", "state", "chunk", "wire", "generate", "output"],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ManifestInvalid, match=re.escape(told)):
        parse(fields)


def test_every_fault_is_listed_with_its_place() -> None:
    fields = create_fields(x={"dtype": "float31"}, max_batch=0, colour="blue")
    with pytest.raises(ManifestInvalid) as caught:
        parse(fields)
    first, *faults = str(caught.value).splitlines()
    assert first == "toy/1/manifest.json: the manifest is not valid:"
    places = {line.split(":")[0].strip() for line in faults}
    assert places >= {"inputs.0.dtype", "max_batch", "colour"}


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", '"text"', "[]"])
def test_what_is_no_json_object_is_refused_by_name(text: str | bytes) -> None:
    with pytest.raises(ManifestInvalid, match="toy/1/manifest.json: the manifest is"):
        Manifest.parse(text, "toy/1/manifest.json")


LETTERS = {"encoding": "utf8", "tokens": "characters", "alphabet": "abcd"}
WORDS = {"encoding": "utf8", "tokens": "words", "buckets": 8}
IDS: dict[str, Any] = {"name": "x", "dtype": "int64", "shape": ["batch", "time"], "time_axis": 1}
NEXT = Y | {"shape": ["batch", "time", 4]}
KEYS: dict[str, Any] = {"inputs": [X | {"shape": ["batch", "time", 4]}], "outputs": [NEXT]}


def text(wire: dict[str, Any], **x: Any) -> dict[str, Any]:
    return create_fields(inputs=[IDS | {"wire": [wire]} | x])


def generating(sampling: str = "categorical", **changes: Any) -> dict[str, Any]:
    """Its output has four numbers a frame, and its input takes an index."""
    rule = {"output": "y", "input": "x", "sampling": sampling} | changes.pop("rule", {})
    return create_fields(**({"inputs": [IDS], "outputs": [NEXT], "generate": rule} | changes))


WRONG_GENERATE: dict[str, tuple[dict[str, Any], str]] = {
    "an output that is not there": (generating(rule={"output": "z"}), "output 'z' to input 'x'"),
    "an input that is not there": (generating(rule={"input": "z"}), "output 'y' to input 'z'"),
    "a second input": (generating(inputs=[IDS, IDS | {"name": "z"}]), "that input alone"),
    "no state": (generating(states=[], inputs=[{"name": "x", "dtype": "int64", "shape": ["batch"]}],
                            outputs=[{"name": "y", "dtype": "float32", "shape": ["batch", 4]}]), "stateful"),
    "two samples a frame": (generating(inputs=[IDS | {"chunk": {"multiple": 2}}]), "one sample in must give"),
    "an output of the whole": (generating(outputs=[{"name": "y", "dtype": "float32", "shape": ["batch", 4]}]),
                               "both have a time_axis or neither"),
    "integers to sample from": (generating(outputs=[NEXT | {"dtype": "int64"}]), "samples from float"),
    "a number to sample from": (generating(outputs=[Y]), r"one axis a frame; y is float32 with \[\]"),
    "an index for a float": (generating(**KEYS), "one index a sample; x is float32"),
    "a range without the last index": (generating(inputs=[IDS | {"range": [0, 2]}]), "go from 0 to 3, range"),
    "keys for one number": (generating("bernoulli"), r"y has \[4\] a frame, x \[\] a sample"),
    "keys by softmax": (generating("bernoulli", **KEYS | {"outputs": [NEXT | {"activation": "softmax"}]}),
                        "activation is softmax"),
    "an index by sigmoid": (generating(outputs=[NEXT | {"activation": "sigmoid"}]), "activation is sigmoid"),
    "more than all": (generating(rule={"top_k": 5}), "top_k is 5; .* at most 4"),
    "the best keys": (generating("bernoulli", **KEYS, rule={"top_k": 1}), "top_k is 1; of a bernoulli"),
    "a temperature of nothing": (generating(rule={"temperature": 0}), "temperature: .*equal to 0.000001"),
}  # fmt: skip
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "format of another version": (create_fields(format=2), "format: Input should be 1"),
    "no inputs": (create_fields(inputs=[]), "inputs: .*at least 1"),
    "a name that is no folder": (create_fields(name="../x"), "name: .*pattern"),
    "batch_axis beyond the shape": (create_fields(x={"batch_axis": 3}), "batch_axis 3 is no axis of"),
    "negative time_axis": (create_fields(x={"time_axis": -1}), "time_axis -1 is no axis of"),
    "time and batch the same": (create_fields(x={"time_axis": 0}), "time_axis and batch_axis are both 0"),
    "time and batch of an output the same": (
        create_fields(outputs=[Y | {"batch_axis": 1}]), "y: time_axis and batch_axis are both 1"),
    "a named axis beside batch and time": (
        create_fields(x={"shape": ["batch", "time", "width"]}),
        "every axis but batch and time needs a positive length",
    ),
    "an axis of nothing": (create_fields(x={"shape": ["batch", "time", 0]}), "needs a positive length"),
    "a state with a named axis": (create_fields(states=[H | {"shape": [2, "batch", "w"]}]), "every axis but"),
    "chunk without time": (stateless(chunk={"multiple": 2}), "need a time_axis"),
    "lengths without time": (stateless(lengths="n"), "need a time_axis"),
    "left_context without time": (stateless(left_context=1), "need a time_axis"),
    "range of floats": (create_fields(x={"range": [0, 1]}), "range is for integer inputs"),
    "png without pixels' scale": (stateless(wire=[{"encoding": "png"}]), "need a uint8 entry"),
    "png of what is no image": (
        stateless(shape=["batch", 4], dtype="uint8", wire=[{"encoding": "png"}]),
        "png and jpeg need",
    ),
    "init of another size": (create_fields(states=[H | {"init": [1, 2]}]), "init holds 2 values, one slot 8"),
    "one input twice": (create_fields(inputs=[X, X]), "inputs named twice: x"),
    "lengths named as a state": (create_fields(x={"lengths": "h"}), "inputs named twice: h"),
    "one output twice": (create_fields(outputs=[Y, Y]), "outputs named twice: y"),
    "batch_axis null in one place": (create_fields(x={"batch_axis": None, "shape": [1, "time"]}),
                                     "must be null everywhere, or nowhere"),
    "a timed output of untimed inputs": (stateless() | {"outputs": [Y]}, "no input has one"),
    "an untimed input beside a timed one": (
        create_fields(inputs=[X, {"name": "z", "dtype": "float32", "shape": ["batch", 2]}]),
        "z: with a timed input, every input needs a time_axis",
    ),
    "stride that does not divide": (
        create_fields(x={"chunk": {"multiple": 4}}, outputs=[Y | {"stride": 3}]),
        "stride 3 does not divide the 4 samples",
    ),
    "time without a state": (create_fields(states=[]), "a time_axis needs states"),
    "a constant of another size": (
        create_fields(constants=[{"name": "c", "dtype": "float32", "value": [1, 2], "shape": [3]}]),
        "value holds 2 numbers, the shape 3",
    ),
}  # fmt: skip


WRONG_TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "text for floats": (text(WORDS, dtype="float32"), "utf8 needs int64"),
    "text for rows": (text(WORDS, shape=["batch", "time", 2]), "one id a sample"),
    "text without time": (text(WORDS, shape=["batch"], time_axis=None), "with a time_axis"),
    "two ways to cut it": (create_fields(inputs=[IDS | {"wire": [WORDS, LETTERS]}]), "of which one can hold"),
    "ids out of range": (text(WORDS, range=[0, 6]), "ids from 0 to 7, range is"),
    "range without the first": (text(LETTERS, range=[1, 9]), "ids from 0 to 3, range is"),
    "a letter twice": (text(LETTERS | {"alphabet": "abca"}), "alphabet holds 'a' more than once"),
    "no letter": (text(LETTERS | {"alphabet": ""}), "alphabet: .*at least 1"),
    "no bucket": (text(WORDS | {"buckets": 0}), "buckets: .*greater than or equal to 1"),
}
WRONG |= WRONG_TEXT | WRONG_GENERATE


@pytest.mark.parametrize("fields, message", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestInvalid, match=message):
        parse(fields)


# Properties.


def test_defaults_are_small_and_the_properties_follow() -> None:
    m = create_manifest()
    assert (m.stateful, m.alone, m.ragged) == (True, False, False)
    assert (m.rows_per_batch, m.frames_per_turn, m.slot_bytes) == (64, 32, 2 * 4 * 4)
    assert m.inputs[0].sample_shape == (3,)
    assert (m.inputs[0].sample_bytes, m.inputs[0].multiple) == (12, 1)
    assert (m.outputs[0].frame_shape, m.outputs[0].frame_bytes) == ((), 4)
    assert m.states[0].slot_shape == (2, 4)


def test_a_model_is_stateful_by_states_or_left_context() -> None:
    assert not parse(stateless()).stateful
    context_alone = create_manifest(states=None, x={"left_context": 2})
    assert context_alone.stateful
    assert context_alone.slot_bytes == 0


def test_rows_may_differ_in_length_only_if_every_timed_input_has_lengths() -> None:
    z = X | {"name": "z", "lengths": "nz"}
    assert create_manifest(x={"lengths": "n"}).ragged
    assert create_manifest(inputs=[X | {"lengths": "n"}, z]).ragged
    assert not create_manifest(inputs=[X, z]).ragged


def test_a_graph_without_batch_axis_runs_one_row() -> None:
    alone = create_manifest(
        inputs=[X | {"shape": ["time", 3], "batch_axis": None, "time_axis": 0}],
        states=[H | {"shape": [2, 4], "batch_axis": None}],
    )
    assert (alone.alone, alone.rows_per_batch) == (True, 1)


def test_a_fixed_batch_bounds_the_rows() -> None:
    assert create_manifest(fixed_batch=8).rows_per_batch == 8
    assert create_manifest(fixed_batch=8, max_batch=4).rows_per_batch == 4


@pytest.mark.parametrize(
    "chunk, multiple, turn", [("free", 1, 32), ({"multiple": 5}, 5, 32), ({"exact": 5}, 5, 1)]
)
def test_the_chunk_decides_the_frame_and_the_turn(chunk: Any, multiple: int, turn: int) -> None:
    m = create_manifest(x={"chunk": chunk})
    assert (m.inputs[0].multiple, m.frames_per_turn) == (multiple, turn)


# JSON.


ROUND_TRIPS = {
    "small": create_fields(),
    "stateless": stateless(wire=[{"dtype": "uint8", "scale": 0.5}, {"encoding": "png"}]),
    "rich": create_fields(
        x={"chunk": {"multiple": 4}, "left_context": 2, "lengths": "n", "tail": "pad",
           "wire": [{"dtype": "int16", "scale": 1 / 32768, "offset": 0.25}]},
        constants=[{"name": "c", "dtype": "int64", "value": [1, 2], "shape": [2], "allowed": [1, 2]}],
        states=[H | {"init": {"value": 0.1}, "finite": False}],
        outputs=[Y | {"stride": 2, "labels": ["a", "b"], "activation": "softmax"}],
        description="ein Modell", resumes_from=["abc"],
    ),
    "values of a state": create_fields(x={"left_context": 1, "left_context_value": 0.1},
                                                        states=[H | {"init": list(range(8))}]),
}  # fmt: skip


ROUND_TRIPS |= {
    "words": text(WORDS | {"lower": True}, range=[0, 7]),
    "characters": text(LETTERS),
    "categorical": generating(rule={"temperature": 0.5, "top_k": 4}),
    "bernoulli": generating("bernoulli", **KEYS),
}


@pytest.mark.parametrize("fields", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_to_json_says_the_same_again(fields: dict[str, Any]) -> None:
    manifest = parse(fields)
    text = manifest.to_json()
    assert Manifest.parse(text, "again") == manifest
    assert Manifest.parse(text, "again").to_json() == text
    assert json.loads(text)["format"] == 1


def test_an_input_knows_how_its_text_is_cut() -> None:
    assert create_manifest().inputs[0].text is None
    letters = parse(text(LETTERS)).inputs[0].text
    assert letters is not None
    assert letters.ids("dab").tolist() == [3, 0, 1]


def test_a_sequence_that_waits_for_the_rest_of_a_word_has_another_schema() -> None:
    schemas = {
        state_schema(parse(fields)) for fields in (text(WORDS), text(LETTERS), create_fields(inputs=[IDS]))
    }
    assert len(schemas) == 3


def test_to_json_leaves_defaults_out() -> None:
    assert set(json.loads(create_manifest().to_json())) == {"format", "name", "inputs", "states", "outputs"}


@pytest.mark.parametrize("path", sorted(EXPORTED.glob("*/*/manifest.json")), ids=str)
def test_the_committed_manifests_are_valid_and_named_as_their_folder(path: Path) -> None:
    # A version's folder is a number; what is not passed on has none.
    folder = path.parents[1] if path.parent.name.isdecimal() else path.parent
    assert Manifest.parse(path.read_bytes(), str(path)).name == folder.name


# Against the graph.


def graph_tensor(name: str, *shape: int | str | None, dtype: str = "float32") -> GraphTensor:
    return GraphTensor(name, dtype, shape)


INPUTS = [graph_tensor("x", "N", "T", 3), graph_tensor("h", 2, "N", 4)]
OUTPUTS = [graph_tensor("y", "N", None), graph_tensor("h_next", 2, "N", 4)]


def disagreements(
    manifest: Manifest, inputs: list[GraphTensor] = INPUTS, outputs: list[GraphTensor] = OUTPUTS
) -> list[str]:
    try:
        manifest.check_graph(inputs, outputs, "toy/1")
    except ManifestInvalid as error:
        first, *lines = str(error).splitlines()
        assert first == "toy/1: the manifest disagrees with the graph:"
        return [line.strip() for line in lines]
    return []


def test_a_graph_of_that_shape_agrees_whatever_its_axes_are_named() -> None:
    assert disagreements(create_manifest()) == []


def test_a_graph_that_leaves_shapes_out_agrees() -> None:
    assert disagreements(create_manifest(), outputs=[graph_tensor("y"), OUTPUTS[1]]) == []


def test_an_output_of_the_graph_may_go_unused() -> None:
    assert disagreements(create_manifest(), outputs=[*OUTPUTS, graph_tensor("more", 1)]) == []


DISAGREE: dict[str, tuple[dict[str, Any], list[GraphTensor], str]] = {
    "name": ({}, [graph_tensor("pcm", "N", "T", 3)], "input 'x' is not in the graph, which has h, pcm"),
    "dtype": ({}, [graph_tensor("x", "N", "T", 3, dtype="float64")],
              "input 'x' is float64 in the graph, float32 in the manifest"),
    "lower rank": ({}, [graph_tensor("x", "N", "T")], "input 'x' is ['N', 'T'] in the graph"),
    "rank": ({}, [graph_tensor("x", "N", 3)], "input 'x' is ['N', 3] in the graph, ['batch', 'time', 3]"),
    "axis length": ({}, [graph_tensor("x", "N", "T", 4)], "input 'x' is ['N', 'T', 4] in the graph"),
    "fixed batch": ({}, [graph_tensor("x", 8, "T", 3)], "input 'x' is [8, 'T', 3] in the graph"),
    "extra input": ({}, [graph_tensor("x", "N", "T", 3), graph_tensor("speed")],
                    "the graph's input 'speed' is not in the manifest"),
    "lengths": ({"x": {"lengths": "n"}},
                [graph_tensor("x", "N", "T", 3), graph_tensor("n", "N", dtype="int64")],
                "input 'n' is int64 in the graph, int32 in the manifest"),
    "constant": ({"constants": [{"name": "c", "dtype": "float32", "value": 1}]},
                 [graph_tensor("x", "N", "T", 3)], "constant 'c' is not in the graph"),
    "control": ({"controls": [{"name": "start", "kind": "start", "dtype": "int32"}]},
                [graph_tensor("x", "N", "T", 3)], "control 'start' is not in the graph"),
}  # fmt: skip


@pytest.mark.parametrize("changes, inputs, line", DISAGREE.values(), ids=DISAGREE.keys())
def test_each_disagreement_is_a_line(changes: dict[str, Any], inputs: list[GraphTensor], line: str) -> None:
    found = disagreements(create_manifest(**changes), [*inputs, INPUTS[1]])
    assert any(f.startswith(line) for f in found), found


def test_all_disagreements_are_listed_at_once() -> None:
    found = disagreements(create_manifest(), [graph_tensor("z", 1)], [graph_tensor("q", 1)])
    assert [f.split(" is ")[0] for f in found] == [
        "input 'x'", "state input 'h'", "state output 'h_next'", "output 'y'", "the graph's input 'z'",
    ]  # fmt: skip


def test_a_graph_of_fixed_batch_agrees_if_the_manifest_says_so() -> None:
    """Its lengths have that many rows, too."""
    manifest = create_manifest(
        inputs=[X | {"shape": [8, "time", 3], "lengths": "n"}],
        states=[H | {"shape": [2, 8, 4]}], outputs=[Y | {"shape": [8, "time"]}], fixed_batch=8,
    )  # fmt: skip
    inputs = [graph_tensor("x", 8, "T", 3), graph_tensor("n", 8, dtype="int32"), graph_tensor("h", 2, 8, 4)]
    outputs = [graph_tensor("y", 8, "T"), graph_tensor("h_next", 2, 8, 4)]
    assert disagreements(manifest, inputs, outputs) == []


STATEFUL: dict[str, Any] = {
    "name": "m",
    "inputs": [
        {"name": "x", "dtype": "float32", "shape": ["batch", "time", 2], "time_axis": 1, "left_context": 3}
    ],
    "states": [
        {"input": "h", "output": "h_next", "dtype": "float32", "shape": [1, "batch", 4], "batch_axis": 1}
    ],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
}


def schema(part: str = "", **changes: Any) -> str:
    whole = STATEFUL | ({part: [STATEFUL[part][0] | changes]} if part else changes)
    return state_schema(Manifest.model_validate(whole))


@pytest.mark.parametrize(
    "part, changes",
    [
        ("states", {"input": "c"}),
        ("states", {"dtype": "float64"}),
        ("states", {"shape": [1, "batch", 5]}),
        ("states", {"shape": ["batch", 1, 4], "batch_axis": 0}),
        ("inputs", {"name": "z"}),
        ("inputs", {"dtype": "float64"}),
        ("inputs", {"shape": ["batch", "time", 3]}),
        ("inputs", {"left_context": 2}),
        ("inputs", {"chunk": {"multiple": 2}}),
    ],
)
def test_a_snapshot_of_other_content_has_another_schema(part: str, changes: dict[str, Any]) -> None:
    assert schema(part, **changes) != schema()


@pytest.mark.parametrize(
    "part, changes",
    [
        ("", {"description": "better", "max_batch": 7, "resumes_from": ["abc"]}),
        ("states", {"shape": [1, "N", 4], "init": {"value": 1.0}, "output": "h2"}),
        ("inputs", {"shape": ["N", "T", 2], "finite": False}),
        ("outputs", {"name": "z"}),
    ],
)
def test_what_no_snapshot_holds_leaves_the_schema_as_it_is(part: str, changes: dict[str, Any]) -> None:
    assert schema(part, **changes) == schema()


def test_two_states_in_another_order_are_another_schema() -> None:
    h = STATEFUL["states"][0]
    c = h | {"input": "c", "output": "c_next"}
    assert schema(states=[h, c]) != schema(states=[c, h])


# Controls, counted frames, states that are given.

START: dict[str, Any] = {"name": "start", "kind": "start", "dtype": "bool"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a control of two numbers a row": (
        {"controls": [START | {"shape": ["batch", 2]}]}, "a control is one number a row"),
    "a control's batch axis": ({"controls": [START | {"batch_axis": 1}]}, "batch_axis 1 is no axis of"),
    "a number of a sequence in float": (
        {"controls": [START | {"kind": "sequence_id"}]}, "a sequence_id is one of int32, uint32, int64,"),
    "another kind": ({"controls": [START | {"kind": "begin"}]}, "controls.0.kind"),
    "counted without time": (
        {"outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"], "lengths_output": "n"}]},
        "lengths_output needs a time_axis"),
    "a state without rows beside many": (
        {"states": [H | {"batch_axis": None, "shape": [4]}]}, "or nowhere, unless fixed_batch is 1"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestInvalid, match=message):
        parse(create_fields(**changes))


def test_a_graph_of_one_row_may_have_states_without_rows() -> None:
    fields = create_fields(states=[H | {"batch_axis": None, "shape": [4]}], fixed_batch=1)
    assert parse(fields).states[0].slot_shape == (4,)


def test_a_run_gives_each_count_once() -> None:
    """Two outputs may be counted by one, which may be an output of its own."""
    counted = Y | {"lengths_output": "n"}
    n = {"name": "n", "dtype": "int32", "shape": ["batch"]}
    assert parse(create_fields(outputs=[counted, counted | {"name": "z"}])).fetched == ("y", "z", "n")
    assert parse(create_fields(outputs=[counted, n])).fetched == ("y", "n")


def test_a_count_is_no_fraction() -> None:
    manifest = create_manifest(outputs=[Y | {"lengths_output": "n"}])
    for dtype, fault in (("float32", "lengths_output 'n' is float32"), ("int64", "")):
        outputs = [graph_tensor("y", "N", "T"), graph_tensor("n", "N", dtype=dtype), OUTPUTS[1]]
        found = disagreements(manifest, outputs=outputs)
        assert any(f.startswith(fault) for f in found) if fault else found == []


def test_what_exporters_declare_of_outputs_may_be_wrong() -> None:
    """Their shapes are looked at when they come."""
    declared = [graph_tensor("y", "N", 1), graph_tensor("h_next")]
    assert disagreements(create_manifest(), outputs=declared) == []
    declared = [graph_tensor("y", "N", "T", dtype="float16"), OUTPUTS[1]]
    found = disagreements(create_manifest(), outputs=declared)
    assert found == ["output 'y' is float16 in the graph, float32 in the manifest"]


def test_a_manifest_that_is_nested_too_deep_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="the manifest is no JSON: maximum recursion depth"):
        Manifest.parse("[" * 100_000, "toy/1")
