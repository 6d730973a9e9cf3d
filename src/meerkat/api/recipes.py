"""What the functions take for a recipe: one that was read, or its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meerkat.config import Recipe, load_recipe, parse_recipe
from meerkat.config.reading import with_files

__all__ = ["Source", "recipe_from"]

Source = str | Path | Recipe


def recipe_from(source: Source, overrides: Sequence[str]) -> Recipe:
    """The recipe, with `section.field=value` overrides."""
    if isinstance(source, Recipe):
        if not overrides:
            return source
        return with_files(parse_recipe(source.model_dump(mode="json"), overrides))
    return load_recipe(source, overrides)
