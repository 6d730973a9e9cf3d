"""Directions from a finite pool of seeds (FedKSeed, Qin et al., arXiv 2312.06353).

There a client draws one of K candidate seeds for each step and sends its index beside the scalar.
Here the index is drawn from the coordinates of the step, which the server knows: nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from meerkat.zo.directions import DirectionKey
from meerkat.zo.noise import words

__all__ = ["POOL", "PoolKeys"]

POOL = 2**32 - 2
"""The client of a direction of the pool, which is nobody's own."""
_DOMAIN = 3


@dataclass(frozen=True)
class PoolKeys:
    """Keys of a pool of `size` directions, drawn with replacement.

    Raises:
        ValueError: The size is out of range.
    """

    size: int = 4096

    def __post_init__(self) -> None:
        if not 1 <= self.size < 2**32:
            raise ValueError(f"size = {self.size} is not between 1 and {2**32 - 1}")

    def key(self, seed: int, place: DirectionKey) -> DirectionKey:
        coordinates = [
            place.round,
            place.step | place.perturbation << 32,
            place.client | _DOMAIN << 32,
        ]
        index = int(words(seed, coordinates, 1)[0]) % self.size
        return DirectionKey(index, 0, 0, POOL)
