"""FedKSeed (Qin et al., arXiv 2312.06353): each client draws its directions from one pool of seeds.

What differs from Meerkat: `noise.keys` is `pool`, of 4096 seeds by default, and `noise.directions`
is `per-client`. Within a step, coefficients of one seed are added up.
"""

from __future__ import annotations

from dataclasses import dataclass

from meerkat.algorithms.meerkat import assembled
from meerkat.algorithms.zeroth_order import ZerothOrder
from meerkat.config import Choice, Recipe

__all__ = ["FedKSeed"]


@dataclass(frozen=True)
class FedKSeed:
    """A recipe with a seed pool, and directions for each client."""

    def algorithm(self, recipe: Recipe, n: int) -> ZerothOrder:
        """The algorithm of a recipe, for a state of n values.

        Raises:
            RecipeError: As `assembled`.
        """
        keys = recipe.noise.keys if recipe.noise.keys.kind == "pool" else Choice(kind="pool")
        noise = recipe.noise.model_copy(update={"keys": keys, "directions": "per-client"})
        return assembled(recipe.model_copy(update={"noise": noise}), n)
