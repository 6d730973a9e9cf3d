"""Metrics of the model on held-out examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from meerkat.journal.records import Evaluated
from meerkat.progress import Progress
from meerkat.tasks.metrics import Metric, Sums, compares_texts, metric_values
from meerkat.tasks.metrics.validation import on_validation
from meerkat.tasks.objective import Objective

__all__ = ["Write", "evaluate_objective", "evaluation_sums"]

Write: TypeAlias = Callable[[Sequence[Any]], Sequence[str]]
"""From examples to the answers that the model writes at the weights as they are."""

_BATCH = 32
"""Examples that an objective is given at a time: more than a small batch of training has."""


def evaluate_objective(
    objective: Objective,
    examples: Sequence[Any],
    metrics: Mapping[str, Metric],
    round: int = 0,
    progress: Progress | None = None,
    batch_size: int = _BATCH,
    validation: Sequence[Any] = (),
    write: Write | None = None,
) -> Evaluated:
    """Metrics at the weights as they are.

    Args:
        validation: Examples to choose a round by; their metrics stand beside the others.
        write: Needed where a metric compares written answers.
    """
    started = time.monotonic()
    sums = evaluation_sums(objective, examples, metrics, write, progress, batch_size)
    values = metric_values(sums, len(examples), metrics)
    if validation:
        sums = evaluation_sums(objective, validation, metrics, write, progress, batch_size)
        values |= on_validation(metric_values(sums, len(validation), metrics))
    return Evaluated(round, values, len(examples), time.monotonic() - started)


def evaluation_sums(
    objective: Objective,
    examples: Sequence[Any],
    metrics: Mapping[str, Metric],
    write: Write | None = None,
    progress: Progress | None = None,
    batch_size: int = _BATCH,
) -> dict[str, Sums]:
    """Sums of each metric, which a client may send and a server add up."""
    progress = progress or Progress()
    writes = write if compares_texts(metrics) else None
    progress.start("Evaluating", -(-len(examples) // batch_size))
    totals: dict[str, Sums] = {}
    for begin in range(0, len(examples), batch_size):
        batch = examples[begin : begin + batch_size]
        found = objective.predict(batch)
        if writes is not None:
            references = tuple(example.reference for example in batch)
            found = replace(found, written=tuple(writes(batch)), references=references)
        for name, metric in metrics.items():
            sums = metric.sums(found)
            totals[name] = totals[name] + sums if name in totals else sums
        progress.advance()
    return totals
