"""One-sided estimates for several directions, with a baseline (FZOO, arXiv 2506.09034).

Without a baseline a coefficient would be L / ε: the size of the loss, not its slope. The baseline
takes that out, so that what is left is of the size of the two-point estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from meerkat.zo.estimators.base import Estimate, LossesAt, losses_at_each, mean_loss
from meerkat.zo.state import Theta

__all__ = ["OneSided", "OneSidedMean"]


@dataclass(frozen=True)
class OneSided:
    """g_i = (L(θ + ε z_i) - L(θ)) / ε: q + 1 forward passes for q directions.

    See method.md section 3.
    """

    fewest_directions: ClassVar[int] = 1

    def forward_passes(self, directions: int) -> int:
        return directions + 1

    def estimate(
        self, losses_at: LossesAt, directions: Sequence[Theta], epsilon: float
    ) -> Estimate:
        moves = [z * float(epsilon) for z in directions]
        here, *moved = losses_at_each(losses_at, [None, *moves])
        baseline = mean_loss(here, "θ")
        losses = [mean_loss(found, "θ + ε z") for found in moved]
        return Estimate(tuple((loss - baseline) / epsilon for loss in losses), baseline)


@dataclass(frozen=True)
class OneSidedMean:
    """g_i = (L_i - mean of the other L_j) / ε: q forward passes for q ≥ 2 directions.

    The mean of the others is independent of z_i, so the estimate is not biased by it. It stands
    for L(θ) (method.md section 3).
    """

    fewest_directions: ClassVar[int] = 2

    def forward_passes(self, directions: int) -> int:
        return directions

    def estimate(
        self, losses_at: LossesAt, directions: Sequence[Theta], epsilon: float
    ) -> Estimate:
        moves = [z * float(epsilon) for z in directions]
        losses = [mean_loss(found, "θ + ε z") for found in losses_at_each(losses_at, moves)]
        total, others = math.fsum(losses), len(losses) - 1
        slopes = tuple((loss - (total - loss) / others) / epsilon for loss in losses)
        return Estimate(slopes, total / len(losses))
