"""The schema of a run: TOML in, validated frozen objects out."""

from meerkat.recipe.reading import load_recipe, parse_recipe
from meerkat.recipe.schema import Recipe
from meerkat.recipe.sections import (
    Evaluation,
    Federation,
    MaskSection,
    ModelSection,
    Network,
    Noise,
    Optimizer,
    Partition,
    Runtime,
    Selection,
    TaskSection,
)

__all__ = [
    "Evaluation",
    "Federation",
    "MaskSection",
    "ModelSection",
    "Network",
    "Noise",
    "Optimizer",
    "Partition",
    "Recipe",
    "Runtime",
    "Selection",
    "TaskSection",
    "load_recipe",
    "parse_recipe",
]
