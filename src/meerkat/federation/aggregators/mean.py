"""The weighted mean, the method's own aggregator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

__all__ = ["Mean"]


@dataclass(frozen=True)
class Mean:
    """ḡ = Σ_k p_k g_k, correctly rounded: the order of clients cannot matter."""

    def __call__(
        self, coefficients: Float64[np.ndarray, " K"], weights: Float64[np.ndarray, " K"]
    ) -> float:
        return math.fsum((coefficients * weights).tolist())
