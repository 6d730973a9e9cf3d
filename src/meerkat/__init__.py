"""Meerkat: sparse zeroth-order federated fine-tuning of language models.

>>> import meerkat
>>> summary = meerkat.run("recipes/demo.toml", out="runs/demo")  # doctest: +SKIP

Names are imported when they are first used, so that a server process never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meerkat.api import (
        Replayed,
        calibrate,
        compare,
        evaluate,
        export,
        gradip,
        harness,
        plan,
        push,
        recalibrate,
        replay,
        report,
        resume,
        run,
        schema,
        split,
        tune,
    )
    from meerkat.benchmarks import bench
    from meerkat.config import Recipe, load_recipe, parse_recipe
    from meerkat.errors import MeerkatError
    from meerkat.runs.export import apply_delta
    from meerkat.trainer import Trainer, TrainingArguments

__all__ = [
    "MeerkatError",
    "Recipe",
    "Replayed",
    "Trainer",
    "TrainingArguments",
    "apply_delta",
    "bench",
    "calibrate",
    "compare",
    "evaluate",
    "export",
    "gradip",
    "harness",
    "load_recipe",
    "parse_recipe",
    "plan",
    "push",
    "recalibrate",
    "replay",
    "report",
    "resume",
    "run",
    "schema",
    "split",
    "tune",
]

_MODULES = {
    "MeerkatError": "errors",
    "Recipe": "config",
    "Trainer": "trainer",
    "TrainingArguments": "trainer",
    "apply_delta": "runs.export",
    "bench": "benchmarks",
    "load_recipe": "config",
    "parse_recipe": "config",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'meerkat' has no attribute {name!r}")
    value = getattr(import_module(f"meerkat.{_MODULES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
