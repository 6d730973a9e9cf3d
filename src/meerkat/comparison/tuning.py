"""Finds a recipe's settings by validation: successive halving over runs, resumed where they are."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meerkat.comparison.halving import Plan, Trial, plan_halving, read_tries
from meerkat.comparison.outcome import main_metric
from meerkat.comparison.running import diverged_in, make_run, worker_pool
from meerkat.config import load_recipe, parse_recipe
from meerkat.config.reading import read_data, with_overrides, with_settings
from meerkat.config.writing import to_toml
from meerkat.errors import RunError
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated
from meerkat.progress import Progress
from meerkat.runs.best_round import score_of
from meerkat.runs.directory import journal_path, open_journal
from meerkat.runs.given import Given
from meerkat.runs.lock import locked
from meerkat.tasks.metrics import LOSS, metric_title
from meerkat.tasks.metrics.validation import VALIDATION

__all__ = ["Tried", "Tuned", "tune_recipe"]


@dataclass(frozen=True)
class Tried:
    """What a trial gave."""

    trial: Trial
    evaluations: tuple[Evaluated, ...]
    """Before its first round and at the end of each of its rungs."""
    fate: str
    """`chosen`, `kept to the end`, `not among the better half`, or why it was dropped."""
    passes: int
    """Example passes that it took."""


@dataclass(frozen=True)
class Tuned:
    """What was found."""

    settings: dict[str, Any]
    """Of the chosen trial, by field."""
    trials: tuple[Tried, ...]
    recipe: Path
    """The recipe with these settings, written."""
    table: Path
    """All trials, written."""

    @property
    def passes(self) -> int:
        """Example passes of all trials."""
        return sum(tried.passes for tried in self.trials)


def tune_recipe(
    path: Path,
    out: Path,
    to: Path | None = None,
    tries: Sequence[str] = (),
    passes: int | None = None,
    validation: int = 256,
    overrides: Sequence[str] = (),
    jobs: int = 0,
    progress: Progress | None = None,
) -> Tuned:
    """See `meerkat.tune`.

    Raises:
        MeerkatError: The recipe, what is tried or the budget is not usable, or no trial got better.
    """
    progress = progress or Progress()
    data = with_overrides(read_data(path), overrides)
    base = parse_recipe(data, origin=str(path))
    plan = plan_halving(data, read_tries(tries, base), passes, validation)
    to = out / "tuned.toml" if to is None else to
    if to.exists() and to.resolve() == path.resolve():
        raise RunError(f"--to {to} is the recipe itself; name another file")
    cores = os.cpu_count() or 1
    jobs = jobs or (1 if torch.cuda.is_available() else max(1, cores // 2))
    with locked(out):
        threads = base.runtime.threads or max(1, cores // jobs)
        chosen = _halve(plan, out, jobs, threads, progress)
        tried = tuple(_tried(plan, trial, out, chosen) for trial in plan.trials)
        if chosen is None:
            starts = ", ".join(f"{each.trial.name}: {each.fate}" for each in tried)
            raise RunError(f"no trial got better than it began ({starts}); try other values: --try")
        text = to_toml(with_settings(data, chosen.settings))
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text, "utf-8")
        load_recipe(to)
        table = out / "trials.md"
        table.write_text(as_markdown(tried), "utf-8")
    return Tuned(chosen.settings, tried, to, table)


def as_markdown(tried: Sequence[Tried]) -> str:
    """The trials as a table: score (loss) on validation before and after each rung."""
    rungs = max(len(each.evaluations) for each in tried)
    metric = next((_metric(each) for each in tried if each.evaluations), LOSS)
    heads = ["trial", "before", *(f"rung {rung}" for rung in range(1, rungs)), "passes", ""]
    lines = [
        f"Validation {metric_title(metric)} (loss), and the rounds done.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for each in tried:
        shown = [_shown(found, metric) for found in each.evaluations]
        shown += [""] * (rungs - len(shown))
        cells = [each.trial.name, *shown, f"{each.passes:,}", each.fate]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def advance(trial: Trial, out: Path, rounds: int, threads: int) -> None:
    """Make a trial's run up to so many rounds, or go on with it; nothing where that is done.

    Raises:
        MeerkatError: It cannot be made.
    """
    given = Given(stops=lambda done: done >= rounds, tests=False)
    make_run(trial.recipe, trial.directory(out), threads, given)


def _halve(plan: Plan, out: Path, jobs: int, threads: int, progress: Progress) -> Trial | None:
    """The trial that is left; None where all are out."""
    alive = list(plan.trials)
    progress.start("Trials", sum(plan.sizes))
    with worker_pool(jobs, threads) as pool:
        for rung in range(len(plan.sizes)):
            due = [t for t in alive if _score(t, out, rung) is None and not _out(t, out, rung)]
            for _ in range(len(alive) - len(due)):
                progress.advance()
            waiting: dict[Future[None], Trial] = {
                pool.submit(advance, t, out, t.rounds[rung], threads): t for t in due
            }
            for future in as_completed(waiting):
                _check(future, waiting[future])
                progress.advance()
                progress.show({"last": waiting[future].name})
            scored = [(_score(t, out, rung), t) for t in alive if not _out(t, out, rung)]
            better = sorted(((s, t) for s, t in scored if s is not None), key=lambda p: p[0])[::-1]
            alive = [t for _, t in better[: math.ceil(plan.sizes[rung] / 2)]]
            if not alive:
                return None
    return alive[0]


def _check(future: Future[None], trial: Trial) -> None:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise RunError(
            f"trial {trial.name}, or one beside it: its process was killed, as where memory is "
            "short; lower --jobs and go on with the same command"
        )
    if error is not None:
        raise error


def _evaluations(trial: Trial, out: Path) -> dict[int, Evaluated]:
    """By rounds done."""
    directory = trial.directory(out)
    if not Journal.exists(journal_path(directory)):
        return {}
    with closing(open_journal(directory)) as journal:
        return {found.round: found for found in journal.evaluations()}


def _score(trial: Trial, out: Path, rung: int) -> tuple[float, ...] | None:
    """What a trial is compared by at the end of a rung; None before that."""
    found = _evaluations(trial, out).get(trial.rounds[rung])
    return None if found is None else score_of(found)


def _out(trial: Trial, out: Path, rung: int) -> str | None:
    """Why a trial is dropped at the end of a rung."""
    if (error := diverged_in(trial.directory(out))) is not None:
        return f"diverged: {error}"
    found = _evaluations(trial, out)
    name = VALIDATION + LOSS
    if 0 not in found or trial.rounds[rung] not in found:
        return None
    before, after = found[0].metrics[name], found[trial.rounds[rung]].metrics[name]
    if not after <= before:  # NaN, too
        return f"loss {after:.3f} above that of its start, {before:.3f}"
    return None


def _tried(plan: Plan, trial: Trial, out: Path, chosen: Trial | None) -> Tried:
    found = _evaluations(trial, out)
    wanted = [0, *trial.rounds]
    evaluations = tuple(found[r] for r in dict.fromkeys(wanted) if r in found)
    rungs = sum(r in found for r in trial.rounds)
    dropped = next((why for k in range(len(trial.rounds)) if (why := _out(trial, out, k))), None)
    if trial is chosen:
        fate = "chosen"
    elif dropped is not None:
        fate = dropped
    else:
        fate = "kept to the end" if rungs == len(trial.rounds) else "not among the better half"
    return Tried(trial, evaluations, fate, plan.passes(trial, rungs) if rungs else 0)


def _metric(tried: Tried) -> str:
    names = [n.removeprefix(VALIDATION) for n in tried.evaluations[0].metrics]
    return main_metric(names)


def _shown(found: Evaluated, metric: str) -> str:
    loss = found.metrics[VALIDATION + LOSS]
    score = "" if metric == LOSS else f"{found.metrics[VALIDATION + metric]:.3f} "
    return f"{score}({loss:.3f})" + (f", {found.round}" if found.round else "")
