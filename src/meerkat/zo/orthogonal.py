"""Directions that are orthogonal in blocks: n of them cover each of n dimensions equally.

Gaussian directions repeat some dimensions and miss others; where n is small, as in a subspace, a
block of n orthogonal ones measures every dimension once (Choromanski et al., arXiv 1804.02395).
Each is uniform on the sphere of radius √n, so estimates stay unbiased.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float32

from meerkat.zo.noise import NoiseKey, draw

__all__ = ["LARGEST", "orthogonal_direction"]

LARGEST = 1024
"""Most dimensions: a block takes about n² short passes over n values."""
_MARK = 2**32 - 3
"""The client of the keys that blocks are drawn by: nobody's. (That of `axes.AXES`, too, for which
nothing is drawn.)"""


def orthogonal_direction(seed: int, lap: int, place: int, n: int) -> Float32[np.ndarray, " n"]:
    """z of the place-th direction of a sequence, read-only; z · z = n.

    Args:
        lap: Which sequence.
        place: Directions j n … (j + 1) n - 1 are orthogonal to each other.

    Raises:
        ValueError: n is above `LARGEST`.
    """
    if n > LARGEST:
        raise ValueError(f"{n} dimensions are more than {LARGEST}")
    block, row = divmod(place, n)
    found: Float32[np.ndarray, " n"] = _block(seed, lap, block, n)[row]
    return found


@lru_cache(maxsize=8)
def _block(seed: int, lap: int, block: int, n: int) -> Float32[np.ndarray, "n n"]:
    """√n times a random orthogonal matrix, by Gram-Schmidt on a Gaussian one.

    Sums are ordered and products elementwise, so the bits are the same on every machine.
    """
    drawn = draw(NoiseKey(seed, block, lap, 0, _MARK), n * n).reshape(n, n).astype(np.float64)
    columns = np.ascontiguousarray(drawn.T)  # columns[c] holds value c of each direction
    for row in range(n):
        columns[:, row] /= np.sqrt(_ordered_sum(np.square(columns[:, row])))
        rest = columns[:, row + 1 :]
        products = np.zeros(n - row - 1)
        for value, others in zip(columns[:, row], rest, strict=True):
            products += value * others
        for value, others in zip(columns[:, row], rest, strict=True):
            others -= value * products
    found = (columns.T * np.sqrt(np.float64(n))).astype(np.float32)
    found.setflags(write=False)
    return found


def _ordered_sum(values: np.ndarray) -> float:
    total = 0.0
    for value in values.tolist():
        total += value
    return total
