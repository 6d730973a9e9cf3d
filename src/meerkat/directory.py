"""A run's directory: what is in it, and a run from where it stands to its end.

DIR/recipe.json      the recipe; only [runtime] and [network] may be edited
DIR/mask.safetensors the mask
DIR/journal.sqlite   the record
DIR/selection.json   who is stopped early and why, where a selection was made
DIR/summary.json     the figures, once the run is complete
DIR/report.html      the report, and its pictures under DIR/report/
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from meerkat.early_stopping import EarlyStopping, check_signal
from meerkat.engines import Engine
from meerkat.errors import JournalError, MeerkatError, RecipeError, RunError
from meerkat.journal import Journal
from meerkat.mask.file import Mask, load_mask, save_mask
from meerkat.progress import Progress
from meerkat.recipe import Recipe, load_recipe
from meerkat.records import Header
from meerkat.reporting import write_report
from meerkat.server.state import Log, ServerState
from meerkat.summary import describe_selection, summarise
from meerkat.training import Evaluate, restore_state, train

__all__ = [
    "carry_out",
    "check_free",
    "claimed",
    "finished",
    "holds_run",
    "journal_path",
    "mask_of",
    "mask_path",
    "open_journal",
    "recipe_of",
]

_RECIPE, _MASK, _JOURNAL, _SELECTION, _SUMMARY = (
    "recipe.json",
    "mask.safetensors",
    "journal.sqlite",
    "selection.json",
    "summary.json",
)

Crew: TypeAlias = Callable[[ServerState, Log], tuple[Engine, Evaluate]]
"""Who runs and evaluates, from where the journal ends."""


def holds_run(directory: Path) -> bool:
    """Is there a run, begun or not?"""
    return (directory / _RECIPE).exists() or (directory / _JOURNAL).exists()


def check_free(directory: Path) -> None:
    """May a new run go here?

    Raises:
        RunError: The directory holds a run.
    """
    if holds_run(directory):
        raise RunError(
            f"{directory} holds another run; choose another --out, or go on with "
            f"`meerkat resume {directory}`"
        )


@contextmanager
def claimed(directory: Path, recipe: Recipe) -> Iterator[None]:
    """A directory for a new run; where nothing has begun, an error leaves no trace of it.

    Raises:
        RunError: The directory holds a run.
    """
    check_free(directory)
    # The recipe is written first, so that a run that is killed at any moment can be resumed.
    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / (_RECIPE + ".part")
    scratch.write_text(recipe.to_json())
    scratch.replace(directory / _RECIPE)
    try:
        yield
    except MeerkatError:
        if not Journal.exists(journal_path(directory)):
            for name in (_RECIPE, _MASK, _JOURNAL):
                (directory / name).unlink(missing_ok=True)
            if not any(directory.iterdir()):
                directory.rmdir()
        raise


def finished(directory: Path, recipe: Recipe, recover: bool = False) -> dict[str, Any] | None:
    """The summary of a run that is complete, written again; None where there is more to do.

    What is wrong with recipe or journal shows here, before any model is loaded.

    Args:
        recover: Keep the good part of a damaged journal.

    Raises:
        RecipeError: recipe.json is not that of the journal.
        JournalError: The journal is damaged.
    """
    path = journal_path(directory)
    if recover and path.exists():
        Journal.recover(path).close()
    if not Journal.exists(path):
        return None
    with closing(open_journal(directory)) as journal:
        return _finish(directory, journal) if _is_complete(journal, recipe) else None


def carry_out(
    directory: Path, recipe: Recipe, header: Header, mask: Mask, crew: Crew, progress: Progress
) -> dict[str, Any]:
    """The rounds that a run's journal lacks, or all where there is none; then its summary.

    Args:
        mask: With θ_0, its `initial`.

    Raises:
        JournalError: The run began with another model, mask or data.
        MeerkatError: See `training.train`.
    """
    check_signal(recipe, mask)
    assert mask.initial is not None, "θ_0 is read with the mask"
    path = journal_path(directory)
    if Journal.exists(path):
        journal = Journal.open(path)
        _check_same(journal.header, header)
    else:
        path.unlink(missing_ok=True)  # a journal whose header was never written
        save_mask(mask, directory / _MASK)
        journal = Journal.create(path, header, mask.initial)
    with closing(journal):
        federation = recipe.federation
        state, log = restore_state(journal, federation.clients, federation.local_steps)
        stopping = EarlyStopping(
            recipe, journal, mask.gradient, lambda: _write_selection(directory, journal)
        )
        engine, evaluate = crew(state, log)
        train(recipe, journal, state, log, engine, stopping, evaluate, progress)
        return _finish(directory, journal)


def _is_complete(journal: Journal, recipe: Recipe) -> bool:
    rounds = recipe.federation.rounds
    return journal.rounds == rounds and any(e.round == rounds for e in journal.evaluations())


def _finish(directory: Path, journal: Journal) -> dict[str, Any]:
    _write_selection(directory, journal)
    summary = summarise(journal)
    (directory / _SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    write_report(directory, journal)
    return summary


def _write_selection(directory: Path, journal: Journal) -> None:
    selection = describe_selection(journal)
    if selection is not None:
        (directory / _SELECTION).write_text(json.dumps(selection, indent=1) + "\n")


def _check_same(recorded: Header, found: Header) -> None:
    """Is what was assembled now what the run began with?"""
    ours, theirs = asdict(found), asdict(recorded)
    for field in ("fingerprint", "model", "mask", "noise", "partition"):
        if ours[field] != theirs[field]:
            raise JournalError(
                f"the run began with another {field} ({theirs[field][:12]}, now "
                f"{ours[field][:12]}): the data, the model or the machine changed; restore it, or "
                "start another run"
            )


def journal_path(directory: Path) -> Path:
    return directory / _JOURNAL


def mask_path(directory: Path) -> Path:
    return directory / _MASK


def open_journal(directory: Path) -> Journal:
    """The journal of a run directory, which must be of the directory's recipe.

    Raises:
        RunError: There is no run, or it has not begun.
        RecipeError: recipe.json is not that of the journal.
        JournalError: The journal is damaged.
    """
    if not directory.is_dir():
        raise RunError(f"{directory}: no such run directory")
    if not Journal.exists(journal_path(directory)):
        raise RunError(f"{directory} holds no journal; `meerkat resume {directory}` begins the run")
    journal = Journal.open(journal_path(directory))
    if (directory / _RECIPE).exists():
        edited, kept = recipe_of(directory), journal.header.fingerprint
        if edited.fingerprint != kept:
            journal.close()
            raise RecipeError(
                f"{directory / _RECIPE} is not the recipe of this journal (fingerprint "
                f"{edited.fingerprint[:12]}, journal {kept[:12]}): only [runtime] and "
                "[network] may change; put it back, or start another run"
            )
    return journal


def recipe_of(directory: Path) -> Recipe:
    """The recipe of a run directory.

    Raises:
        RunError: There is no run.
    """
    path = directory / _RECIPE
    if not path.exists():
        raise RunError(f"{directory} holds no run; start one with `meerkat run RECIPE --out`")
    return load_recipe(path)


def mask_of(directory: Path, header: Header) -> Mask:
    """The mask of a run directory, which must be the one that the journal names.

    Raises:
        MaskError: It is missing or damaged.
        JournalError: It is another.
    """
    mask = load_mask(mask_path(directory), header.model)
    if mask.digest != header.mask:
        raise JournalError(
            f"{directory / _MASK} is not the mask of this run ({mask.digest[:12]}, journal "
            f"{header.mask[:12]}); put the run's own mask back"
        )
    return mask
