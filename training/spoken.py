"""Two recurrent layers that listen to spoken digits: what `spoken-digits` and `spoken-digits-rnn` share.

The first layer says what it hears in each 20 ms; the second reads the first and says what digit was
spoken last: the running answer.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.serving.manifest import METADATA_KEY, Manifest

from . import sound, sound_graph, voices
from .candidate import AnyArray, Candidate, Tensors
from .datasets import fsdd
from .datasets.fsdd import Recording
from .graph import Array, Graph
from .progress import progress
from .recurrent import CELLS, Cell, State
from .sound import BANDS, OVERLAP, STEP, Ear, tones
from .stepper import initial, turn
from .task import Answers, Batch, Figures, Task
from .voices import Variety
from .weights import count, exported

BATCH = 32
POOL = 16 * BATCH  # examples that are made and sorted by length at once, so that batches have little padding
VALIDATION_TAKES = range(5, 10)  # of every speaker and digit, held out of the training split
LABELS = [str(digit) for digit in range(10)]
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
DATA = {
    "name": "Free Spoken Digit Dataset v1.0.10",
    "licence": fsdd.LICENCE,
    "sha256": {"recordings/*.wav, see training/datasets/fsdd.py": fsdd.CHECKSUM},
    "split": "official: takes 0 to 4 of each speaker and digit to test; of the others, 5 to 9 for "
    "validation and 10 to 49 to train on. Speaker left out: takes 10 to 49 of the other five to train "
    "on, 5 to 9 of them for validation, all 500 recordings of that speaker to test",
}


@dataclass(frozen=True)
class Sizes:
    """The kind of both layers and their units."""

    cell: Cell
    hear: int
    answer: int

    @property
    def layers(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Return name and units of each layer."""
        return ("hear", self.hear), ("answer", self.answer)


@dataclass
class SpokenState:
    """What one step leaves for the next: sound [batch, 120] and both layers' states [1, batch, n]."""

    overlap: Tensor
    hear: State
    answer: State


