"""Executes a run from the end of its journal to its summary, for any engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from meerkat.config import Recipe
from meerkat.engines.base import Engine
from meerkat.errors import JournalError
from meerkat.federation.state import ServerState
from meerkat.journal import Journal
from meerkat.journal.records import Header
from meerkat.progress import Progress
from meerkat.runs.best_round import is_complete
from meerkat.runs.directory import journal_path, mask_path, open_journal, summary_path
from meerkat.runs.driver import Evaluator, restore_state, train
from meerkat.runs.early_stopping import EarlyStopping, check_signal
from meerkat.runs.events import RunInfo, RunObserver
from meerkat.runs.pausing import Stops, never
from meerkat.runs.renewal import MakeMask, Renewals
from meerkat.runs.summary import summarise
from meerkat.spaces.mask_file import Mask, save_mask
from meerkat.zo.log import Log

__all__ = ["EngineFactory", "execute", "summary_if_complete"]

EngineFactory: TypeAlias = Callable[[ServerState, Log, Mask, int], tuple[Engine, Evaluator]]
"""Makes what runs the clients and what evaluates, from where the journal ends: the state, the log,
the mask that the run is in, and the position of the log at which that begins."""


def summary_if_complete(
    directory: Path, recipe: Recipe, observer: RunObserver, recover: bool = False
) -> dict[str, Any] | None:
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
        if not is_complete(journal, recipe):
            return None
        observer.run_started(RunInfo(directory, journal))
        return _finish(directory, journal, observer)


def execute(
    directory: Path,
    recipe: Recipe,
    header: Header,
    mask: Mask,
    start_engine: EngineFactory,
    make_mask: MakeMask,
    observer: RunObserver,
    progress: Progress,
    stops: Stops = never,
) -> dict[str, Any]:
    """The rounds that a run's journal lacks, or all where there is none; then its summary.

    Args:
        mask: That the run begins with; with θ_0, its `initial`.
        make_mask: Makes its subspace again in mid-run.
        stops: When to pause; the summary is then that of the rounds so far.

    Raises:
        JournalError: The run began with another model, mask or data.
        MeerkatError: See `driver.train`.
    """
    check_signal(recipe.selection, mask)
    assert mask.start is not None, "θ_0 is read with the mask"
    path = journal_path(directory)
    if Journal.exists(path):
        journal = Journal.open(path)
        _check_same(journal.header, header)
    else:
        path.unlink(missing_ok=True)  # a journal whose header was never written
        save_mask(mask, mask_path(directory))
        journal = Journal.create(path, header, mask.start)
    with closing(journal):
        federation = recipe.federation
        state, log = restore_state(journal, federation.clients, federation.local_steps)
        stopping = EarlyStopping(recipe, journal, mask.direction_gradient, observer.clients_stopped)
        renewals = Renewals(recipe, directory, journal, mask, make_mask, observer.subspace_renewed)
        engine, evaluate = start_engine(state, log, renewals.mask, renewals.begins)
        observer.run_started(RunInfo(directory, journal))
        train(
            recipe,
            journal,
            state,
            log,
            engine,
            stopping,
            renewals,
            evaluate,
            observer,
            progress,
            stops,
        )
        return _finish(directory, journal, observer)


def _finish(directory: Path, journal: Journal, observer: RunObserver) -> dict[str, Any]:
    summary = summarise(journal)
    summary_path(directory).write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    observer.run_ended(summary)
    return summary


def _check_same(recorded: Header, found: Header) -> None:
    """Is what was assembled now what the run began with?"""
    ours, theirs = asdict(found), asdict(recorded)
    for field in ("fingerprint", "model", "configuration", "mask", "space", "noise", "partition"):
        if ours[field] != theirs[field]:
            raise JournalError(
                f"the run began with another {field} ({theirs[field][:12]}, now "
                f"{ours[field][:12]}): the data, the model or the machine changed; restore it, or "
                "start another run"
            )
