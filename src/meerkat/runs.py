"""A run whose clients are all in this process: begin, go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meerkat.assembly import Assembly, assemble
from meerkat.descent import Theta
from meerkat.directory import carry_out, claimed, finished, recipe_of
from meerkat.engines import Engine
from meerkat.engines.local import LocalEngine
from meerkat.evaluation import evaluate_objective
from meerkat.progress import Progress
from meerkat.recipe import Recipe
from meerkat.records import Evaluated
from meerkat.server.state import Log, ServerState
from meerkat.training import Evaluate

__all__ = ["begin", "go_on"]


def begin(recipe: Recipe, directory: Path, progress: Progress) -> dict[str, Any]:
    """Start a run in a directory that holds none, and see it through.

    Raises:
        RunError: The directory holds a run.
        MeerkatError: See `assembly.assemble` and `training.train`.
    """
    with claimed(directory, recipe):
        return _see_through(assemble(recipe, progress), directory, progress)


def go_on(directory: Path, progress: Progress, recover: bool = False) -> dict[str, Any]:
    """Go on with a run after any interruption; a complete run is only summed up again.

    Args:
        recover: Keep the good part of a damaged journal and go on from there.

    Raises:
        RunError: There is no run.
        RecipeError: recipe.json is not that of the journal.
        MeerkatError: See `assembly.assemble` and `training.train`.
    """
    recipe = recipe_of(directory)
    summary = finished(directory, recipe, recover)
    if summary is not None:
        return summary
    return _see_through(assemble(recipe, progress), directory, progress)


def _see_through(assembly: Assembly, directory: Path, progress: Progress) -> dict[str, Any]:
    recipe, mask = assembly.recipe, assembly.calibrated.mask
    worker = assembly.worker()

    def evaluate(round: int, theta: Theta) -> Evaluated:
        worker.space.write(theta)
        size = recipe.federation.batch_size
        return evaluate_objective(assembly.objective, assembly.test, size, round, progress)

    def crew(state: ServerState, log: Log) -> tuple[Engine, Evaluate]:
        worker.synchronise(state.theta, len(log))
        return LocalEngine(worker, assembly.clients(), progress.advance), evaluate

    try:
        return carry_out(directory, recipe, assembly.header(), mask, crew, progress)
    finally:
        worker.space.restore()
