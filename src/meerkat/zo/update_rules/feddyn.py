"""The server's side of FedDyn (Acar et al., arXiv 2111.04263); `algorithms.feddyn` takes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from meerkat.zo.arrays import copied, zeros_like
from meerkat.zo.state import ModelState, Theta
from meerkat.zo.update_rules.base import Term, estimate

__all__ = ["ServerCorrection"]


@dataclass(frozen=True)
class ServerCorrection:
    """θ ← θ - η ĝ, s ← s + ρ η ĝ, and after the last step of a round θ ← θ - s (method.md Eq. 26).

    s is h / α of the paper, ρ the share of all clients that a round has. It is no choice of a
    recipe: without the clients' own correction it would be a momentum that never decays.
    """

    steps: int
    """T, updates of a round."""
    share: float
    """ρ."""

    def init(self, theta: Theta) -> ModelState:
        slots = {"correction": zeros_like(theta), "updates": np.zeros(1, np.float64)}
        return ModelState(copied(theta), slots)

    def apply(self, state: ModelState, learning_rate: float, terms: Iterable[Term]) -> ModelState:
        moved = estimate(terms, state.theta) * float(learning_rate)
        theta = state.theta - moved
        correction = state.slots["correction"] + moved * self.share
        updates = state.slots["updates"] + 1
        if int(updates[0]) % self.steps == 0:
            theta = theta - correction
        return ModelState(theta, {"correction": correction, "updates": updates})
