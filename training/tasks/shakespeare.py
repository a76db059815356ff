"""An LSTM that goes on with a play, character by character: `tenuto train shakespeare`.

One to many: a character in, how likely each of 65 comes next out; the one that is drawn is the next input.
Trained on tiny Shakespeare, in pieces from anywhere in the text, each from a state of zeros.
"""

from collections.abc import Iterator

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.serving.manifest import Manifest
from tenuto.serving.text import Characters
from tenuto.training import recurrent_graph
from tenuto.training.candidate import Candidate
from tenuto.training.datasets import tinyshakespeare
from tenuto.training.datasets.tinyshakespeare import ALPHABET
from tenuto.training.progress import progress
from tenuto.training.recipe import Recipe
from tenuto.training.recurrent import RecurrentNetwork, Shape
from tenuto.training.stepper import Stepper, initial, turn
from tenuto.training.task import Batch, Figures, Task

PIECES = 64  # a step
PIECE = 128  # characters
DROPOUT, INPUT_DROPOUT = 0.3, 0.1
VALIDATION = 0.45, 0.5  # from there to there of the part to train on
SHAPE = Shape(inputs=64, hidden=(384, 384), outputs=len(ALPHABET), symbols=len(ALPHABET))
CUTTER = Characters(ALPHABET)

DATA = {
    "name": "tiny Shakespeare",
    "licence": tinyshakespeare.LICENCE,
    "sha256": {tinyshakespeare.FILENAME: tinyshakespeare.CHECKSUM},
    "split": "nanoGPT's: the first 90 % to train on, of which a twentieth in the middle is held out to "
    "choose the epoch; the last 10 %, which others call validation, to test",
}


