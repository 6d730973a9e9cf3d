"""A grid file: which methods, on which cases, with which budget, search and seeds."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from meerkat.comparison.methods import METHODS, Method
from meerkat.config.parts import Count, Positive, Section, Seed
from meerkat.config.reading import described_error, read_data, with_overrides
from meerkat.errors import RecipeError
from meerkat.registry import look_up

__all__ = ["Grid", "OwnMethod", "Search", "load_grid"]

Rate = Positive | Literal["auto"]
Settings = dict[str, Any]
"""Values by the field of a recipe, `section.field`."""


class Search(Section):
    """How a learning rate is found for each method and case: by validation, with one seed."""

    seed: Seed = 0
    """Of the runs that are searched with; none of `seeds`."""
    validation: Count = 256
    """Held-out examples to choose by, none of which is tested on; a case may set its own
    `evaluation.validation`."""
    rates: dict[str, tuple[Rate, ...]] = Field(default_factory=dict)
    """By method, in place of those that it is registered with."""


class OwnMethod(Section):
    """A method that the grid adds."""

    title: str
    base: str = "meerkat"
    """The method whose settings and rates it has where it says no others."""
    settings: Settings = Field(default_factory=dict)
    rates: tuple[Rate, ...] | None = None


class Grid(Section):
    """A comparison. A cell is a run: a method, a case, a rate and a seed."""

    recipe: str
    """What all cells have in common: a recipe's file, from where the grid file is."""
    methods: tuple[str, ...]
    """By name: see `comparison.methods`, and `method` here."""
    method: dict[str, OwnMethod] = Field(default_factory=dict)
    """Further methods."""
    reference: str = "meerkat"
    """The method that others are compared with, pair by pair of equal seeds."""
    passes: Count
    """Budget: example passes of a client in a run. A forward pass over one example is one, with a
    backward pass three; rounds follow from it."""
    pay_calibration: bool = True
    """Is a calibration of clients (`selection.kind = "gradip"`) paid from the budget? Without that,
    arms take equally many steps."""
    seeds: tuple[Seed, ...] = (1, 2, 3, 4, 5)
    """Of the runs in the table."""
    evaluations: Annotated[int, Field(ge=1, le=1000)] = 4
    """How often a run is evaluated after its start, evenly spread; the last one counts."""
    target: Annotated[float, Field(gt=0)] | None = None
    """A score whose cost is reported: passes and bytes until an evaluation has it."""
    settings: Settings = Field(default_factory=dict)
    """Of all cells."""
    cases: dict[str, dict[str, Settings]] = Field(default_factory=dict)
    """Axes: each has values by name, which are settings. Their product are the cases."""
    search: Search = Search()

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if self.search.seed in self.seeds:
            raise ValueError(
                f"search.seed = {self.search.seed} is one of seeds; a rate that was chosen with a "
                "seed is not to be judged by it: take another"
            )
        for field, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{field} = {list(values)!r}: name each once, and at least one")
        if self.reference not in self.methods:
            raise ValueError(
                f"reference = {self.reference!r} is none of methods; add it, or name another"
            )
        return self

    def found(self, name: str) -> Method:
        """A method of this grid, with the rates that are tried for it.

        Raises:
            RecipeError: It is not known.
        """
        own = self.method.get(name)
        if own is None:
            base = look_up(METHODS, name, "methods")
            title, settings, rates = base.title, dict(base.settings), base.rates
        else:
            base = look_up(METHODS, own.base, f"method.{name}.base")
            title, settings = own.title, {**base.settings, **own.settings}
            rates = base.rates if own.rates is None else own.rates
        rates = self.search.rates.get(name, rates)
        return Method(title, settings, rates, base.bound, base.source)

    @property
    def points(self) -> list[tuple[tuple[str, ...], Settings]]:
        """Each case: the names of its values, one an axis, and its settings."""
        found = []
        for values in product(*(axis.items() for axis in self.cases.values())):
            settings: Settings = {}
            for _, some in values:
                settings |= some
            found.append((tuple(name for name, _ in values), settings))
        return found


def load_grid(path: Path, overrides: Sequence[str] = ()) -> tuple[Grid, dict[str, Any]]:
    """A grid, and the data of the recipe that it names.

    Args:
        overrides: `field=value`, of the grid.

    Raises:
        RecipeError: A file is missing or malformed, or a field is not valid.
    """
    if not path.is_file():
        raise RecipeError(f"grid {path}: no such file")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"grid {path}: not valid TOML: {error}") from None
    try:
        grid = Grid.model_validate(with_overrides(data, overrides))
    except ValidationError as error:
        raise RecipeError(f"grid {path}: {described_error(error, Grid)}") from None
    for name in {*grid.methods, *grid.search.rates}:
        grid.found(name)
    return grid, read_data(path.parent / grid.recipe)
