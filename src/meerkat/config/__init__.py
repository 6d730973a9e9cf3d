"""The schema of a run: TOML in, validated frozen objects out."""

from meerkat.config.parts import Choice
from meerkat.config.reading import load_recipe, parse_recipe
from meerkat.config.schema import Recipe
from meerkat.config.sections import (
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
    Tracking,
)

__all__ = [
    "Choice",
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
    "Tracking",
    "load_recipe",
    "parse_recipe",
]
