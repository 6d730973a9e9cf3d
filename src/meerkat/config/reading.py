"""TOML → a validated recipe, or one line that says what is wrong with it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from meerkat.config.schema import Recipe
from meerkat.errors import RecipeError

__all__ = [
    "described_error",
    "load_recipe",
    "parse_recipe",
    "read_data",
    "with_files",
    "with_overrides",
    "with_settings",
]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML (or JSON) file and apply `key=value` overrides.

    Raises:
        RecipeError: The file is missing or malformed, or a field is not valid.
    """
    path = Path(path)
    return with_files(parse_recipe(read_data(path), overrides, origin=str(path)))


def with_files(recipe: Recipe) -> Recipe:
    """A recipe of one's own with the contents of a file that it names in place of the name.

    Whoever is sent a recipe, or goes on with a run, needs no such file.

    Raises:
        RecipeError: The file of `task.chat_template` is missing or unreadable.
    """
    name = recipe.task.chat_template
    if name is None or "{" in name or not name.endswith(".jinja"):
        return recipe
    try:
        text = Path(name).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise RecipeError(f"task.chat_template = {name!r} cannot be read: {reason}") from None
    task = recipe.task.model_copy(update={"chat_template": text})
    return recipe.model_copy(update={"task": task})


def read_data(path: Path) -> dict[str, Any]:
    """The sections of a recipe's file, before they are checked.

    Raises:
        RecipeError: The file is missing or malformed.
    """
    if path.is_dir() or not path.exists():
        raise RecipeError(f"recipe {path}: no such file")
    try:
        text = path.read_text("utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {path}: not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe {path}: it holds a {type(data).__name__}, not sections of fields"
        )
    return data


def with_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sections with some fields changed by `section.field=value`.

    Raises:
        RecipeError: An override is not of this form.
    """
    merged: dict[str, Any] = json.loads(json.dumps(data, default=str))
    for override in overrides:
        _apply(merged, override)
    return merged


def with_settings(data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's sections with some fields set, by `section.field`.

    Raises:
        RecipeError: Where a section should be there is a value.

    >>> with_settings({"a": {"b": 1}}, {"a.c": 2, "d": 3})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    merged: dict[str, Any] = json.loads(json.dumps(data, default=str))
    for key, value in settings.items():
        _set(merged, key.split("."), value, key)
    return merged


def parse_recipe(
    data: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "recipe"
) -> Recipe:
    """Validate a nested mapping as a recipe.

    Raises:
        RecipeError: One line that names the first field that is wrong, its value and the way out.

    >>> data = {"model": {"name": "gpt2"}, "task": {"name": "sst2"}}
    >>> parse_recipe(data, ["federation.clients=4", "federation.rounds=2"]).federation.rounds
    2
    """
    merged = with_overrides(data, overrides)
    try:
        return Recipe.model_validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {described_error(error, Recipe)}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in place; the value is read as TOML, else taken as a string."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r}: write it as section.field=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if isinstance(value, date | time):  # TOML has dates; a recipe has none
        value = text.strip()
    _set(data, parts, value, f"--set {override!r}")


def _set(data: dict[str, Any], parts: Sequence[str], value: Any, where: str) -> None:
    for part in parts[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: {part} is a value, not a section")
    data[parts[-1]] = value


def described_error(error: ValidationError, root: type[BaseModel]) -> str:
    """The first error of pydantic's list, as field, value and way out.

    Args:
        root: What was read.
    """
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    # Branches of a union carry their type's name behind the field; no field has such a name.
    named = [part for part in location if part.isidentifier() or part.isdigit()]
    field = ".".join(part for part in named if part not in ("bool", "int", "float", "str"))
    kind, value = first["type"], first["input"]
    if kind == "missing":
        return f"{field} is missing; add it"
    if kind == "extra_forbidden":
        section = _section(root, location[:-1])
        near = ", ".join(section.model_fields) if section else ""
        return f"{field} = {value!r} is not a known key; known here: {near}"
    if kind == "value_error":
        return str(first["ctx"]["error"])
    # Each branch of a union has its own complaint, one behind the other.
    same = [e["msg"] for e in error.errors() if e["loc"][: len(location) - 1] == first["loc"][:-1]]
    wanted = same if location[-1] != field.rpartition(".")[2] else [first["msg"]]
    return f"{field} = {value!r}: " + ", or ".join(f"{m[0].lower()}{m[1:]}" for m in wanted)


def _section(root: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    section = root
    for part in location:
        if part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section
