"""Stochastic gradient descent, the method's own rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meerkat.zo.arrays import copied
from meerkat.zo.state import ModelState, Theta
from meerkat.zo.update_rules.base import Term

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD:
    """θ ← θ - η Σ c z (method.md section 3)."""

    def init(self, theta: Theta) -> ModelState:
        return ModelState(copied(theta))

    def apply(self, state: ModelState, learning_rate: float, terms: Iterable[Term]) -> ModelState:
        """The product η c is taken in float64 and rounded to float32 once.

        Then there is one float32 multiplication and one subtraction a value and direction.
        """
        theta = copied(state.theta)
        for coefficient, z in terms:
            theta -= z * float(learning_rate * coefficient)
        return ModelState(theta)
