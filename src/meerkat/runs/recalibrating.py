"""Renews the subspace of a run whose server has no model: the calibrator, beside that server."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

from meerkat.config import Recipe
from meerkat.errors import RunError
from meerkat.journal import Journal, replay
from meerkat.progress import Progress
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.best_round import last_round
from meerkat.runs.directory import (
    journal_path,
    mask_of,
    mask_path,
    open_journal,
    recipe_of,
    renewed_mask_path,
)
from meerkat.runs.finding_subspace import renewed_subspace
from meerkat.runs.renewal import is_due
from meerkat.spaces.mask_file import save_mask

__all__ = ["renew_when_due"]

_LOOK_EVERY = 1.0
"""Seconds between looks at the journal."""


def renew_when_due(
    directory: Path,
    corpus: str | tuple[str, ...] | None,
    once: bool,
    made: Callable[[Path], None],
    progress: Progress,
) -> None:
    """Make each subspace that the run of a directory waits for, until it is complete.

    Args:
        corpus: Where texts come from now; as the recipe says by default.
        once: Make the one that is due now, if any, and return.
        made: Called with each file.

    Raises:
        RunError: The run's subspace is never renewed, or there is no run.
        MeerkatError: The recipe, the model or the corpus is not usable.
    """
    recipe = recipe_of(directory)
    if recipe.subspace is None or not recipe.subspace.renew_every:
        raise RunError(
            f"{directory}: the subspace of this run is not renewed; start one with "
            "subspace.renew_every"
        )
    assembly = cache(lambda: assemble(recipe, progress, mask_file=mask_path(directory)))
    while True:
        done, complete = _progress_of(directory, recipe)
        if is_due(recipe, done) and not complete:
            path = renewed_mask_path(directory, done)
            if not path.exists():
                _make(directory, assembly(), corpus, path)
                made(path)
        if once or complete:
            return
        time.sleep(_LOOK_EVERY)


def _progress_of(directory: Path, recipe: Recipe) -> tuple[int, bool]:
    """Rounds that are done, 0 where the run has not begun; and are no more to come?"""
    if not Journal.exists(journal_path(directory)):
        return 0, False
    with closing(open_journal(directory)) as journal:
        return journal.rounds, journal.rounds == last_round(recipe, journal.evaluations())


def _make(
    directory: Path, assembly: Assembly, corpus: str | tuple[str, ...] | None, path: Path
) -> None:
    """Replay the journal, and write the mask with the subspace at the weights of now."""
    with closing(open_journal(directory)) as journal:
        mask = mask_of(directory, journal)
        weights = mask.weights(replay(journal).theta)
    save_mask(renewed_subspace(assembly, mask, weights, corpus), path)
