"""The network of `sentiment`: an LSTM that reads, beside a count of words and of pairs of words.

The count takes sides as the naive Bayes of Wang and Manning 2012 does ("Baselines and bigrams"): each word
and each pair of neighbours adds the logarithm of how much more often it stands in favourable sentences. The
LSTM's (Hochreiter and Schmidhuber 1997) own opinion is a linear map of its mean output over all words so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Words = NDArray[np.int64]  # ids of hashed words, [words]
Ratios = NDArray[np.float32]

PAIR_FACTOR = 1_000_003  # a prime: hashes (word before, word) as before * factor + word
UNIT = 2.0**-20  # what is added up along time is rounded to it, so that sums of integers are exact


@dataclass(frozen=True)
class Lexicon:
    """What is counted in the training part before the network is trained.

    `rows` int64 [buckets]: the word's vector, 0 for words that are rare or unknown; `single` [buckets] and
    `pair` [pair buckets]: log ratios, multiples of UNIT.
    """

    rows: NDArray[np.int64]
    single: Ratios
    pair: Ratios

    @classmethod
    def count(
        cls,
        sentences: Sequence[Words],
        favourable: NDArray[np.bool_],
        *,
        buckets: int,
        pairs: int,
        least: int,
    ) -> "Lexicon":
        """Count in hashed sentences; words seen less than `least` times share the vector 0."""
        seen = np.bincount(np.concatenate(sentences), minlength=buckets) >= least
        hashed = [pair_ids(words, pairs) for words in sentences]
        return cls(
            np.where(seen, np.cumsum(seen), 0),
            _log_ratios(sentences, favourable, buckets),
            _log_ratios(hashed, favourable, pairs),
        )

    @property
    def vectors(self) -> int:
        """How many vectors the network has to learn."""
        return int(self.rows.max()) + 1


def _log_ratios(sentences: Sequence[Words], favourable: NDArray[np.bool_], size: int) -> Ratios:
    """Return ln(p / q), p and q being the shares of each id in favourable and other sentences, plus one."""
    counts = np.ones((2, size))
    for ids, side in zip(sentences, favourable, strict=True):
        counts[int(side), np.unique(ids)] += 1
    against, for_ = counts / counts.sum(1, keepdims=True)
    rounded: Ratios = (np.round(np.log(for_ / against) / UNIT) * UNIT).astype(np.float32)
    return rounded


def pair_ids(words: Words, pairs: int) -> Words:
    """Return a hash of each word with the one before it; before the first there is none."""
    before = np.concatenate([[0], words[:-1] + 1])
    return (before * PAIR_FACTOR + words) % pairs


@dataclass
class SentimentState:
    """What one word leaves for the next.

    `before` int64 [batch, 1]: the last word's id + 1, 0 before the first; `sums` int64 [batch, 2 + hidden],
    in UNITs: words so far, the count's log odds, the LSTM's outputs; `memory`: h and c, [1, batch, hidden].
    """

    before: Tensor
    sums: Tensor
    memory: tuple[Tensor, Tensor]


class SentimentNetwork(nn.Module):
    """Word ids int64 [batch, time] to log-probabilities [batch, time, 2]: unfavourable, favourable."""

    rows: Tensor
    single: Tensor
    pair: Tensor

    def __init__(
        self, lexicon: Lexicon, *, vector: int, hidden: int, weights: tuple[float, float], word_dropout: float
    ) -> None:
        """`weights` are the count's: of words and of pairs, the LSTM's opinion weighing 1."""
        super().__init__()
        self.register_buffer("rows", torch.from_numpy(lexicon.rows))
        for name, weight in zip(("single", "pair"), weights, strict=True):
            self.register_buffer(name, torch.from_numpy(getattr(lexicon, name) * np.float32(weight)))
        self.word_dropout = word_dropout
        self.embedding = nn.Embedding(lexicon.vectors, vector)
        self.lstm = nn.LSTM(vector, hidden, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(hidden, 2)
        nn.init.normal_(self.embedding.weight, 0, 0.3)

    def initial_state(self, batch: int) -> SentimentState:
        """Return the state before the first word: zeros."""
        hidden = self.lstm.hidden_size
        memory = torch.zeros(1, batch, hidden), torch.zeros(1, batch, hidden)
        before, sums = (torch.zeros(batch, size, dtype=torch.int64) for size in (1, 2 + hidden))
        return SentimentState(before, sums, memory)

    def read(self, words: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the LSTM's outputs [batch, time, hidden] and its new state; in training, drop words."""
        rows = self.rows[words]
        if self.training:
            rows = rows.masked_fill(torch.rand(rows.shape) < self.word_dropout, 0)
        hidden, memory = self.lstm(self.dropout(self.embedding(rows)), memory)
        return hidden, memory

    def opinion(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Return what the LSTM alone says after each row's last word, log odds [batch, 2]: for training."""
        hidden, _ = self.read(words, self.initial_state(len(words)).memory)
        inside = torch.arange(words.shape[1]) < lengths[:, None]
        mean = (hidden * inside[..., None]).sum(1) / lengths[:, None]
        answer: Tensor = self.head(self.dropout(mean))
        return answer

    def forward(self, words: Tensor, state: SentimentState) -> tuple[Tensor, SentimentState]:
        """Return the running answer after each word, and the state after the last one."""
        hidden, memory = self.read(words, state.memory)
        before = torch.cat([state.before, words[:, :-1] + 1], 1)
        votes = (
            self.single[words].double() + self.pair[(before * PAIR_FACTOR + words) % len(self.pair)].double()
        )
        news = torch.cat([torch.full_like(votes, UNIT)[..., None], votes[..., None], hidden.double()], -1)
        sums = state.sums[:, None] + torch.round(news / UNIT).long().cumsum(1)
        count = sums[..., :1].double()
        mean = (sums[..., 2:].double() * UNIT / count).float()
        side = (sums[..., 1:2].double() * (UNIT / 2)).float()
        answer = (self.head(mean) + torch.cat([-side, side], -1)) / 2
        return F.log_softmax(answer, -1), SentimentState(words[:, -1:] + 1, sums[:, -1], memory)
