"""Does a subspace fit the clients' data? Asked before training, of their texts without labels.

The scores of the public texts have curvature one along every direction of an aligned subspace, so a
step changes scores by about one. That is no good measure in two cases (docs/results/subspace.md):

- Of texts of another kind or language most of the curvature may lie along two or three directions.
- Where the model's own scores differ by less from text to text, such a step leaves the region in
  which they are linear in w, and has to be shorter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float64

from meerkat.config import Recipe
from meerkat.data.encoding import Encoded
from meerkat.models.objective import TextObjective
from meerkat.runs.assembly import Assembly
from meerkat.runs.finding_mask import Fit
from meerkat.runs.finding_subspace import slopes_along
from meerkat.zo.noise import permutation

__all__ = ["effective_rank", "fit_of", "fitted", "spread_of"]

_EXAMPLES = 64
_TOGETHER = 16
"""Examples of one pass."""
_MOST_ASKED = 8
"""At most k by this is asked for: few directions cannot tell."""
_USUAL_SPREAD = 1.8
"""Of the demo, by which η and ε of Eq. 20 were chosen."""

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


def fit_of(assembly: Assembly) -> Fit | None:
    """How the recipe's aligned subspace fits 64 texts of the clients; None where nobody asks."""
    section = assembly.recipe.subspace
    if section is None or section.kind != "aligned" or section.dimensions <= _MOST_ASKED:
        return None
    if not section.least_rank and not section.least_spread:
        return None
    held = sorted(place for part in assembly.parts for place in part)
    chosen = permutation(section.seed, (2, 3), len(held))[:_EXAMPLES]
    examples = [assembly.split.train[held[place]] for place in chosen]
    encoded = [assembly.encoder.encode(example) for example in examples]
    rank = effective_rank(slopes_along(assembly, assembly.found_mask.mask, section, encoded))
    spread = None
    if assembly.task.has_classes:
        spread = spread_of(_scores(assembly.objective, encoded))
    return Fit(rank, spread)


@torch.inference_mode()
def _scores(objective: TextObjective, encoded: Sequence[Encoded]) -> Float64[np.ndarray, "N A"]:
    found = [
        objective.scores(batch.to(objective.device))
        for begin in range(0, len(encoded), _TOGETHER)
        for batch in objective.packs(encoded[begin : begin + _TOGETHER])
    ]
    return torch.cat(found).double().cpu().numpy()


def fitted(assembly: Assembly) -> Assembly:
    """The same, or a run with shorter steps, or without its subspace, where that does not fit.

    A subspace that a mask file brings is taken as it is.
    """
    section, given = assembly.recipe.subspace, assembly.mask_file or assembly.recipe.mask.file
    if section is None or given is not None:
        return assembly
    fit = fit_of(assembly)
    if fit is None:
        return assembly
    asked = min(section.least_rank, section.dimensions / _MOST_ASKED)
    if fit.rank < asked:
        _logger.warning(
            "the clients' texts make use of %.1f directions of the subspace, and %.1f are asked "
            "for (subspace.least_rank): the public texts are too unlike them; name others in "
            "subspace.corpus. The run is made without a subspace",
            fit.rank,
            asked,
        )
        return replace(assembly, recipe=assembly.recipe.without_subspace)
    if fit.spread is None or fit.spread >= section.least_spread:
        return assembly
    recipe = _shortened(assembly.recipe, fit.spread / _USUAL_SPREAD)
    _logger.warning(
        "the answers' scores spread by %.2f over the clients' texts, less than "
        "subspace.least_spread = %g: steps are shorter, with optimizer.learning_rate = %.3g and "
        "epsilon = %.3g",
        fit.spread,
        section.least_spread,
        recipe.learning_rate,
        recipe.epsilon,
    )
    return replace(assembly, recipe=recipe)


def _shortened(recipe: Recipe, factor: float) -> Recipe:
    """With rate and ε that are so much smaller where they were `auto`, written out."""
    optimizer = recipe.optimizer
    found = {"learning_rate": recipe.learning_rate, "epsilon": recipe.epsilon}
    changes = {
        name: factor * value for name, value in found.items() if getattr(optimizer, name) == "auto"
    }
    return recipe.model_copy(update={"optimizer": optimizer.model_copy(update=changes)})
