"""Training losses by the name that `task.objective` has: one file each, and a line here.

Evaluations report the usual loss and the metrics, whatever training makes small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meerkat.config import Recipe
from meerkat.config.parts import Choice
from meerkat.errors import RecipeError
from meerkat.registry import build
from meerkat.tasks.base import Task
from meerkat.tasks.functions import is_function, own_function
from meerkat.tasks.losses.accuracy import Inaccuracy
from meerkat.tasks.losses.base import Scored, TrainingLoss
from meerkat.tasks.losses.function import FunctionLoss
from meerkat.tasks.losses.macro_f1 import MacroF1Loss
from meerkat.tasks.losses.preference import DPO, SimPO
from meerkat.tasks.losses.usual import UsualLoss

__all__ = [
    "LOSSES",
    "Scored",
    "TrainingLoss",
    "UsualLoss",
    "import_objective",
    "training_loss",
]

LOSSES: Mapping[str, Callable[..., TrainingLoss]] = {
    "accuracy": Inaccuracy,
    "dpo": DPO,
    "loss": UsualLoss,
    "macro_f1": MacroF1Loss,
    "simpo": SimPO,
}

_EXACT = ("backward", "forward-mode")
"""Estimators that differentiate."""
_FEWEST_CLIPPED = 3
"""Clients of a round from which on the server clips (`federation.rounds`)."""


def training_loss(recipe: Recipe, task: Task) -> TrainingLoss:
    """What a recipe's training makes small. A function of the user's own is not imported yet.

    Raises:
        RecipeError: It is not known, is for another kind of task, or does not fit how losses
            become coefficients.
    """
    chosen = recipe.task.objective
    if is_function(chosen.kind):
        return FunctionLoss(chosen.kind, chosen.options)
    loss = build(LOSSES, chosen.kind, chosen.options, "task.objective")
    _check_kind(chosen, loss, task)
    if not loss.is_smooth:
        _check_steps(recipe, chosen)
    return loss


def import_objective(recipe: Recipe) -> None:
    """Import the function that a recipe trains by, if it is one, before anything is loaded.

    What only evaluates or replays a run never does.

    Raises:
        RecipeError: There is none of this name.
    """
    if is_function(recipe.task.objective.kind):
        own_function(recipe.task.objective.kind, "task.objective")


def _check_kind(chosen: Choice, loss: TrainingLoss, task: Task) -> None:
    """Is it for this kind of task?

    Raises:
        RecipeError: No.
    """
    classes, pairs = task.has_classes, task.has_pairs
    fits = {"any": True, "answers": classes or pairs, "classes": classes, "pairs": pairs}
    if not fits[loss.of]:
        kind = "has classes" if classes else "is of pairs" if pairs else "is free text"
        usable = [name for name, other in LOSSES.items() if fits[other.of]]  # type: ignore[attr-defined]
        raise RecipeError(
            f"task.objective = {chosen.kind!r} is about {loss.of}, and the task {kind}; known for "
            f"it are {', '.join(usable)}"
        )


def _check_steps(recipe: Recipe, chosen: Choice) -> None:
    """Does a loss that is a step function of θ fit the rest?

    Raises:
        RecipeError: No.
    """
    asked = f"task.objective = {{ kind = {chosen.kind!r}, temperature = 0 }}"
    optimizer, federation = recipe.optimizer, recipe.federation
    if optimizer.estimator.kind in _EXACT or optimizer.exact_clients:
        field = "estimator" if optimizer.estimator.kind in _EXACT else "exact_clients"
        raise RecipeError(
            f"{asked} has no derivative, which optimizer.{field} needs; give a temperature above "
            "0, or take optimizer.estimator = 'two-point' for all clients"
        )
    if federation.clip_factor and recipe.clients_per_round >= _FEWEST_CLIPPED:
        raise RecipeError(
            f"{asked} has slopes most of which are 0, and the server clips at "
            f"federation.clip_factor = {federation.clip_factor:g} times their median; set it to 0, "
            "or give a temperature above 0"
        )
