"""Two LSTMs that listen to spoken digits: `tenuto train spoken-digits`.

Every 20 ms of 8 kHz sound become two log-mel frames. The first LSTM (Hochreiter and Schmidhuber 1997) says
what it hears in each 20 ms; the second reads the first and says what digit was spoken last.
"""

from collections.abc import Mapping

from tenuto.training.recipe import Recipe
from tenuto.training.spoken import SPEAKERS, Sizes, SpokenTask
from tenuto.training.task import Task


class SpokenDigitsTask(SpokenTask):
    """The Free Spoken Digit Dataset, two LSTMs."""

    name = "spoken-digits"
    recipe = Recipe(epochs=100, learning_rate=6e-3, seeds=(0, 1, 2))
    sizes = Sizes("lstm", hear=160, answer=64)
    dropout = 0.15
    description = (
        "Spoken digits 0 to 9 from 8 kHz sound. For every 20 ms: log_probabilities, what is heard now; "
        "answer, what digit was spoken last."
    )
    card = """
Listens to 8 kHz sound and says which English digit was spoken last. For demonstrations and tests of
live streams: sound may come in chunks of any length. Two outputs for each 20 ms: `log_probabilities`,
what the first LSTM hears now, and `answer`, what the second one has understood so far. The answer stays
in the pause after a digit and changes with the next. Both are arbitrary before the first digit
and in the first part of a word: there is no "nothing heard" among the labels. For that, and for who wants
each digit once, there is `digit-strings`.

Six speakers, all in training and test: the figure on the test set says how well it knows their voices. For a
voice that it never heard see `without-...` below: each is a training without that speaker (of 12 epochs,
not 40), tested on all 500 recordings of that speaker. It depends on the voice; most of what goes wrong is
six heard as eight, three as eight, four as five or seven.

Of validation recordings played five in a row with half a second between them, 98 % were right in the
pause, and 97 % of the last ones still so after 3 seconds of silence. White noise: at -60 dB of full
scale the same; at -50 dB 88 %, and the answer wanders off within 3 seconds (62 %); words at -20 dB over
noise at -40 dB 74 %, 20 % after 3 seconds. Words at -50 dB of full scale (root mean square) 89 %; at
-60 dB, too quiet, 30 %. States are bounded; a stream may run for as long as it likes.
"""

    def variants(self) -> Mapping[str, Task]:
        """Return the same without one of the six speakers, who then is the test."""
        return {f"without-{speaker}": SpokenDigitsTask(speaker) for speaker in SPEAKERS}
