"""The two-point estimate: the method's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from meerkat.zo.estimators.base import Estimate, LossesAt, mean_loss
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
        slopes, middles = [], []
        for z in directions:
            move = z * z.dtype.type(epsilon)
            above = mean_loss(losses_at(move), "θ + ε z")
            below = mean_loss(losses_at(-move), "θ - ε z")
            slopes.append((above - below) / (2 * epsilon))
            middles.append((above + below) / 2)
        return Estimate(tuple(slopes), sum(middles) / len(middles))
