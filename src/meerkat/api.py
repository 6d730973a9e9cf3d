"""The commands as functions, with the same names: what `import meerkat` offers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from meerkat import runs
from meerkat.assembly import Calibrated, assemble
from meerkat.data.holdings import write_folders
from meerkat.data.sources import Split
from meerkat.descent import Theta
from meerkat.directory import finished, journal_path, mask_of, mask_path, open_journal, recipe_of
from meerkat.errors import MaskError, RecipeError, RunError
from meerkat.evaluation import evaluate_objective
from meerkat.exporting import save_delta, save_merged
from meerkat.journal import replay as replay_journal
from meerkat.mask.file import save_mask
from meerkat.models import load_model
from meerkat.progress import Progress
from meerkat.recipe import Recipe, load_recipe, parse_recipe
from meerkat.records import Evaluated
from meerkat.reporting import write_report
from meerkat.server.gradip import Compass
from meerkat.server.selection import Decision
from meerkat.trajectories import (
    PathSummary,
    calibration_reports,
    round_reports,
    summarise_paths,
    write_table,
)

__all__ = [
    "Gradip",
    "Replayed",
    "calibrate",
    "evaluate",
    "export",
    "gradip",
    "replay",
    "report",
    "resume",
    "run",
    "split",
]

Source = str | Path | Recipe


@dataclass(frozen=True)
class Gradip:
    """What the server sees of all paths."""

    calibration: bool
    """Are the paths those of the calibrations, or of all rounds?"""
    paths: tuple[PathSummary, ...]
    """By client."""
    decision: Decision | None
    """Who is stopped early now, if anything was decided."""


@dataclass(frozen=True)
class Replayed:
    """θ after a number of rounds."""

    rounds: int
    theta: Theta
    digest: str


def calibrate(
    recipe: Source,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Calibrated:
    """Find a recipe's mask (method.md section 2), and write it to `out` if given.

    Raises:
        MeerkatError: The recipe, the model or the corpus is not usable.
    """
    calibrated = assemble(_recipe(recipe, overrides), progress).calibrated
    if out is None:
        return calibrated
    save_mask(calibrated.mask, out)
    return dataclasses.replace(calibrated, path=Path(out))


def run(
    recipe: Source,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune as a recipe says, and return the run's summary.

    Args:
        recipe: A recipe, or the path of one.
        out: The run's directory; by default `runs/` and the recipe's name and fingerprint.
        overrides: `section.field=value`, as `--set`.

    Raises:
        MeerkatError: What was wrong; rounds that are in the journal stay there.
    """
    parsed = _recipe(recipe, overrides)
    directory = Path(out) if out else default_out(recipe, parsed)
    if parsed.runtime.engine == "flower":
        return _simulate(parsed, directory, progress, new=True)
    return runs.begin(parsed, directory, progress or Progress())


def default_out(source: Source, recipe: Recipe) -> Path:
    """Where a run goes that names no directory."""
    name = "run" if isinstance(source, Recipe) else Path(source).stem
    return Path("runs") / f"{name}-{recipe.fingerprint[:8]}"


