"""HiSo: zeroth-order steps preconditioned by a diagonal curvature (Li et al., arXiv 2506.02370)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from meerkat.zo.arrays import copied, square_root, zeros_like
from meerkat.zo.state import ModelState, Theta
from meerkat.zo.update_rules.base import Term, estimate

__all__ = ["HiSo"]


@dataclass(frozen=True)
class HiSo:
    """Directions H^(-1/2) z in place of z, H from squares of past estimates (method.md Eq. 25).

    θ is perturbed and moved along H^(-1/2) z: θ ← θ - η ĝ with ĝ = Σ c H^(-1/2) z, and then
    H ← β H + (1 - β) (ĝ² + δ). H is 1 at the start, and a function of the log's scalars: none of it
    is sent.

    Raises:
        ValueError: β is not in [0, 1), or δ is not positive.
    """

    smoothing: float = 0.95
    """β; that of the authors' code."""
    delta: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing = {self.smoothing} is not in [0, 1)")
        if not np.float32(self.delta) > 0:
            raise ValueError(f"delta = {self.delta} is not positive")

    def init(self, theta: Theta) -> ModelState:
        return ModelState(copied(theta), {"curvature": zeros_like(theta) + 1.0})

    def shaped(self, state: ModelState, z: Theta) -> Theta:
        """H^(-1/2) z."""
        return z / square_root(state.slots["curvature"])

    def apply(self, state: ModelState, learning_rate: float, terms: Iterable[Term]) -> ModelState:
        """The state after one update; `terms` have the directions before they are shaped."""
        gradient = self.shaped(state, estimate(terms, state.theta))
        kept = np.float32(self.smoothing)
        rest = float(np.float32(1) - kept)
        squares = gradient * gradient + self.delta
        curvature = state.slots["curvature"] * float(kept) + squares * rest
        theta = state.theta - gradient * float(learning_rate)
        return ModelState(theta, {"curvature": curvature})
