"""Meerkat: sparse zeroth-order federated fine-tuning of language models.

>>> import meerkat
>>> summary = meerkat.run("recipes/demo.toml", out="runs/demo")  # doctest: +SKIP
"""

from __future__ import annotations

from meerkat.api import (
    Replayed,
    calibrate,
    evaluate,
    export,
    replay,
    report,
    resume,
    run,
)
from meerkat.benchmarks import bench
from meerkat.errors import MeerkatError
from meerkat.export import apply_delta
from meerkat.recipe import Recipe, load_recipe, parse_recipe

__all__ = [
    "MeerkatError",
    "Recipe",
    "Replayed",
    "apply_delta",
    "bench",
    "calibrate",
    "evaluate",
    "export",
    "load_recipe",
    "parse_recipe",
    "replay",
    "report",
    "resume",
    "run",
]
