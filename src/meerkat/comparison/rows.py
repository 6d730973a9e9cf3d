"""The rows of a comparison's table: mean and spread over seeds, and a paired test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from meerkat.comparison.outcome import Outcome, Point, main_metric
from meerkat.comparison.running import GroupOutcome
from meerkat.tasks.metrics.validation import VALIDATION

__all__ = ["Cost", "Row", "Spread", "paired", "rows_of", "spread"]

ZERO_SHOT = "before any round"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation, of n - 1; None of one seed."""
    count: int


@dataclass(frozen=True)
class Cost:
    """What it took a client to reach the target, in the mean of those runs that did."""

    reached: int
    """How many runs."""
    passes: float
    bytes: float
    """Up and down."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method in a case; without what follows `metrics`, the model before any round."""

    case: tuple[str, ...]
    method: str
    title: str
    metric: str
    """The name of what `score` is."""
    metrics: Mapping[str, Spread]
    """After the last round, on the test examples."""
    rate: float | str | None = None
    """None where every run of the search diverged, or some are not made yet."""
    searching: bool = False
    """Are they not?"""
    edge: bool = False
    """Is it the smallest or largest of those tried?"""
    tried: int = 0
    """Rates of the search."""
    diverged: int = 0
    """Runs of the table that ended early for that."""
    difference: float | None = None
    """Of the main metric to the reference, mean over pairs of equal seeds."""
    p: float | None = None
    """Of a paired t-test, two-sided; None of fewer than two pairs, or where all differ alike."""
    rounds: int = 0
    passes: float = 0.0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    cost: Cost | None = None
    """None without a target."""

    @property
    def score(self) -> Spread | None:
        return self.metrics.get(self.metric)


def rows_of(found: Sequence[GroupOutcome]) -> list[Row]:
    """The table's rows, case by case: what is there before any round, then the methods."""
    rows = []
    by_case: dict[tuple[str, ...], list[GroupOutcome]] = {}
    for group in found:
        by_case.setdefault(group.group.case, []).append(group)
    for case, groups in by_case.items():
        name = groups[0].group.grid.reference
        reference = next(group for group in groups if group.group.method == name)
        if any(cell.evaluations for cell in reference.cells):
            rows.append(_zero_shot(case, reference))
        rows += [_row(group, reference) for group in groups]
    return rows


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> tuple[float, float] | None:
    """Mean difference over the seeds that both have, and p of a paired t-test; NaN of one pair.

    >>> paired({1: 3.0, 2: 5.0, 3: 7.0}, {1: 2.0, 2: 3.0, 4: 9.0})[0]
    1.5
    """
    seeds = sorted(ours.keys() & others.keys())
    if not seeds:
        return None
    differences = [ours[seed] - others[seed] for seed in seeds]
    if len(set(differences)) < 2:
        return statistics.fmean(differences), math.nan
    test = stats.ttest_rel([ours[s] for s in seeds], [others[s] for s in seeds])
    return statistics.fmean(differences), float(test.pvalue)


def _zero_shot(case: tuple[str, ...], reference: GroupOutcome) -> Row:
    """The model as it was loaded: the first evaluation of the reference's runs."""
    points = [cell.evaluations[0] for cell in reference.cells if cell.evaluations]
    metrics = _metrics(points)
    return Row(
        case=case,
        method="zero-shot",
        title=ZERO_SHOT,
        metric=main_metric(metrics),
        metrics=metrics,
    )


def _row(found: GroupOutcome, reference: GroupOutcome) -> Row:
    group = found.group
    ended = [cell for cell in found.cells if cell.evaluations]
    points = [cell.last for cell in ended]
    metrics = _metrics(points)
    metric = main_metric(metrics)
    test = (
        None if found is reference else paired(_scores(found, metric), _scores(reference, metric))
    )
    target = group.grid.target
    return Row(
        case=group.case,
        method=group.method,
        title=group.grid.found(group.method).title,
        rate=found.rate,
        searching=len(found.search) < len(group.search),
        edge=found.at_the_edge,
        tried=len(found.search),
        diverged=len(found.cells) - len(ended),
        metric=metric,
        metrics=metrics,
        difference=None if test is None else test[0],
        p=None if test is None or math.isnan(test[1]) else test[1],
        rounds=max((point.round for point in points), default=0),
        passes=_mean([point.passes for point in points]),
        bytes_up=_mean([point.bytes_up for point in points]),
        bytes_down=_mean([point.bytes_down for point in points]),
        cost=None if target is None else _cost(ended, metric, target),
    )


def _metrics(points: Sequence[Point]) -> dict[str, Spread]:
    """Of the test examples alone."""
    names = (
        [name for name in points[0].metrics if not name.startswith(VALIDATION)] if points else []
    )
    return {name: spread([point.metrics[name] for point in points]) for name in names}


def _scores(found: GroupOutcome, metric: str) -> dict[int, float]:
    """The main metric after the last round, by seed."""
    ended = [cell for cell in found.cells if cell.evaluations]
    return {cell.cell.seed: cell.last.metrics[metric] for cell in ended}


def _cost(ended: Sequence[Outcome], metric: str, target: float) -> Cost:
    first = [
        point
        for cell in ended
        if (point := next((p for p in cell.evaluations if p.metrics[metric] >= target), None))
    ]
    total = [point.bytes_up + point.bytes_down for point in first]
    return Cost(len(first), _mean([point.passes for point in first]), _mean(total))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
