"""The weighted median: less than half of the weight cannot move it beyond the others' values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

__all__ = ["Median"]


@dataclass(frozen=True)
class Median:
    """The coefficient at which half of the weight is reached, of all clients sorted by coefficient.

    Where it is reached exactly between two clients, their mean.
    """

    def __call__(
        self, coefficients: Float64[np.ndarray, " K"], weights: Float64[np.ndarray, " K"]
    ) -> float:
        order = np.argsort(coefficients, kind="stable")
        values, reached = coefficients[order], np.cumsum(weights[order])
        half = reached[-1] / 2
        place = int(np.searchsorted(reached, half * (1 - 1e-12)))
        if abs(reached[place] - half) <= 1e-12 and place + 1 < len(values):
            return float((values[place] + values[place + 1]) / 2)
        return float(values[place])
