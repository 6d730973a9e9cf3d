"""FedKSeed (Qin et al., arXiv 2312.06353): each client draws its directions from one pool of seeds.

What differs from Meerkat: `noise.keys` is `pool`, of 4096 seeds by default, and `noise.directions`
is `per-client`. Within a step, coefficients of one seed are added up.
"""

from __future__ import annotations

from meerkat.algorithms.meerkat import meerkat
from meerkat.algorithms.zeroth_order import ZerothOrder
from meerkat.config import Choice, Recipe

__all__ = ["fedkseed"]


def fedkseed(recipe: Recipe, n: int) -> ZerothOrder:
    """The recipe with a seed pool and directions for each client.

    Raises:
        RecipeError: As `meerkat`.
    """
    keys = recipe.noise.keys if recipe.noise.keys.kind == "pool" else Choice(kind="pool")
    noise = recipe.noise.model_copy(update={"keys": keys, "directions": "per-client"})
    return meerkat(recipe.model_copy(update={"noise": noise}), n)
