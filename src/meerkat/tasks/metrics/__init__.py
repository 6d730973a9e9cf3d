"""Metrics by the name that `evaluation.metrics` has: one file each or a few, and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meerkat.config import Choice
from meerkat.errors import RecipeError
from meerkat.registry import build, look_up
from meerkat.tasks.functions import is_function
from meerkat.tasks.metrics.accuracy import Accuracy
from meerkat.tasks.metrics.base import Metric, Sums
from meerkat.tasks.metrics.by_class import BalancedAccuracy, MacroF1
from meerkat.tasks.metrics.loss import Loss
from meerkat.tasks.metrics.preference import Margin, PreferenceAccuracy
from meerkat.tasks.metrics.texts import (
    ExactMatch,
    Function,
    Regex,
    RougeL,
    TextMetric,
    TokenF1,
)
from meerkat.tasks.metrics.validation import VALIDATION

__all__ = [
    "LOSS",
    "METRICS",
    "Metric",
    "Sums",
    "compares_texts",
    "functions_in",
    "metric_names",
    "metric_of",
    "metric_title",
    "metric_values",
    "metrics_of",
    "prepare",
]

LOSS = "loss"
"""The metric that every evaluation has."""

METRICS: Mapping[str, Metric] = {
    LOSS: Loss(),
    "accuracy": Accuracy(),
    "macro_f1": MacroF1(),
    "balanced_accuracy": BalancedAccuracy(),
    "preference_accuracy": PreferenceAccuracy(),
    "margin": Margin(),
}

TEXT_METRICS: Mapping[str, Metric] = {
    "exact_match": ExactMatch(),
    "token_f1": TokenF1(),
    "rouge_l": RougeL(),
}
"""Those of written answers."""

WITH_OPTIONS: Mapping[str, type[Regex] | type[Function]] = {"regex": Regex, "function": Function}
"""Those of written answers that have options; the option `name` is their name in results."""

_CLASSIFICATION = ("accuracy", "macro_f1")
_PAIRS = ("preference_accuracy", "margin")


def metrics_of(
    wanted: Sequence[Choice | str], has_classes: bool, has_pairs: bool = False
) -> dict[str, Metric]:
    """By name the loss, then what a recipe asks for, or what the kind of task has by default.

    No function of a recipe is imported here.

    Raises:
        RecipeError: A metric is not known, has a wrong option, needs classes or pairs where there
            are none, or compares written answers where there are several to choose from.
    """
    wanted = wanted or (_CLASSIFICATION if has_classes else _PAIRS if has_pairs else ())
    found: dict[str, Metric] = {LOSS: METRICS[LOSS]}
    for asked in wanted:
        choice = Choice(kind=asked) if isinstance(asked, str) else asked
        name, metric = _metric(choice)
        if metric.of_classes and not has_classes:
            raise RecipeError(
                f"evaluation.metrics: {name!r} is about classes, and the task is "
                f"{'of pairs' if has_pairs else 'free text'}; leave it out"
            )
        if isinstance(metric, TextMetric) and (has_classes or has_pairs):
            raise RecipeError(
                f"evaluation.metrics: {name!r} compares written answers, and the task has "
                f"{'classes' if has_classes else 'pairs'}; leave it out"
            )
        if name in _PAIRS and not has_pairs:
            raise RecipeError(
                f"evaluation.metrics: {name!r} is about pairs, and the task has none; leave it "
                "out, or name task.chosen and task.rejected"
            )
        if name in found and found[name] != metric:
            raise RecipeError(
                f"evaluation.metrics: two of them are called {name!r}; give one of them the option "
                "name"
            )
        found[name] = metric
    return found


def _metric(choice: Choice) -> tuple[str, Metric]:
    """A metric, and the name that its values have."""
    kind, field = choice.kind, "evaluation.metrics"
    if is_function(kind):
        own = build(WITH_OPTIONS, "function", {**choice.options, "function": kind}, field)
        return own.name or kind, own
    if kind in WITH_OPTIONS:
        own = build(WITH_OPTIONS, kind, choice.options, field)
        return own.name or str(choice.options["function"]), own
    if kind not in METRICS and kind not in TEXT_METRICS:
        look_up({**METRICS, **TEXT_METRICS, **WITH_OPTIONS}, kind, field)
    metric = METRICS[kind] if kind in METRICS else TEXT_METRICS[kind]
    if choice.options:
        raise RecipeError(
            f"{field} = {kind!r}: it takes no options; leave {next(iter(choice.options))} out"
        )
    return kind, metric


def metric_names(
    wanted: Sequence[Choice | str], has_classes: bool, has_pairs: bool = False
) -> tuple[str, ...]:
    """The names of `metrics_of`."""
    return tuple(metrics_of(wanted, has_classes, has_pairs))


def compares_texts(metrics: Mapping[str, Metric]) -> bool:
    """Does one of them need answers that the model writes?"""
    return any(isinstance(metric, TextMetric) for metric in metrics.values())


def prepare(metrics: Mapping[str, Metric]) -> None:
    """Load what metrics need: a package of the extra `metrics`, a function of one's own.

    Raises:
        RunError: The extra is not installed.
        RecipeError: There is no such function.
    """
    for metric in metrics.values():
        if isinstance(metric, TextMetric):
            metric.prepare()


def functions_in(wanted: Sequence[Choice]) -> tuple[str, ...]:
    """The functions that metrics of a recipe name."""
    named = (str(c.options.get("function", "")) if c.kind == "function" else c.kind for c in wanted)
    return tuple(name for name in named if is_function(name))


def metric_of(name: str) -> Metric | None:
    """The metric behind a name in an evaluation, of test or validation; None if it is not known.

    One with options is not: what it is stands in the recipe alone.
    """
    bare = name.removeprefix(VALIDATION)
    return METRICS.get(bare) or TEXT_METRICS.get(bare)


def metric_title(name: str) -> str:
    """Its title for people, or its name where it is not known.

    >>> metric_title("macro_f1"), metric_title("validation_accuracy"), metric_title("mine")
    ('macro F1', 'validation accuracy', 'mine')
    """
    metric = metric_of(name)
    if metric is None:
        return name
    return f"validation {metric.title}" if name.startswith(VALIDATION) else metric.title


def metric_values(
    sums: Mapping[str, Sums], examples: int, metrics: Mapping[str, Metric] = METRICS
) -> dict[str, float]:
    """Metrics by name from their sums; without examples all are NaN.

    Args:
        metrics: Those that the sums are of.
    """
    if not examples:
        return dict.fromkeys(sums, float("nan"))
    return {name: metrics[name].value(found, examples) for name, found in sums.items()}
