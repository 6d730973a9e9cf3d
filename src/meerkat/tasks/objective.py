"""The interface of an objective: what a step and an evaluation need of a model. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64

__all__ = [
    "CopyingObjective",
    "DifferentiableObjective",
    "Objective",
    "Predictions",
    "ReferringObjective",
]


@dataclass(frozen=True)
class Predictions:
    """Losses and predicted classes of S examples."""

    losses: Float64[np.ndarray, " S"]
    labels: Int64[np.ndarray, " S"]
    """The true classes; 0 for free text."""
    predicted: Int64[np.ndarray, " S"]
    classes: int
    """Answers to choose from: 1 for free text, which has no classes, 2 for pairs."""
    margins: Float64[np.ndarray, " S"] | None = None
    """Score of the right answer less the highest of the others; None where there is one answer."""
    written: tuple[str, ...] = ()
    """The answers that the model writes, where a metric compares them."""
    references: tuple[str, ...] = ()
    """What it should have written."""


@runtime_checkable
class Objective(Protocol):
    """A loss over examples at the weights as they are in the model.

    Losses come one an example: their mean is taken once, by whoever needs it.
    """

    def losses(self, examples: Sequence[Any]) -> Float64[np.ndarray, " S"]:
        """The loss of each example."""

    def predict(self, examples: Sequence[Any]) -> Predictions:
        """Losses and answers of each example."""


@runtime_checkable
class DifferentiableObjective(Objective, Protocol):
    """An objective whose losses can be differentiated, which exact estimators need."""

    def losses_with_graph(self, examples: Sequence[Any]) -> Iterator[Any]:
        """The losses of some examples after the other, as tensors that autograd can go through.

        Each is computed when it is asked for, so the caller says in which mode.
        """


@runtime_checkable
class CopyingObjective(Objective, Protocol):
    """An objective that takes a batch several times in one pass, for a space that overlays."""

    def copies_per_pass(self, examples: Sequence[Any]) -> int:
        """How many copies of a batch may go through one pass; 1 where that is no use."""

    def losses_of_copies(
        self, examples: Sequence[Any], copies: int
    ) -> Float64[np.ndarray, "copies S"]:
        """The losses of so many copies, which are equally long runs of the pass's tokens."""


@runtime_checkable
class ReferringObjective(Objective, Protocol):
    """An objective whose losses may compare with the model as it was loaded."""

    def unreferred(self, examples: Sequence[Any]) -> list[Any]:
        """Those that losses cannot be had of until `refer` has seen them."""

    def refer(self, examples: Sequence[Any]) -> None:
        """Keep what their losses need of the weights as they are: those that were loaded."""
