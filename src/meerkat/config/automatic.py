"""What `auto` means in a subspace, where rate and perturbation have units (method.md section 9)."""

from __future__ import annotations

import math

__all__ = ["MOST_ORTHOGONAL", "subspace_epsilon", "subspace_rate"]

MOST_ORTHOGONAL = 1024
"""Most dimensions for which directions are orthogonal by default."""


def subspace_rate(dimensions: int, directions: float) -> float:
    """η of the first round, in a subspace whose directions have curvature one.

    There the loss of an answer has a curvature of about 0.17 (at most 0.25, that of a
    cross-entropy between two). A step along N directions of k, orthogonal and averaged, is k / N
    times as long as one along the gradient, so it allows N / 0.17 k; the gradient of a batch
    allows 1 / 0.7 at most, whatever N. Where it was measured: docs/results/subspace.md.

    Args:
        dimensions: k.
        directions: N, distinct directions of a round; infinite for exact gradients.
    """
    return 1.0 / (0.17 * dimensions / directions + 0.7)


def subspace_epsilon(dimensions: int) -> float:
    """ε for which a perturbation changes the scores' difference by 0.6, root mean square."""
    return 0.6 / math.sqrt(dimensions)
