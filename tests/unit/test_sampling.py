"""What is drawn follows the distribution, and nothing but seed, step and part decides it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tenuto.serving.errors import RunFailed, WrongInput, WrongSetting
from tenuto.serving.manifest import LEAST_TEMPERATURE, MOST_TEMPERATURE, Manifest
from tenuto.serving.model_runner import flush_denormals
from tenuto.serving.sampling import Generation, Sampler, Sampling, Uniforms
from tests import toys

from .fakes import Array, f32

LOGITS = f32([0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 0.25, 1.5])
KEYS = f32([0.05, 0.5, 0.95, 0.0, 1.0, 0.3])
DRAWS = 4000
uniforms = Uniforms().draw
# The 0.999 quantile of the chi-square distribution, by degrees of freedom (any table of it).
CHI_SQUARE_999 = {5: 20.52, 7: 24.32}


def create_sampler(toy: Any = toys.speaker, activation: str = "") -> Sampler:
    manifest = toy()[1]
    manifest["outputs"][0]["activation"] = activation
    return Sampler(Manifest.model_validate(manifest))


def drawn(
    sampler: Sampler, frame: Array, dtype: str, *, seed: int = 1, temperature: float = 1.0, top_k: int = 0
) -> Array:
    """[draws, numbers of a sample]: of 40 steps of 100 parts each."""
    generation = Generation(Sampling(seed, temperature, top_k), frame.tobytes())
    samples = [sampler.draw(generation, 1 + i // 100, 1 + i % 100) for i in range(DRAWS)]
    return np.stack([np.frombuffer(sample, dtype) for sample in samples])


def indices(frame: Array = LOGITS, activation: str = "", **sampling: Any) -> Array:
    return drawn(create_sampler(activation=activation), frame, "int64", **sampling)[:, 0]


def softmax(logits: Array) -> Array:
    weights = np.exp(logits.astype(np.float64))
    whole: Array = weights / weights.sum()
    return whole


def chi_square(counts: Array, expected: Array) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# The uniform numbers.


def philox(key: int, counter: list[int]) -> list[int]:
    """One block of Philox-4x64-10 with the key (`key`, 0), from the paper: four words of 64 bits."""
    low, words, keys = 2**64 - 1, counter, [key, 0]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (second >> 64) ^ words[1] ^ keys[0], second & low, (first >> 64) ^ words[3] ^ keys[1], first & low
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & low, (keys[1] + 0xBB67AE8584CAA73B) & low]
    return words


def test_the_uniform_numbers_are_philox_s_for_all_time() -> None:
    """A text must be the same with the next numpy, and a program in another language can draw it."""
    assert uniforms(1, 2, 3, 3).tolist() == [0.9337443921724664, 0.39039256465951866, 0.7000775509398287]
    for seed, step, part in ((1, 2, 3), (0, 1, 1), (2**64 - 1, 70_000, 4096)):
        blocks = [philox(seed, [block, part, step, 0]) for block in (1, 2)]
        expected = [(word >> 11) / 2**53 for block in blocks for word in block]
        assert uniforms(seed, step, part, 8).tolist() == expected


def test_another_seed_step_or_part_gives_others_and_more_of_them_begin_alike() -> None:
    base = uniforms(1, 2, 3, 88).tolist()
    assert uniforms(1, 2, 3, 5).tolist() == base[:5]
    others = [
        uniforms(*of, 88).tolist() for of in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (2**64 - 1, 2, 3))
    ]
    assert len({tuple(numbers) for numbers in (base, *others)}) == 6
    assert all(0 <= u < 1 for u in base)


def test_they_are_uniform_over_parts_and_steps() -> None:
    values = [uniforms(9, step, part, 1)[0] for step in range(1, 41) for part in range(1, 101)]
    counts = np.bincount((np.array(values) * 8).astype(int), minlength=8)
    assert chi_square(counts, np.full(8, DRAWS / 8)) < CHI_SQUARE_999[7]


# One of many.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("activation", ["", "log_softmax", "softmax"])
def test_an_index_comes_as_often_as_the_model_says(activation: str, temperature: float) -> None:
    probabilities = softmax(LOGITS)
    told = {"": LOGITS, "log_softmax": np.log(probabilities), "softmax": probabilities}[activation]
    got = indices(told.astype(np.float32), activation, temperature=temperature)
    expected = softmax(LOGITS / temperature) * DRAWS
    assert chi_square(np.bincount(got, minlength=8), expected) < CHI_SQUARE_999[7]


def test_logits_that_all_are_higher_mean_the_same() -> None:
    assert indices().tolist() == indices(LOGITS + 8).tolist()
    assert indices().tolist() != indices(seed=2).tolist()


@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
def test_no_index_but_the_k_best_is_drawn(top_k: int) -> None:
    best = np.argsort(-LOGITS)[:top_k]
    got = indices(top_k=top_k, temperature=5.0)
    assert set(got.tolist()) == set(best.tolist())


@pytest.mark.parametrize("top_k", [0, 8, 9])
def test_the_best_of_all_are_all(top_k: int) -> None:
    assert indices(top_k=top_k).tolist() == indices().tolist()


def test_of_equal_ones_the_lower_index_is_the_better() -> None:
    assert set(indices(np.zeros(8, np.float32), top_k=3).tolist()) == {0, 1, 2}


def test_a_low_temperature_takes_the_best_and_a_high_one_each_alike() -> None:
    assert set(indices(temperature=1e-3).tolist()) == {4}
    counts = np.bincount(indices(temperature=1e6), minlength=8)
    assert chi_square(counts, np.full(8, DRAWS / 8)) < CHI_SQUARE_999[7]


@pytest.mark.parametrize("temperature", [LEAST_TEMPERATURE, MOST_TEMPERATURE])
def test_the_ends_of_what_is_allowed_draw_from_the_largest_numbers(temperature: float) -> None:
    """Also where denormal numbers are taken for zero, as on an engine's thread."""
    extreme = f32([3e38, -3e38, 1e-40, -1e-40, 0, -np.inf, 2e38, 3e38])
    keys = f32([3e38, -3e38, 1e-40, -1e-40, 0, -np.inf])
    drawn_there: list[Array] = []

    def draw() -> None:
        flush_denormals()
        drawn_there.append(indices(extreme, temperature=temperature))
        drawn_there.append(drawn(create_sampler(toys.player), keys, "float32", temperature=temperature))

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    got, struck = drawn_there
    assert set(got.tolist()) == {0, 7}
    assert (struck[:, 0] == 1).all()
    assert (struck[:, [1, 5]] == 0).all()
    assert 0.4 < struck[:, 2:5].mean() < 0.6


