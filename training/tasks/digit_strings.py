"""Two LSTMs that write down spoken digits as they come: `tenuto train digit-strings`.

Many to many: for each 20 ms of sound a digit or a blank (connectionist temporal classification, Graves 2006).
Nobody says where in the sound a digit is; the training finds that out. Streams for training go on from batch
to batch with their states (truncated backpropagation through time), so that none of them is ever new: a
stream may run for hours.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.serving.manifest import METADATA_KEY, Manifest
from tenuto.training import sound, sound_graph, strings, voices
from tenuto.training.candidate import AnyArray, Candidate, Tensors
from tenuto.training.datasets import fsdd
from tenuto.training.datasets.fsdd import RATE_HZ, Recording
from tenuto.training.graph import Array, Graph
from tenuto.training.progress import progress
from tenuto.training.recipe import Recipe
from tenuto.training.recurrent import State
from tenuto.training.sound import BANDS, OVERLAP, STEP, Ear, tones
from tenuto.training.spoken import DATA as SPLIT
from tenuto.training.spoken import VALIDATION_TAKES, remember, run_layer
from tenuto.training.stepper import initial, turn
from tenuto.training.strings import Stream, edit_distance, segment
from tenuto.training.task import Batch, Figures, Task
from tenuto.training.weights import count, exported

STREAMS = 32  # side by side in training
SEGMENTS = 60  # of each stream in an epoch
SEGMENT_STEPS = (100, 200)  # of 20 ms: the shortest and the longest segment
SIZES = (("hear", 160), ("decide", 64))
BLANK = 0
LABELS = ["", *(str(digit) for digit in range(10))]
WINDOWS = {"10 s": (10, 60), "1 min": (60, 120), "10 min": (600, 660)}  # of a stream's age, in seconds
TEST_STREAMS = 24


class DigitStringsNetwork(nn.Module):
    """PCM int16 [batch, samples] to log-probabilities of a digit beginning to be known in each 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.ear = Ear()
        (_, hear), (_, decide) = SIZES
        self.hear = nn.LSTM(2 * BANDS, hear, batch_first=True)
        self.decide = nn.LSTM(hear, decide, batch_first=True)
        self.head = nn.Linear(decide, len(LABELS))
        self.dropout = nn.Dropout(0.1)
        self.hint = nn.Linear(hear, len(LABELS) - 1)  # for training alone: what the first layer hears
        for layer in (self.hear, self.decide):
            remember(layer)
        with torch.no_grad():
            self.head.bias[BLANK] += 3  # most frames are blank, so begin there

    def initial_state(self, batch: int) -> State:
        """Return the state before the first sound: 120 samples of silence, h and c of both layers."""
        states = [torch.zeros(1, batch, size) for _, size in SIZES for _ in "hc"]
        return torch.zeros(batch, OVERLAP), *states

    def listen(self, steps: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Run both layers over log-mel [batch, time, 80]; `state` has h and c of both.

        Returns log-probabilities [batch, time, 11], what the first layer gave [batch, time, 160], new state.
        """
        heard, hear_state = run_layer(self.hear, steps, state[:2])
        decided, decide_state = run_layer(self.decide, self.dropout(heard), state[2:])
        said = F.log_softmax(self.head(self.dropout(decided)), -1)
        return said, heard, (*hear_state, *decide_state)

    def forward(self, pcm: Tensor, state: State) -> tuple[Tensor, State]:
        """Hear int16 [batch, samples], samples a multiple of 160, all rows of that length.

        Returns float32 [batch, samples / 160, 11], the blank first, and the state for the next call.
        """
        sound = torch.cat([state[0], pcm.float() / 32768], dim=1)
        said, _, after = self.listen(self.ear(sound), state[1:])
        return said, (sound[:, -OVERLAP:], *after)


class DigitStringsTask(Task):
    """Strings of recordings of the Free Spoken Digit Dataset."""

    name = "digit-strings"
    recipe = Recipe(epochs=60, learning_rate=6e-3)
    data = SPLIT | {
        "split": "official: takes 0 to 4 of each speaker and digit to test; of the others, 5 to 9 for "
        "validation and 10 to 49 to train on. Strings are made of one part's recordings alone"
    }
    card = """
Writes down English digits spoken one after the other, with pauses of up to two seconds or none, for as
long as the stream lasts. `digit` is what a client needs: for each 20 ms the digit that is written now,
or -1. It is the greedy reading of `log_probabilities` (a label that is neither the blank nor the one
before it), with the label before kept in the sequence's state, so that chunks may be cut anywhere.

The test is made of recordings that took no part in training, but of the same six speakers: a voice that
it never heard will fare worse (see `spoken-digits`). It is a demonstration of streams that live for
hours, on words that lie 0 to 75 dB over white noise. `metrics.json` has how soon a digit is written after its
word began and ended. Words that are no digits are written as digits.
"""

    def source(self) -> str:
        """Return what decides the weights: the words for the card, and how it is tested, do not."""
        mine = (DigitStringsNetwork, DigitStringsTask.use, DigitStringsTask.batches, DigitStringsTask.loss)
        code = [inspect.getsource(thing) for thing in (sound, voices, strings, *mine)]
        return "".join(code) + f"{STREAMS} {SEGMENTS} {SEGMENT_STEPS} {SIZES}"

    def load(self) -> None:
        """Read the official training split; five takes of each speaker and digit are held out."""
        known = fsdd.recordings("train")
        self.use(
            [one for one in known if one.index not in VALIDATION_TAKES],
            [one for one in known if one.index in VALIDATION_TAKES],
        )

    def use(self, train: Sequence[Recording], held: Sequence[Recording]) -> Self:
        """Make strings to train on of these recordings, and to validate with of those."""
        self._train, self._ear = list(train), Ear()
        rng = np.random.default_rng(0)
        self._ear.measure([segment(self._train, 8 * RATE_HZ, rng).sound for _ in range(40)])
        streams = [Stream.draw(held, 30, rng) for _ in range(16)]
        sound = [one.between(0, 31 * RATE_HZ // STEP * STEP, rng) for one in streams]
        self._held = torch.from_numpy(np.stack(sound)), [[w.digit for w in one.words] for one in streams]
        return self

    def network(self) -> nn.Module:
        """Return both layers, the features' means and deviations set from the training part."""
        network = DigitStringsNetwork()
        network.ear.load_state_dict(self._ear.state_dict())
        return network

    def steps(self) -> int:
        """Return the number of segments."""
        return SEGMENTS

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield segments of the same streams, one after the other.

        Log-mel [streams, time, 80], digits [streams, most], how many [streams], whether the streams begin
        [streams], the digit at each step and how much of it was said [streams, time].
        """
        before = np.zeros((STREAMS, OVERLAP), np.float32)
        for number in range(SEGMENTS):
            samples = int(rng.integers(*SEGMENT_STEPS)) * STEP
            drawn = [segment(self._train, samples, rng) for _ in range(STREAMS)]
            sound = np.concatenate([before, np.stack([one.sound for one in drawn])], axis=1)
            before = sound[:, -OVERLAP:]
            lengths = torch.tensor([len(one.spans) for one in drawn])
            digits = torch.zeros(STREAMS, max(1, int(lengths.max())), dtype=torch.int64)
            for row, one in zip(digits, drawn, strict=True):
                row[: len(one.spans)] = torch.tensor(one.digits, dtype=torch.int64) + 1
            now, heard = (
                torch.from_numpy(np.stack(some))
                for some in zip(*(one.frames() for one in drawn), strict=True)
            )
            steps = voices.heard(self._ear, torch.from_numpy(sound), voices.FAMILIAR, rng)
            yield steps, digits, lengths, torch.full((STREAMS,), number == 0), now, heard

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the negative log-likelihood a digit; goes on from the last segment's states.

        Added is how well the first layer knows what is being said: without that hint it takes hundreds of
        steps until anything but blanks is written.
        """
        assert isinstance(network, DigitStringsNetwork)
        steps, digits, lengths, begins, now, said_of_it = batch
        if begins.all():
            self._carried = network.initial_state(len(steps))[1:]
        said, heard, after = network.listen(steps, self._carried)
        self._carried = tuple(state.detach() for state in after)
        times = torch.full((len(steps),), steps.shape[1])
        loss = F.ctc_loss(said.transpose(0, 1), digits, times, lengths, BLANK, "sum")
        hint = F.cross_entropy(network.hint(heard).transpose(1, 2), now, reduction="none")
        weights = said_of_it**2
        return loss / lengths.sum().clamp(min=1) + (weights * hint).sum() / weights.sum().clamp(min=1)

    def validate(self, network: nn.Module) -> float:
        """Return the digit error rate of 16 streams of 30 seconds."""
        assert isinstance(network, DigitStringsNetwork)
        pcm, truth = self._held
        said, _ = network(pcm, network.initial_state(len(pcm)))
        pairs = list(zip(truth, said.argmax(-1).numpy(), strict=True))
        wrong = sum(edit_distance(digits, [d for d in emitted(row) if d >= 0]) for digits, row in pairs)
        return wrong / sum(len(digits) for digits in truth)

    def candidate(self, network: nn.Module, seed: int) -> Candidate:
        """Build the ONNX file, and synthetic sound to check it with."""
        assert isinstance(network, DigitStringsNetwork)
        described = manifest()

        def reference(chunks: Sequence[AnyArray]) -> list[Tensors]:
            state, outputs, last = network.initial_state(1), [], BLANK
            for chunk in chunks:
                with torch.no_grad():
                    said, state = network(torch.from_numpy(chunk)[None], state)
                symbols = said[0].argmax(-1).numpy()
                outputs.append({"digit": emitted(symbols, last), "log_probabilities": said[0].numpy()})
                last = int(symbols[-1])
            return outputs

        return Candidate(
            manifest=described,
            model=build(exported(network), described),
            reference=reference,
            golden=np.split(tones(seed), np.cumsum([160, 100, 60, 500, 1, 799, 3200, 40])),
            probe=tones(seed + 1, seconds=8.0),
            tolerance=1e-3,
            golden_tolerance=1e-2,
            parameters=count(network) - count(network.hint),
            card=self.card,
        )

    def test(self, session: onnxruntime.InferenceSession, manifest: Manifest) -> Figures:
        """Digit error rate on 24 streams of test recordings, at three ages of the streams."""
        found = measure(session, manifest, TEST_STREAMS, WINDOWS)
        wrong, digits = (sum(one[key] for one in found["ages"].values()) for key in ("wrong", "digits"))
        return {
            "metric": "digit error rate",
            "value": wrong / digits,
            "n": digits,
            "test_set": f"{TEST_STREAMS} streams of FSDD v1.0.10's test recordings (takes 0 to 4, drawn with "
            "replacement), pauses of 0 to 2 s, levels -10 to +6 dB, white noise at -80 to -55 dB of "
            "full scale; 50 or 60 s of each after 10 s, 1 min and 10 min of one sequence",
            **found,
        }


def emitted(symbols: NDArray[np.int64], last: int = BLANK) -> NDArray[np.int64]:
    """Return the digit that is written at each frame, or -1: a label that is not blank nor the one before."""
    before = np.concatenate([[last], symbols[:-1]])
    return np.where((symbols != BLANK) & (symbols != before), symbols - 1, -1)


def measure(
    session: onnxruntime.InferenceSession,
    manifest: Manifest,
    streams: int,
    windows: Mapping[str, tuple[int, int]],
    seed: int = 0,
) -> dict[str, Any]:
    """Return errors in windows of the streams' age, in seconds, and how soon digits come.

    Counted are the words that begin in the window; what is written from the first one's beginning to that of
    the first word after the window is compared to them by edit distance.
    """
    rng = np.random.default_rng(seed)
    recordings = fsdd.recordings("test")
    seconds = max(stop for _, stop in windows.values()) + 5
    drawn = [Stream.draw(recordings, seconds, rng) for _ in range(streams)]
    said = _listen(session, manifest, drawn, int(seconds) * RATE_HZ, rng)
    ages = {label: _errors(drawn, said, *window) for label, window in windows.items()}
    return {"ages": ages, **_latencies(drawn, said)}


Said = list[tuple[int, int]]  # the sample at which a digit was written, and the digit


def _listen(
    session: onnxruntime.InferenceSession,
    manifest: Manifest,
    streams: Sequence[Stream],
    samples: int,
    rng: np.random.Generator,
) -> list[Said]:
    states = [initial(manifest) for _ in streams]
    said: list[Said] = [[] for _ in streams]
    block = manifest.max_frames * STEP
    with progress(f"{manifest.name}: test", samples // block) as bar:
        for start in range(0, samples - block + 1, block):
            chunks = [stream.between(start, start + block, rng) for stream in streams]
            rows = turn(session, manifest, chunks, states)
            states = [after for _, after in rows]
            for mine, (outputs, _) in zip(said, rows, strict=True):
                for frame in np.flatnonzero(outputs["digit"] >= 0):
                    mine.append((start + (int(frame) + 1) * STEP, int(outputs["digit"][frame])))
            bar.update()
    return said


def _errors(streams: Sequence[Stream], said: Sequence[Said], start: int, stop: int) -> dict[str, Any]:
    wrong = digits = 0
    for stream, mine in zip(streams, said, strict=True):
        words = [w for w in stream.words if start * RATE_HZ <= w.start < stop * RATE_HZ]
        after = min(w.start for w in stream.words if w.start >= stop * RATE_HZ)
        got = [digit for at, digit in mine if words[0].start <= at < after]
        wrong += edit_distance([w.digit for w in words], got)
        digits += len(words)
    rate = wrong / digits
    return {
        "digit_error_rate": rate,
        "wrong": wrong,
        "digits": digits,
        "standard_error": float(np.sqrt(rate * (1 - rate) / digits)),
    }


def _latencies(streams: Sequence[Stream], said: Sequence[Said]) -> dict[str, Any]:
    """Return milliseconds from words' beginnings and ends to their digits, if before the next word ended."""
    begins, ends = [], []
    for stream, mine in zip(streams, said, strict=True):
        times, at = np.array([at for at, _ in mine]), 0
        for word, following in zip(stream.words, stream.words[1:], strict=False):
            at = int(np.searchsorted(times, word.start, "right"))
            found = [t for t, d in mine[at : at + 3] if d == word.digit and t < following.stop]
            if found:
                begins.append((found[0] - word.start) * 1000 / RATE_HZ)
                ends.append((found[0] - word.stop) * 1000 / RATE_HZ)
    return {
        f"milliseconds_after_its_{name}": {
            "median": float(np.median(values)),
            "90_percent": float(np.percentile(values, 90)),
        }
        for name, values in (("beginning", begins), ("end", ends))
    }


def manifest() -> Manifest:
    """Describe the model."""
    timed = {"batch_axis": 0, "time_axis": 1, "stride": STEP}
    layers = [state for name, size in SIZES for state in sound_graph.layer_states(name, "lstm", size)]
    last = {"input": "last_label", "output": "last_label_next", "dtype": "int64", "shape": ["batch", 1]}
    return Manifest.model_validate(
        {
            "format": 1,
            "name": DigitStringsTask.name,
            "description": "Writes down spoken digits from 8 kHz sound as they come. For every 20 ms: "
            "digit, the one written now or -1; log_probabilities of a blank and ten digits.",
            "licence": fsdd.LICENCE,
            "inputs": [sound_graph.PCM],
            "states": [sound_graph.OVERLAP_STATE, *layers, last | {"batch_axis": 0, "init": "zeros"}],
            "outputs": [
                {"name": "digit", "dtype": "int64", "shape": ["batch", "frames"], **timed},
                sound_graph.log_probabilities("log_probabilities", LABELS),
            ],
            "max_batch": 64,
            "max_frames": 32,
        }
    )


def build(weights: Mapping[str, Array], described: Manifest) -> bytes:
    """Return the ONNX file for the weights of a `DigitStringsNetwork`, with its manifest inside."""
    graph = Graph(described.name)
    for state in described.states:
        graph.input(state.input, state.dtype, state.shape)
    graph.input("pcm", "int16", ["batch", "samples"])
    graph.input("lengths", "int32", ["batch"])
    hidden, lengths = sound_graph.add_steps(graph, sound_graph.part(weights, "ear"))
    for layer, _ in SIZES:
        part = sound_graph.part(weights, layer)
        hidden = sound_graph.add_layer(graph, layer, "lstm", part, hidden, lengths)
    sound_graph.add_head(graph, hidden, sound_graph.part(weights, "head"), "log_probabilities")
    _add_digit(graph, lengths)
    for output in described.outputs:
        graph.output(output.name, output.dtype, output.shape)
    for state in described.states:
        graph.output(state.output, state.dtype, state.shape)
    return graph.model({METADATA_KEY: described.to_json()})


def _add_digit(graph: Graph, lengths: str) -> None:
    """Add `digit`, int64 [batch, time], and the last label of each row's own end, int64 [batch, 1]."""
    node, ints = graph.node, graph.integers
    labels = node("ArgMax", ["log_probabilities"], "labels", axis=2, keepdims=0)
    known = node("Concat", ["last_label", labels], "labels_known", axis=1)
    before = node("Slice", [known, ints(0), ints(-1), ints(1)], "labels_before")
    same = node("Equal", [labels, before], "label_again")
    blank = node("Equal", [labels, ints(BLANK)], "label_blank")
    silent = node("Or", [same, blank], "nothing_new")
    digits = node("Sub", [labels, ints(1)], "digits_all")
    node("Where", [silent, ints(-1), digits], "digit")
    # `known` begins with the label before, so a row's last one is at its length.
    ends = node("Cast", [lengths], "label_ends", to=7)
    ends = node("Unsqueeze", [ends, ints(1, 2)], "label_ends_index")
    node("GatherND", [known, ends], "last_label_next", batch_dims=1)
