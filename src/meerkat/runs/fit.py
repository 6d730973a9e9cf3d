"""Does a subspace fit the clients' data? Asked before training, of their texts without labels.

The scores of the public texts have curvature one along every direction of an aligned subspace, so a
step changes scores by about one. That is no good measure in two cases (docs/results/subspace.md):

- Of texts of another kind or language most of the curvature may lie along two or three directions.
- Where the model's own scores differ by less from text to text, such a step leaves the region in
  which they are linear in w, and has to be shorter; where they differ by more, it may be longer.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from meerkat.config import Recipe, parse_recipe
from meerkat.config.automatic import SUBSPACE_BATCH, SUBSPACE_PERTURBATIONS
from meerkat.config.parts import Choice
from meerkat.config.sections import SubspaceSection
from meerkat.errors import RecipeError
from meerkat.runs.assembly import Assembly
from meerkat.runs.finding_mask import Fit
from meerkat.runs.finding_subspace import slopes_along
from meerkat.zo.noise import permutation

__all__ = [
    "EXAMPLES",
    "asks",
    "effective_rank",
    "fit_of",
    "fitted",
    "scale_of",
    "spread_of",
    "without_subspace",
]

EXAMPLES = 64
"""Of the clients', that are asked."""
_MOST_ASKED = 8
"""At most k by this is asked for: few directions cannot tell."""
_LEAST, _MOST, _PART = 0.25, 2.5, 20
"""Steps are so many times as long as those of Eq. 20 at least and at most, in twentieths: little
beyond what was measured, and the same number whatever a processor's last bits are."""

_logger = logging.getLogger(__name__)


def effective_rank(slopes: Float64[np.ndarray, "N k"]) -> float:
    """tr(C)² / tr(C²) of C = mean of s sᵀ: as many directions hold its curvature (Eq. 22).

    >>> effective_rank(np.eye(4)), effective_rank(np.ones((5, 3)))
    (4.0, 1.0)
    """
    products = slopes @ slopes.T
    total = float(np.trace(products))
    return total**2 / float(np.sum(products**2)) if total > 0 else 0.0


def spread_of(scores: Float64[np.ndarray, "N A"]) -> float:
    """Standard deviation over N texts of the scores of A answers, each less their mean (Eq. 23).

    With two answers it is that of the difference of their scores.

    >>> spread_of(np.array([[0.0, 1.0], [0.0, 3.0]]))
    1.0
    """
    centred = scores - scores.mean(axis=1, keepdims=True)
    return math.sqrt(2 * float(centred.var(axis=0).sum()) / (scores.shape[1] - 1))


def asks(recipe: Recipe) -> bool:
    """Is it a recipe whose subspace is to fit? One that a mask file brings is taken as it is."""
    section = recipe.subspace
    return (
        section is not None
        and section.kind == "aligned"
        and section.dimensions > _MOST_ASKED
        and bool(section.least_rank or section.usual_spread)
        and recipe.mask.file is None
    )


def _asked(section: SubspaceSection) -> float:
    """The least rank, which few directions cannot have."""
    return min(section.least_rank, section.dimensions / _MOST_ASKED)


def fit_of(assembly: Assembly) -> Fit | None:
    """How the recipe's subspace fits 64 texts of the clients; None where it is not asked."""
    section = assembly.recipe.subspace
    if section is None or assembly.mask_file is not None or not asks(assembly.recipe):
        return None
    held = sorted(place for part in assembly.parts for place in part)
    chosen = permutation(section.seed, (2, 3), len(held))[:EXAMPLES]
    examples = [assembly.split.train[held[place]] for place in chosen]
    encoded = [assembly.encoder.encode(example) for example in examples]
    rank = effective_rank(slopes_along(assembly, assembly.found_mask.mask, section, encoded))
    spread = None
    if assembly.task.has_classes:
        spread = spread_of(assembly.objective.scores_of(encoded).cpu().numpy())
    if rank < _asked(section):
        return Fit(rank, spread)
    recipe = _scaled(assembly.recipe, scale_of(spread, section.usual_spread))
    return Fit(rank, spread, recipe.learning_rate, recipe.epsilon)


def fitted(assembly: Assembly) -> Assembly:
    """The same, or a run with shorter or longer steps, or without its subspace, where that does
    not fit.

    Raises:
        RecipeError: It does not fit, and the recipe asks for what there is in a subspace alone.
    """
    section, fit = assembly.recipe.subspace, fit_of(assembly)
    if section is None or fit is None:
        return assembly
    asked = _asked(section)
    if fit.rank < asked:
        reason = (
            f"the clients' texts make use of {fit.rank:.1f} directions of the subspace, and "
            f"{asked:.1f} are asked for (subspace.least_rank): the public texts are too unlike "
            "them; name others in subspace.corpus"
        )
        try:
            recipe = without_subspace(assembly.recipe)
        except RecipeError as error:
            raise RecipeError(f"{reason}. Without a subspace it is no run: {error}") from None
        _logger.warning("%s. The run is made without a subspace", reason)
        return replace(assembly, recipe=recipe)
    recipe = _scaled(assembly.recipe, scale_of(fit.spread, section.usual_spread))
    if recipe != assembly.recipe:
        _logger.warning(
            "the answers' scores spread by %.2f over the clients' texts, where "
            "subspace.usual_spread = %g: optimizer.learning_rate = %.3g, epsilon = %.3g",
            fit.spread,
            section.usual_spread,
            recipe.learning_rate,
            recipe.epsilon,
        )
    return replace(assembly, recipe=recipe)


def scale_of(spread: float | None, usual: float) -> float:
    """How many times as long as those of Eq. 20 steps are (method.md section 9).

    >>> scale_of(3.56, 1.75), scale_of(1.73, 1.75), scale_of(0.0, 1.75), scale_of(None, 1.75)
    (2.05, 1.0, 0.25, 1.0)
    """
    if spread is None or not usual:
        return 1.0
    return round(_PART * min(_MOST, max(_LEAST, spread / usual))) / _PART


def without_subspace(recipe: Recipe) -> Recipe:
    """The same run with θ free over the mask, and what goes with that by default.

    Rate and ε have other units there, so they are `auto`.

    Raises:
        RecipeError: It asks for what there is in a subspace alone, such as exact gradients.
    """
    data = recipe.model_dump(mode="json") | {"subspace": None}
    data["optimizer"] |= {"learning_rate": "auto", "epsilon": "auto", "schedule": "auto"}
    step = (recipe.federation.batch_size, recipe.optimizer.estimator, recipe.noise.perturbations)
    if step == (SUBSPACE_BATCH, Choice(kind="one-sided"), SUBSPACE_PERTURBATIONS):
        del data["federation"]["batch_size"]
        del data["optimizer"]["estimator"]
        del data["noise"]["perturbations"]
    return parse_recipe(data)


def _scaled(recipe: Recipe, factor: float) -> Recipe:
    """With rate and ε so many times as large where they were `auto`, written out."""
    if factor == 1:
        return recipe
    optimizer = recipe.optimizer
    found = {"learning_rate": recipe.learning_rate, "epsilon": recipe.epsilon}
    changes = {
        name: factor * value for name, value in found.items() if getattr(optimizer, name) == "auto"
    }
    return recipe.model_copy(update={"optimizer": optimizer.model_copy(update=changes)})