class SpokenDigitNetwork(nn.Module):
    """PCM int16 [batch, samples] to log-probabilities of each 20 ms and the running answer."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        self.sizes = sizes
        self.ear = Ear()
        cell = CELLS[sizes.cell]
        self.hear = cell(2 * BANDS, sizes.hear, batch_first=True)
        self.hear_head = nn.Linear(sizes.hear, len(LABELS))
        self.answer = cell(sizes.hear, sizes.answer, batch_first=True)
        self.answer_head = nn.Linear(sizes.answer, len(LABELS))
        self.dropout = nn.Dropout(dropout)
        for layer in (self.hear, self.answer):
            remember(layer)

    def initial_state(self, batch: int) -> SpokenState:
        """Return the state before the first sound: silence, and nothing heard."""
        parts = 2 if self.sizes.cell == "lstm" else 1
        hear, answer = (
            tuple(torch.zeros(1, batch, size) for _ in range(parts)) for _, size in self.sizes.layers
        )
        return SpokenState(torch.zeros(batch, OVERLAP), hear, answer)

    def listen(self, steps: Tensor, state: SpokenState) -> tuple[Tensor, Tensor, State, State]:
        """Run both layers over log-mel [batch, time, 80].

        Returns the logits of each, [batch, time, 10], and the new state of each.
        """
        heard, hear_state = run_layer(self.hear, steps, state.hear)
        heard = self.dropout(heard)
        answer, answer_state = run_layer(self.answer, heard, state.answer)
        logits = self.hear_head(heard), self.answer_head(self.dropout(answer))
        return *logits, hear_state, answer_state

    def forward(self, pcm: Tensor, state: SpokenState) -> tuple[tuple[Tensor, Tensor], SpokenState]:
        """Hear int16 [batch, samples], samples a multiple of 160, all rows of that length.

        Returns log-probabilities and the running answer, float32 [batch, samples / 160, 10], and
        the state for the next call.
        """
        sound = torch.cat([state.overlap, pcm.float() / 32768], dim=1)
        heard, answer, hear_state, answer_state = self.listen(self.ear(sound), state)
        after = SpokenState(sound[:, -OVERLAP:], hear_state, answer_state)
        return (F.log_softmax(heard, -1), F.log_softmax(answer, -1)), after


def remember(layer: nn.RNNBase) -> None:
    """Begin with orthogonal recurrent weights (Saxe 2014) and open forget gates (Gers 2000)."""
    with torch.no_grad():
        weights = dict(layer.named_parameters())
        for gate in weights["weight_hh_l0"].split(layer.hidden_size):
            nn.init.orthogonal_(gate)
        if isinstance(layer, nn.LSTM):
            weights["bias_ih_l0"][layer.hidden_size : 2 * layer.hidden_size] += 1


def run_layer(layer: nn.Module, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """Run a torch recurrent layer with its state as a tuple, whatever its kind."""
    hidden, after = layer(inputs, state if len(state) == 2 else state[0])
    return hidden, after if len(state) == 2 else (after,)


@dataclass(frozen=True, eq=False)
class Example:
    """Sound float32 [160 * time], and for each 20 ms a target and its weight [time]."""

    sound: Array
    targets: NDArray[np.int64]
    weights: Array


def vary(recordings: Sequence[Recording], variety: Variety, rng: np.random.Generator) -> Example:
    """Put recordings one after the other, each in another voice, into noise.

    The weight of a frame grows from 0 to 1 over its digit and stays 1 in the pause after it: at the
    beginning of a word nobody can know, and at its end the answer should be right and stay.
    """
    parts: list[Array] = [np.zeros(rng.integers(0, 1600), np.float32)]
    spans: list[tuple[int, int, int]] = []
    for recording in recordings:
        word = voices.say(recording, variety, rng)
        start = sum(map(len, parts))
        spans.append((start, start + len(word), recording.digit))
        pause = rng.integers(0, 4800) if rng.random() < 0.35 else 0
        parts += [word, np.zeros(pause, np.float32)]
    sound = np.concatenate(parts)
    sound = np.clip(sound + voices.noise(len(sound), variety, rng), -1, 1)[: len(sound) // STEP * STEP]
    targets = np.zeros(len(sound) // STEP, np.int64)
    weights = np.zeros(len(targets), np.float32)
    ends = (np.arange(len(targets)) + 1) * STEP
    for start, stop, digit in spans:
        targets[ends > start] = digit
        weights[ends > start] = np.clip((ends[ends > start] - start) / (stop - start), 0, 1) ** 2
    return Example(sound, targets, weights)


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sound [batch, 120 + samples], targets, weights [batch, time], each one's last frame.

    The 120 samples before the sound are zeros, as the overlap of a new sequence is.
    """
    time = max(len(example.targets) for example in examples)
    sound = np.zeros((len(examples), OVERLAP + time * STEP), np.float32)
    targets = np.zeros((len(examples), time), np.int64)
    weights = np.zeros((len(examples), time), np.float32)
    for row, example in enumerate(examples):
        sound[row, OVERLAP : OVERLAP + len(example.sound)] = example.sound
        targets[row, : len(example.targets)] = example.targets
        weights[row, : len(example.targets)] = example.weights
    last = torch.tensor([len(example.targets) - 1 for example in examples])
    return torch.from_numpy(sound), torch.from_numpy(targets), torch.from_numpy(weights), last