def test_what_has_no_probability_is_never_drawn() -> None:
    masked = LOGITS.copy()
    masked[[0, 4, 7]] = -np.inf
    assert set(indices(masked).tolist()) == {1, 2, 3, 5, 6}
    certain = f32([0, 0, 1, 0, 0, 0, 0, 0])
    assert set(indices(certain, "softmax").tolist()) == {2}


# Many at once.


def test_each_key_is_struck_as_often_as_the_model_says_and_by_itself() -> None:
    got = drawn(create_sampler(toys.player, "sigmoid"), KEYS, "float32")
    assert set(got.ravel().tolist()) == {0.0, 1.0}
    counts, some = got.sum(axis=0), [0, 1, 2, 5]
    expected = KEYS[some] * DRAWS
    spread = np.sqrt(expected * (1 - KEYS[some]))
    assert (np.abs(counts[some] - expected) < 4 * spread).all()
    assert counts[3] == 0
    assert counts[4] == DRAWS
    correlation = np.corrcoef(got[:, some].T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(DRAWS)


def test_a_temperature_divides_the_keys_logits() -> None:
    logits = np.log(KEYS[[1, 2, 5]]) - np.log1p(-KEYS[[1, 2, 5]])
    expected = DRAWS / (1 + np.exp(-logits / 2))
    frame = f32([KEYS[1], KEYS[2], KEYS[5], 0, 1, 0.5])
    got = drawn(create_sampler(toys.player, "sigmoid"), frame, "float32", temperature=2.0).sum(axis=0)
    assert (np.abs(got[:3] - expected) < 4 * np.sqrt(expected * (1 - expected / DRAWS))).all()
    assert got[3:5].tolist() == [0, DRAWS]


def test_probabilities_and_their_logits_strike_the_same_keys() -> None:
    logits = f32([-800, -1, 0, 1, 800, 2])
    probabilities = f32([0, *(1 / (1 + np.exp(-logits[1:4]))), 1, 1 / (1 + np.exp(-2))])
    by_logits = drawn(create_sampler(toys.player), logits, "float32")
    by_probability = drawn(create_sampler(toys.player, "sigmoid"), probabilities, "float32")
    assert (by_logits != by_probability).mean() < 1e-3


# Shapes, and what cannot be drawn.


def test_a_sample_has_the_shape_in_which_a_client_would_send_it() -> None:
    assert create_sampler().shape == (1,)
    assert create_sampler(toys.player).shape == (1, 6)


def test_the_last_frame_of_the_right_output_is_what_counts() -> None:
    part = (np.arange(24, dtype=np.float32).tobytes(), b"another")
    assert create_sampler().last_frame(part) == np.arange(16, 24, dtype=np.float32).tobytes()


def test_before_any_output_nothing_can_be_drawn() -> None:
    with pytest.raises(WrongInput, match="it generates before there is any output; send a sample first"):
        create_sampler().draw(Generation(Sampling(1, 1.0, 0)), 3, 1)


@pytest.mark.parametrize(
    "toy, activation, bad, text",
    [
        (toys.speaker, "", np.nan, "output 'logits' holds nan"),
        (toys.speaker, "", np.inf, "the largest logit is inf"),
        (toys.speaker, "softmax", -0.5, "output 'logits' holds -0.5"),
        (toys.player, "sigmoid", 1.5, "output 'chord' holds 1.5"),
    ],
)
def test_numbers_that_are_no_distribution_are_named(toy: Any, activation: str, bad: float, text: str) -> None:
    sampler = create_sampler(toy, activation)
    frame = np.full(8 if toy is toys.speaker else 6, 0.5, np.float32)
    frame[2] = bad
    with pytest.raises(RunFailed, match=text):
        sampler.draw(Generation(Sampling(1, 1.0, 0), frame.tobytes()), 3, 4)


@pytest.mark.parametrize(
    "seed, temperature, text",
    [(-1, 1.0, "seed is -1"), (2**64, 1.0, "seed is 18446744073709551616"), (0, 0.0, "temperature is 0"),
     (0, -1.0, "temperature is -1"), (0, 1e-7, "is 1e-07, expected 1e-06 to 1e"), (0, 2e6, "is 2e"),
     (0, float("inf"), "temperature is inf"), (0, float("nan"), "is nan")],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(seed: int, temperature: float, text: str) -> None:
    with pytest.raises(WrongSetting, match=text):
        Sampling(seed, temperature, 0)
