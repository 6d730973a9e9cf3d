"""A client's path from seeds and scalars, without its data (method.md section 4, step 3)."""

from __future__ import annotations

from collections.abc import Iterator

from meerkat.descent import Theta, descend
from meerkat.noise import Directions
from meerkat.protocol import ClientReport

__all__ = ["virtual_path"]


def virtual_path(
    theta: Theta, learning_rate: float, report: ClientReport, directions: Directions
) -> Iterator[Theta]:
    """θ_k^t = θ_r - η Σ_{s≤t} g_k^{r,s} z(r,s), for t = 1 … T_k.

    Bit for bit the client's own θ. Yields the same array at each step: memory O(n).
    """
    path = theta.copy()
    owner, count = directions.owner(report.client), report.perturbations
    for step in range(report.steps):
        for q in range(count):
            z = directions.z(report.round, step, q, owner)
            scalar = report.scalars[step * count + q]
            descend(path, learning_rate, scalar / count, z)
        yield path
