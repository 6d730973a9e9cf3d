"""Accuracy: the share of examples whose class is predicted."""

from __future__ import annotations

import numpy as np

from meerkat.tasks.metrics.base import Sums
from meerkat.tasks.objective import Predictions

__all__ = ["Accuracy"]


class Accuracy:
    """Hits by examples."""

    title, percent, lower_is_better, of_classes = "accuracy", True, False, True

    def sums(self, found: Predictions) -> Sums:
        return np.array([np.count_nonzero(found.labels == found.predicted)], np.float64)

    def value(self, sums: Sums, examples: int) -> float:
        return float(sums[0]) / examples

    def is_possible(self, sums: Sums, examples: int, classes: int) -> bool:
        return len(sums) == 1 and 0 <= sums[0] <= examples and sums[0] == np.floor(sums[0])
