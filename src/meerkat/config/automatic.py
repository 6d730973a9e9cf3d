"""What `auto` means in a subspace, where rate and perturbation have units (method.md section 9)."""

from __future__ import annotations

import math

__all__ = [
    "MOST_ORTHOGONAL",
    "SUBSPACE_BATCH",
    "SUBSPACE_PERTURBATIONS",
    "subspace_epsilon",
    "subspace_rate",
]

MOST_ORTHOGONAL = 1024
"""Most dimensions for which directions are orthogonal by default: `zo.orthogonal.LARGEST`, which
this package does not import."""

SUBSPACE_BATCH, SUBSPACE_PERTURBATIONS = 4, 7
"""Examples and one-sided directions of a step: 8 passes over 4 examples, as many as 2 over 16."""


def subspace_rate(dimensions: int, directions: float) -> float:
    """η of the first round, in a subspace whose directions have curvature one.

    A step along N orthogonal directions of k, averaged, is k / N times as long as one along the
    gradient, so it has to be so much smaller; one along the gradient of a batch may have η = 1. The
    factor 0.28 is what learned best where it was measured (docs/results/subspace.md).

    Args:
        dimensions: k.
        directions: N, distinct directions of a round; infinite for exact gradients.
    """
    return 1.0 / (0.28 * dimensions / directions + 1.0)


def subspace_epsilon(dimensions: int) -> float:
    """ε for which a perturbation changes the scores' difference by 0.6, root mean square."""
    return 0.6 / math.sqrt(dimensions)
