"""The exact gradient of a few values by a backward pass, as slopes along all axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from meerkat.zo.axes import axis_length
from meerkat.zo.estimators.base import Estimate, LossesAt, differentiable, mean_loss
from meerkat.zo.state import Theta

__all__ = ["Backward"]


@dataclass(frozen=True)
class Backward:
    """g_q = ∇L · z_q for each axis z_q = √k e_q (method.md section 9).

    One forward and one backward pass whatever k is; activations are kept between the two.
    """

    fewest_directions: ClassVar[int] = 1

    def forward_passes(self, directions: int) -> int:
        return 1

    def estimate(
        self, losses_at: LossesAt, directions: Sequence[Theta], epsilon: float
    ) -> Estimate:
        """The slopes along all axes, whatever `directions` are."""
        losses, gradient = differentiable(losses_at).gradient()
        slopes = gradient * float(axis_length(len(gradient)))
        return Estimate(tuple(slopes.tolist()), mean_loss(losses, "θ"))
