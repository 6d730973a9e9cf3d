"""Axes as directions: an exact gradient in k values is k projected gradients (method.md section 9).

The direction of axis q is z_q = √k e_q. With g_q = ∇ · z_q the mean of g_q z_q over the k axes is
the gradient, as the mean over Gaussian directions is on average. So a report of k such numbers is
an ordinary report of k directions, and all that is defined on directions and their g holds for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

__all__ = ["AXES", "Along", "along_axes", "axis", "axis_length"]

AXES = 2**32 - 3
"""The client of the key of an axis, which is nobody's own: (0, 0, q, AXES)."""

Along: TypeAlias = Literal["drawn", "axes"]
"""What a report is along: directions that were drawn, or all axes."""


def axis_length(k: int) -> np.float32:
    """√k, correctly rounded."""
    return np.sqrt(np.float32(k))


def axis(k: int, q: int) -> Float32[np.ndarray, " k"]:
    """z_q = √k e_q.

    Raises:
        ValueError: There is no axis q.
    """
    if not 0 <= q < k:
        raise ValueError(f"axis {q} of {k} values")
    z = np.zeros(k, np.float32)
    z[q] = axis_length(k)
    return z


def along_axes(coefficients: Sequence[float]) -> Float32[np.ndarray, " k"]:
    """Σ_q c_q z_q over all axes, each product rounded to float32 on its own."""
    return np.array(coefficients, np.float32) * axis_length(len(coefficients))
