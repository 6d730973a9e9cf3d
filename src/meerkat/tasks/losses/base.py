"""The interface of a training loss: scores of a batch's answers → one number an example. No torch.

What a loss is given are tensors all the same; it computes by their methods alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

__all__ = ["Kind", "Scored", "TrainingLoss", "choices", "of_label"]

Kind = Literal["any", "answers", "classes", "pairs"]
"""What of a task a loss is for: anything, several answers to choose from, classes, or pairs."""


@dataclass(frozen=True)
class Scored:
    """Scores of the A answers of S examples."""

    scores: Any
    """Float32 (S, A): the mean log-probability of an answer's tokens, less a number that the
    answers of an example share where each of them is one token."""
    labels: Any
    """Int64 (S): which answer is right; 0 for free text, and in a pair, whose first is chosen."""
    lengths: Any | None = None
    """Float32 (S, A): tokens of each answer; for losses that compare."""
    reference: Any | None = None
    """As `scores`, at the weights as they were loaded; for losses that compare."""


@runtime_checkable
class TrainingLoss(Protocol):
    """What training makes small (docs/objectives.md).

    The loss of a batch is the mean over its examples, whatever an example's own number is.
    """

    @property
    def of(self) -> Kind:
        """Which tasks it is for."""

    @property
    def is_joint(self) -> bool:
        """Does an example's number depend on the others? Then it is given a batch as a whole."""

    @property
    def is_smooth(self) -> bool:
        """Has it a derivative by the scores?"""

    @property
    def compares(self) -> bool:
        """Does it need `Scored.reference`?"""

    def losses(self, batch: Scored) -> Any:
        """Float32 (S): the number of each example."""


class OfEach:
    """What most losses are: smooth, of each example by itself, at the weights as they are."""

    is_joint: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    @property
    def is_smooth(self) -> bool:
        return True


def choices(scores: Any, temperature: float) -> Any:
    """(S, A): how much each answer is chosen, softmax(scores / temperature).

    At temperature 0 it is 1 for the highest score, and 0 for the others.
    """
    if temperature:
        return (scores / temperature).softmax(1)
    best = scores.argmax(1, keepdim=True)
    return scores.new_zeros(scores.shape).scatter(1, best, 1.0)


def of_label(values: Any, labels: Any) -> Any:
    """(S): of (S, A) values those of the right answers."""
    return values.gather(1, labels[:, None]).squeeze(1)


def check_temperature(temperature: float) -> None:
    """Is it one that scores can be divided by, or 0?

    Raises:
        ValueError: It is negative.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature:g}; give 0 (not smoothed) or more")
