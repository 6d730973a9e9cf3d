"""What a cell gave: its evaluations with what they had cost by then."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from meerkat.comparison.cells import Cell, calibration_passes, example_passes
from meerkat.comparison.results import read_result
from meerkat.journal.records import Evaluated
from meerkat.runs.best_round import score_of
from meerkat.runs.directory import journal_path, open_journal, summary_path
from meerkat.tasks.metrics import LOSS
from meerkat.tasks.metrics.validation import VALIDATION

__all__ = ["Outcome", "Point", "better", "main_metric", "outcome_of"]


@dataclass(frozen=True)
class Point:
    """One evaluation of a run, and what a client had sent, received and computed before it."""

    round: int
    metrics: Mapping[str, float]
    bytes_up: float
    """Of a client, as all others here."""
    bytes_down: float
    passes: int
    """Over one example."""


@dataclass(frozen=True)
class Outcome:
    """A cell that is complete."""

    cell: Cell
    evaluations: tuple[Point, ...]
    """None where the run diverged."""
    error: str | None = None
    """Why it diverged."""

    @property
    def last(self) -> Point:
        return self.evaluations[-1]


def main_metric(metrics: Iterable[str]) -> str:
    """The first metric besides the loss, or the loss; not one of validation.

    >>> main_metric(["loss", "validation_loss", "accuracy"])
    'accuracy'
    """
    names = [name for name in metrics if not name.startswith(VALIDATION) and name != LOSS]
    return names[0] if names else LOSS


def better(one: Outcome, other: Outcome) -> bool:
    """Did `one` end with the better validation, as `best_round` compares evaluations?"""
    return _score(one) > _score(other)


def _score(found: Outcome) -> tuple[float, ...]:
    """Of the last evaluation; below all others where it is not finite."""
    last = found.last
    return score_of(Evaluated(last.round, dict(last.metrics), 0, 0.0)) or (-math.inf,)


def outcome_of(cell: Cell, out: Path) -> Outcome | None:
    """What a cell gave; None where it is not complete.

    Raises:
        MeerkatError: Its journal is damaged, or of another recipe.
    """
    directory = cell.directory(out)
    diverged = directory / "diverged.json"
    if diverged.exists():
        return Outcome(cell, (), json.loads(diverged.read_text("utf-8"))["error"])
    if cell.bound is not None:
        return _first_order(cell, directory)
    if not summary_path(directory).exists() or not journal_path(directory).exists():
        return None
    summary = json.loads(summary_path(directory).read_text("utf-8"))
    with closing(open_journal(directory)) as journal:
        clients, by_round = summary["clients"], [(0, 0)]
        up, down = summary["calibration_bytes_up"], summary["calibration_bytes_down"]
        for _, metrics in journal.records():
            up, down = up + metrics.bytes_up, down + metrics.bytes_down
            by_round.append((up, down))
        each, before = example_passes(cell.recipe), calibration_passes(cell.recipe)
        points = tuple(
            Point(
                found.round,
                found.metrics,
                by_round[found.round][0] / clients,
                by_round[found.round][1] / clients,
                before + each * found.round if found.round else 0,
            )
            for found in sorted(journal.evaluations(), key=lambda found: found.round)
        )
    return Outcome(cell, points)


def _first_order(cell: Cell, directory: Path) -> Outcome | None:
    found = read_result(directory)
    if found is None or not found.finished:
        return None
    each = example_passes(cell.recipe, cell.bound)
    points = tuple(
        Point(
            point.round,
            point.metrics,
            found.bytes_up * point.round,
            found.bytes_down * point.round,
            each * point.round,
        )
        for point in found.points
    )
    return Outcome(cell, points)
