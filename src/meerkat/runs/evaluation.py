"""Metrics of the model on held-out examples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from meerkat.journal.records import Evaluated
from meerkat.progress import Progress
from meerkat.tasks.metrics import METRICS, Sums, metric_values
from meerkat.tasks.metrics.validation import on_validation
from meerkat.tasks.objective import Objective

__all__ = ["evaluate_objective", "evaluation_sums"]

_BATCH = 32
"""Examples that an objective is given at a time: more than a small batch of training has."""


def evaluate_objective(
    objective: Objective,
    examples: Sequence[Any],
    metrics: Sequence[str],
    round: int = 0,
    progress: Progress | None = None,
    batch_size: int = _BATCH,
    validation: Sequence[Any] = (),
) -> Evaluated:
    """The metrics of these names at the weights as they are.

    Args:
        validation: Examples to choose a round by; their metrics stand beside the others.
    """
    started = time.monotonic()
    sums = evaluation_sums(objective, examples, metrics, progress, batch_size)
    values = metric_values(sums, len(examples))
    if validation:
        sums = evaluation_sums(objective, validation, metrics, progress, batch_size)
        values |= on_validation(metric_values(sums, len(validation)))
    return Evaluated(round, values, len(examples), time.monotonic() - started)


def evaluation_sums(
    objective: Objective,
    examples: Sequence[Any],
    metrics: Sequence[str],
    progress: Progress | None = None,
    batch_size: int = _BATCH,
) -> dict[str, Sums]:
    """Sums of each metric, which a client may send and a server add up."""
    progress = progress or Progress()
    progress.start("Evaluating", -(-len(examples) // batch_size))
    totals: dict[str, Sums] = {}
    for begin in range(0, len(examples), batch_size):
        found = objective.predict(examples[begin : begin + batch_size])
        for name in metrics:
            sums = METRICS[name].sums(found)
            totals[name] = totals[name] + sums if name in totals else sums
        progress.advance()
    return totals
