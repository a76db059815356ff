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
    recipe = Recipe(epochs=100, learning_rate=6e-3, precision="bfloat16", seeds=(0, 1, 2))
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

Six speakers, all in training and test: the figure on the test set says how well it knows their voices, which
training varies a little. For a voice that it never heard see `without-...` below: each is a training without
that speaker, with voices, rooms and microphones varied more, tested on all 500 recordings of that speaker.
It depends on the voice.

Of 300 rows of five validation recordings with half a second between them, the answer was right in the
pause after the last one in 99.7 %, and 3 seconds later still. White noise: at -60 dB of full scale 99 %; at
-50 dB 86 %, and 66 % after 3 seconds; words at -20 dB (root mean square) over noise at -40 dB 46 %. Words at
-50 dB 94 %, at -60 dB, too quiet, 28 %. States are bounded; a stream may run for as long as it likes.
"""

    def variants(self) -> Mapping[str, Task]:
        """Return the same without one of the six speakers, who then is the test."""
        return {f"without-{speaker}": SpokenDigitsTask(speaker) for speaker in SPEAKERS}
