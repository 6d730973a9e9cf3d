"""Successive halving: which settings of a recipe are tried, and for how many rounds each.

Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016 (arXiv 1502.07943), Algorithm 1: of n trials ⌈log₂ n⌉ rungs have equal shares of the
budget, which a rung's trials have in equal parts; after each the better half goes on. Here the half
is rounded up, and trials that diverged, or end above the loss that they started from, are out. A
trial is one run: a later rung goes on with it, so that no pass is paid twice.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from meerkat.comparison.cells import example_passes
from meerkat.comparison.methods import METHODS
from meerkat.config import Recipe, parse_recipe
from meerkat.config.reading import with_settings
from meerkat.errors import RecipeError

__all__ = ["Plan", "Trial", "plan_halving", "read_tries"]

RATE = "optimizer.learning_rate"


@dataclass(frozen=True)
class Trial:
    """A recipe that is tried."""

    number: int
    settings: dict[str, Any]
    """What is tried, by field."""
    recipe: Recipe
    rounds: tuple[int, ...]
    """Rounds done at the end of each rung."""

    @property
    def name(self) -> str:
        return ", ".join(f"{field} = {json.dumps(value)}" for field, value in self.settings.items())

    def directory(self, out: Path) -> Path:
        """Where its run is; another recipe or budget has another folder."""
        return out / "trials" / f"{self.number:02}-{self.recipe.fingerprint[:8]}"


@dataclass(frozen=True)
class Plan:
    """All trials, and how many of them a rung has."""

    trials: tuple[Trial, ...]
    sizes: tuple[int, ...]
    """Trials of each rung, where none is out before."""
    validation: int
    """Examples of an evaluation."""

    def passes(self, trial: Trial, rungs: int) -> int:
        """Example passes of a trial over so many rungs: steps of all clients, and evaluations."""
        ends = {0, *trial.rounds[:rungs]}  # a trial that may not be longer has the same end twice
        return max(ends) * _round_passes(trial.recipe) + self.validation * len(ends)


def read_tries(texts: Sequence[str], recipe: Recipe) -> dict[str, list[Any]]:
    """What is tried, by field: `section.field=[value, …]`, or by default the learning rate.

    Raises:
        RecipeError: It is not of this form, or nothing needs to be tried.
    """
    tries: dict[str, list[Any]] = {}
    for text in texts:
        field, _, listed = text.partition("=")
        try:
            values = tomllib.loads(f"values = {listed}")["values"]
        except tomllib.TOMLDecodeError:
            values = None
        if not isinstance(values, list) or not values or "." not in field:
            raise RecipeError(f"--try {text!r}: write it as section.field=[value, value]")
        tries[field.strip()] = values
    if tries:
        return tries
    if recipe.subspace is not None:
        raise RecipeError(
            f"{RATE} follows from [subspace]; name what is to be tried, such as "
            "--try federation.local_steps=[1, 4]"
        )
    method = {"sensitivity": "meerkat"}.get(recipe.mask.kind, recipe.mask.kind)
    return {RATE: list(METHODS[method].rates)}


def plan_halving(
    data: Mapping[str, Any], tries: Mapping[str, Sequence[Any]], passes: int | None, validation: int
) -> Plan:
    """The trials of a recipe's sections, with the rounds that a budget gives each.

    Args:
        passes: Example passes of all trials; those of one run of the recipe by default.
        validation: Examples to choose by, where the recipe keeps none.

    Raises:
        RecipeError: A trial's recipe is not valid, there is one alone, or the budget is too small.
    """
    base = parse_recipe(data)
    grid = [dict(zip(tries, values, strict=True)) for values in product(*tries.values())]
    if len(grid) < 2:
        raise RecipeError("--try: there is one trial alone; name two values and more")
    kept = base.evaluation.validation or validation
    always = {"evaluation.validation": kept, "evaluation.every": 0, "evaluation.patience": 0}
    found = [parse_recipe(with_settings(data, {**always, **some})) for some in grid]
    if passes is None:
        passes = base.federation.rounds * _round_passes(base)
    sizes = [len(grid)]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    trials = []
    for number, (settings, recipe) in enumerate(zip(grid, found, strict=True), start=1):
        rounds = _rounds(base, recipe, sizes, passes, kept)
        most = {**always, **settings, "federation.rounds": rounds[-1]}
        made = parse_recipe(with_settings(data, most))
        trials.append(Trial(number, settings, made, tuple(rounds)))
    return Plan(tuple(trials), tuple(sizes), kept)


def _rounds(
    base: Recipe, recipe: Recipe, sizes: Sequence[int], passes: int, validation: int
) -> list[int]:
    """Rounds done at the end of each rung, at most those of a run of the base recipe."""
    each = _round_passes(recipe)
    steps = base.federation.rounds * base.federation.local_steps
    most = max(1, steps // recipe.federation.local_steps)
    done, rounds = 0, []
    for rung, size in enumerate(sizes):
        measured = validation * (2 if rung == 0 else 1)  # also before the first round
        more = (passes // (size * len(sizes)) - measured) // each
        if more < 1:
            least = (each + measured) * size * len(sizes)
            raise RecipeError(
                f"--passes {passes}: with {sizes[0]} trials a rung of {size} needs at least "
                f"{least}: a round takes {each} example passes, an evaluation {validation}; raise "
                "it, try fewer values, or lower --validation"
            )
        done += more
        rounds.append(min(done, most))
    return rounds


def _round_passes(recipe: Recipe) -> int:
    return example_passes(recipe) * recipe.clients_per_round
