"""What a Trainer refuses, in one line each, and which step is its best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meerkat.config import Recipe
from meerkat.errors import RecipeError
from meerkat.journal.records import Evaluated
from meerkat.tasks.metrics.validation import VALIDATION
from meerkat.trainer.arguments import TrainingArguments
from meerkat.trainer.callbacks import best_of

__all__ = ["as_floats", "best_step", "check_recipe", "check_same"]


def best_step(args: TrainingArguments, evaluations: Sequence[Evaluated]) -> int:
    """The step with the best evaluation.

    Raises:
        RecipeError: None has the metric.
    """
    best = best_of(args, evaluations)
    if best is None:
        names = ", ".join(name for found in evaluations[:1] for name in found.metrics)
        raise RecipeError(
            f"metric_for_best_model = {args.metric_for_best_model!r} is in no evaluation; there "
            f"are {names}"
        )
    return best[0]


def as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a user as an evaluation keeps them: without `eval_`, each a float.

    Raises:
        RecipeError: One is no number, or has a name of validation.
    """
    found = {}
    for name, value in metrics.items():
        plain = name.removeprefix("eval_")
        if plain.startswith(VALIDATION):
            raise RecipeError(f"compute_metrics: {name!r}: {VALIDATION} is for validation examples")
        try:
            found[plain] = float(value)
        except (TypeError, ValueError):
            raise RecipeError(f"compute_metrics: {name!r} = {value!r} is no number") from None
    return found


def check_recipe(recipe: Recipe, in_memory: Mapping[str, str]) -> None:
    """Is it something that a Trainer can do?

    Args:
        in_memory: `[model]` of a model in memory; empty where the recipe names one.

    Raises:
        RecipeError: No.
    """
    runtime = recipe.runtime
    refused = (
        (recipe.mask.kind == "lora", "mask.kind = 'lora'", "it puts factors into the model"),
        (runtime.engine == "flower", "runtime.engine = 'flower'", "there is one client"),
        (
            runtime.weights != "stored",
            f"runtime.weights = {runtime.weights!r}",
            "it takes bits from the model for good",
        ),
        (
            bool(in_memory) and runtime.compute == "float32",
            "runtime.compute = 'float32'",
            "a model in memory computes in its type",
        ),
    )
    for field, found in in_memory.items():
        if (asked := getattr(recipe.model, field)) != found:
            raise RecipeError(
                f"settings: model.{field} = {asked!r}: the model is in memory, and it has {found}; "
                "leave it out"
            )
    for wrong, what, why in refused:
        if wrong:
            raise RecipeError(f"settings: {what}: {why}; take meerkat.run for it")


def check_same(begun: Recipe, asked: Recipe) -> None:
    """Is what is asked for now what the run was begun with?

    Raises:
        RecipeError: No; the first field that differs is named.
    """
    for section in type(asked).model_fields:
        old, new = getattr(begun, section), getattr(asked, section)
        if section in ("runtime", "network") or old == new:
            continue
        fields = getattr(type(new), "model_fields", {})
        name = next((f for f in fields if getattr(old, f, None) != getattr(new, f)), None)
        where = section if name is None else f"{section}.{name}"
        if name is not None:
            old, new = getattr(old, name, None), getattr(new, name)
        raise RecipeError(
            f"{where} = {new!r} now, and the run began with {old!r}; put it back, or choose "
            "another output_dir"
        )
