"""Metrics that average over classes: macro F1 and balanced accuracy."""

from __future__ import annotations

import numpy as np

from meerkat.tasks.metrics.base import Sums
from meerkat.tasks.objective import Predictions

__all__ = ["BalancedAccuracy", "MacroF1"]


class _ByClass:
    """Sums: hits of each class, then its examples, then how often it was predicted."""

    percent, lower_is_better, of_classes = True, False, True

    def sums(self, found: Predictions) -> Sums:
        hits = found.labels[found.labels == found.predicted]
        counts = [
            np.bincount(which, minlength=found.classes)
            for which in (hits, found.labels, found.predicted)
        ]
        return np.concatenate(counts).astype(np.float64)

    def is_possible(self, sums: Sums, examples: int, classes: int) -> bool:
        if len(sums) != 3 * classes or (sums < 0).any() or (sums != np.floor(sums)).any():
            return False
        hits, held, predicted = sums.reshape(3, classes)
        within = (hits <= np.minimum(held, predicted)).all()
        return bool(within and held.sum() == examples and predicted.sum() == examples)


class MacroF1(_ByClass):
    """Unweighted mean of the classes' F1; a class that is neither there nor predicted counts 0."""

    title = "macro F1"

    def value(self, sums: Sums, examples: int) -> float:
        hits, held, predicted = sums.reshape(3, -1)
        both = held + predicted
        return float(np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0).mean())


class BalancedAccuracy(_ByClass):
    """Unweighted mean of the recall of the classes that there are examples of."""

    title = "balanced accuracy"

    def value(self, sums: Sums, examples: int) -> float:
        hits, held, _ = sums.reshape(3, -1)
        return float((hits[held > 0] / held[held > 0]).mean())
