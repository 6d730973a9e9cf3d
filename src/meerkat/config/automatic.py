"""What `auto` means in a subspace, where rate and perturbation have units (method.md section 9)."""

from __future__ import annotations

import math

__all__ = ["MOST_ORTHOGONAL", "subspace_epsilon", "subspace_rate"]

MOST_ORTHOGONAL = 1024
"""Most dimensions for which directions are orthogonal by default."""


def subspace_rate(dimensions: int, directions: int) -> float:
    """η at the start, in a subspace whose directions have curvature one.

    A step along one random direction of k is stable for η below about 2 / 0.2 (k + 2) where the
    loss is a cross-entropy, whose curvature is at most a quarter of the scores'; N directions that
    are averaged allow N times as much, up to what a step along the gradient itself allows.

    Args:
        dimensions: k.
        directions: N, distinct directions of a round.
    """
    return directions / (dimensions + directions)


def subspace_epsilon(dimensions: int) -> float:
    """ε for which a perturbation changes the scores' difference by 0.6, root mean square."""
    return 0.6 / math.sqrt(dimensions)
