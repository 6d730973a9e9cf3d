"""The trimmed mean: the largest and the smallest coefficients do not count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

__all__ = ["TrimmedMean"]


@dataclass(frozen=True)
class TrimmedMean:
    """Weighted mean without the `share` of clients at either end (Yin et al., ICML 2018).

    Raises:
        ValueError: The share is not in [0, 0.5).
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise ValueError(f"share = {self.share} is not in [0, 0.5)")

    def __call__(
        self, coefficients: Float64[np.ndarray, " K"], weights: Float64[np.ndarray, " K"]
    ) -> float:
        order = np.argsort(coefficients, kind="stable")
        # So many clients as the share says, but at least one of each end where three are there.
        cut = math.ceil(self.share * len(order)) if self.share and len(order) > 2 else 0
        cut = min(cut, (len(order) - 1) // 2)
        kept = order[cut : len(order) - cut]
        products = math.fsum((coefficients[kept] * weights[kept]).tolist())
        return products / math.fsum(weights[kept].tolist())
