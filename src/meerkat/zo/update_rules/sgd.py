"""Stochastic gradient descent, the method's own rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from meerkat.zo.state import ModelState, Theta
from meerkat.zo.update_rules.base import Term

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD:
    """θ ← θ - η Σ c z (method.md section 3)."""

    def init(self, theta: Theta) -> ModelState:
        return ModelState(theta.copy())

    def apply(self, state: ModelState, learning_rate: float, terms: Iterable[Term]) -> ModelState:
        """The product η c is taken in float64 and rounded to float32 once.

        Then there is one float32 multiplication and one subtraction a value and direction.
        """
        theta = state.theta.copy()
        for coefficient, z in terms:
            theta -= np.float32(learning_rate * coefficient) * z
        return ModelState(theta)
