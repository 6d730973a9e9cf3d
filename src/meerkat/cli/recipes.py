"""Commands on what a recipe may say: schema."""

from __future__ import annotations

import json

from meerkat.cli.application import command

__all__ = ["schema"]


@command
def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete and check it."""
    from meerkat import api

    print(json.dumps(api.schema(), indent=2))
