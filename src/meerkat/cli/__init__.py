"""Commands; no logic. Each calls the function of the same name in `meerkat.api`."""

from __future__ import annotations

# Each registers its commands; this is their order in `meerkat --help`.
from meerkat.cli import running  # noqa: F401

# isort: split
from meerkat.cli import results  # noqa: F401

# isort: split
from meerkat.cli import recipes  # noqa: F401
from meerkat.cli.application import app, main

__all__ = ["app", "main"]
