"""Metrics of pairs: how often, and by how much, the chosen answer scores above the rejected one."""

from __future__ import annotations

import numpy as np

from meerkat.tasks.metrics.accuracy import Accuracy
from meerkat.tasks.metrics.base import Sums
from meerkat.tasks.objective import Predictions

__all__ = ["Margin", "PreferenceAccuracy"]

_LARGEST = 1e30
"""A mean margin is no larger, so that sums over clients stay finite."""


class PreferenceAccuracy(Accuracy):
    """Share of pairs whose chosen answer has the higher score, the mean log-probability of its
    tokens; of equal scores the first, that of the chosen one, counts as higher."""

    title, of_classes = "preference accuracy", False


class Margin:
    """Mean over pairs of the chosen answer's score less that of the rejected one, in nats a token.

    Its sums are those of the margins above zero, and of those below without their sign.
    """

    title, percent, lower_is_better, of_classes = "margin", False, False, False

    def sums(self, found: Predictions) -> Sums:
        if found.margins is None:
            raise ValueError("these predictions are not of several answers, so have no margins")
        return np.array([found.margins.clip(0).sum(), (-found.margins).clip(0).sum()])

    def value(self, sums: Sums, examples: int) -> float:
        return float(sums[0] - sums[1]) / examples

    def is_possible(self, sums: Sums, examples: int, classes: int) -> bool:
        return len(sums) == 2 and bool((sums >= 0).all() and (sums <= _LARGEST * examples).all())
