"""Adam over zeroth-order estimates, rebuilt from scalars as in AdaMeZO (arXiv 2605.00650)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from meerkat.zo.arrays import copied, divided, square_root, zeros_like
from meerkat.zo.state import ModelState, Theta
from meerkat.zo.update_rules.base import Term, estimate

__all__ = ["Adam"]


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015) with ĝ = Σ c z for the gradient (method.md section 3, Update rules).

    m ← β₁ m + (1 - β₁) ĝ, v ← β₂ v + (1 - β₂) ĝ², θ ← θ - η m̂ / (√v̂ + δ), with m̂ = m / (1 - β₁ᵗ)
    and v̂ = v / (1 - β₂ᵗ). Both moments are functions of the log's scalars, so none is sent.

    Raises:
        ValueError: A β is not in [0, 1), or δ is not positive.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    delta: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not in [0, 1)")
        if not self.delta > 0:
            raise ValueError(f"delta = {self.delta} is not positive")

    def init(self, theta: Theta) -> ModelState:
        slots = {
            "first": zeros_like(theta),
            "second": zeros_like(theta),
            # β₁ᵗ and β₂ᵗ as running products: a power function rounds differently on each machine.
            "powers": np.ones(2, np.float64),
        }
        return ModelState(copied(theta), slots)

    def apply(self, state: ModelState, learning_rate: float, terms: Iterable[Term]) -> ModelState:
        gradient = estimate(terms, state.theta)
        beta1, beta2 = np.float32(self.beta1), np.float32(self.beta2)
        rest1, rest2 = float(np.float32(1) - beta1), float(np.float32(1) - beta2)
        first = state.slots["first"] * float(beta1) + gradient * rest1
        second = state.slots["second"] * float(beta2) + (gradient * gradient) * rest2
        powers = state.slots["powers"] * np.array([self.beta1, self.beta2])
        correction1, correction2 = (float(np.float32(1 - power)) for power in powers.tolist())
        root = square_root(divided(second, correction2)) + self.delta
        theta = state.theta - (divided(first, correction1) / root) * float(learning_rate)
        return ModelState(theta, {"first": first, "second": second, "powers": powers})
