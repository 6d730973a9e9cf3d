"""Heavy-ball momentum over zeroth-order estimates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

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
        return ModelState(theta.copy(), {"momentum": np.zeros_like(theta)})

    def apply(self, state: ModelState, learning_rate: float, terms: Iterable[Term]) -> ModelState:
        momentum = np.float32(self.decay) * state.slots["momentum"]
        momentum += estimate(terms, state.theta)
        theta = state.theta - np.float32(learning_rate) * momentum
        return ModelState(theta, {"momentum": momentum})
