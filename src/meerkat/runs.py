"""A run and its directory: begin, go on, finish; the recipe, the journal, the mask, the summary.

DIR/recipe.json      the recipe; only its [runtime] may be edited
DIR/mask.safetensors the mask
DIR/journal.sqlite   the record
DIR/selection.json   who is stopped early and why, where a selection was made
DIR/summary.json     the figures, once the run is complete
DIR/report.html      the report, and its pictures under DIR/report/
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meerkat.assembly import Assembly, assemble
from meerkat.descent import Theta
from meerkat.early_stopping import EarlyStopping, check_signal
from meerkat.engines.local import LocalEngine
from meerkat.errors import JournalError, MeerkatError, RecipeError, RunError
from meerkat.evaluation import evaluate_objective
from meerkat.journal import Journal, replay
from meerkat.mask import Mask, load_mask, save_mask
from meerkat.progress import Progress
from meerkat.protocol import PLAN_BYTES, encode_report
from meerkat.recipe import Recipe, load_recipe
from meerkat.records import Evaluated, Header
from meerkat.reporting import write_report
from meerkat.training import restore_state, train

__all__ = [
    "begin",
    "describe_selection",
    "go_on",
    "journal_path",
    "mask_of",
    "mask_path",
    "open_journal",
    "recipe_of",
    "summarise",
]

_RECIPE, _MASK, _JOURNAL, _SELECTION, _SUMMARY = (
    "recipe.json",
    "mask.safetensors",
    "journal.sqlite",
    "selection.json",
    "summary.json",
)


def begin(recipe: Recipe, directory: Path, progress: Progress) -> dict[str, Any]:
    """Start a run in a directory that holds none, and see it through.

    Raises:
        RunError: The directory holds a run.
        MeerkatError: See `assembly.assemble` and `training.train`.
    """
    if (directory / _RECIPE).exists() or (directory / _JOURNAL).exists():
        raise RunError(
            f"{directory} holds another run; choose another --out, or go on with "
            f"`meerkat resume {directory}`"
        )
    # The recipe is written first, so that a run that is killed at any moment can be resumed.
    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / (_RECIPE + ".part")
    scratch.write_text(recipe.to_json())
    scratch.replace(directory / _RECIPE)
    try:
        return _see_through(assemble(recipe, progress), directory, progress)
    except MeerkatError:
        if not Journal.exists(journal_path(directory)):  # nothing has begun: leave no trace
            for name in (_RECIPE, _MASK, _JOURNAL):
                (directory / name).unlink(missing_ok=True)
            if not any(directory.iterdir()):
                directory.rmdir()
        raise


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
    path = journal_path(directory)
    if recover and path.exists():
        Journal.recover(path).close()
    if Journal.exists(path):
        # What is wrong with either shows before the model is loaded; a complete run needs none.
        with closing(open_journal(directory)) as journal:
            if _is_complete(journal, recipe):
                return _finish(directory, journal)
    return _see_through(assemble(recipe, progress), directory, progress)


def _see_through(assembly: Assembly, directory: Path, progress: Progress) -> dict[str, Any]:
    recipe = assembly.recipe
    path = journal_path(directory)
    calibrated = assembly.calibrated
    check_signal(recipe, calibrated.mask)
    worker = assembly.worker()
    if Journal.exists(path):
        journal = Journal.open(path)
        _check_same(journal.header, assembly.header())
    else:
        path.unlink(missing_ok=True)  # a journal whose header was never written
        save_mask(calibrated.mask, directory / _MASK)
        journal = Journal.create(path, assembly.header(), worker.theta)
    with closing(journal):
        state, log = restore_state(
            journal, recipe.federation.clients, recipe.federation.local_steps
        )
        worker.synchronise(state.theta, len(log))
        stopping = EarlyStopping(
            recipe, journal, calibrated.mask.gradient, lambda: _write_selection(directory, journal)
        )
        engine = LocalEngine(worker, assembly.clients(), progress.advance)

        def evaluate(round: int, theta: Theta) -> Evaluated:
            worker.space.write(theta)
            size = recipe.federation.batch_size
            return evaluate_objective(assembly.objective, assembly.test, size, round, progress)

        try:
            train(recipe, journal, state, log, engine, stopping, evaluate, progress)
        finally:
            worker.space.restore()
        return _finish(directory, journal)


def _write_selection(directory: Path, journal: Journal) -> None:
    selection = describe_selection(journal)
    if selection is not None:
        (directory / _SELECTION).write_text(json.dumps(selection, indent=1) + "\n")


def describe_selection(journal: Journal) -> dict[str, Any] | None:
    """Who is stopped early and why, with each client's labels; None where nothing was decided."""
    decisions, header = journal.decisions(), journal.header
    if not decisions:
        return None
    chosen, last = json.loads(header.recipe)["selection"], decisions[-1]
    clients = []
    for verdict in last.verdicts:
        counts = header.label_counts[verdict.client]
        labels = dict(zip(header.labels, counts, strict=False)) or {"examples": sum(counts)}
        clients.append({**asdict(verdict), "labels": labels})
    return {
        **{name: chosen[name] for name in ("kind", "signal", "action")},
        "flagged": list(last.flagged),
        "decisions": [
            {
                "round": decision.round,
                "source": decision.source,
                "thresholds": decision.thresholds and asdict(decision.thresholds),
                "flagged": list(decision.flagged),
            }
            for decision in decisions
        ],
        "clients": clients,
    }


