"""The interface of an aggregator: one coefficient from those of a round's clients."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

__all__ = ["Aggregator"]


@runtime_checkable
class Aggregator(Protocol):
    """Coefficients of several clients along one direction → one (method.md section 4, step 4)."""

    def __call__(
        self, coefficients: Float64[np.ndarray, " K"], weights: Float64[np.ndarray, " K"]
    ) -> float:
        """The aggregate of all clients of the round, sorted by client.

        Args:
            coefficients: g_k; 0 for a client that was stopped before this step.
            weights: p_k of all clients that reported; they add up to 1.
        """
