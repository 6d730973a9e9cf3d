"""Choices of a recipe by name: a dictionary for each, and one line for what is not in it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from meerkat.errors import RecipeError

__all__ = ["build", "look_up"]

T = TypeVar("T")


def look_up(table: Mapping[str, T], name: str, field: str) -> T:
    """What a registry holds under a name.

    Raises:
        RecipeError: The name is not registered; the line lists those that are.

    >>> look_up({"mean": sum}, "median", "federation.aggregator")
    Traceback (most recent call last):
    meerkat.errors.RecipeError: federation.aggregator = 'median' is not known; known are mean
    """
    if name not in table:
        raise RecipeError(f"{field} = {name!r} is not known; known are {', '.join(sorted(table))}")
    return table[name]


def build(
    table: Mapping[str, Callable[..., T]], name: str, options: Mapping[str, Any], field: str
) -> T:
    """Call what is registered under a name with the recipe's options.

    Args:
        table: Frozen dataclasses by name; their fields are the options.

    Raises:
        RecipeError: The name or an option is not known, a value is not of its type or range, or an
            option that has no default is missing.
    """
    kind = look_up(table, name, field)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    chosen = {}
    for option, value in options.items():
        if option not in fields:
            known = f"known are {', '.join(fields)}" if fields else "it takes none"
            raise RecipeError(f"{field} = {name!r}: {option} is not one of its options; {known}")
        chosen[option] = _fitting(value, fields[option].type, f"{field}.{option}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in options
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{field} = {name!r}: its option {missing[0]} is missing; add it")
    try:
        return kind(**chosen)
    except ValueError as error:
        raise RecipeError(f"{field} = {name!r}: {error}") from None


def _fitting(value: Any, wanted: Any, field: str) -> Any:
    """A number as the type of its option: 1 is a float too, true is no number."""
    kind = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", "")
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "int" and not whole:
        raise RecipeError(f"{field} = {value!r} is no int; give a whole number")
    if kind == "float":
        # An infinite one has no place in JSON, so no journal could be read again.
        if not (whole or isinstance(value, float)) or not abs(value) <= sys.float_info.max:
            raise RecipeError(f"{field} = {value!r} is no float; give a finite number")
        return float(value)
    return value
