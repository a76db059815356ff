"""An LSTM that goes on with a chorale, chord by chord: `tenuto train chorales`.

One to many: 88 keys in, how likely each of them sounds a quarter note later out; what is drawn from that is
the next input. Trained on J. S. Bach's chorales, transposed at random.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.serving.manifest import Manifest
from tenuto.training import recurrent_graph
from tenuto.training.candidate import Candidate
from tenuto.training.datasets import jsb
from tenuto.training.datasets.jsb import KEYS, LOWEST, Chorale
from tenuto.training.progress import progress
from tenuto.training.recipe import Recipe
from tenuto.training.recurrent import RecurrentNetwork, Shape
from tenuto.training.stepper import Stepper
from tenuto.training.task import Batch, Figures, Task

BATCH = 12
SHAPE = Shape(inputs=KEYS, hidden=(288,), outputs=KEYS, activation="sigmoid")
DROPOUT = 0.3  # of what the LSTM says; dropping keys that are heard made it worse
TRANSPOSITIONS = (-5, 6)  # semitones, both included: every key signature once
NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
LABELS = [f"{NOTES[pitch % 12]}{pitch // 12 - 1}" for pitch in range(LOWEST, LOWEST + KEYS)]

DATA = {
    "name": "JSB chorales",
    "licence": jsb.LICENCE,
    "sha256": {jsb.FILENAME: jsb.CHECKSUM},
    "split": "Boulanger-Lewandowski 2012: 229 chorales to train on, 76 for validation, 77 to test",
}


class ChoralesTask(Task):
    """JSB chorales, a quarter note a step."""

    name = "chorales"
    recipe = Recipe(
        epochs=250, learning_rate=8e-3, weight_decay=0.05, average=0.995, keep="best", seeds=(0, 1, 2)
    )
    data = DATA
    card = """
Hears chords, one a quarter note, and says of each of a piano's 88 keys how likely it sounds at the next one.
Drawing from that and feeding it back writes music in the manner of Bach's four-part chorales, in any key.
For demonstrations of "one to many".

