"""Sums over vectors that are too long for a temporary: 2^28 parameters are a GiB in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Vector", "add_scaled", "blocks"]

Vector: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]
"""n values, float32 in a run; whatever θ's type is, everything is computed in it."""

_BLOCK = 2**18
"""Values of a block, which with its temporaries stays in a processor's cache."""


def blocks(n: int) -> Iterator[slice]:
    """Slices that together are 0 to n.

    >>> [(block.start, block.stop) for block in blocks(2**18 + 1)]
    [(0, 262144), (262144, 262145)]
    """
    return (slice(begin, min(begin + _BLOCK, n)) for begin in range(0, n, _BLOCK))


def add_scaled(target: Vector, factor: float, vector: Vector) -> None:
    """target ← target + factor · vector, in place."""
    for block in blocks(len(target)):
        target[block] += factor * vector[block]
