"""Algorithms by the name that `algorithm` has in a recipe: one short file each, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from meerkat.algorithms.feddyn import FedDyn
from meerkat.algorithms.fedkseed import FedKSeed
from meerkat.algorithms.meerkat import Meerkat
from meerkat.config import Recipe
from meerkat.federation.algorithm import Algorithm
from meerkat.registry import build

__all__ = ["ALGORITHMS", "make_algorithm"]


class Method(Protocol):
    """A method with its options, for any recipe."""

    def algorithm(self, recipe: Recipe, n: int) -> Algorithm:
        """The algorithm of a recipe, for a state of n values."""


ALGORITHMS: Mapping[str, Callable[..., Method]] = {
    "feddyn": FedDyn,
    "fedkseed": FedKSeed,
    "meerkat": Meerkat,
}


def make_algorithm(recipe: Recipe, n: int) -> Algorithm:
    """The algorithm of a recipe, for a state of n values.

    Raises:
        RecipeError: A name or an option is not known, or a value is out of range.
    """
    chosen = recipe.algorithm
    return build(ALGORITHMS, chosen.kind, chosen.options, "algorithm").algorithm(recipe, n)
