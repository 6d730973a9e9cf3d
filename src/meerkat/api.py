"""The commands as functions, with the same names: what `import meerkat` offers.

What needs a model is imported where it is used, so that a server without torch has the rest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meerkat.config import Recipe, load_recipe, parse_recipe
from meerkat.config.reading import with_files
from meerkat.errors import RunError
from meerkat.extras import needed_extra
from meerkat.journal import replay as replay_journal
from meerkat.journal.records import Evaluated
from meerkat.progress import Progress
from meerkat.reporting.observer import ReportWriter
from meerkat.runs.best_round import Rounds, wanted_rounds
from meerkat.runs.directory import (
    check_free,
    journal_path,
    mask_of,
    mask_path,
    open_journal,
    recipe_of,
)
from meerkat.runs.events import Observers, RunObserver
from meerkat.runs.execution import summary_if_complete
from meerkat.runs.lock import locked
from meerkat.runs.recipe_schema import recipe_schema
from meerkat.runs.trajectories import Gradip, read_gradip
from meerkat.runs.watching import ProgressObserver, SelectionWriter
from meerkat.spaces.mask_file import save_mask
from meerkat.tracking.observer import tracked
from meerkat.zo.state import ModelState, Theta

if TYPE_CHECKING:
    from meerkat.comparison.comparing import Comparison
    from meerkat.comparison.tuning import Tuned
    from meerkat.runs.answers import Answered
    from meerkat.runs.finding_mask import FoundMask
    from meerkat.runs.plan_figures import Plan
    from meerkat.spaces.base import ParameterSpace

__all__ = [
    "Gradip",
    "Replayed",
    "calibrate",
    "compare",
    "evaluate",
    "export",
    "gradip",
    "harness",
    "plan",
    "push",
    "recalibrate",
    "replay",
    "report",
    "resume",
    "run",
    "schema",
    "split",
    "tune",
]

Source = str | Path | Recipe


@dataclass(frozen=True)
class Replayed:
    """The training state after a number of rounds."""

    rounds: int
    state: ModelState

    @property
    def theta(self) -> Theta:
        return self.state.theta

    @property
    def digest(self) -> str:
        """Of the whole state."""
        return self.state.digest


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
    assembly = assemble(_recipe(recipe, overrides), progress)
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


def harness(
    target: str | Path,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    recipe: Source | None = None,
    rounds: Rounds = None,
    overrides: Sequence[str] = (),
    batch_size: int = 8,
) -> dict[str, Any]:
    """Results of a run, or of any model, on tasks of lm-evaluation-harness, as that gives them.

    Args:
        target: A run's directory, or a model as `model.name` names one.
        tasks: Names of its tasks, or of those in `include_path`.
        include_path: A folder of task files (YAML) of one's own, whose data may be local.
        limit: At most so many examples of each task.
        recipe: How a model is loaded: its `model.dtype` and `[runtime]`.
        rounds: As `evaluate`.

    Raises:
        MeerkatError: The extra `harness` is missing, or target or a task is not usable.
    """
    with needed_extra("train"):
        from meerkat.runs.harness import harness_results, model_of, run_model
    directory, include = Path(target), None if include_path is None else Path(include_path)
    if journal_path(directory).exists():
        parsed = _recipe(recipe_of(directory), overrides)
        with run_model(directory, rounds, parsed) as loaded:
            return harness_results(loaded, tasks, include, limit, batch_size)
    parsed_or_none = None if recipe is None else _recipe(recipe, overrides)
    loaded = model_of(str(target), parsed_or_none)
    return harness_results(loaded, tasks, include, limit, batch_size)


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
    return plan_run(_recipe(recipe, overrides), measure, progress)


def push(folder: str | Path, repository: str, public: bool = False) -> str:
    """Upload a folder that `export` wrote to a hub, and return its address there.

    Args:
        repository: `OWNER/NAME`; it is made, as a private one, if there is none.
        public: Make a new one public.

    Raises:
        RunError: The folder is no export, or the hub refuses or cannot be reached.
    """
    with needed_extra("train"):
        from meerkat.exporting.hub import push_folder
    return push_folder(Path(folder), repository, public)


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
    parsed = _recipe(recipe, overrides)
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


def replay(directory: str | Path, rounds: Rounds = None, audit: bool = False) -> Replayed:
    """The training state after `rounds` rounds (all by default), from the journal alone.

    Args:
        rounds: `best` is the round with the best validation score.
        audit: Check the whole journal and replay it from the start, without its checkpoints.

    Raises:
        MeerkatError: There is no such run or round, or θ is not what the run recorded.
    """
    with closing(open_journal(Path(directory), audit=audit)) as journal:
        done = wanted_rounds(journal, rounds)
        state = replay_journal(journal, done, audit)
        return Replayed(journal.rounds if done is None else done, state)


def evaluate(
    target: str | Path,
    recipe: Source | None = None,
    split: str = "test",
    examples: int | None = None,
    rounds: Rounds = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    show: int = 0,
    shown: Callable[[Answered], None] = lambda answered: None,
) -> Evaluated:
    """The metrics of a run, or of any model under a recipe's task.

    Args:
        target: A run's directory, or a model as `model.name` names one.
        recipe: The task to evaluate a model on; a run brings its own.
        split: `test` (held out, without validation examples), `validation`, or `train`.
        examples: At most so many; the recipe's number by default.
        rounds: θ after so many rounds of the run; `best` is the one with the best validation score.
        show: So many examples, the first, whose answers are given to `shown` before the evaluation.

    Raises:
        MeerkatError: The target, the recipe or the split is not usable.
    """
    with needed_extra("train"):
        from meerkat.data.clients import examples_of
        from meerkat.runs.answers import answers
        from meerkat.runs.assembly import EncodedExamples, assemble
        from meerkat.runs.evaluation import evaluate_objective
        from meerkat.spaces.linear import space_of
    directory = Path(target)
    is_run = journal_path(directory).exists()
    if split not in ("test", "validation", "train"):
        raise RunError(f"--split {split!r}: it is test, validation or train")
    if is_run and recipe is None:
        parsed = _recipe(recipe_of(directory), overrides)
    elif recipe is not None:
        parsed = _recipe(recipe, overrides)
    else:
        raise RunError(f"{target} is no run directory; to evaluate a model give --recipe as well")
    changes = [] if is_run else [f"model.name={json.dumps(str(target))}"]
    if is_run:
        own = recipe_of(directory)
        if "lora" in (own.mask.kind, parsed.mask.kind):  # the model has the factors of the run
            parsed = parsed.model_copy(update={"mask": own.mask, "subspace": own.subspace})
    # A run has a mask of its own, however it was found.
    mask_file = mask_path(directory) if is_run else None
    assembly = assemble(_recipe(parsed, changes), progress, mask_file=mask_file)
    chosen = examples_of(parsed, assembly.split, split, examples)
    space: ParameterSpace | None = None
    if is_run:
        with closing(open_journal(directory)) as journal:
            done = wanted_rounds(journal, rounds)
            mask, state = mask_of(directory, journal, done), replay_journal(journal, done)
        _ = assembly.found_mask  # checks the model, as it was loaded
        assembly.quantise()
        space = space_of(assembly.loaded.model, mask)
        space.write(state.theta)
    encoded = EncodedExamples(chosen, assembly.encoder)
    try:
        for answered in answers(assembly, encoded[:show]):
            shown(answered)
        return evaluate_objective(
            assembly.objective, encoded, assembly.metrics, progress=progress, write=assembly.write
        )
    finally:
        if space is not None:
            space.restore()


def export(
    directory: str | Path,
    to: str | Path,
    delta: bool = False,
    rounds: Rounds = None,
    peft: bool = False,
    shira: bool = False,
) -> Path:
    """Write a run's model: merged, as a sparse delta for `apply_delta`, or as peft's adapter.

    All but a delta are folders with a model card, the recipe, and a list of what was written.

    Args:
        peft: Write LoRA factors, which `peft.PeftModel.from_pretrained` loads over the base model:
            those of a run with `mask.kind = "lora"`, or the exact ones of a sparse change.
        shira: Write a sparse change as peft's SHiRA adapter.
        rounds: As `evaluate`.

    Raises:
        MeerkatError: There is no such run, its base model changed, or `to` exists.
    """
    forms = {"--delta": delta, "--peft": peft, "--shira": shira}
    wanted = [name for name, given in forms.items() if given]
    if len(wanted) > 1:
        raise RunError(f"{' and '.join(wanted)} exclude each other: take one")
    with needed_extra("train"):
        from meerkat.exporting.exporting import export_run
    return export_run(Path(directory), Path(to), wanted[0] if wanted else None, rounds)


def gradip(
    directory: str | Path, to: str | Path | None = None, clients: Sequence[int] = ()
) -> Gradip:
    """GradIP: how each client's steps lie to the pre-training gradient (method.md section 5).

    From the journal of a run that is finished or under way, whether it stops clients early or not:
    over each client's calibration if there was one, else over all its rounds.

    Args:
        to: Write GradIP, norm and cosine of every step to this CSV file, calibrations first.
        clients: Only these clients in that file; all by default.

    Raises:
        MeerkatError: There is no such run, its mask has no gradient, or the file exists.
    """
    return read_gradip(Path(directory), None if to is None else Path(to), set(clients))


def report(directory: str | Path) -> Path:
    """Draw a run's pictures and its page, also of an unfinished run.

    Raises:
        MeerkatError: There is no such run.
    """
    with needed_extra("report"):
        from meerkat.reporting.writing import write_report
    with closing(open_journal(Path(directory))) as journal:
        return write_report(Path(directory), journal)


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
    return write_client_folders(_recipe(recipe, overrides), Path(to))


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


def _recipe(source: Source, overrides: Sequence[str]) -> Recipe:
    if isinstance(source, Recipe):
        if not overrides:
            return source
        return with_files(parse_recipe(source.model_dump(mode="json"), overrides))
    return load_recipe(source, overrides)
