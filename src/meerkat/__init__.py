"""Meerkat: sparse zeroth-order federated fine-tuning of language models.

>>> import meerkat
>>> summary = meerkat.run("recipes/demo.toml", out="runs/demo")  # doctest: +SKIP

Names are imported when they are first used, so that a server, which needs `meerkat.rounds` and
`meerkat.server` alone, never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meerkat.api import (
        Replayed,
        calibrate,
        evaluate,
        export,
        gradip,
        replay,
        report,
        resume,
        run,
        split,
    )
    from meerkat.benchmarks import bench
    from meerkat.errors import MeerkatError
    from meerkat.exporting import apply_delta
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
    "gradip",
    "load_recipe",
    "parse_recipe",
    "replay",
    "report",
    "resume",
    "run",
    "split",
]

_ROOMS = {
    "MeerkatError": "errors",
    "Recipe": "recipe",
    "apply_delta": "exporting",
    "bench": "benchmarks",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'meerkat' has no attribute {name!r}")
    value = getattr(import_module(f"meerkat.{_ROOMS.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
