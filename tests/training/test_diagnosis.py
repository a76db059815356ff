"""The pictures of docs/networks.md: what they measure, on cases whose answer is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tenuto[training]'")
pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'tenuto[diagnosis]'")

from tenuto.training import recurrent_graph  # noqa: E402
from tenuto.training.diagnosis import convolution, exploding, recall, vanishing, weighing  # noqa: E402
from tenuto.training.diagnosis.confusion import Confusion  # noqa: E402
from tenuto.training.diagnosis.curves import Curves  # noqa: E402
from tenuto.training.diagnosis.inside import Gates, Inside  # noqa: E402
from tenuto.training.recurrent import RecurrentNetwork, Shape  # noqa: E402
from tenuto.training.task import Answers  # noqa: E402
from tenuto.training.weights import exported  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def _linear_rnn(keep: float) -> RecurrentNetwork:
    """A network whose state is `keep` times the one before, plus a little of the input: almost linear."""
    network = RecurrentNetwork(Shape(inputs=1, hidden=(1,), outputs=1, cell="rnn", activation=""))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.layers[0].get_parameter("weight_ih_l0").fill_(1e-3)
        network.layers[0].get_parameter("weight_hh_l0").fill_(keep)
        network.head.weight.fill_(1.0)
    return network


@pytest.mark.parametrize("keep", [0.5, 0.9, 1.1])
def test_a_gradient_shrinks_by_the_recurrent_weight_at_each_step_back(keep: float) -> None:
    norms = vanishing.gradient_norms(_linear_rnn(keep), 20)
    assert len(norms) == 21
    assert norms == pytest.approx([keep**d for d in range(21)], rel=1e-3)


def test_a_bit_is_asked_for_after_the_noise() -> None:
    steps, bits = recall.sequences(100, 30, torch.Generator().manual_seed(0))
    assert steps.shape == (100, 31, 1)
    assert torch.equal(steps[:, 0, 0] > 0, bits.bool())
    assert steps[:, 1:].std() == pytest.approx(0.1, rel=0.1)


def test_a_network_that_keeps_its_first_input_recalls_and_one_that_does_not_guesses() -> None:
    assert recall.recalled(_linear_rnn(1.0), 2) == 1.0
    assert 0.4 < recall.recalled(_linear_rnn(0.0), 50) < 0.6


def test_an_lstm_is_taught_what_an_rnn_is_not() -> None:
    found = recall.Recall.measure(distances=(200,), seeds=(0,))
    assert found.rates["lstm"][200][0] > 0.98
    assert found.rates["rnn"][200][0] < 0.6
    assert found.table().splitlines()[-1] == "| LSTM | 100% |"  # rounded


def test_clipping_is_all_the_difference() -> None:
    found = exploding.Exploding.measure()
    (free, clipped), first = found.losses.values(), [losses[0] for losses in found.losses.values()]
    assert first[0] == first[1]
    assert len(free) < exploding.STEPS  # the loss was no number any more
    assert len(clipped) == exploding.STEPS
    assert np.mean(clipped[-50:]) < 0.7 * np.mean(clipped[:20])


def test_the_sum_is_of_the_two_marked_numbers() -> None:
    x, sums = weighing.sequences(50, torch.Generator().manual_seed(0))
    assert x.shape == (50, weighing.LENGTH, 2)
    assert torch.equal(x[:, :, 1].sum(1), torch.full((50,), 2.0))
    for row, total in zip(x, sums, strict=True):
        assert float(row[row[:, 1] == 1, 0].sum()) == pytest.approx(float(total), abs=1e-6)


def test_influence_is_the_change_of_the_answer() -> None:
    found = weighing.Weighing.measure(steps=1)
    assert {cell: len(influence) for cell, influence in found.influence.items()} == {"rnn": 30, "lstm": 30}
    assert all(error > 0.3 for error in found.errors.values())  # one step teaches nothing


def _model() -> tuple[RecurrentNetwork, bytes]:
    torch.manual_seed(0)
    shape = Shape(inputs=3, hidden=(5,), outputs=2)
    network = RecurrentNetwork(shape)
    described = recurrent_graph.manifest(shape, name="probe", entry={"name": "x"}, output={"name": "y"})
    return network, recurrent_graph.build(exported(network), shape, described)


def _feeds(x: Any) -> dict[str, Any]:
    zero = np.zeros((1, 1, 5), np.float32)
    return {"x": x, "lengths": np.array([x.shape[1]], np.int32), "h0": zero, "c0": zero}


def test_gates_are_those_of_the_network() -> None:
    network, model = _model()
    inside = Inside(model)
    x = np.random.default_rng(0).standard_normal((1, 6, 3)).astype(np.float32)
    gates = Gates.of(inside, inside.nodes("LSTM")[0], _feeds(x))
    state = network.initial_state(1)
    for step in range(6):
        layer = network.layers[0]
        stacked = torch.nn.functional.linear(
            torch.from_numpy(x[:, step]),
            layer.get_parameter("weight_ih_l0"),
            layer.get_parameter("bias_ih_l0"),
        ) + torch.nn.functional.linear(
            state[0][0], layer.get_parameter("weight_hh_l0"), layer.get_parameter("bias_hh_l0")
        )
        i, f, _, o = (torch.sigmoid(part)[0].detach().numpy() for part in stacked.chunk(4, 1))
        _, state = network(torch.from_numpy(x[:, step : step + 1]), state)
        for gate, expected in zip((gates.input, gates.forget, gates.output), (i, f, o), strict=True):
            np.testing.assert_allclose(gate[step], expected, atol=1e-6)
        np.testing.assert_allclose(gates.cell[step], state[1][0, 0].detach().numpy(), atol=1e-6)


def test_gates_that_do_not_give_what_the_model_says_are_refused() -> None:
    _, model = _model()
    inside = Inside(model)
    inside.constants["lstm0_w"] = inside.constants["lstm0_w"] * 2
    with pytest.raises(ValueError, match="lstm0_y: step 1 of the gates"):
        Gates.of(inside, inside.nodes("LSTM")[0], _feeds(np.ones((1, 3, 3), np.float32)))


def test_confusion_counts_and_names_the_commonest_mistake(tmp_path: Path) -> None:
    truth, said = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 2, 2, 1, 2])
    found = Confusion.of("probe", Answers(truth, said, ["cat", "dog", "emu"]))
    assert found.counts.tolist() == [[1, 1, 0], [0, 1, 2], [0, 0, 1]]
    assert found.worst() == ("dog", "emu", 2)
    found.draw(tmp_path / "one.svg")
    found.draw(tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_curves_are_read_from_what_is_recorded(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / f"model{number}/1"
        folder.mkdir(parents=True)
        curve = [{"loss": 1.0, "validation": 0.5}, {"loss": 0.5, "validation": 0.4}]
        metrics = {"model": folder.parent.name, "training": {"curve": curve} if number else {}}
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    found = Curves.read(tmp_path)
    assert list(found.lines) == ["model1", "model2", "model3"]
    found.draw(tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert all(name in text for name in found.lines)


@pytest.mark.parametrize("digit", "0123456789")
def test_the_printed_digit_is_ink_in_the_middle(digit: str) -> None:
    image = convolution.drawn(digit)
    assert image.shape == (28, 28)
    assert image[:3].max() == image[-3:].max() == 0
    assert 0.9 < image.max() <= 1
