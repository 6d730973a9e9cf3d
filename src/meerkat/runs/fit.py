"""Does a subspace fit the clients' data? Asked before training, of their texts without labels.

The scores of the public texts have curvature one along every direction of an aligned subspace. Of
texts of another kind or language, most of the curvature may lie along two or three: gradients are
then mostly noise along these, and the model gets worse (docs/results/subspace.md).
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from meerkat.config.sections import SubspaceSection
from meerkat.runs.assembly import Assembly
from meerkat.runs.finding_subspace import slopes_along
from meerkat.zo.noise import permutation

__all__ = ["effective_rank", "fitted", "rank_at_clients"]

_EXAMPLES = 64
_MOST_ASKED = 8
"""At most k by this is asked for: few directions cannot tell."""

_logger = logging.getLogger(__name__)


def effective_rank(slopes: Float64[np.ndarray, "N k"]) -> float:
    """tr(C)² / tr(C²) of C = mean of s sᵀ: as many directions hold its curvature (Eq. 22).

    >>> effective_rank(np.eye(4)), effective_rank(np.ones((5, 3)))
    (4.0, 1.0)
    """
    products = slopes @ slopes.T
    total = float(np.trace(products))
    return total**2 / float(np.sum(products**2)) if total > 0 else 0.0


def rank_at_clients(assembly: Assembly) -> float | None:
    """Effective rank of the clients' texts in the recipe's aligned subspace.

    None where `subspace.least_rank` asks for none, or the subspace is another.
    """
    section = assembly.recipe.subspace
    if section is None or section.kind != "aligned" or _asked(section) <= 1:
        return None
    held = sorted(place for part in assembly.parts for place in part)
    chosen = permutation(section.seed, (2, 3), len(held))[:_EXAMPLES]
    examples = [assembly.split.train[held[place]] for place in chosen]
    encoded = [assembly.encoder.encode(example) for example in examples]
    return effective_rank(slopes_along(assembly, assembly.found_mask.mask, section, encoded))


def fitted(assembly: Assembly) -> Assembly:
    """The same, or without its subspace where that does not fit.

    A subspace that a mask file brings is taken as it is.
    """
    section, given = assembly.recipe.subspace, assembly.mask_file or assembly.recipe.mask.file
    if section is None or given is not None:
        return assembly
    rank = rank_at_clients(assembly)
    if rank is None or rank >= _asked(section):
        return assembly
    _logger.warning(
        "the clients' texts make use of %.1f directions of the subspace, and %.1f are asked for "
        "(subspace.least_rank): the public texts are too unlike them. The run is made without a "
        "subspace; with subspace.corpus = texts like theirs, or 'model', it may have one",
        rank,
        _asked(section),
    )
    return replace(assembly, recipe=assembly.recipe.without_subspace)


def _asked(section: SubspaceSection) -> float:
    return min(section.least_rank, section.dimensions / _MOST_ASKED)