class SpokenTask(Task):
    """Free Spoken Digit Dataset, 20 ms a step. What is made from it says which layers, and its name."""

    data = DATA
    sizes: ClassVar[Sizes]
    dropout: ClassVar[float]
    description: ClassVar[str]

    def __init__(self, without: str | None = None) -> None:
        self.without = without  # a speaker who takes no part in training, and is the whole test

    @property
    def variety(self) -> Variety:
        """Return how far voices are varied: who is to be told apart from others, or a voice not known yet."""
        return voices.FAMILIAR if self.without is None else voices.STRANGERS

    def source(self) -> str:
        """Return what decides the weights: the words for the card, and how it is tested, do not."""
        code = map(inspect.getsource, (sound, voices, sys.modules[__name__]))
        return "".join(code) + f"{self.sizes} {self.dropout} {self.without}"

    def load(self) -> None:
        """Read the official training split; five takes of each speaker and digit are held out."""
        known = [one for one in fsdd.recordings("train") if one.speaker != self.without]
        self.use(
            [one for one in known if one.index not in VALIDATION_TAKES],
            [one for one in known if one.index in VALIDATION_TAKES],
        )

    def use(self, train: Sequence[Recording], held: Sequence[Recording]) -> Self:
        """Train on these recordings and validate on those."""
        self._train, self._held, self._ear = list(train), list(held), Ear()
        rng = np.random.default_rng(0)
        self._ear.measure([vary([one], self.variety, rng).sound for one in self._train[::5]])
        return self

    def network(self) -> nn.Module:
        """Return both layers, the features' means and deviations set from the training part."""
        network = SpokenDigitNetwork(self.sizes, self.dropout)
        network.ear.load_state_dict(self._ear.state_dict())
        return network

    def steps(self) -> int:
        """Return the number of batches, the last ones smaller."""
        return -(-len(self._train) // BATCH)

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield log-mel [batch, time, 80], targets, weights [batch, time] and last frames [batch]."""
        order = rng.permutation(len(self._train))
        for start in range(0, len(order), POOL):
            examples = [self._draw(i, rng) for i in order[start : start + POOL]]
            examples.sort(key=lambda example: len(example.targets))
            batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
            for i in rng.permutation(len(batches)):
                sound, *answers = collate(batches[i])
                yield voices.heard(self._ear, sound, self.variety, rng), *answers

    def _draw(self, i: int, rng: np.random.Generator) -> Example:
        """Vary one recording; one time in four another one comes before it."""
        first = [self._train[int(rng.integers(len(self._train)))]] if rng.random() < 0.25 else []
        return vary([*first, self._train[i]], self.variety, rng)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy of both layers, weighted by frame, and of the last answer."""
        assert isinstance(network, SpokenDigitNetwork)
        steps, targets, weights, last = batch
        heard, answer, _, _ = network.listen(steps, network.initial_state(len(steps)))
        weights = weights / weights.sum()
        rows = torch.arange(len(steps))
        return (
            (weights * F.cross_entropy(heard.transpose(1, 2), targets, reduction="none")).sum()
            + (weights * F.cross_entropy(answer.transpose(1, 2), targets, reduction="none")).sum()
            + F.cross_entropy(answer[rows, last], targets[rows, last])
        )

    def validate(self, network: nn.Module) -> float:
        """Return the part of the held-out recordings whose last running answer is wrong."""
        assert isinstance(network, SpokenDigitNetwork)
        by_length: dict[int, list[Recording]] = {}
        for one in self._held:
            by_length.setdefault(len(one.pcm) // STEP * STEP, []).append(one)
        wrong = 0
        for samples, some in by_length.items():
            pcm = torch.from_numpy(np.stack([one.pcm[:samples] for one in some]))
            (_, answer), _ = network(pcm, network.initial_state(len(some)))
            wrong += sum(int(a) != one.digit for a, one in zip(answer[:, -1].argmax(1), some, strict=True))
        return wrong / len(self._held)

    def candidate(self, network: nn.Module, seed: int) -> Candidate:
        """Build the ONNX file, and synthetic sound to check it with."""
        assert isinstance(network, SpokenDigitNetwork)
        described = self.manifest()

        def reference(chunks: Sequence[AnyArray]) -> list[Tensors]:
            state, outputs = network.initial_state(1), []
            for chunk in chunks:
                with torch.no_grad():
                    (heard, answer), state = network(torch.from_numpy(chunk)[None], state)
                outputs.append({"log_probabilities": heard[0].numpy(), "answer": answer[0].numpy()})
            return outputs

        return Candidate(
            manifest=described,
            model=build(exported(network), self.sizes, described),
            reference=reference,
            golden=np.split(tones(seed), np.cumsum([160, 100, 60, 500, 1, 799, 3200, 40])),
            probe=tones(seed + 1, seconds=8.0),
            tolerance=1e-3,
            golden_tolerance=1e-2,
            parameters=count(network),
            card=self.card,
        )

    def manifest(self) -> Manifest:
        """Describe the model."""
        layers = [
            s
            for name, size in self.sizes.layers
            for s in sound_graph.layer_states(name, self.sizes.cell, size)
        ]
        return Manifest.model_validate(
            {
                "format": 1,
                "name": self.name,
                "description": self.description,
                "licence": fsdd.LICENCE,
                "inputs": [sound_graph.PCM],
                "states": [sound_graph.OVERLAP_STATE, *layers],
                "outputs": [
                    sound_graph.log_probabilities(name, LABELS) for name in ("log_probabilities", "answer")
                ],
                "max_batch": 64,
                "max_frames": 32,
            }
        )

    def answers(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Answers:
        """Hear every test recording; what counts is the running answer after its last whole 20 ms."""
        recordings = self._recordings()
        return _answers(recordings, streamed(session, manifest, recordings)["answer"])

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Accuracy of the last running answer, each recording fed in chunks of 20 ms from silence."""
        named = "FSDD v1.0.10, official split: takes 0 to 4"
        if self.without is not None:
            named = f"FSDD v1.0.10, all recordings of {self.without}, who was left out of training"
        recordings = self._recordings()
        last = streamed(session, manifest, recordings)
        heard = _answers(recordings, last["log_probabilities"])
        return {
            **_answers(recordings, last["answer"]).figures(
                f"{named}; the running answer after the last whole 20 ms, fed 20 ms at a time"
            ),
            "accuracy_of_last_log_probabilities": heard.figures("")["value"],
        }

    def _recordings(self) -> list[Recording]:
        """Return the test part: the official one, or all of the speaker who was left out."""
        if self.without is None:
            return fsdd.recordings("test")
        everything = [*fsdd.recordings("test"), *fsdd.recordings("train")]
        return [one for one in everything if one.speaker == self.without]


def _answers(recordings: Sequence[Recording], said: NDArray[np.int64]) -> Answers:
    return Answers(np.array([one.digit for one in recordings]), said, LABELS)


def streamed(
    session: onnxruntime.InferenceSession, manifest: Manifest, recordings: Sequence[Recording]
) -> dict[str, NDArray[np.int64]]:
    """Return each output's last label of each recording, all fed 20 ms at a time from silence."""
    last = {output.name: np.zeros(len(recordings), np.int64) for output in manifest.outputs}
    with progress(f"{manifest.name}: test", len(recordings)) as bar:
        for first in range(0, len(recordings), manifest.max_batch):
            rows = range(first, min(first + manifest.max_batch, len(recordings)))
            states = {row: initial(manifest) for row in rows}
            bar.update(len(rows))
            for start in range(0, max(len(recordings[row].pcm) for row in rows) - STEP + 1, STEP):
                live = [row for row in rows if start + STEP <= len(recordings[row].pcm)]
                chunks = [recordings[row].pcm[start : start + STEP] for row in live]
                results = turn(session, manifest, chunks, [states[row] for row in live])
                for row, (outputs, after) in zip(live, results, strict=True):
                    states[row] = after
                    for name, value in outputs.items():
                        last[name][row] = value[-1].argmax()
    return last


def build(weights: Mapping[str, Array], sizes: Sizes, described: Manifest) -> bytes:
    """Return the ONNX file for the weights of a `SpokenDigitNetwork`, with its manifest inside."""
    graph = Graph(described.name)
    for state in described.states:
        graph.input(state.input, state.dtype, state.shape)
    graph.input("pcm", "int16", ["batch", "samples"])
    graph.input("lengths", "int32", ["batch"])
    steps, lengths = sound_graph.add_steps(graph, sound_graph.part(weights, "ear"))
    hidden = steps
    for (layer, _), output in zip(sizes.layers, described.outputs, strict=True):
        part = sound_graph.part(weights, layer)
        hidden = sound_graph.add_layer(graph, layer, sizes.cell, part, hidden, lengths)
        sound_graph.add_head(graph, hidden, sound_graph.part(weights, f"{layer}_head"), output.name)
    for output in described.outputs:
        graph.output(output.name, output.dtype, output.shape)
    for state in described.states:
        graph.output(state.output, state.dtype, state.shape)
    return graph.model({METADATA_KEY: described.to_json()})
