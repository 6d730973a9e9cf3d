"""A run whose clients are all in this process: start, resume."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from meerkat.config import Recipe
from meerkat.engines.base import Engine
from meerkat.engines.local import LocalEngine
from meerkat.federation.algorithm import RememberingAlgorithm
from meerkat.federation.state import ServerState
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated
from meerkat.progress import Progress
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.directory import (
    claimed,
    journal_path,
    mask_path,
    open_journal,
    recipe_of,
    write_holders,
    write_recipe,
)
from meerkat.runs.driver import Evaluator
from meerkat.runs.evaluation import evaluate_objective
from meerkat.runs.events import RunObserver
from meerkat.runs.execution import execute, summary_if_complete
from meerkat.runs.finding_subspace import renewed_subspace
from meerkat.runs.fit import fitted
from meerkat.runs.given import Given
from meerkat.runs.lock import locked
from meerkat.spaces.linear import space_of
from meerkat.spaces.mask_file import Mask, save_mask
from meerkat.tasks.losses import import_objective
from meerkat.zo.log import Log
from meerkat.zo.state import ModelState

__all__ = ["resume_run", "start_run"]

_NOTHING = Given()


def start_run(
    recipe: Recipe,
    directory: Path,
    observer: RunObserver,
    progress: Progress,
    given: Given = _NOTHING,
) -> dict[str, Any]:
    """Start a run in a directory that holds none, and see it through; its summary.

    Raises:
        RunError: The directory holds a run.
        MeerkatError: See `assembly.assemble` and `driver.train`.
    """
    with locked(directory), claimed(directory, recipe):
        import_objective(recipe)
        assembly = _fitted(recipe, directory, progress, given)
        return _execute(assembly, directory, observer, progress, given)


def resume_run(
    directory: Path,
    observer: RunObserver,
    progress: Progress,
    recover: bool = False,
    given: Given = _NOTHING,
) -> dict[str, Any]:
    """Go on with a run after any interruption; a complete run is only summed up again.

    Args:
        recover: Keep the good part of a damaged journal and go on from there.

    Raises:
        RunError: There is no run.
        RecipeError: recipe.json is not that of the journal.
        MeerkatError: See `assembly.assemble` and `driver.train`.
    """
    recipe = recipe_of(directory)
    with locked(directory):
        return _resume(directory, recipe, observer, progress, recover, given)


def _resume(
    directory: Path,
    recipe: Recipe,
    observer: RunObserver,
    progress: Progress,
    recover: bool,
    given: Given,
) -> dict[str, Any]:
    summary = summary_if_complete(directory, recipe, observer, recover)
    if summary is not None:
        return summary
    import_objective(recipe)
    # A run that has begun has a mask of its own: the file or cache that it came from may be gone.
    own = mask_path(directory)
    begun = Journal.exists(journal_path(directory)) and own.exists()
    if begun:
        assembly = assemble(recipe, progress, mask_file=own, loaded=given.loaded)
    else:
        assembly = _fitted(recipe, directory, progress, given)
    return _execute(assembly, directory, observer, progress, given)


def _fitted(recipe: Recipe, directory: Path, progress: Progress, given: Given) -> Assembly:
    """What a run begins with; where that is not the recipe's subspace, it is written down."""
    assembly = fitted(assemble(recipe, progress, loaded=given.loaded))
    if assembly.recipe != recipe:
        write_recipe(assembly.recipe, directory)
    return assembly


def _execute(
    assembly: Assembly,
    directory: Path,
    observer: RunObserver,
    progress: Progress,
    given: Given,
) -> dict[str, Any]:
    recipe, mask = assembly.recipe, assembly.found_mask.mask
    worker = assembly.worker()

    def evaluate(round: int, state: ModelState) -> Evaluated:
        worker.space.write(state.theta)
        found = evaluate_objective(
            assembly.objective,
            assembly.test if given.tests else (),
            assembly.metrics,
            round,
            progress,
            validation=assembly.validation,
            write=assembly.write,
        )
        more = given.measure(assembly)
        return replace(found, metrics={**found.metrics, **more}) if more else found

    def answered() -> None:
        progress.advance()
        prefix = assembly.objective.prefix
        if prefix is not None and prefix.kept.room:
            progress.show({"first blocks kept": prefix.kept.described})

    def start_engine(
        state: ServerState, log: Log, mask: Mask, begins: int
    ) -> tuple[Engine, Evaluator]:
        in_model = partial(space_of, assembly.loaded.model, device=assembly.theta_device)
        engine = LocalEngine(worker, assembly.clients(), in_model, answered)
        engine.renew(mask, begins, state.model, len(log))
        if isinstance(worker.algorithm, RememberingAlgorithm):
            with closing(open_journal(directory)) as journal:
                engine.recall(record for record, _ in journal.records())
        return engine, evaluate

    def make_mask(path: Path, mask: Mask, weights: Float32[np.ndarray, " n"]) -> None:
        worker.space.restore()
        save_mask(renewed_subspace(assembly, mask, weights), path)

    header = assembly.header()
    write_holders(directory, assembly.holders())
    try:
        return execute(
            directory,
            recipe,
            header,
            mask,
            start_engine,
            make_mask,
            observer,
            progress,
            given.stops,
        )
    finally:
        worker.space.restore()
