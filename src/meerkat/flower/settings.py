"""Flower's run config → a recipe and where the run goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meerkat.config import Recipe, load_recipe, parse_recipe
from meerkat.errors import RecipeError
from meerkat.runs.directory import holds_run, recipe_of

__all__ = ["Settings", "read_settings"]


@dataclass(frozen=True)
class Settings:
    """What `flwr run` was asked for."""

    recipe: Recipe
    out: Path
    """The run's directory."""
    mask: Path | None
    """The mask file, if one is named."""


def read_settings(config: Mapping[str, Any], folder: Path = Path()) -> Settings:
    """The settings of a run.

    `recipe` is the path of a recipe, `out` the run's directory, `mask` a mask file, and `set` holds
    changes as `--set` takes them, parted by semicolons. Any other key is a field of the recipe. An
    empty value is as if the key were not there. Without a recipe, `out` must hold a run.

    Args:
        folder: The app's own folder; a relative recipe that is not in the current folder is there.

    Raises:
        RecipeError: Recipe or changes are not valid.
        RunError: Neither a recipe is named nor a directory with a run.
    """
    given = {key: value for key, value in config.items() if value != ""}
    path, out, mask = (given.pop(key, None) for key in ("recipe", "out", "mask"))
    changes = [part.strip() for part in str(given.pop("set", "")).split(";") if part.strip()]
    changes += [f"{key}={_toml(value)}" for key, value in given.items()]
    directory = Path(str(out)) if out is not None else None
    if directory is not None and holds_run(directory) and path is None:
        kept = recipe_of(directory)
        recipe = parse_recipe(kept.model_dump(mode="json"), changes, str(directory))
        return Settings(recipe, directory, _path(mask))
    if path is None:
        raise RecipeError("--run-config recipe is missing; give the path of a recipe")
    found = Path(str(path))
    if not found.exists() and (folder / found).exists():
        found = folder / found
    recipe = load_recipe(found, changes)
    name = f"{found.stem}-{recipe.fingerprint[:8]}"
    return Settings(recipe, directory or Path("runs") / name, _path(mask))


def _path(value: Any) -> Path | None:
    return None if value is None else Path(str(value))


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