def _is_complete(journal: Journal, recipe: Recipe) -> bool:
    rounds = recipe.federation.rounds
    return journal.rounds == rounds and any(e.round == rounds for e in journal.evaluations())


def _finish(directory: Path, journal: Journal) -> dict[str, Any]:
    _write_selection(directory, journal)
    summary = summarise(journal)
    (directory / _SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    write_report(directory, journal)
    return summary


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
                f"{edited.fingerprint[:12]}, journal {kept[:12]}): only [runtime] may change; put "
                "it back, or start another run"
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


def summarise(journal: Journal) -> dict[str, Any]:
    """The figures of a run, from its journal alone."""
    header = journal.header
    recipe = json.loads(header.recipe)
    metrics = [metrics for _, metrics in journal.records()]
    answers = sum(len(record.reports) for record, _ in journal.records())
    evaluations, decisions = journal.evaluations(), journal.decisions()
    calibrated = len(journal.calibrated())
    steps = recipe["selection"]["calibration_steps"] * header.perturbations
    before = next((e for e in evaluations if e.round == 0), None)
    after = next((e for e in evaluations if e.round == journal.rounds), None)
    seconds = sum(m.seconds for m in metrics) + sum(e.seconds for e in evaluations)
    return {
        "accuracy_before": before and before.accuracy,
        "accuracy_after": after and after.accuracy,
        "macro_f1_before": before and before.macro_f1,
        "macro_f1_after": after and after.macro_f1,
        "loss_before": before and before.loss,
        "loss_after": after and after.loss,
        "evaluated_examples": before and before.examples,
        "rounds": journal.rounds,
        "clients": recipe["federation"]["clients"],
        "local_steps": recipe["federation"]["local_steps"],
        "bytes_up_per_client_round": sum(m.bytes_up for m in metrics) / max(1, answers),
        "bytes_down_per_client_round": sum(m.bytes_down for m in metrics) / max(1, answers),
        "stopped_early": list(decisions[-1].flagged) if decisions else [],
        "calibrated_clients": calibrated,
        "calibration_forward_passes": 2 * steps * calibrated,
        "calibration_bytes_up": sum(len(encode_report(r)) for r in journal.calibrations()),
        "calibration_bytes_down": PLAN_BYTES * calibrated,
        "theta_digest": replay(journal)[1],
        "mask_size": header.mask_size,
        "eligible_parameters": header.eligible,
        "model": recipe["model"]["name"],
        "seed": recipe["seed"],
        "fingerprint": header.fingerprint,
        "seconds": round(seconds, 3),
    }
