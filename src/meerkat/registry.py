"""Choices of a recipe by name: a dictionary for each, and one line for what is not in it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from meerkat.errors import RecipeError

__all__ = ["build", "imported_function", "look_up", "names_function"]

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


def names_function(name: str) -> bool:
    """Is it the name of a function of the user's own, and not of something registered?

    >>> names_function("mine.losses:focal"), names_function("macro_f1")
    (True, False)
    """
    return ":" in name


def imported_function(path: str, field: str) -> Callable[..., Any]:
    """The function `module:function`; importing it runs the module.

    Modules are found as Python finds them: installed, or in a folder of `PYTHONPATH`.

    Raises:
        RecipeError: There is no such module or function, or the module fails.

    >>> imported_function("math:hypot", "task.objective")(3, 4)
    5.0
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # a module of somebody else's may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"{field} = {path!r}: module {module!r} cannot be imported: {reason}; install it, or "
            "put its folder on PYTHONPATH"
        ) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RecipeError(f"{field} = {path!r}: module {module!r} has no function {name!r}")
    return found


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
