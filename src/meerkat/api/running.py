"""Before and for a run: calibrate, compare, plan, recalibrate, run, resume, schema, split, tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meerkat.api.recipes import Source, recipe_from
from meerkat.config import Recipe
from meerkat.extras import needed_extra
from meerkat.progress import Progress
from meerkat.reporting.observer import ReportWriter
from meerkat.runs.directory import check_free, recipe_of
from meerkat.runs.events import Observers, RunObserver
from meerkat.runs.execution import summary_if_complete
from meerkat.runs.lock import locked
from meerkat.runs.recipe_schema import recipe_schema
from meerkat.runs.watching import ProgressObserver, SelectionWriter
from meerkat.spaces.mask_file import save_mask
from meerkat.tracking.observer import tracked

if TYPE_CHECKING:
    from meerkat.comparison.comparing import Comparison
    from meerkat.comparison.tuning import Tuned
    from meerkat.runs.finding_mask import FoundMask
    from meerkat.runs.plan_figures import Plan

__all__ = [
    "calibrate",
    "compare",
    "default_out",
    "plan",
    "recalibrate",
    "resume",
    "run",
    "schema",
    "split",
    "tune",
]


def calibrate(
    recipe: Source,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> FoundMask:
    """Find a recipe's mask (method.md section 2), and write it to `out` if given.

    Raises:
        MeerkatError: The recipe, the model or the corpus is not usable.
    """
    with needed_extra("train"):
        from meerkat.runs.assembly import assemble
        from meerkat.runs.fit import fit_of
    assembly = assemble(recipe_from(recipe, overrides), progress)
    found = dataclasses.replace(assembly.found_mask, fit=fit_of(assembly))
    if out is None:
        return found
    save_mask(found.mask, out)
    return dataclasses.replace(found, path=Path(out))


def compare(
    grid: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    jobs: int = 0,
    only_tables: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Make the runs that a grid lacks, and its tables and pictures.

    Args:
        grid: A grid's file: methods, cases, budget, search and seeds.
        out: Where runs and tables go; by default under `comparisons/`, by the grid's name.
        overrides: `field=value` of the grid, as `--set`.
        jobs: Runs at a time; 0 is one for every two cores, or one where there is a GPU.
        only_tables: Make no run; tables and pictures of those that are there.

    Raises:
        MeerkatError: The grid is not valid, or runs could not be made; those that were are kept.
    """
    with needed_extra("compare"):
        from meerkat.comparison.comparing import compare_methods
    directory = Path(out) if out else Path("comparisons") / Path(grid).stem
    return compare_methods(Path(grid), directory, overrides, jobs, only_tables, progress)


