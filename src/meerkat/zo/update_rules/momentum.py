"""Heavy-ball momentum over zeroth-order estimates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meerkat.zo.arrays import copied, zeros_like
from meerkat.zo.state import ModelState, Theta
from meerkat.zo.update_rules.base import Term, estimate

__all__ = ["Momentum"]


@dataclass(frozen=True)
class Momentum:
    """m ← μ m + ĝ, θ ← θ - η m (method.md section 3, Update rules).

    Raises:
        ValueError: The decay is not in [0, 1).
    """

    decay: float = 0.9
    """μ; the step that a constant ĝ ends with is 1 / (1 - μ) times that of SGD."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay = {self.decay} is not in [0, 1)")

    def init(self, theta: Theta) -> ModelState:
        return ModelState(copied(theta), {"momentum": zeros_like(theta)})

    def apply(self, state: ModelState, learning_rate: float, terms: Iterable[Term]) -> ModelState:
        momentum = state.slots["momentum"] * self.decay
        momentum += estimate(terms, state.theta)
        theta = state.theta - momentum * float(learning_rate)
        return ModelState(theta, {"momentum": momentum})
