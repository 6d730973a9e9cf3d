"""The interface of a metric: sums over examples, and the value that follows from them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from meerkat.tasks.objective import Predictions

__all__ = ["Metric", "Sums"]

Sums = Float64[np.ndarray, " M"]
"""Statistics that add up over examples, and so over clients."""


@runtime_checkable
class Metric(Protocol):
    """A figure of how well a model does.

    A client sends sums and a server adds them, so a metric of all clients' held-out examples is the
    same as if they were in one place.
    """

    title: str
    """For people."""
    percent: bool
    """Does it lie between 0 and 1?"""
    lower_is_better: bool
    of_classes: bool
    """Is it about classes, which free text has none of?"""

    def sums(self, found: Predictions) -> Sums:
        """Its sums over some examples."""

    def value(self, sums: Sums, examples: int) -> float:
        """The metric of so many examples, at least one."""

    def is_possible(self, sums: Sums, examples: int, classes: int) -> bool:
        """Can any so many examples have these sums?"""
