"""Two LSTMs that listen to spoken digits: `tenuto train spoken-digits`.

Every 20 ms of 8 kHz sound become two log-mel frames. The first LSTM (Hochreiter and Schmidhuber 1997) says
what it hears in each 20 ms; the second reads the first and says what digit was spoken last.
"""

from collections.abc import Mapping
from dataclasses import replace

import onnxruntime

from tenuto.serving.manifest import Manifest
from tenuto.training.recipe import Recipe
from tenuto.training.spoken import SPEAKERS, Sizes, SpokenTask
from tenuto.training.task import Figures, Task


class SpokenDigitsTask(SpokenTask):
    """The Free Spoken Digit Dataset, two LSTMs."""

    name = "spoken-digits"
    recipe = Recipe(epochs=40, learning_rate=6e-3, seeds=(0, 1, 2))
    sizes = Sizes("lstm", hear=160, answer=64)
    dropout = 0.15
    description = (
        "Spoken digits 0 to 9 from 8 kHz sound. For every 20 ms: log_probabilities, what is heard now; "
        "answer, what digit was spoken last."
    )
    card = """
TODO
"""

    def __init__(self, without: str | None = None) -> None:
        super().__init__(without)
        if without is not None:
            self.recipe = replace(self.recipe, epochs=16)

    def variants(self) -> Mapping[str, Task]:
        """Return the same without one of the six speakers, who then is the test."""
        return {f"without-{speaker}": SpokenDigitsTask(speaker) for speaker in SPEAKERS}

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Return the accuracy; of a variant also how long it was trained."""
        epochs = {} if self.without is None else {"epochs": self.recipe.epochs}
        return super().test(session, manifest) | epochs
