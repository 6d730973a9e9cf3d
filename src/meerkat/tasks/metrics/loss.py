"""The mean loss of an example."""

from __future__ import annotations

import math

import numpy as np

from meerkat.tasks.metrics.base import Sums
from meerkat.tasks.objective import Predictions

__all__ = ["Loss"]

_LARGEST = 1e30
"""A mean loss is no larger, so that sums over clients stay finite."""


class Loss:
    """Mean of the examples' losses, in nats."""

    title, percent, lower_is_better, of_classes = "loss", False, True, False

    def sums(self, found: Predictions) -> Sums:
        return np.array([math.fsum(found.losses.tolist())])

    def value(self, sums: Sums, examples: int) -> float:
        return float(sums[0]) / examples

    def is_possible(self, sums: Sums, examples: int, classes: int) -> bool:
        return len(sums) == 1 and 0 <= sums[0] <= _LARGEST * examples
