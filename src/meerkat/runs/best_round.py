"""Which round of a run is best by its validation score, and when a run is out of patience.

Both follow from the evaluations in the journal alone, so a run that is resumed decides the same.

Of two evaluations the better one has the better first metric besides the loss (accuracy, for a
classification), then the lower validation loss; where both are equal, as all of free text without
its loss would be, the earlier one stays the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from meerkat.config import Recipe
from meerkat.errors import RunError
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated
from meerkat.tasks.metrics import LOSS, metric_of
from meerkat.tasks.metrics.validation import of_validation

__all__ = ["Rounds", "best_evaluation", "is_complete", "last_round", "score_of", "wanted_rounds"]

Rounds = int | Literal["best"] | None
"""So many rounds, those up to the best evaluation, or all."""


def score_of(found: Evaluated) -> tuple[float, ...] | None:
    """What an evaluation is compared by: the larger the better; None without a validation score.

    >>> score_of(Evaluated(3, {"accuracy": 0.5, "loss": 0.7}, 20, 1.0)) is None
    True
    >>> measured = {"loss": 0.7, "validation_loss": 0.6, "validation_accuracy": 0.75}
    >>> score_of(Evaluated(3, measured, 20, 1.0))
    (0.75, -0.6)
    """
    values = of_validation(found.metrics)
    if not values or not all(map(math.isfinite, values.values())):
        return None
    others = [name for name in values if name != LOSS]
    # With free text there is none, and the loss alone decides.
    score = [_signed(name, values[name]) for name in (*others[:1], LOSS) if name in values]
    return tuple(score)


def _signed(name: str, value: float) -> float:
    """A metric so that more is better; one that is not known is taken to be so."""
    metric = metric_of(name)
    return -value if metric is not None and metric.lower_is_better else value


def best_evaluation(evaluations: Iterable[Evaluated]) -> Evaluated | None:
    """The best evaluation, in order of rounds the first of equals; None where none has a score."""
    best: tuple[tuple[float, ...], Evaluated] | None = None
    for found in evaluations:
        score = score_of(found)
        if score is not None and (best is None or score > best[0]):
            best = score, found
    return best and best[1]


def last_round(recipe: Recipe, evaluations: Sequence[Evaluated]) -> int:
    """After how many rounds a run ends, as far as its evaluations, by round, can say.

    That is after `federation.rounds`, or where `evaluation.patience` evaluations in a row are not
    better than the best before them. Those without a validation score do not count.
    """
    patience, best, waited = recipe.evaluation.patience, None, 0
    for found in evaluations if patience else ():
        score = score_of(found)
        if score is None:
            continue
        if best is None or score > best:
            best, waited = score, 0
        else:
            waited += 1
        if waited == patience:
            return min(found.round, recipe.federation.rounds)
    return recipe.federation.rounds


def is_complete(journal: Journal, recipe: Recipe) -> bool:
    """Are all rounds of a run done, and was the last state evaluated?"""
    evaluations = journal.evaluations()
    last = last_round(recipe, evaluations)
    return journal.rounds == last and any(found.round == last for found in evaluations)


def wanted_rounds(journal: Journal, rounds: Rounds) -> int | None:
    """The number of rounds that is meant, by number or as `best`; None is all of them.

    Raises:
        RunError: The best is asked for, and the run has no validation score.
    """
    if rounds != "best":
        return rounds
    best = best_evaluation(journal.evaluations())
    if best is None:
        kept = journal.header.parsed.evaluation.validation
        why = "no evaluation has a validation score yet" if kept else "evaluation.validation = 0"
        raise RunError(
            f"--round best: {journal.path.parent} has no validation score to choose by ({why}); "
            "give a number, or make a run with evaluation.validation and evaluation.every"
        )
    return best.round
