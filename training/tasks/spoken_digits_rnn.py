"""`spoken-digits` with plain recurrent layers in place of the LSTMs: `tenuto train spoken-digits-rnn`."""

from tenuto.training.recipe import Recipe
from tenuto.training.spoken import Sizes, SpokenTask


class SpokenDigitsRnnTask(SpokenTask):
    """The Free Spoken Digit Dataset, two plain tanh layers (Elman 1990) with as many units as the LSTMs."""

    name = "spoken-digits-rnn"
    recipe = Recipe(epochs=30, learning_rate=2e-3)
    sizes = Sizes("rnn", hear=160, answer=64)
    dropout = 0.15
    description = (
        "spoken-digits with plain recurrent layers in place of LSTMs, to compare. For every 20 ms: "
        "log_probabilities, what is heard now; answer, what digit was spoken last."
    )
    card = """
TODO
"""
