"""A run whose clients are all in this process: start, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meerkat.config import Recipe
from meerkat.engines.base import Engine
from meerkat.engines.local import LocalEngine
from meerkat.federation.state import ServerState
from meerkat.journal.records import Evaluated
from meerkat.progress import Progress
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.directory import claimed, recipe_of
from meerkat.runs.driver import Evaluator
from meerkat.runs.evaluation import evaluate_objective
from meerkat.runs.events import RunObserver
from meerkat.runs.execution import execute, summary_if_complete
from meerkat.zo.log import Log
from meerkat.zo.state import ModelState

__all__ = ["resume_run", "start_run"]


def start_run(
    recipe: Recipe, directory: Path, observer: RunObserver, progress: Progress
) -> dict[str, Any]:
    """Start a run in a directory that holds none, and see it through; its summary.

    Raises:
        RunError: The directory holds a run.
        MeerkatError: See `assembly.assemble` and `driver.train`.
    """
    with claimed(directory, recipe):
        return _execute(assemble(recipe, progress), directory, observer, progress)


def resume_run(
    directory: Path, observer: RunObserver, progress: Progress, recover: bool = False
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
    summary = summary_if_complete(directory, recipe, observer, recover)
    if summary is not None:
        return summary
    return _execute(assemble(recipe, progress), directory, observer, progress)


def _execute(
    assembly: Assembly, directory: Path, observer: RunObserver, progress: Progress
) -> dict[str, Any]:
    recipe, mask = assembly.recipe, assembly.found_mask.mask
    worker = assembly.worker()

    def evaluate(round: int, state: ModelState) -> Evaluated:
        worker.space.write(state.theta)
        return evaluate_objective(
            assembly.objective,
            assembly.test,
            recipe.federation.batch_size,
            assembly.metrics,
            round,
            progress,
        )

    def start_engine(state: ServerState, log: Log) -> tuple[Engine, Evaluator]:
        worker.synchronise(state.model, len(log))
        return LocalEngine(worker, assembly.clients(), progress.advance), evaluate

    try:
        return execute(directory, recipe, assembly.header(), mask, start_engine, observer, progress)
    finally:
        worker.space.restore()