class ShakespeareTask(Task):
    """Tiny Shakespeare, a character a step."""

    name = "shakespeare"
    recipe = Recipe(
        epochs=9, learning_rate=5e-3, matrix_rate=1e-2, average=0.99, precision="bfloat16", keep="best"
    )
    data = DATA
    card = """
Reads a text character by character and says how likely each of its 65 characters is next; drawing from that
and feeding it back writes a play with speakers, lines and something like English. For demonstrations of "one
to many"; there is no sense in what it says.

It knows 1 MB of Shakespeare and no other character: no digit but 3, no quotation mark, no accent. It makes
words up, fewer at a lower temperature. The first characters after a cold start in the middle of a line cost
most. The test part is new plays throughout: `last_tenth` in metrics.json is the newest of them, `worst` the
worst of 64 starts in the test part, for such a network can fall into a state that it never leaves, and an
earlier one did.
"""

    def load(self) -> None:
        """Read the text; a piece in the middle of the part to train on is held out.

        Its end would be the beginning of the play with which the test part goes on.
        """
        start, stop = tinyshakespeare.TRAIN
        self.take(CUTTER.ids(tinyshakespeare.text()[start:stop]))

    def take(self, ids: NDArray[np.int64]) -> None:
        """Hold out a piece of that text, and train on the rest."""
        start, stop = (int(share * len(ids)) for share in VALIDATION)
        self._held = torch.from_numpy(ids[start:stop])
        self._train = torch.from_numpy(np.delete(ids, slice(start, stop)))

    def network(self) -> nn.Module:
        """Return an LSTM over characters whose gates begin open for what it remembers."""
        network = RecurrentNetwork(SHAPE, dropout=DROPOUT, input_dropout=INPUT_DROPOUT)
        for name, parameter in network.named_parameters():
            if name == "embedding.weight":
                nn.init.normal_(parameter, 0, 0.3)
            elif "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            elif "bias_hh" in name:
                nn.init.zeros_(parameter)
                nn.init.ones_(parameter.data.chunk(4)[1])  # the gate that keeps (Jozefowicz 2015)
        return network

    def steps(self) -> int:
        """Return the number of batches in which the whole text is read once."""
        return (len(self._train) // PIECE - 2) // PIECES

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield characters and those that follow, [pieces, piece]; each epoch cuts the text elsewhere."""
        starts = np.arange(rng.integers(PIECE), len(self._train) - PIECE, PIECE)
        chosen = rng.permutation(starts)[: self.steps() * PIECES].reshape(-1, PIECES)
        for places in torch.from_numpy(chosen):
            pieces = self._train[places[:, None] + torch.arange(PIECE + 1)]
            yield pieces[:, :-1], pieces[:, 1:]

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return nats a character."""
        assert isinstance(network, RecurrentNetwork)
        read, follow = batch
        features, _ = network.features(read, network.initial_state(len(read)))
        return F.cross_entropy(network.head(features).float().flatten(0, 1), follow.flatten())

    def validate(self, network: nn.Module) -> float:
        """Return nats a character on the text held out, read from 64 places."""
        assert isinstance(network, RecurrentNetwork)
        rows = _rows(self._held, 64)
        said, _ = network(rows[:, :-1], network.initial_state(len(rows)))
        return float(F.nll_loss(said.flatten(0, 1), rows[:, 1:].flatten()))

    def candidate(self, network: nn.Module, seed: int) -> Candidate:
        """Build the ONNX file, and characters at random to check it with."""
        assert isinstance(network, RecurrentNetwork)
        return recurrent_graph.candidate(
            network,
            manifest(),
            golden=np.split(babble(60, seed), [1, 2, 5, 30]),
            probe=babble(400, seed + 1),
            card=self.card,
        )

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Nats a character on the last 10 % of the text, all of it one sequence."""
        start, stop = tinyshakespeare.TEST
        ids = CUTTER.ids(tinyshakespeare.text()[start:stop])
        surprises, stepper = [], Stepper(session, manifest)
        with progress("shakespeare: test", len(ids)) as bar:
            for at in range(0, len(ids) - 1, 1000):
                read, follow = ids[at : at + 1000][: len(ids) - 1 - at], ids[at + 1 : at + 1001]
                said = stepper.step(read)["log_probabilities"]
                surprises.append(-said[np.arange(len(follow)), follow].astype(np.float64))
                bar.update(len(read))
        nats = np.concatenate(surprises)
        return {
            "metric": "nats a character",
            "value": float(nats.mean()),
            "last_tenth": float(nats[-len(nats) // 10 :].mean()),
            "from_64_places": _from_places(session, manifest, ids, 64),
            "n": len(nats),
            "test_set": "tiny Shakespeare, the last 10 % of the text as one sequence, each character after "
            "the first guessed from all before it",
        }


def _from_places(
    session: onnxruntime.InferenceSession, manifest: Manifest, ids: NDArray[np.int64], places: int
) -> dict[str, float]:
    """Return mean and worst nats a character of sequences that begin at `places` places of the text."""
    rows = _rows(torch.from_numpy(ids), places).numpy()
    said = turn(session, manifest, list(rows[:, :-1]), [initial(manifest) for _ in rows])
    nats = [
        -outputs["log_probabilities"][np.arange(len(row) - 1), row[1:]].mean(dtype=np.float64)
        for row, (outputs, _) in zip(rows, said, strict=True)
    ]
    return {"mean": float(np.mean(nats)), "worst": float(np.max(nats))}


def _rows(text: Tensor, rows: int) -> Tensor:
    """Cut a text into that many pieces of one length, [rows, length]; what is left at its end is left out."""
    length = len(text) // rows
    return text[: rows * length].view(rows, length)


def manifest() -> Manifest:
    """Describe the model."""
    return recurrent_graph.manifest(
        SHAPE,
        name=ShakespeareTask.name,
        description="Goes on with a play in Shakespeare's manner, character by character. Send text of the "
        "model's 65 characters; what comes out is how likely each of them is next.",
        licence="CC0-1.0",
        entry={
            "name": "characters",
            "wire": [{"encoding": "utf8", "tokens": "characters", "alphabet": ALPHABET}],
        },
        output={"name": "log_probabilities", "labels": list(ALPHABET)},
        generate={"output": "log_probabilities", "input": "characters", "sampling": "categorical"},
        max_batch=64,
        max_frames=32,
    )


def babble(length: int, seed: int) -> NDArray[np.int64]:
    """Return characters at random, int64 [length]."""
    return np.random.default_rng(seed).integers(len(ALPHABET), size=length)
