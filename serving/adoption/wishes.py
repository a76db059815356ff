"""What the user says of a file; it goes before every guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tenuto.serving.manifest import Exact, Multiple

Chunk = Multiple | Exact | Literal["free"]
Axis = int | None  # None: it has none


@dataclass(frozen=True)
class Wishes:
    """By the names of the graph's tensors."""

    time_axes: dict[str, Axis] = field(default_factory=dict)
    batch_axes: dict[str, Axis] = field(default_factory=dict)
    chunks: dict[str, Chunk] = field(default_factory=dict)
    left_context: dict[str, int] = field(default_factory=dict)
    lengths: dict[tuple[str, int], int] = field(default_factory=dict)  # of (tensor, axis)
    constants: dict[str, tuple[float, ...]] = field(default_factory=dict)  # the value, then others allowed
    states: dict[str, str] = field(default_factory=dict)  # input -> output
    no_states: frozenset[str] = frozenset()
    controls: dict[str, str] = field(default_factory=dict)  # input -> kind

    def tensors(self) -> set[str]:
        """All that are named."""
        named = {*self.time_axes, *self.batch_axes, *self.chunks, *self.left_context, *self.constants}
        named |= {tensor for tensor, _ in self.lengths}
        return named | {*self.states, *self.states.values(), *self.no_states, *self.controls}


@dataclass(frozen=True)
class Guess:
    """What was taken to hold of `subject`, and why."""

    subject: str
    says: str
    reason: str


@dataclass(frozen=True)
class Question:
    """What the file does not tell, and the option that answers it. `needed`: there is no manifest without."""

    subject: str
    asks: str
    option: str
    needed: bool


class Notes:
    """Guesses and questions, in the order in which they came up."""

    def __init__(self) -> None:
        self.guesses: list[Guess] = []
        self.questions: list[Question] = []

    def guess(self, subject: str, says: str, reason: str) -> None:
        self.guesses.append(Guess(subject, says, reason))

    def ask(self, subject: str, asks: str, option: str, needed: bool = True) -> None:
        question = Question(subject, asks, option, needed)
        if question not in self.questions:
            self.questions.append(question)

    @property
    def needed(self) -> list[Question]:
        return [question for question in self.questions if question.needed]
