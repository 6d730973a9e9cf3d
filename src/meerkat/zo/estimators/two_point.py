"""The two-point estimate: the method's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from meerkat.zo.estimators.base import Estimate, LossesAt, losses_at_each, mean_loss
from meerkat.zo.state import Theta

__all__ = ["TwoPoint"]


@dataclass(frozen=True)
class TwoPoint:
    """g = (L(θ + ε z) - L(θ - ε z)) / 2ε for each direction (method.md section 3)."""

    fewest_directions: ClassVar[int] = 1

    def forward_passes(self, directions: int) -> int:
        return 2 * directions

    def estimate(
        self, losses_at: LossesAt, directions: Sequence[Theta], epsilon: float
    ) -> Estimate:
        moves = [z * float(epsilon) for z in directions]
        found = losses_at_each(losses_at, [offset for move in moves for offset in (move, -move)])
        slopes, middles = [], []
        for place in range(0, len(found), 2):
            above = mean_loss(found[place], "θ + ε z")
            below = mean_loss(found[place + 1], "θ - ε z")
            slopes.append((above - below) / (2 * epsilon))
            middles.append((above + below) / 2)
        return Estimate(tuple(slopes), sum(middles) / len(middles))