def plan(
    recipe: Source,
    overrides: Sequence[str] = (),
    measure: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """What a run of a recipe will need: memory, disk, bytes, forward passes; no weight is loaded.

    Args:
        measure: Load model and data, and time a few passes: what the run will take here.

    Raises:
        MeerkatError: The recipe or the model is not usable.
    """
    with needed_extra("train"):
        from meerkat.runs.planning import plan_run
    return plan_run(recipe_from(recipe, overrides), measure, progress)


def recalibrate(
    directory: str | Path,
    corpus: str | Path | None = None,
    once: bool = False,
    made: Callable[[Path], None] = lambda path: None,
    progress: Progress | None = None,
) -> None:
    """Renew the subspace of a run whenever its server waits for that (method.md section 9).

    A server without a model needs it where the recipe has `subspace.renew_every`: run it beside
    the server, on a machine that has the model and sees the run's directory.

    Args:
        corpus: A text file that texts come from now, as where data have changed.
        once: Make what is due now, and return; by default stay until the run is complete.
        made: Called with each file.

    Raises:
        MeerkatError: There is no such run, or recipe, model or corpus are not usable.
    """
    with needed_extra("train"):
        from meerkat.runs.recalibrating import renew_when_due
    source = None if corpus is None else str(corpus)
    renew_when_due(Path(directory), source, once, made, progress or Progress())


def run(
    recipe: Source,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    observers: Sequence[RunObserver] | None = None,
) -> dict[str, Any]:
    """Fine-tune as a recipe says, and return the run's summary.

    Args:
        recipe: A recipe, or the path of one.
        out: The run's directory; by default `runs/` and the recipe's name and fingerprint.
        overrides: `section.field=value`, as `--set`.
        observers: Are told each event of the run, as are those of progress and selection.json,
            which every run has, and the recipe's trackers. By default one that draws the report;
            `()` for none.

    Raises:
        MeerkatError: What was wrong; rounds that are in the journal stay there.
    """
    parsed = recipe_from(recipe, overrides)
    directory = Path(out) if out else default_out(recipe, parsed)
    progress = progress or Progress()
    with _observed(parsed, observers, progress) as observer:
        if parsed.runtime.engine == "flower":
            check_free(directory)
            with needed_extra("train"):
                from meerkat.runs.assembly import assemble
                from meerkat.runs.fit import asks, fitted
            if asks(parsed):
                parsed = fitted(assemble(parsed, progress)).recipe
            return _simulate(parsed, directory, observer, progress, new=True)
        with needed_extra("train"):
            from meerkat.runs.local_run import start_run
        return start_run(parsed, directory, observer, progress)


def default_out(source: Source, recipe: Recipe) -> Path:
    """The directory of a run for which none is given."""
    name = "run" if isinstance(source, Recipe) else Path(source).stem
    return Path("runs") / f"{name}-{recipe.fingerprint[:8]}"


def resume(
    directory: str | Path,
    recover: bool = False,
    progress: Progress | None = None,
    observers: Sequence[RunObserver] | None = None,
) -> dict[str, Any]:
    """Go on with a run after any interruption, and return its summary.

    Args:
        recover: Keep the good part of a damaged journal and go on from there.
        observers: As `run`.

    Raises:
        MeerkatError: There is no run, or it cannot go on.
    """
    directory, progress = Path(directory), progress or Progress()
    recipe = recipe_of(directory)
    with _observed(recipe, observers, progress) as observer:
        if recipe.runtime.engine == "flower":
            with locked(directory):
                summary = summary_if_complete(directory, recipe, observer, recover)
            return summary or _simulate(recipe, directory, observer, progress, new=False)
        with needed_extra("train"):
            from meerkat.runs.local_run import resume_run
        return resume_run(directory, observer, progress, recover)


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe (draft 2020-12), which editors complete and check recipes by."""
    return recipe_schema()


def split(recipe: Source, to: str | Path, overrides: Sequence[str] = ()) -> list[Path]:
    """Write the examples of each client of a recipe to a folder of its own, to try a deployment.

    Raises:
        MeerkatError: The data cannot be split like this, or `to` is not an empty folder.
    """
    with needed_extra("train"):
        from meerkat.data.clients import write_client_folders
    return write_client_folders(recipe_from(recipe, overrides), Path(to))


def tune(
    recipe: str | Path,
    out: str | Path | None = None,
    to: str | Path | None = None,
    tries: Sequence[str] = (),
    passes: int | None = None,
    validation: int = 256,
    overrides: Sequence[str] = (),
    jobs: int = 0,
    progress: Progress | None = None,
) -> Tuned:
    """Find a recipe's learning rate, or other fields, on validation examples, and write the recipe.

    By successive halving; called again after any interruption, it goes on where it was.

    Args:
        recipe: A recipe's file.
        out: Where the trials' runs and their table go; by default under `tuning/`.
        to: Where the tuned recipe goes; `tuned.toml` in `out` by default.
        tries: `section.field=[value, …]`; by default the rates of the recipe's kind of mask.
        passes: Budget: example passes of all trials; those of one run of the recipe by default.
        validation: Held-out examples to choose by, where the recipe keeps none.
        jobs: Trials at a time; 0 is one for every two cores, or one where there is a GPU.

    Raises:
        MeerkatError: The recipe or the budget is not usable, or no trial got better.
    """
    with needed_extra("train"):
        from meerkat.comparison.tuning import tune_recipe
    path = Path(recipe)
    directory = Path("tuning") / path.stem if out is None else Path(out)
    target = None if to is None else Path(to)
    return tune_recipe(
        path, directory, target, tries, passes, validation, overrides, jobs, progress
    )


@contextmanager
def _observed(
    recipe: Recipe, wanted: Sequence[RunObserver] | None, progress: Progress
) -> Iterator[RunObserver]:
    """All that a run's events are told."""
    extra = [ReportWriter()] if wanted is None else wanted
    with tracked(recipe) as trackers:
        yield Observers([ProgressObserver(progress), SelectionWriter(), *trackers, *extra])


def _simulate(
    recipe: Recipe, directory: Path, observer: RunObserver, progress: Progress, new: bool
) -> dict[str, Any]:
    with needed_extra("flower"):
        from meerkat.flower.simulation import simulate
    return simulate(recipe, directory, observer, progress, new)
