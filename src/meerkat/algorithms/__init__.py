"""Algorithms by the name that `algorithm` has in a recipe: one short file each, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meerkat.algorithms.fedkseed import fedkseed
from meerkat.algorithms.meerkat import meerkat
from meerkat.config import Recipe
from meerkat.federation.algorithm import Algorithm
from meerkat.registry import look_up

__all__ = ["ALGORITHMS", "make_algorithm"]

ALGORITHMS: Mapping[str, Callable[[Recipe, int], Algorithm]] = {
    "fedkseed": fedkseed,
    "meerkat": meerkat,
}


def make_algorithm(recipe: Recipe, n: int) -> Algorithm:
    """The algorithm of a recipe, for a state of n values.

    Raises:
        RecipeError: A name or an option is not known, or a value is out of range.
    """
    return look_up(ALGORITHMS, recipe.algorithm, "algorithm")(recipe, n)