def resume(
    directory: str | Path, recover: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Go on with a run after any interruption, and return its summary.

    Args:
        recover: Keep the good part of a damaged journal and go on from there.

    Raises:
        MeerkatError: There is no run, or it cannot go on.
    """
    directory = Path(directory)
    recipe = recipe_of(directory)
    if recipe.runtime.engine == "flower":
        summary = finished(directory, recipe, recover)
        return summary or _simulate(recipe, directory, progress, new=False)
    return runs.go_on(directory, progress or Progress(), recover)


def replay(directory: str | Path, rounds: int | None = None) -> Replayed:
    """θ after `rounds` rounds (all by default), from the journal alone.

    Raises:
        MeerkatError: There is no such run or round, or θ is not what the run recorded.
    """
    with closing(open_journal(Path(directory))) as journal:
        theta, digest = replay_journal(journal, rounds)
        return Replayed(journal.rounds if rounds is None else rounds, theta, digest)


def evaluate(
    target: str | Path,
    recipe: Source | None = None,
    split: str = "test",
    examples: int | None = None,
    rounds: int | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Evaluated:
    """Accuracy, macro-F1 and loss of a run, or of any model under a recipe's task.

    Args:
        target: A run's directory, or a model as `model.name` names one.
        recipe: The task to evaluate a model on; a run brings its own.
        split: `test` (held out) or `train`.
        examples: How many; the recipe's number by default.
        rounds: θ after so many rounds of the run.

    Raises:
        MeerkatError: The target, the recipe or the split is not usable.
    """
    directory = Path(target)
    is_run = journal_path(directory).exists()
    if split not in ("test", "train"):
        raise RunError(f"--split {split!r}: it is test or train")
    if is_run and recipe is None:
        parsed = _recipe(recipe_of(directory), overrides)
    elif recipe is not None:
        parsed = _recipe(recipe, overrides)
    else:
        raise RunError(f"{target} is no run directory; to evaluate a model give --recipe as well")
    changes = [f"evaluation.examples={examples}"] if examples is not None else []
    if is_run:  # the run's own mask, however it was found
        changes.append(f"mask.file={json.dumps(str(mask_path(directory)))}")
    else:
        changes.append(f"model.name={json.dumps(str(target))}")
    assembly = assemble(parse_recipe(parsed.model_dump(mode="json"), changes), progress)
    if is_run:
        with closing(open_journal(directory)) as journal:
            mask_of(directory, journal.header)
            theta, _ = replay_journal(journal, rounds)
        assembly.worker().space.write(theta)
    if split == "train":
        swapped = Split(assembly.split.train, assembly.split.train)
        assembly = dataclasses.replace(assembly, split=swapped)
    size = parsed.federation.batch_size
    return evaluate_objective(assembly.objective, assembly.test, size, progress=progress)


def export(
    directory: str | Path,
    to: str | Path,
    delta: bool = False,
    rounds: int | None = None,
) -> Path:
    """Write a run's model: merged, or as a sparse delta for `apply_delta`.

    Raises:
        MeerkatError: There is no such run, its base model changed, or `to` exists.
    """
    directory, to = Path(directory), Path(to)
    with closing(open_journal(directory)) as journal:
        header = journal.header
        theta, _ = replay_journal(journal, rounds)
    mask = mask_of(directory, header)
    if delta:
        save_delta(mask, theta, to)
        return to
    recipe = recipe_of(directory)
    loaded = load_model(recipe.model, recipe.runtime)
    if loaded.fingerprint != header.model:
        raise RunError(
            f"model.name = {recipe.model.name!r} is not the model that the run began with "
            f"(fingerprint {loaded.fingerprint[:12]}, journal {header.model[:12]}); restore it"
        )
    save_merged(loaded, mask, theta, to)
    return to


def gradip(
    directory: str | Path, to: str | Path | None = None, clients: Sequence[int] = ()
) -> Gradip:
    """How each client walked along the pre-training gradient (method.md section 5).

    From the journal of a run that is finished or under way, whether it selects clients or not:
    over the calibration of each client if there was one, else over all its rounds.

    Args:
        to: Write GradIP, norm and cosine of every step to this CSV file, calibrations first.
        clients: Only these clients in that file; all by default.

    Raises:
        MeerkatError: There is no such run, its mask has no gradient, or the file exists.
    """
    directory = Path(directory)
    with closing(open_journal(directory)) as journal:
        recipe, header = recipe_of(directory), journal.header
        gradient = mask_of(directory, header).gradient
        if gradient is None:
            raise MaskError(
                f"{mask_path(directory)}: a {header.mask_kind} mask keeps no pre-training "
                "gradient, which GradIP needs; set mask.kind = 'sensitivity' in a new run"
            )
        compass = Compass(gradient, header.directions)
        if to is not None:
            if Path(to).exists():
                raise RunError(f"{to} exists; choose another file")
            everything = chain(journal.calibrations(), round_reports(journal))
            write_table(compass.stream(everything), Path(to), set(clients))
        reports = calibration_reports(journal, recipe)
        calibrated = summarise_paths(compass.stream(reports), recipe.selection.later_window)
        paths = calibrated or summarise_paths(
            compass.stream(round_reports(journal)), recipe.selection.later_window
        )
        decisions = journal.decisions()
    return Gradip(bool(calibrated), tuple(paths), decisions[-1] if decisions else None)


def report(directory: str | Path) -> Path:
    """Draw a run's pictures and its page, also of an unfinished run.

    Raises:
        MeerkatError: There is no such run.
    """
    with closing(open_journal(Path(directory))) as journal:
        return write_report(Path(directory), journal)


def split(recipe: Source, to: str | Path, overrides: Sequence[str] = ()) -> list[Path]:
    """Write what each client of a recipe holds as a folder of its own, to try a deployment with.

    Raises:
        MeerkatError: The data cannot be split like this, or `to` is not an empty folder.
    """
    return write_folders(_recipe(recipe, overrides), Path(to))


def _simulate(
    recipe: Recipe, directory: Path, progress: Progress | None, new: bool
) -> dict[str, Any]:
    try:
        from meerkat.flower.simulation import simulate
    except ImportError:
        raise RecipeError(
            "runtime.engine = 'flower' needs the flower extra: pip install 'meerkat-fl[flower]'"
        ) from None
    return simulate(recipe, directory, progress or Progress(), new)


def _recipe(source: Source, overrides: Sequence[str]) -> Recipe:
    if isinstance(source, Recipe):
        return parse_recipe(source.model_dump(mode="json"), overrides)
    return load_recipe(source, overrides)
