"""Where a subspace starts: the nearest w at which no answer is preferred on average.

A model prefers some answer words whatever the text says (Zhao et al., arXiv 2102.09690). Without
that preference, training has a shorter way to go. No label is used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Float64

__all__ = ["balanced_start"]

_STEPS = 3


def balanced_start(
    jacobian: Float64[np.ndarray, "A k"],
    preferences: Callable[[Float32[np.ndarray, " k"]], Float64[np.ndarray, " A"]],
) -> Float32[np.ndarray, " k"]:
    """The shortest w that evens out preferences, by steps with the Jacobian at w = 0.

    Args:
        jacobian: Change of each answer's preference with w, at w = 0.
        preferences: w → mean score of each answer over the texts, less the mean of these.

    Returns:
        The best w of those that were tried; 0 where no step makes preferences smaller.
    """
    inverse = np.linalg.pinv(jacobian, rcond=1e-3)
    w = np.zeros(jacobian.shape[1], np.float32)
    left = preferences(w)
    for _ in range(_STEPS):
        moved = (w - inverse @ left).astype(np.float32)
        found = preferences(moved)
        if not np.linalg.norm(found) < np.linalg.norm(left):
            break
        w, left = moved, found
    return w
