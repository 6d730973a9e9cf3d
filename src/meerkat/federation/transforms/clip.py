"""Clipping: no coefficient is larger than a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from meerkat.federation.transforms.base import Place

__all__ = ["Clip"]


@dataclass(frozen=True)
class Clip:
    """g ← min(max(g, -bound), bound); an exact gradient is shortened to a root mean square g.

    Raises:
        ValueError: The bound is not positive.
    """

    bound: float

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound = {self.bound} is not positive")

    def __call__(
        self, coefficients: Float64[np.ndarray, " Q"], place: Place
    ) -> Float64[np.ndarray, " Q"]:
        if place.along == "axes":
            squares = math.fsum((coefficients * coefficients).tolist()) / len(coefficients)
            size = math.sqrt(squares)
            return coefficients if size <= self.bound else coefficients * (self.bound / size)
        return np.clip(coefficients, -self.bound, self.bound)
