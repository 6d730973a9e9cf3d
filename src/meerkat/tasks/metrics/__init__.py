"""Metrics by the name that `evaluation.metrics` has: one file each or a few, and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meerkat.errors import RecipeError
from meerkat.registry import look_up
from meerkat.tasks.metrics.accuracy import Accuracy
from meerkat.tasks.metrics.base import Metric, Sums
from meerkat.tasks.metrics.by_class import BalancedAccuracy, MacroF1
from meerkat.tasks.metrics.loss import Loss
from meerkat.tasks.metrics.validation import VALIDATION

__all__ = [
    "LOSS",
    "METRICS",
    "Metric",
    "Sums",
    "metric_names",
    "metric_of",
    "metric_title",
    "metric_values",
]

LOSS = "loss"
"""The metric that every evaluation has."""

METRICS: Mapping[str, Metric] = {
    LOSS: Loss(),
    "accuracy": Accuracy(),
    "macro_f1": MacroF1(),
    "balanced_accuracy": BalancedAccuracy(),
}

_CLASSIFICATION = ("accuracy", "macro_f1")


def metric_names(wanted: Sequence[str], has_classes: bool) -> tuple[str, ...]:
    """The loss, then what a recipe asks for, or what the kind of task has by default.

    Raises:
        RecipeError: A metric is not known, or needs classes where there are none.
    """
    for name in wanted:
        if look_up(METRICS, name, "evaluation.metrics").of_classes and not has_classes:
            raise RecipeError(
                f"evaluation.metrics: {name!r} is about classes, and the task is free text; "
                "leave it out"
            )
    chosen = wanted or (_CLASSIFICATION if has_classes else ())
    return tuple(dict.fromkeys((LOSS, *chosen)))


def metric_of(name: str) -> Metric | None:
    """The metric behind a name in an evaluation, of test or validation; None if it is not known."""
    return METRICS.get(name.removeprefix(VALIDATION))


def metric_title(name: str) -> str:
    """Its title for people, or its name where it is not known.

    >>> metric_title("macro_f1"), metric_title("validation_accuracy"), metric_title("mine")
    ('macro F1', 'validation accuracy', 'mine')
    """
    metric = metric_of(name)
    if metric is None:
        return name
    return f"validation {metric.title}" if name.startswith(VALIDATION) else metric.title


def metric_values(sums: Mapping[str, Sums], examples: int) -> dict[str, float]:
    """Metrics by name from their sums; without examples all are NaN."""
    if not examples:
        return dict.fromkeys(sums, float("nan"))
    return {name: METRICS[name].value(found, examples) for name, found in sums.items()}
