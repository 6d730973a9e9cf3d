"""Meerkat: zeroth-order local steps along the recipe's directions, averaged by the server.

Full-FedZO, weight magnitude, random and union masks are this algorithm over another mask.
Meerkat-vp adds early stopping, which `selection` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meerkat.algorithms.zeroth_order import ZerothOrder
from meerkat.config import Recipe
from meerkat.errors import RecipeError
from meerkat.federation.aggregators import AGGREGATORS
from meerkat.federation.transforms import TRANSFORMS
from meerkat.registry import build
from meerkat.zo.directions import PerturbationStream
from meerkat.zo.estimators import ESTIMATORS
from meerkat.zo.key_schemes import KEY_SCHEMES
from meerkat.zo.orthogonal import LARGEST
from meerkat.zo.update_rules import UPDATE_RULES
from meerkat.zo.update_rules.base import ShapingRule

__all__ = ["Meerkat", "assembled"]


@dataclass(frozen=True)
class Meerkat:
    """All choices as the recipe has them."""

    def algorithm(self, recipe: Recipe, n: int) -> ZerothOrder:
        """The algorithm of a recipe, for a state of n values.

        Raises:
            RecipeError: As `assembled`.
        """
        return assembled(recipe, n)


def assembled(recipe: Recipe, n: int) -> ZerothOrder:
    """What a recipe's choices give together; other methods change some of them first.

    Raises:
        RecipeError: A choice is not known, or does not fit the others.
    """
    noise, optimizer, federation = recipe.noise, recipe.optimizer, recipe.federation
    estimator = build(
        ESTIMATORS,
        optimizer.estimator.kind,
        optimizer.estimator.options,
        "optimizer.estimator",
    )
    if noise.perturbations < estimator.fewest_directions:
        raise RecipeError(
            f"optimizer.estimator = {optimizer.estimator.kind!r} needs at least "
            f"{estimator.fewest_directions} directions, and noise.perturbations is "
            f"{noise.perturbations}; raise it"
        )
    shared = noise.directions == "shared"
    by_axis = optimizer.estimator.kind == "backward"
    if not (shared or by_axis) and federation.aggregator.kind != "mean":
        # Each client's coefficient is an entry of its own then: an aggregator would see none.
        raise RecipeError(
            f"federation.aggregator = {federation.aggregator.kind!r} needs a direction that all "
            f"clients share, and noise.directions is {noise.directions!r}; take 'mean', or share "
            "the directions"
        )
    rule = build(UPDATE_RULES, optimizer.rule.kind, optimizer.rule.options, "optimizer.rule")
    if isinstance(rule, ShapingRule):
        _check_shaping(recipe)
    keys = build(KEY_SCHEMES, noise.keys.kind, noise.keys.options, "noise.keys")
    if recipe.noise_kind == "orthogonal":
        _check_orthogonal(recipe, n)
    stream = PerturbationStream(
        recipe.seed,
        n,
        recipe.noise_kind,
        shared,
        noise.perturbations,
        keys,
        federation.local_steps,
        federation.clients,
    )
    return ZerothOrder(
        stream=stream,
        rule=rule,
        estimator=estimator,
        epsilon=recipe.epsilon,
        transforms=tuple(
            build(TRANSFORMS, choice.kind, choice.options, "federation.transforms")
            for choice in federation.transforms
        ),
        aggregator=build(
            AGGREGATORS,
            federation.aggregator.kind,
            federation.aggregator.options,
            "federation.aggregator",
        ),
        weighting=federation.weighting,
        weight_cap=federation.weight_cap or math.inf,
        over_step=federation.weights_over == "step",
    )


def _check_shaping(recipe: Recipe) -> None:
    """Directions that depend on the state fit neither exact reports nor GradIP.

    Raises:
        RecipeError: The recipe asks for one of them.
    """
    name, optimizer = f"optimizer.rule = {recipe.optimizer.rule.kind!r}", recipe.optimizer
    if optimizer.exact_clients or optimizer.estimator.kind == "backward":
        raise RecipeError(
            f"{name} moves along directions of its own, and an exact report has none; take "
            "another rule, or another estimator and no optimizer.exact_clients"
        )
    if recipe.selection.kind == "gradip" and recipe.selection.signal == "gradip":
        raise RecipeError(
            f"{name} moves along directions of its own, which GradIP does not know; set "
            "selection.signal = 'projected-gradient'"
        )


def _check_orthogonal(recipe: Recipe, n: int) -> None:
    """Orthogonal directions are for few dimensions, and each is used once.

    Raises:
        RecipeError: There are too many dimensions, or directions come from a pool.
    """
    if recipe.noise.keys.kind != "fresh":
        raise RecipeError(
            f"noise.kind = 'orthogonal' goes with noise.keys = 'fresh', which is "
            f"{recipe.noise.keys.kind!r}; change one of them"
        )
    if recipe.subspace is None or n > LARGEST:
        found = "without [subspace]" if recipe.subspace is None else f"with n = {n}"
        raise RecipeError(
            f"noise.kind = 'orthogonal' is for at most {LARGEST} dimensions, and the recipe is "
            f"{found}; take 'gaussian', or a subspace of fewer dimensions"
        )