The keys of a chord are drawn one by one: given what was before, they do not know of each other. So of 4,096
chords drawn at temperature 1, beginning with silence, 22 % have five keys or more and 2 % none (Bach: none
and 0.6 %), and 71 % have a shape, intervals above the lowest key with octaves aside, that occurs in the
training part (Bach: 99.8 %). It keeps no metre and plans no end: it hears one chord a quarter note, cannot
tell a held note from a repeated one, and knows no shorter notes. On the validation part the first chord
costs 11.9 nats, each of the next three 7.9, those after the 32nd 8.0. The longest chorale that it was
trained on has 129 steps.
"""

    def load(self) -> None:
        """Read the chorales to train on, and those for validation."""
        self.take(jsb.chorales("train"), jsb.chorales("valid"))

    def take(self, train: Sequence[Chorale], held: Sequence[Chorale]) -> None:
        """Train on chorales, validate on others."""
        self._train, self._held = train, collate(held)

    def network(self) -> nn.Module:
        """Return an LSTM over chords."""
        return RecurrentNetwork(SHAPE, dropout=DROPOUT, input_dropout=0.0)

    def steps(self) -> int:
        """Return the number of batches, which differ in size by one at most."""
        return -(-len(self._train) // BATCH)

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield chords heard, chords to come and their weights, each [batch, time, ...].

        Chorales of about the same length share a batch, so that little is padding.
        """
        order = np.argsort([len(one) + rng.uniform(0, 16) for one in self._train])
        groups = np.array_split(order, self.steps())
        for group in rng.permutation(self.steps()):
            chosen = groups[group]
            yield collate([transpose(self._train[i], rng) for i in chosen])

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the mean over steps of the keys' summed binary cross entropies, in nats."""
        assert isinstance(network, RecurrentNetwork)
        heard, truth, weights = batch
        features, _ = network.features(heard, network.initial_state(len(heard)))
        surprise = F.binary_cross_entropy_with_logits(network.head(features), truth, reduction="none")
        return (surprise.sum(-1) * weights).sum() / weights.sum()

    def validate(self, network: nn.Module) -> float:
        """Return nats a step on the chorales held out."""
        return float(self.loss(network, self._held))

    def candidate(self, network: nn.Module, seed: int) -> Candidate:
        """Build the ONNX file, and made-up chords to check it with."""
        assert isinstance(network, RecurrentNetwork)
        return recurrent_graph.candidate(
            network,
            manifest(),
            golden=np.split(chords(40, seed), [1, 2, 5, 20]),
            probe=chords(400, seed + 1),
            card=self.card,
        )

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Nats a step over all steps of the test chorales, each one sequence that begins with silence."""
        surprises = []
        test = jsb.chorales("test")
        with progress("chorales: test", len(test)) as bar:
            for chorale in test:
                heard, truth, _ = collate([chorale])
                likely = Stepper(session, manifest).step(heard[0].numpy())["probabilities"]
                surprises.append(surprise(likely.astype(np.float64), truth[0].numpy()))
                bar.update()
        return {
            "metric": "nats a step",
            "value": float(np.concatenate(surprises).mean()),
            "without_first_chords": float(np.concatenate([one[1:] for one in surprises]).mean()),
            "n": sum(map(len, surprises)),
            "test_set": "JSB chorales on quarter notes, the 77 test chorales, all steps; the first chord is "
            "guessed from silence, each of the 88 keys counts",
        }


def collate(chorales: Sequence[Chorale]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is heard and what comes, float32 [batch, time, 88], and each step's weight [batch, time].

    What is heard before the first chord is silence: no key.
    """
    time = max(map(len, chorales))
    heard = np.zeros((len(chorales), time, KEYS), np.float32)
    truth, weights = heard.copy(), np.zeros((len(chorales), time), np.float32)
    for row, chorale in enumerate(chorales):
        heard[row, 1 : len(chorale)] = chorale[:-1]
        truth[row, : len(chorale)] = chorale
        weights[row, : len(chorale)] = 1
    return torch.from_numpy(heard), torch.from_numpy(truth), torch.from_numpy(weights)


def transpose(chorale: Chorale, rng: np.random.Generator) -> Chorale:
    """Return the chorale some semitones higher or lower; no key of the collection leaves the piano."""
    low, high = TRANSPOSITIONS
    return np.roll(chorale, rng.integers(low, high + 1), axis=1)


def surprise(likely: NDArray[np.float64], truth: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return -ln of the probability of each chord: [time, 88] and [time, 88] to [time]."""
    told: NDArray[np.float64] = -np.log(np.where(truth > 0, likely, 1 - likely)).sum(1)
    return told


def manifest() -> Manifest:
    """Describe the model; keys may also come as uint8, 0 or 1."""
    return recurrent_graph.manifest(
        SHAPE,
        name=ChoralesTask.name,
        description="Chorales, a chord a quarter note: which of a piano's 88 keys sound goes in, how likely "
        "each of them sounds a quarter note later comes out. Begin with silence, or with chords.",
        licence="CC0-1.0",
        entry={
            "name": "keys",
            "unit": "1 sounds, 0 does not",
            "wire": [{"dtype": "uint8"}],
            "columns": LABELS,
        },
        output={"name": "probabilities", "labels": LABELS},
        generate={"output": "probabilities", "input": "keys", "sampling": "bernoulli"},
        max_batch=64,
        max_frames=32,
    )


def chords(steps: int, seed: int) -> NDArray[np.float32]:
    """Return made-up chords float32 [steps, 88]: four keys at random in the middle of the piano."""
    rng = np.random.default_rng(seed)
    rolls = np.zeros((steps, KEYS), np.float32)
    for roll in rolls:
        roll[rng.choice(np.arange(20, 70), 4, replace=False)] = 1
    return rolls
