"""A grid as cells: one run each, with the recipe that it is made by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meerkat.comparison.grid import Grid
from meerkat.comparison.results import PASSES, FirstOrder
from meerkat.config import Recipe, parse_recipe
from meerkat.config.reading import with_settings
from meerkat.errors import RecipeError
from meerkat.registry import build
from meerkat.zo.estimators import ESTIMATORS

__all__ = ["Cell", "Group", "calibration_passes", "example_passes", "groups_of"]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    name: str
    """`method/case/seed-3`, or `method/case/search-1e-05`: its folder, less a fingerprint."""
    recipe: Recipe
    bound: FirstOrder | None
    """A first-order method, which is no run of ours."""
    rate: float | str
    seed: int

    def directory(self, out: Path) -> Path:
        """Where its files are: another recipe has another folder."""
        return out / "cells" / f"{self.name}-{self.recipe.fingerprint[:8]}"


@dataclass(frozen=True)
class Group:
    """The cells of a method in a case: those that a rate is searched by, and those of a rate."""

    grid: Grid
    data: dict[str, Any]
    """The recipe's sections that all cells have in common."""
    method: str
    case: tuple[str, ...]
    """A name for each axis."""
    case_settings: dict[str, Any]

    @property
    def name(self) -> str:
        return "/".join((self.method, ",".join(self.case) or "all"))

    @property
    def search(self) -> list[Cell]:
        """A cell for each rate that is tried; none where there is one alone."""
        rates = self.grid.found(self.method).rates
        seed = self.grid.search.seed
        if len(rates) < 2:
            return []
        return [self._cell(f"search-{_short(rate)}", rate, seed) for rate in rates]

    def chosen(self, rate: float | str) -> list[Cell]:
        """The cells of the table, once a rate is chosen: one a seed."""
        return [self._cell(f"seed-{seed}", rate, seed) for seed in self.grid.seeds]

    def _cell(self, name: str, rate: float | str, seed: int) -> Cell:
        grid, method = self.grid, self.grid.found(self.method)
        settings = {
            "evaluation.validation": grid.search.validation,
            **grid.settings,
            **self.case_settings,
            **method.settings,
            "optimizer.learning_rate": rate,
            "seed": seed,
        }
        where = f"{self.name}/{name}"
        data = with_settings(self.data, settings)
        data.setdefault("federation", {}).setdefault("rounds", 1)
        try:
            first = parse_recipe(data, origin=where)
            each = example_passes(first, method.bound)
        except RecipeError as error:
            raise RecipeError(f"cell {error}") from None
        before = calibration_passes(first) if grid.pay_calibration else 0
        rounds = (grid.passes - before) // each
        if rounds < 1:
            raise RecipeError(
                f"cell {where}: passes = {grid.passes} is less than a round takes, {each}, and a "
                f"calibration before it, {before}; raise it"
            )
        due = {"federation.rounds": rounds, "evaluation.every": -(-rounds // grid.evaluations)}
        recipe = parse_recipe(with_settings(data, due), origin=where)
        return Cell(where, recipe, method.bound, rate, seed)


def groups_of(grid: Grid, data: dict[str, Any]) -> Iterator[Group]:
    """All groups of a grid, case by case.

    Raises:
        RecipeError: A cell's recipe is not valid.
    """
    for case, settings in grid.points:
        for method in grid.methods:
            yield Group(grid, data, method, case, settings)


def example_passes(recipe: Recipe, bound: FirstOrder | None = None) -> int:
    """Forward passes over one example that a client makes in a round.

    >>> from meerkat.config import parse_recipe
    >>> data = {"model": {"name": "m"}, "task": {"name": "sst2"}}
    >>> data["federation"] = {"clients": 2, "rounds": 1, "local_steps": 3, "batch_size": 16}
    >>> example_passes(parse_recipe(data))
    96
    """
    chosen, steps = recipe.optimizer.estimator, recipe.federation.local_steps
    if bound is not None or chosen.kind == "backward":
        return PASSES * recipe.federation.batch_size * steps
    estimator = build(ESTIMATORS, chosen.kind, chosen.options, "optimizer.estimator")
    passes = estimator.forward_passes(recipe.noise.perturbations)
    return passes * recipe.federation.batch_size * steps


def calibration_passes(recipe: Recipe) -> int:
    """Example passes of a client before round 0, which a budget has to pay, too."""
    chosen = recipe.selection
    if chosen.kind != "gradip" or chosen.apply:
        return 0
    return example_passes(recipe) // recipe.federation.local_steps * chosen.calibration_steps


def _short(rate: float | str) -> str:
    return rate if isinstance(rate, str) else f"{rate:g}"
