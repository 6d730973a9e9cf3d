"""Exact slopes along the drawn directions: forward-mode differentiation, no ε."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from meerkat.zo.estimators.base import Estimate, LossesAt, differentiable, mean_loss
from meerkat.zo.state import Theta

__all__ = ["ForwardMode"]


@dataclass(frozen=True)
class ForwardMode:
    """g = ∇L · z for each direction, by dual numbers (Baydin et al., arXiv 2202.08587).

    One pass a direction, which carries the slope beside the value; no activations are kept.
    """

    fewest_directions: ClassVar[int] = 1

    def forward_passes(self, directions: int) -> int:
        return directions

    def estimate(
        self, losses_at: LossesAt, directions: Sequence[Theta], epsilon: float
    ) -> Estimate:
        exact, slopes, middle = differentiable(losses_at), [], 0.0
        for z in directions:
            losses, along = exact.slope(z)
            middle = mean_loss(losses, "θ")  # the same for each direction
            slopes.append(mean_loss(along, "θ"))
        return Estimate(tuple(slopes), middle)
