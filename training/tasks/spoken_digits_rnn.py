"""`spoken-digits` with plain recurrent layers in place of the LSTMs: `tenuto train spoken-digits-rnn`."""

from tenuto.training.recipe import Recipe
from tenuto.training.spoken import Sizes, SpokenTask


class SpokenDigitsRnnTask(SpokenTask):
    """The Free Spoken Digit Dataset, two plain tanh layers (Elman 1990) with as many units as the LSTMs."""

    name = "spoken-digits-rnn"
    recipe = Recipe(epochs=60, learning_rate=2e-3)
    sizes = Sizes("rnn", hear=160, answer=64)
    dropout = 0.15
    description = (
        "spoken-digits with plain recurrent layers in place of LSTMs, to compare. For every 20 ms: "
        "log_probabilities, what is heard now; answer, what digit was spoken last."
    )
    card = """
The same data, features and units as `spoken-digits` (160 and 64), but plain tanh layers (Elman 1990)
without gates: 55,444 parameters in place of 214,996, a greatest learning rate of 2e-3 in place of 6e-3, and
60 epochs in place of 100 (100 reached 95.7 %, in float32 like these). It is here to compare, not to use: see
`spoken-digits` for what the outputs mean. The answer has to outlive the pause after a word, and that is what
gates are for.
"""
